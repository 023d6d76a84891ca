"""Traces of steps for simulated cards, shared by the cards for which they hold."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from memfit.cards import Gpu
from memfit.errors import NotSimulatedError
from memfit.memory.restore import preserved
from memfit.records import WorkspaceSource
from memfit.simulation.allocator.caching import AllocatorStats
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.cudnn.needs import asks_cudnn
from memfit.simulation.schedule import StepSchedule
from memfit.simulation.tracing.autocast import keeps_casts_in_inference_mode
from memfit.simulation.tracing.refusals import refuse_compiled, refuse_sparse
from memfit.simulation.tracing.semantics import META, MetaPrecision
from memfit.simulation.tracing.trace import (
    StepDrawsError,
    StepTrace,
    TraceOptions,
    Watcher,
    trace_step,
)
from memfit.simulation.tracing.workspace import Kernels
from memfit.step.draws import ENDS, Draws
from memfit.step.training_step import TrainingStep

__all__ = [
    "Replay",
    "TraceCache",
    "Traced",
    "trace",
    "trace_options",
    "workspace_source",
]

# Samples of a batch function that stand for a batch, where a step asks for values.
_ENOUGH_SAMPLES = 16


def trace(
    step: TrainingStep,
    options: TraceOptions,
    *,
    precision_policy: MetaPrecision | None = None,
    watcher: Watcher | None = None,
) -> StepTrace:
    """Trace a training step on the meta device.

    Args:
        step: What to train, its precision chosen.
        options: What decides the trace besides.
        precision_policy: How it computes in mixed precision; `None` for today's torch.
        watcher: Told of every allocation.

    Raises:
        UnsupportedError: The step needs values that a meta tensor does not have, or is compiled.
    """
    is_inference_mode = step.options.evaluate is not None and not step.options.no_grad
    precision_policy = precision_policy or MetaPrecision(
        step.options.precision, caches=not is_inference_mode or keeps_casts_in_inference_mode()
    )
    if step.options.compile:
        raise NotSimulatedError.because(
            step.name, "it is compiled, and a simulation does not see what its kernels keep"
        )
    if step.options.parallel is not None:
        raise NotSimulatedError.because(step.name, "a simulation has no other ranks")
    if not torch.backends.cudnn.enabled:
        raise NotSimulatedError.because(
            step.name, "torch.backends.cudnn.enabled is False, and its kernels are cuDNN's"
        )
    if not isinstance(step.subject, str):
        subject = step.subject
        refuse_compiled(subject.model, subject.loss, subject.optimizer, name=step.name)
        refuse_sparse(subject.model, name=step.name)

    def traced(draws: Draws, **choices: Any) -> StepTrace:
        # A user's batch function may draw random numbers, and a step may throw switches.
        with preserved():
            return trace_step(
                lambda: step.prepare(META, precision_policy=precision_policy),
                precision_policy=precision_policy,
                options=options,
                name=step.name,
                watcher=watcher,
                draws=draws,
                **choices,
            )

    def traced_as_batch(draws: Draws) -> StepTrace:
        made = traced(draws)
        if not made.depends_on_batch:
            return made
        # What a few samples answer (is any of them padded?) is not what a batch does. The whole
        # example does, and twice the example says what every further sample adds.
        example = None if isinstance(step.subject, str) else step.subject.example_batch_size
        size = example or _ENOUGH_SAMPLES
        return traced(draws, batch_sizes=(size, 2 * size)) if size > 1 else made

    try:
        return traced_as_batch(Draws())
    except StepDrawsError:
        pass
    ends = [traced_as_batch(Draws(share)) for share in ENDS]
    worst = max(ends, key=lambda made: made.schedule.heaviest)
    if worst is not ends[-1] and watcher is not None:
        worst = traced_as_batch(Draws(ENDS[ends.index(worst)]))
    varies = len({made.schedule.heaviest for made in ends}) > 1
    return dataclasses.replace(worst, peak_varies=varies)


def trace_options(gpu: Gpu, *, is_quick: bool = False) -> TraceOptions:
    """Return what a card decides of a trace, with this torch.

    Args:
        gpu: The card.
        is_quick: See `memfit.simulation.tracing.workspace.Kernels`.
    """
    capability = gpu.compute_capability
    return TraceOptions(
        compute_capability=capability,
        kernels=Kernels(
            compute_capability=capability,
            allows_tf32=torch.backends.cudnn.allow_tf32,
            is_quick=is_quick,
        ),
        cudnn_benchmark=torch.backends.cudnn.benchmark,
        gpu=gpu,
    )


def workspace_source(traced: Traced, gpu: Gpu) -> WorkspaceSource | None:
    """Say how the workspaces of a step's convolutions are known; `None` if it has none."""
    if traced.options.kernels.is_quick:
        return WorkspaceSource.BOUND
    if not traced.has_slow_needs:
        return None
    return WorkspaceSource.CUDNN if asks_cudnn(gpu) else WorkspaceSource.BOUND


@dataclasses.dataclass(frozen=True, slots=True)
class Replay:
    """How a replay ended: the allocator's figures, the peak of each iteration, why it ran out."""

    stats: AllocatorStats
    peaks: tuple[int, ...]
    message: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Traced:
    """A trace, whom it holds for, and what replays of it gave.

    Args:
        step: What was traced.
        options: What decided the trace besides.
        trace: The trace.
        replays: By card, batch size, capacity, whether it was a rough one, and the allocator's
            options.
    """

    step: TrainingStep
    options: TraceOptions
    trace: StepTrace
    replays: dict[tuple[Gpu, int, int | None, bool, AllocatorSettings], Replay] = dataclasses.field(
        default_factory=dict
    )
    has_slow_needs: bool = dataclasses.field(init=False)
    """Whether a rough replay differs from an exact one."""
    _schedules: dict[tuple[Gpu, bool], StepSchedule] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Look once through the events: every replay asks."""
        object.__setattr__(self, "has_slow_needs", self.trace.schedule.has_slow_needs)

    def schedule_on(self, gpu: Gpu, *, is_rough: bool) -> StepSchedule:
        """Return the schedule with the scratch memory of a card; see `CardSizes` for `is_rough`."""
        key = (gpu, is_rough)
        if key not in self._schedules:
            self._schedules[key] = self.trace.as_run.on(gpu, is_rough=is_rough)
        return self._schedules[key]

    def holds_for(self, step: TrainingStep, options: TraceOptions) -> bool:
        """Whether another card would have made the same trace."""
        return (step.subject is self.step.subject or step.subject == self.step.subject) and (
            step.options == self.step.options
            and options.kernels.like(self.options.kernels, has_tf32=self.trace.has_tf32)
            and all(
                options.choose_attention(call) is backend for call, backend in self.trace.attention
            )
        )


class TraceCache:
    """Traces of steps, shared by the simulated cards of one question.

    Args:
        is_quick: The workspaces of convolutions are bounds, and cuDNN is not asked for them.
            Convolutional models on many cards are then some times quicker.
    """

    def __init__(self, *, is_quick: bool = False) -> None:
        self._is_quick = is_quick
        self._traced: list[Traced] = []

    def add(self, step: TrainingStep, options: TraceOptions, trace: StepTrace) -> None:
        """Take over a trace that was made elsewhere."""
        self._traced.append(Traced(step, options, trace))

    def find(self, step: TrainingStep, gpu: Gpu) -> Traced:
        """Return a trace that holds for a card, made now if there is none yet."""
        options = trace_options(gpu, is_quick=self._is_quick)
        for traced in self._traced:
            if traced.holds_for(step, options):
                return traced
        traced = Traced(step, options, trace(step, options))
        self._traced.append(traced)
        return traced

"""Trials on a GPU that is not there: a traced step, replayed on a model of its allocator.

A step is traced once for each way in which cards differ (attention kernels, tensor cores), and
replayed for each batch size and capacity. Nothing here is measured, and every trial says so.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from memfit.backends.protocol import Prediction
from memfit.cards import Gpu
from memfit.memory.collector import collector_paused
from memfit.memory.restore import preserved
from memfit.records import Capacity, Evaluation, Outcome, Precision, Source, Trial
from memfit.simulation.allocator.caching import (
    AllocatorOutOfMemoryError,
    AllocatorStats,
    CachingAllocator,
)
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.schedule import StepSchedule
from memfit.simulation.tracing.attention import AttentionBackend
from memfit.simulation.tracing.refusals import refuse_compiled, refuse_sparse
from memfit.simulation.tracing.scratch import WORKSPACES_BY_CALL, torch_release
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
from memfit.units import format_bytes

__all__ = ["SimulatedBackend", "TraceCache", "kept_workspaces", "trace", "trace_options"]

# Ids of their workspaces: forward runs in the caller's thread and backward in one of its own.
_BLAS_HANDLES = (-1_000_001, -1_000_002)
# The search for a step's edge begins this part below the batch size that its tensors allow.
_FRAGMENTS_SHARE = 64
# Samples of a batch function that stand for a batch, where a step asks for values.
_ENOUGH_SAMPLES = 16
_PREFERS_CUDNN = "2.11"

_Returned = TypeVar("_Returned")


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
        UnsupportedError: The step needs values that a meta tensor does not have.
    """
    precision_policy = precision_policy or MetaPrecision(
        step.options.precision, caches=step.options.evaluate is None or step.options.no_grad
    )
    if not isinstance(step.subject, str):
        subject = step.subject
        refuse_compiled(subject.model, subject.loss, subject.optimizer, name=step.name)
        refuse_sparse(subject.model, name=step.name)

    def traced(draws: Draws, **choices: Any) -> StepTrace:
        # A user's batch function may draw random numbers, and a step may throw switches.
        with preserved():
            return trace_step(
                step.prepare(META, precision_policy=precision_policy),
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


def trace_options(gpu: Gpu) -> TraceOptions:
    """Return what a card decides of a trace, with this torch."""
    capability = gpu.compute_capability
    return TraceOptions(
        compute_capability=capability,
        kernels=Kernels(compute_capability=capability),
        prefers_cudnn_attention=torch.__version__ >= _PREFERS_CUDNN,
        cudnn_benchmark=False,
        gpu=gpu,
    )


def kept_workspaces(gpu: Gpu) -> dict[int, int]:
    """Return the workspaces that BLAS handles keep, as bytes by the id of an allocation.

    Since torch 2.15 a product takes its workspace for the call, and none is kept, except on ROCm
    (`memfit.simulation.tracing.scratch`).
    """
    release = torch_release()
    if release >= WORKSPACES_BY_CALL and gpu.vendor != "AMD":
        return {}
    return dict.fromkeys(_BLAS_HANDLES, gpu.blas_workspace_bytes(release))


@dataclasses.dataclass(frozen=True, slots=True)
class _Replay:
    """How a replay ended: the allocator's figures, the peak of each iteration, why it ran out."""

    stats: AllocatorStats
    peaks: tuple[int, ...]
    message: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class _Traced:
    """A trace, whom it holds for, and what replays of it gave.

    Args:
        step: What was traced.
        options: What decided the trace besides.
        trace: The trace.
        replays: By card, batch size and capacity.
    """

    step: TrainingStep
    options: TraceOptions
    trace: StepTrace
    replays: dict[tuple[Gpu, int, int | None], _Replay] = dataclasses.field(default_factory=dict)
    _schedules: dict[Gpu, StepSchedule] = dataclasses.field(default_factory=dict)

    def schedule_on(self, gpu: Gpu) -> StepSchedule:
        """Return the schedule with the scratch memory of a card."""
        if gpu not in self._schedules:
            self._schedules[gpu] = self.trace.schedule.on(gpu)
        return self._schedules[gpu]

    def holds_for(self, step: TrainingStep, options: TraceOptions) -> bool:
        """Whether another card would have made the same trace."""
        return (step.subject is self.step.subject or step.subject == self.step.subject) and (
            step.options == self.step.options
            and options.kernels.like(self.options.kernels)
            and all(
                _keeps_alike(
                    options.choose_attention(call),
                    backend,
                )
                for call, backend in self.trace.attention
            )
        )


def _keeps_alike(one: AttentionBackend, other: AttentionBackend) -> bool:
    """Whether two kernels save the same tensors, as flash and cuDNN do."""
    alike = (AttentionBackend.FLASH, AttentionBackend.CUDNN)
    return one is other or (one in alike and other in alike)


class TraceCache:
    """Traces of steps, shared by the simulated cards of one question."""

    def __init__(self) -> None:
        self._traced: list[_Traced] = []

    def add(self, step: TrainingStep, options: TraceOptions, trace: StepTrace) -> None:
        """Take over a trace that was made elsewhere."""
        self._traced.append(_Traced(step, options, trace))

    def find(self, step: TrainingStep, gpu: Gpu) -> _Traced:
        """Return a trace that holds for a card, made now if there is none yet."""
        options = trace_options(gpu)
        for traced in self._traced:
            if traced.holds_for(step, options):
                return traced
        traced = _Traced(step, options, trace(step, options))
        self._traced.append(traced)
        return traced


class SimulatedBackend:
    """A GPU of the catalogue.

    Args:
        gpu: The card.
        memory_bytes: What the training step may use; `None` for what a process has on the card.
        settings: The allocator's options; `None` for those of this process's environment.
        traces: Traces to share with other cards.
    """

    def __init__(
        self,
        gpu: Gpu,
        *,
        memory_bytes: int | None = None,
        settings: AllocatorSettings | None = None,
        traces: TraceCache | None = None,
    ) -> None:
        self._gpu = gpu
        self._memory_bytes = memory_bytes
        self._settings = settings or AllocatorSettings.from_environment(os.environ)
        self._traces = traces or TraceCache()

    def __enter__(self) -> SimulatedBackend:
        """Return the backend."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Do nothing: a simulation holds no memory of a device."""

    @property
    def gpu(self) -> Gpu:
        """The card."""
        return self._gpu

    @property
    def device_name(self) -> str:
        """The card's name."""
        return self._gpu.name

    @property
    def environment(self) -> tuple[str, ...]:
        """What a training script has to be given: nothing."""
        return ()

    @property
    def source(self) -> Source:
        """What its figures are."""
        return Source.SIMULATED

    @property
    def auto_precision(self) -> Precision:
        """bf16 autocast where the card has it, else fp16."""
        return Precision.AMP_BF16 if self._gpu.has_bf16 else Precision.AMP_FP16

    @property
    def has_retries(self) -> bool:
        """Whether a step can fit only after the allocator gave back its cache and asked again."""
        return True

    def capacity(self) -> Capacity:
        """Return what the caching allocator could take of the card."""
        gpu = self._gpu
        if self._memory_bytes is not None:
            return Capacity(
                usable_bytes=self._memory_bytes,
                total_bytes=max(gpu.total_bytes, self._memory_bytes),
                origin="given",
            )
        return Capacity(
            usable_bytes=gpu.usable_bytes,
            total_bytes=gpu.total_bytes,
            origin=(
                f"simulated: {format_bytes(gpu.total_bytes)} as torch reports it, less "
                f"{format_bytes(gpu.context_bytes)} for the process itself"
            ),
        )

    def trial(self, step: TrainingStep, batch_size: int) -> Trial:
        """Replay one batch size.

        Args:
            step: What to train; its precision is chosen.
            batch_size: Samples in each micro-batch, at least 1.

        Returns:
            How it would end.

        Raises:
            UnsupportedError: The step needs values that a meta tensor does not have.
        """
        replay = self._replay(step, batch_size, self.capacity().usable_bytes)
        stats, peaks, fits = replay.stats, replay.peaks, replay.message is None
        found = self._traces.find(step, self._gpu)
        traced = found.trace
        grows = found.schedule_on(self._gpu).grows(batch_size, stats.peak_reserved_bytes)
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if fits else Outcome.OUT_OF_MEMORY,
            source=Source.SIMULATED,
            peak_requested_bytes=stats.peak_requested_bytes,
            peak_allocated_bytes=stats.peak_allocated_bytes,
            peak_reserved_bytes=stats.peak_reserved_bytes,
            num_alloc_retries=stats.num_alloc_retries,
            num_iterations=len(peaks) if fits else 0,
            num_micro_batches=step.num_micro_batches,
            peak_grows=fits and (peaks[-1] > peaks[-2] or grows),
            peak_varies=traced.peak_varies,
            message=replay.message,
        )

    def needed_bytes(self, step: TrainingStep, batch_size: int) -> int:
        """Return what a batch size would take on a card with unlimited memory."""
        return self._replay(step, batch_size, None).stats.peak_reserved_bytes

    def call(
        self, function: Callable[..., _Returned], step: TrainingStep, *arguments: Any
    ) -> _Returned:
        """Call a function in this process; see `Backend.call`."""
        return function(self, step, *arguments)

    def prediction(self, step: TrainingStep) -> Prediction:
        """Say where the edge of a step is: the replays know.

        Args:
            step: What to train; its precision is chosen.
        """
        return Prediction(batch_size=self.expected_edge(step))

    def simulated_counterpart(self) -> SimulatedBackend:
        """Return this card itself."""
        return self

    def expected_edge(self, step: TrainingStep) -> int | None:
        """Return an edge: a batch size that fits below one that does not.

        What tensors hold bounds it from above. Below that bound, replays under the capacity decide:
        without a limit, a step reserves more than it needs.

        Args:
            step: What to train; its precision is chosen.

        Returns:
            Samples; `None` where the step does not grow, or nothing fits.
        """
        limit = self.capacity().usable_bytes
        room = limit - sum(kept_workspaces(self._gpu).values())
        trace = self._traces.find(step, self._gpu).trace
        most = trace.schedule.largest_within(room)
        if most is None:
            return None
        fails, distance = most + 1, 1 + most // _FRAGMENTS_SHARE
        most = max(most - distance, 0)
        while most and not self._fits(step, most):
            fails, most, distance = most, max(most - distance, 0), 2 * distance
        while most + 1 < fails:
            middle = (most + fails) // 2
            if self._fits(step, middle):
                most = middle
            else:
                fails = middle
        return most or None

    def _fits(self, step: TrainingStep, batch_size: int) -> bool:
        return self._replay(step, batch_size, self.capacity().usable_bytes).message is None

    def _replay(self, step: TrainingStep, batch_size: int, capacity_bytes: int | None) -> _Replay:
        traced = self._traces.find(step, self._gpu)
        key = (self._gpu, batch_size, capacity_bytes)
        if key not in traced.replays:
            allocator = CachingAllocator(capacity_bytes=capacity_bytes, settings=self._settings)
            peaks: list[int] = []
            message = None
            try:
                with collector_paused():
                    kept = tuple(kept_workspaces(self._gpu).items())
                    # Without backward, its thread has no handle.
                    is_alone = step.options.evaluate is Evaluation.ALONE
                    for handle, num_bytes in kept[: 1 if is_alone else None]:
                        allocator.allocate(handle, num_bytes)
                    peaks.extend(traced.schedule_on(self._gpu).play(allocator, batch_size))
            except AllocatorOutOfMemoryError as error:
                message = str(error)
            traced.replays[key] = _Replay(allocator.stats, tuple(peaks), message)
        return traced.replays[key]

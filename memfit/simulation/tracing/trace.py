"""Runs one training step on meta tensors, and records which storages it allocates and frees.

A model without weights runs forward, backward and the optimizer. A dispatch mode sees each
operation's outputs. Some things differ between the meta device and a GPU (autocast, attention,
foreach optimizers, workspaces). They are corrected on the way. A model may ask for values. If they
come from the batch, it gets them (`memfit.simulation.tracing.known_values`). If they come from its
weights, the model is refused.

Source: the order of events is the autograd engine's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import torch
from torch import nn

from memfit._torch_private import dispatched, pytree
from memfit.cards import Gpu, gpu_with
from memfit.errors import MemfitError
from memfit.memory.collector import old_objects_set_aside
from memfit.records import Action, Event
from memfit.simulation.schedule import Schedule, StepSchedule
from memfit.simulation.steady import Choose, Iteration, Recorded, settle
from memfit.simulation.tracing.attention import (
    AttentionBackend,
    AttentionBuild,
    AttentionCall,
    choose,
)
from memfit.simulation.tracing.autocast import functional_layer_open
from memfit.simulation.tracing.autocast_regions import regions_followed
from memfit.simulation.tracing.model_facts import ModelFacts
from memfit.simulation.tracing.recorder import PLANS_TRIED, Recorder, Watcher
from memfit.simulation.tracing.recurrent import join_weights
from memfit.simulation.tracing.refusals import explained, repeats
from memfit.simulation.tracing.semantics import CudaSemantics, MetaPrecision, foreach_on_meta
from memfit.simulation.tracing.workspace import Kernels

__all__ = ["StepDrawsError", "StepTrace", "TraceOptions", "Watcher", "trace_step"]

_BATCH_SIZES: Final = (2, 3)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """What decides a trace besides the training step.

    Args:
        compute_capability: The compute capability of the card, such as (8, 6).
        kernels: Knows the memory that its kernels take besides tensors.
        attention_build: What decides attention's kernel besides the card.
        uses_foreach: Whether optimizers use their foreach implementation by default, as on CUDA.
            A step on a CPU, with which a trace can be compared, does not.
        cudnn_benchmark: Whether convolutions try their plans (`torch.backends.cudnn.benchmark`).
        gpu: The card, which decides the size of some scratch memory; `None` for a card of which
            only the compute capability is known. `StepSchedule.on` changes it.
    """

    compute_capability: tuple[int, int]
    kernels: Kernels
    gpu: Gpu | None = None
    attention_build: AttentionBuild = dataclasses.field(default_factory=AttentionBuild.current)
    uses_foreach: bool = True
    cudnn_benchmark: bool = True

    def choose_attention(self, call: AttentionCall) -> AttentionBackend:
        """Return the kernel that attention uses."""
        return choose(call, self.compute_capability, self.attention_build)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """A traced training step.

    Args:
        schedule: Its events.
        as_run: Its events, with what libraries and a GradScaler keep on a card from their first
            call on.
        attention: Every kind of attention that it ran, and the kernel taken.
        num_operations: Operations that one iteration dispatched.
        facts: What is known of the model without a card.
        has_tf32: A convolution would take another workspace without TF32.
        depends_on_batch: The step asked for values of its batch, so that another batch might have
            made another trace.
        peak_varies: Whether random draws choose what the step runs. This is then the trace with the
            most memory.
    """

    schedule: StepSchedule
    as_run: StepSchedule
    attention: tuple[tuple[AttentionCall, AttentionBackend], ...]
    num_operations: int
    facts: ModelFacts
    has_tf32: bool = True
    depends_on_batch: bool = False
    peak_varies: bool = False


class StepDrawsError(MemfitError):
    """The step draws single numbers on the host, so its traces may differ."""


class Draws(Protocol):
    """Counts and forces the single numbers that a step draws (`memfit.step.draws.Draws`)."""

    @property
    def share(self) -> float | None:
        """The position in its range to which every draw is forced; `None` if draws stay random."""

    @property
    def num_seen(self) -> int:
        """The number of draws so far."""


class PreparedStep(Protocol):
    """What a trace needs of a training step on the meta device (`PreparedStep`)."""

    model: nn.Module
    make_batch: Callable[[int], tuple[Any, tuple[Any, ...]]]

    @property
    def num_forwards(self) -> int:
        """Forward passes in one iteration."""

    @property
    def num_prefetched(self) -> int:
        """Batches that wait on the device besides the one that is used."""

    @property
    def is_channels_last(self) -> bool:
        """Whether the model was moved to the device first, and to the other layout then."""

    def held_tensors(self) -> Iterator[torch.Tensor]:
        """Yield every tensor that exists before an iteration begins."""

    def drawing(self, draws: Any) -> contextlib.AbstractContextManager[None]:
        """Count and force the draws in the iterations of the block."""

    def begin(self) -> None:
        """Start as training does."""

    def accumulate(self, batch_size: int) -> None:
        """Run every micro-batch forward and backward."""

    def update(self) -> None:
        """Take the optimizer's step and drop the gradients."""


def trace_step(
    prepare: Callable[[], PreparedStep],
    *,
    precision_policy: MetaPrecision,
    options: TraceOptions,
    name: str,
    draws: Draws,
    watcher: Watcher | None = None,
    batch_sizes: tuple[int, int] = _BATCH_SIZES,
) -> StepTrace:
    """Trace a training step on the meta device.

    Args:
        prepare: Makes the step, with `precision_policy`. A step that keeps tensors from one
            iteration to the next is made several times.
        precision_policy: How the step computes in mixed precision.
        options: The other options of the trace.
        name: The name of the model in errors.
        watcher: Is told about every allocation. It does not change the events.
        batch_sizes: The two batch sizes that are traced, the smaller first.
        draws: Forces the single numbers that the step draws, if it has a share.

    Returns:
        The events of the setup, of the first iteration and of the later iterations.

    Raises:
        StepDrawsError: The step draws single numbers, and they were not forced.
        NotSimulatedError: The step needs values that a meta tensor does not have.
    """
    latest: _Recording | None = None

    def record(choose: Choose) -> Recorded:
        nonlocal latest
        latest = _Recording(prepare(), precision_policy, options, draws, watcher)
        return latest.run(choose, name)

    with repeats(name):
        schedule = settle(record, batch_sizes=batch_sizes, only_first=PLANS_TRIED)
    assert latest is not None
    first = schedule.first
    schedule = dataclasses.replace(
        schedule,
        setup=_with_prefetched(schedule.setup, latest.prepared),
        first=first if options.cudnn_benchmark else first.without(PLANS_TRIED),
    )
    card = options.gpu or gpu_with(options.compute_capability)
    return StepTrace(
        schedule=schedule.on(card),
        as_run=schedule.as_run((*latest.recorder.kept, *latest.kept)).on(card),
        attention=tuple(latest.semantics.attention.items()),
        num_operations=latest.recorder.num_operations,
        facts=ModelFacts.of(latest.prepared.model, forward_flops=latest.forward_flops),
        has_tf32=latest.recorder.has_tf32,
        depends_on_batch=latest.depends_on_batch,
    )


class _Recording:
    """One run of a step from its beginning."""

    def __init__(
        self,
        prepared: PreparedStep,
        precision_policy: MetaPrecision,
        options: TraceOptions,
        draws: Draws,
        watcher: Watcher | None,
    ) -> None:
        self.prepared = prepared
        self._precision_policy = precision_policy
        self._options = options
        self._draws = draws
        self._watcher = watcher
        self.recorder = Recorder(options.kernels, watcher)
        self.semantics = CudaSemantics(precision_policy.autocast, options.choose_attention)
        self.depends_on_batch = False
        # Operations of one sample's forward pass, in the first iteration.
        self.forward_flops = 0
        # What the first iteration keeps for good, each with the allocation before it.
        self.kept: list[tuple[int, Event]] = []

    def run(self, choose: Choose, name: str) -> Recorded:
        """Iterate the step for as long as a batch size is chosen, and record what it allocates."""
        prepared, recorder, watcher = self.prepared, self.recorder, self._watcher
        self._precision_policy.begin()
        with contextlib.ExitStack() as stack:
            stack.enter_context(foreach_on_meta(enabled=self._options.uses_foreach))
            stack.enter_context(functional_layer_open())
            stack.enter_context(regions_followed(self._precision_policy.autocast))
            # The collector must not free tensors at times that depend on earlier work of the
            # process.
            stack.enter_context(old_objects_set_aside())
            stack.enter_context(explained(prepared.model, name))
            if watcher is not None:
                stack.enter_context(watcher.watch(prepared, recorder.mark))
            stack.callback(recorder.close)
            join_weights(prepared.model)
            stack.enter_context(self.semantics)
            stack.enter_context(dispatched(recorder.handle))
            # The model is there before the step begins to hold more: averages, an optimizer's
            # state.
            recorder.see_moved(prepared.held_tensors(), moves_twice=prepared.is_channels_last)
            prepared.begin()
            for tensor in prepared.held_tensors():
                recorder.see(tensor)
            setup = recorder.cut()
            iterations: list[Iteration] = []
            while (batch_size := choose(iterations)) is not None:
                iterations.append(self._iteration(batch_size, setup, is_first=not iterations))
        return Recorded(setup=tuple(setup), iterations=tuple(iterations))

    def _iteration(self, batch_size: int, setup: list[Event], *, is_first: bool) -> Iteration:
        recorder, draws = self.recorder, self._draws
        recorder.forget_plans()
        before = recorder.num_answers
        recorder.num_operations = recorder.forward_flops = 0
        is_watched = draws.share is not None or is_first
        with self.prepared.drawing(draws) if is_watched else contextlib.nullcontext():
            self.prepared.accumulate(batch_size)
        if draws.share is None and draws.num_seen:
            raise StepDrawsError("The step draws single numbers.")
        # An optimizer asks how many steps it took, and whether its gradients are finite. Its
        # answers are the same for every batch.
        self.depends_on_batch |= recorder.num_answers > before
        if is_first:
            num_samples = batch_size * self.prepared.num_forwards
            self.forward_flops = recorder.forward_flops // num_samples
        run = recorder.cut()
        if is_first and (kept := recorder.numbers_of(self._precision_policy.kept)):
            run = self._without_kept(run, kept)
        setup.extend(recorder.take_residents())
        self.prepared.update()
        return Iteration(batch_size=batch_size, run=tuple(run), update=tuple(recorder.cut()))

    def _without_kept(self, events: list[Event], numbers: frozenset[int]) -> list[Event]:
        """Leave out what the first iteration makes and no later one makes or frees."""
        left: list[Event] = []
        last_made = 0
        for event in events:
            if event.id in numbers:
                self.kept.append((last_made, event))
                continue
            left.append(event)
            if event.action.is_request:
                last_made = event.id
        return left


def _with_prefetched(setup: Schedule, prepared: PreparedStep) -> Schedule:
    if not prepared.num_prefetched:
        return setup
    inputs, targets = prepared.make_batch(1)
    leaves = pytree.tree_leaves((inputs, targets))
    sizes = [leaf.untyped_storage().nbytes() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    sizes *= prepared.num_prefetched
    events = tuple(
        Event(
            action=Action.ALLOC,
            id=-1 - index,
            num_bytes=size * setup.batch_size,
            origin="prefetched batch",
        )
        for index, size in enumerate(sizes)
    )
    return dataclasses.replace(
        setup, events=setup.events + events, growth_bytes=setup.growth_bytes + tuple(sizes)
    )

"""Trials on a GPU that is not there: a traced step, replayed on a model of its allocator.

A step is traced once for each way in which cards differ (`memfit.backends.traces`), and replayed
for each batch size and capacity. Nothing here is measured, and every trial says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

from memfit.backends.card_capacity import card_capacity
from memfit.backends.protocol import Prediction
from memfit.backends.traces import Replay, TraceCache, workspace_source
from memfit.cards import Gpu
from memfit.memory.collector import collector_paused
from memfit.records import Capacity, Outcome, Precision, Source, Trial
from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError
from memfit.simulation.allocator.compiled import new_allocator
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.cudnn.answers import keep_answers
from memfit.simulation.tracing.model_facts import ModelFacts
from memfit.simulation.tracing.releases import torch_release
from memfit.step.training_step import TrainingStep

__all__ = ["SimulatedBackend"]

# The search for a step's edge begins this part below the batch size that its tensors allow.
_FRAGMENTS_SHARE = 64

_Returned = TypeVar("_Returned")


class SimulatedBackend:
    """A GPU of the catalogue.

    Args:
        gpu: The card.
        memory_bytes: What the training step may use; `None` for what a process has on the card.
        settings: The allocator's options; `None` for those of this process's environment.
        traces: Traces to share with other cards.
        is_rough: Workspaces of convolutions are scaled from few batch sizes. This is quick, and
            good enough to begin a search.
    """

    def __init__(
        self,
        gpu: Gpu,
        *,
        memory_bytes: int | None = None,
        settings: AllocatorSettings | None = None,
        traces: TraceCache | None = None,
        is_rough: bool = False,
    ) -> None:
        self._gpu = gpu
        self._is_rough = is_rough
        self._memory_bytes = memory_bytes
        self._settings = settings or AllocatorSettings.from_environment(
            os.environ, torch_release=torch_release()
        )
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

    @property
    def takes_ranks(self) -> bool:
        """Whether a trial can be one rank of many."""
        return False

    def capacity(self) -> Capacity:
        """Return what the caching allocator could take of the card."""
        gpu = self._gpu
        if self._memory_bytes is not None:
            return Capacity(
                usable_bytes=self._memory_bytes,
                total_bytes=max(gpu.total_bytes, self._memory_bytes),
                origin="given",
            )
        return card_capacity(gpu, self.source)

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
        grows = found.schedule_on(self._gpu, is_rough=self._is_rough).grows(
            batch_size, stats.peak_reserved_bytes
        )
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
            is_approximate=self._gpu.vendor != "NVIDIA",
            workspaces=workspace_source(found, self._gpu),
            message=replay.message,
        )

    def needed_bytes(self, step: TrainingStep, batch_size: int) -> int:
        """Return what a batch size would take on a card with unlimited memory."""
        return self._replay(step, batch_size, None).stats.peak_reserved_bytes

    def facts(self, step: TrainingStep) -> ModelFacts:
        """Return what a step's trace has counted of its model.

        Args:
            step: What to train; its precision is chosen.
        """
        return self._traces.find(step, self._gpu).trace.facts

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
        return Prediction(
            batch_size=self.expected_edge(step),
            step=step,
            scout=self.scout(),
        )

    def simulated_counterpart(self) -> SimulatedBackend:
        """Return this card itself."""
        return self

    def scout(self) -> SimulatedBackend:
        """Return a rougher and quicker simulation of the same card."""
        return SimulatedBackend(
            self._gpu,
            memory_bytes=self._memory_bytes,
            settings=self._settings,
            traces=self._traces,
            is_rough=True,
        )

    def expected_edge(self, step: TrainingStep) -> int | None:
        """Return an edge: a batch size that fits below one that does not.

        The rough simulation comes close, and exact replays find the edge from there.

        Args:
            step: What to train; its precision is chosen.

        Returns:
            Samples; `None` where the step does not grow, or nothing fits.
        """
        close = self.scout().rough_edge(step)
        if close is None or not self._traces.find(step, self._gpu).has_slow_needs:
            return close
        fits, fails, distance = 0, None, 1
        size = close
        while fails is None or fits + 1 < fails:
            if self._fits(step, size):
                fits = size
            else:
                fails = size
            if fails is None:
                size = fits + distance
            elif not fits:
                size = fails - distance
                if size <= 0:
                    return None
            else:
                size = (fits + fails) // 2
            distance *= 2
        return fits

    def rough_edge(self, step: TrainingStep) -> int | None:
        """Return an edge: a batch size that fits below one that does not.

        What tensors hold bounds it from above. Below that bound, replays under the capacity decide:
        without a limit, a step reserves more than it needs.

        Args:
            step: What to train; its precision is chosen.

        Returns:
            Samples; `None` where the step does not grow, or nothing fits.
        """
        trace = self._traces.find(step, self._gpu).trace
        most = trace.schedule.largest_within(self.capacity().usable_bytes)
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

    def _replay(self, step: TrainingStep, batch_size: int, capacity_bytes: int | None) -> Replay:
        traced = self._traces.find(step, self._gpu)
        # Without slow needs, a rough replay is the exact one, and is not run twice.
        is_rough = self._is_rough and traced.has_slow_needs
        key = (self._gpu, batch_size, capacity_bytes, is_rough, self._settings)
        if key not in traced.replays:
            allocator = new_allocator(capacity_bytes=capacity_bytes, settings=self._settings)
            peaks: list[int] = []
            message = None
            try:
                with collector_paused():
                    schedule = traced.schedule_on(self._gpu, is_rough=is_rough)
                    peaks.extend(schedule.play(allocator, batch_size))
            except AllocatorOutOfMemoryError as error:
                message = str(error)
            traced.replays[key] = Replay(allocator.stats, tuple(peaks), message)
            keep_answers()
        return traced.replays[key]

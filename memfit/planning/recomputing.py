"""Chooses the blocks that a plan recomputes: the fewest operations again for which it fits.

The choice comes from one trace (`memfit.planning.blocks`). It is then tried on the backend, which
says what the allocator takes beside the tensors, and the choice is made again with that, until a
cheaper one does not fit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from memfit import search
from memfit.backends import Backend, SimulatedGpu
from memfit.errors import DoesNotFitError, UsageError
from memfit.planning.blocks import recomputable
from memfit.planning.searching import SearchOptions, run_search, run_trial
from memfit.records import Recomputation, Trial
from memfit.simulation.recomputation import Recomputable
from memfit.simulation.tracing.scratch import kept_workspace_bytes
from memfit.step.training_step import TrainingStep

__all__ = ["Recomputed", "recomputed"]

_MOST_TRIES = 8
# What the next choice has to free more if a trial does not tell how much it lacked.
_LACKED_SHARE = 0.03
_LEAST_SHARE = 0.005


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed:
    """The step of a plan with its blocks chosen.

    Args:
        step: The step. The names of its recomputed blocks are in its options.
        largest: The micro-batch that it fits with; `None` for the whole share of a rank.
        found: What is recomputed; `None` if nothing has to be.
    """

    step: TrainingStep
    largest: int | None
    found: Recomputation | None


def recomputed(
    backend: Backend,
    step: TrainingStep,
    *,
    share: int,
    part_of: Callable[[int], int],
    options: SearchOptions,
    progress: Callable[[Trial], None] | None,
) -> Recomputed:
    """Choose the blocks to recompute for a plan.

    If a rank's whole share can fit in one step, it is to fit. Otherwise the micro-batch is the
    largest that fits with every block recomputed.

    Args:
        backend: The device or card.
        step: The step to train, with its precision chosen.
        share: The samples of the first rank.
        part_of: From a number of accumulation steps to the samples of a micro-batch.
        options: The search; its `max_batch_size` is the largest micro-batch that is considered.
        progress: Called with each trial.

    Raises:
        UsageError: The device has no simulation, or the model has no blocks.
        DoesNotFitError: Not even one sample fits with every block recomputed.
    """
    card = backend.simulated_counterpart()
    if card is None:
        raise UsageError(
            "checkpoint 'auto' (--checkpoint auto) reads a model's blocks from the simulation of a "
            f"GPU, and {backend.device_name} has none: name the blocks, or a --gpu."
        )
    is_whole = share <= (options.max_batch_size or share)
    chooser = _Chooser(backend, card, step, options, progress)
    if is_whole:
        found = chooser.fitted(share, accumulate=False)
        if found is not None:
            return found
    # The fewest steps first, then the fewest operations again.
    half = part_of(2)
    found = chooser.fitted(part_of(-(-share // half)), accumulate=True)
    if found is not None:
        return found
    most = chooser.most_with_all(half)
    found = chooser.fitted(part_of(-(-share // most)), accumulate=True)
    if found is None:
        raise DoesNotFitError(
            f"{step.name} fits in micro-batches of {most} with every block recomputed, but not "
            "with the headroom. Ask for less headroom."
        )
    return found


class _Chooser:
    """Chooses blocks on one backend."""

    def __init__(
        self,
        backend: Backend,
        card: SimulatedGpu,
        step: TrainingStep,
        options: SearchOptions,
        progress: Callable[[Trial], None] | None,
    ) -> None:
        self._backend = backend
        self._card = card
        self._step = step
        self._options = options
        self._progress = progress
        self._is_first = True
        self._all: tuple[str, ...] = ()
        self._limit_bytes = search.limit_of(backend.capacity().safe_bytes, options.headroom)

    def fitted(self, batch_size: int, *, accumulate: bool) -> Recomputed | None:
        """Return the step with the fewest blocks recomputed for which a batch size fits, if any."""
        largest = batch_size if accumulate else None
        if self._fits(self._run((), batch_size, accumulate=accumulate)):
            return Recomputed(step=self._step, largest=largest, found=None)
        data = self._data(batch_size, accumulate=accumulate)
        chosen = self._cheapest(data, batch_size, accumulate=accumulate)
        if chosen is None:
            return None
        return Recomputed(
            step=self._with(chosen),
            largest=largest,
            found=Recomputation(
                blocks=chosen,
                num_blocks=len(self._all),
                forward_share=data.share_of(chosen),
                forward_share_of_all=data.share_of(self._all),
            ),
        )

    def most_with_all(self, ceiling: int) -> int:
        """Return the largest micro-batch that is recommended with every block recomputed."""
        options = dataclasses.replace(self._options, max_batch_size=ceiling)
        step = _accumulating(self._with(self._all), accumulate=True)
        found = run_search(self._backend, step, options, progress=self._progress)
        if found.recommended_batch_size is None:
            raise DoesNotFitError(
                f"{self._step.name} fits with every block recomputed, but no micro-batch leaves "
                f"{options.headroom:.0%} of the memory free. Ask for less headroom."
            )
        return found.recommended_batch_size

    def _cheapest(
        self, data: Recomputable, batch_size: int, *, accumulate: bool
    ) -> tuple[str, ...] | None:
        """Return the cheapest choice that fits, by halving the bytes that tensors may hold.

        With fewer bytes the choice is more expensive. What the allocator takes beside the tensors
        is not known before a trial, and differs from choice to choice.
        """
        limit = self._limit_bytes
        least = data.peak_of(self._all)
        room = limit - kept_workspace_bytes(self._card.gpu)
        if least > limit * (1 + _LACKED_SHARE):
            return None
        # The step did not fit as it is.
        tried: dict[tuple[str, ...], bool] = {(): False}
        fits_at, fails_at = None, room + 1
        best: tuple[str, ...] | None = None
        while len(tried) <= _MOST_TRIES and fails_at - (fits_at or 0) > limit * _LEAST_SHARE:
            names = data.cheapest(room)
            names = self._all if names is None else names
            beside = int(limit * _LACKED_SHARE)
            if names not in tried:
                trial = self._run(names, batch_size, accumulate=accumulate)
                tried[names] = self._fits(trial)
                beside = max(beside, (trial.peak_reserved_bytes or 0) - data.peak_of(names))
            if tried[names]:
                fits_at = room
                if best is None or data.share_of(names) < data.share_of(best):
                    best = names
            else:
                fails_at = room
            if fits_at is not None:
                room = (fits_at + fails_at) // 2
            elif names == self._all or room <= least:
                break
            else:
                room = max(least, min(limit - beside, room - int(limit * _LEAST_SHARE)))
        if best is None and self._all not in tried:
            trial = self._run(self._all, batch_size, accumulate=accumulate)
            best = self._all if self._fits(trial) else None
        return best

    def _data(self, batch_size: int, *, accumulate: bool) -> Recomputable:
        # What is compiled cannot be traced. Its blocks hold less, and the trials say how much.
        options = dataclasses.replace(self._step.options, compile=False)
        plain = dataclasses.replace(self._step, options=options)
        step = _accumulating(plain, accumulate=accumulate)
        data = recomputable(step, self._card.gpu, batch_size)
        # A block that holds nothing is not worth recomputing, also where every block is meant.
        self._all = tuple(block.name for block in data.blocks if block.parked_bytes > 0)
        if not self._all:
            raise UsageError(
                f"{step.name} has no blocks that could be recomputed one by one: leave checkpoint "
                "(--checkpoint auto) out."
            )
        return data

    def _with(self, names: Sequence[str]) -> TrainingStep:
        options = dataclasses.replace(self._step.options, checkpoint=tuple(names))
        return dataclasses.replace(self._step, options=options)

    def _run(self, names: Sequence[str], batch_size: int, *, accumulate: bool) -> Trial:
        step = _accumulating(self._with(names), accumulate=accumulate)
        trial = run_trial(self._backend, step, batch_size, is_first=self._is_first)
        self._is_first = False
        if self._progress is not None:
            self._progress(trial)
        return trial

    def _fits(self, trial: Trial) -> bool:
        return search.has_headroom(trial, self._limit_bytes)


def _accumulating(step: TrainingStep, *, accumulate: bool) -> TrainingStep:
    options = dataclasses.replace(step.options, accumulate=accumulate)
    return dataclasses.replace(step, options=options)

"""One plan for ranks that have different cards: each takes the share that its card has room for.

All ranks need the same number of micro-batches. A card that holds twice as many samples takes twice
as many. How fast the cards are is not known, because cards that are not here have no real seconds.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from memfit import partition, search
from memfit.backends import Backend
from memfit.errors import DoesNotFitError, UsageError
from memfit.planning.planner import PlanTarget, as_rank, remarks_on
from memfit.planning.searching import run_search, run_trial
from memfit.records import Capacity, Objective, Plan, ProbeResult, RankPart, Source, Trial
from memfit.step.training_step import TrainingStep

__all__ = ["plan_together"]

_FEWEST = 2
# If the samples are at most so many times what the cards hold while accumulating, a step without
# accumulation is tried.
_NEARLY = 1.3


class _Opens(Protocol):
    def __call__(self, gpu: str) -> Backend: ...


def plan_together(
    gpus: Sequence[str],
    opened: _Opens,
    step: TrainingStep,
    target: PlanTarget,
    *,
    progress: Callable[[Trial], None] | None = None,
) -> Plan:
    """Plan for ranks on several cards.

    Args:
        gpus: The card of each rank.
        opened: A function that opens a card as a backend, which is a context manager.
        step: The step to train, with its precision chosen.
        target: The effective batch and the limits of the plan, for as many ranks.
        progress: Called with each trial when it has ended.

    Raises:
        UsageError: The aim of the plan is not the fewest steps.
        DoesNotFitError: Not even the smallest micro-batch fits one of the cards.
    """
    if target.objective is not Objective.LARGEST:
        raise UsageError(
            f"A plan for different cards has the fewest steps, so its objective is 'largest', not "
            f"{target.objective.value!r}."
        )
    return _Together(gpus, opened, step, target, progress).plan()


class _Together:
    """Makes a plan for several cards; each is opened when it is asked."""

    def __init__(
        self,
        gpus: Sequence[str],
        opened: _Opens,
        step: TrainingStep,
        target: PlanTarget,
        progress: Callable[[Trial], None] | None,
    ) -> None:
        self._start = time.perf_counter()
        self._gpus = tuple(gpus)
        self._opened = opened
        self._target = target
        self._progress = progress
        self._step = step
        self._cards = {gpu: _Card() for gpu in gpus}

    def plan(self) -> Plan:
        samples = self._target.effective_batch_size
        for gpu in self._cards:
            self._search(gpu)
        limits = [self._cards[gpu].limit for gpu in self._gpus]
        shares = partition.shares_by(samples, limits)
        if samples <= _NEARLY * sum(limits) and self._all_fit(
            dict.fromkeys(zip(self._gpus, shares, strict=True), False)
        ):
            return self._plan_of([(share,) for share in shares], accumulate=False)
        while True:
            limits = [self._cards[gpu].limit for gpu in self._gpus]
            shares = partition.shares_by(samples, limits)
            parts = [
                self._cut(share, limit, -(-samples // sum(limits)))
                for share, limit in zip(shares, limits, strict=True)
            ]
            tried = {
                (gpu, size): True
                for gpu, sizes in zip(self._gpus, parts, strict=True)
                for size in sizes
            }
            if self._all_fit(tried):
                return self._plan_of(parts, accumulate=True)

    def _cut(self, share: int, limit: int, num_steps: int) -> tuple[int, ...]:
        """Cut a rank's share into as many parts as the other ranks have, or fewer."""
        unit = self._target.search.multiple_of
        part = -(-share // max(num_steps, _FEWEST))
        part = min(-(-part // unit) * unit, limit)
        return partition.cut(share, part, multiple_of=unit)

    def _search(self, gpu: str) -> None:
        """Find the largest micro-batch of a card for a step that accumulates."""
        options = self._target.search
        most = min(self._target.effective_batch_size, options.max_batch_size or 2**62)
        with self._opened(gpu) as backend:
            card = self._cards[gpu]
            card.step = as_rank(self._step, self._target, backend)
            card.device, card.capacity = backend.device_name, backend.capacity()
            found: ProbeResult = run_search(
                backend,
                _accumulating(card.step, accumulate=True),
                dataclasses.replace(options, max_batch_size=most),
                progress=self._progress,
            )
        card.source = found.source
        card.trials += found.trials
        if found.recommended_batch_size is None:
            raise DoesNotFitError(
                f"{self._step.name} fits {card.device}, but no micro-batch leaves "
                f"{options.headroom:.0%} of its memory free. Ask for less headroom."
            )
        card.limit = found.recommended_batch_size
        card.edge, card.edge_found = found.max_batch_size, found.edge_found

    def _all_fit(self, wanted: dict[tuple[str, int], bool]) -> bool:
        """Whether cards keep the headroom with some sizes; lower the limit of one that does not.

        Args:
            wanted: For a card and a batch size, whether the step accumulates.
        """
        fits = True
        for gpu in self._cards:
            sizes = {size: accumulate for (name, size), accumulate in wanted.items() if name == gpu}
            fits = self._fit(gpu, sizes) and fits
        return fits

    def _fit(self, gpu: str, sizes: dict[int, bool]) -> bool:
        card = self._cards[gpu]
        limit_bytes = search.limit_of(card.capacity.safe_bytes, self._target.search.headroom)
        unknown = {
            size: accumulate
            for size, accumulate in sizes.items()
            if card.trial_of(size, accumulate=accumulate) is None
        }
        if unknown:
            with self._opened(gpu) as backend:
                for size, accumulate in unknown.items():
                    step = _accumulating(card.step, accumulate=accumulate)
                    trial = run_trial(backend, step, size, is_first=False)
                    card.trials.append(trial)
                    if self._progress is not None:
                        self._progress(trial)
        fits = True
        for size, accumulate in sizes.items():
            known = card.trial_of(size, accumulate=accumulate)
            assert known is not None
            if not search.has_headroom(known, limit_bytes):
                fits = False
                if accumulate:
                    card.limit = min(card.limit, size - 1)
        if card.limit < 1:
            raise DoesNotFitError(f"{self._step.name} does not fit {card.device} reliably.")
        return fits

    def _plan_of(self, parts: Sequence[tuple[int, ...]], *, accumulate: bool) -> Plan:
        target = self._target
        ranks = tuple(
            self._cards[gpu].part(sizes, accumulate=accumulate)
            for gpu, sizes in zip(self._gpus, parts, strict=True)
        )
        first, card = ranks[0], self._cards[self._gpus[0]]
        counts = Counter(part.device for part in ranks)
        remarks = [
            (
                "Each card takes the share that it has room for. How fast the cards are is not "
                "known, so the fastest may wait for the others."
            )
        ]
        if min(map(len, parts)) < max(map(len, parts)):
            remarks.append("Some ranks need fewer micro-batches than others.")
        return Plan(
            subject=self._step.name,
            device=", ".join(
                f"{count} x {device}" if count > 1 else device for device, count in counts.items()
            ),
            source=(
                Source.SIMULATED
                if any(part.source is Source.SIMULATED for part in ranks)
                else first.source
            ),
            options=_accumulating(card.step, accumulate=accumulate).options,
            capacity=first.capacity,
            effective_batch_size=target.effective_batch_size,
            world_size=target.world_size,
            objective=target.objective,
            micro_batch_sizes=first.micro_batch_sizes,
            multiple_of=target.search.multiple_of,
            headroom=target.search.headroom,
            max_micro_batch_size=card.edge,
            edge_found=card.edge_found,
            recommended_micro_batch_size=first.recommended_micro_batch_size,
            peak_reserved_bytes=first.peak_reserved_bytes,
            samples_per_second=None,
            trials=first.trials,
            remarks=(*remarks, *remarks_on(card.step, target)),
            ranks=ranks,
            seconds=time.perf_counter() - self._start,
            torch_version=torch.__version__,
        )


class _Card:
    """What is known of a card."""

    step: TrainingStep
    device: str
    capacity: Capacity
    source: Source

    def __init__(self) -> None:
        self.trials: list[Trial] = []
        self.limit = self.edge = 1
        self.edge_found = False

    def trial_of(self, size: int, *, accumulate: bool) -> Trial | None:
        """Return the last trial of a batch size."""
        found = (
            trial
            for trial in reversed(self.trials)
            if trial.batch_size == size and (trial.num_micro_batches > 1) == accumulate
        )
        return next(found, None)

    def part(self, sizes: tuple[int, ...], *, accumulate: bool) -> RankPart:
        """Return the part of a rank that has this card."""
        tried = [self.trial_of(size, accumulate=accumulate) for size in dict.fromkeys(sizes)]
        peaks = [trial.peak_reserved_bytes for trial in tried if trial is not None]
        known = [peak for peak in peaks if peak is not None]
        return RankPart(
            device=self.device,
            source=self.source,
            capacity=self.capacity,
            micro_batch_sizes=sizes,
            recommended_micro_batch_size=self.limit,
            peak_reserved_bytes=max(known, default=None),
            trials=tuple(self.trials),
        )


def _accumulating(step: TrainingStep, *, accumulate: bool) -> TrainingStep:
    options = dataclasses.replace(step.options, accumulate=accumulate)
    return dataclasses.replace(step, options=options)

"""One plan on one backend: tries sizes until the plan's own micro-batch fits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

import torch

from memfit import partition, search
from memfit.backends import Backend, with_precision
from memfit.errors import DoesNotFitError, UsageError
from memfit.planning.recomputing import recomputed
from memfit.planning.searching import SearchOptions, run_search, run_trial
from memfit.records import Objective, Parallel, Plan, ProbeResult, Recomputation, Source, Trial
from memfit.step.training_step import TrainingStep

__all__ = ["PlanTarget", "as_rank", "plan_on", "remarks_on"]

# Batch norm may refuse fewer samples.
_FEWEST = 2
_ADDS_UP = (
    "The loss is a sum (reduction='sum'), so the losses of micro-batches are added unweighted: "
    "give the Accumulator weight='sum'. Trainers that divide by the steps change its gradient."
)
_NOTHING_AGAIN = "It fits without recomputing any block, so none was chosen."


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanTarget:
    """The checked arguments of a plan.

    Args:
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: The number of ranks that share these samples.
        objective: The aim of the plan.
        search: How micro-batches are searched. Every micro-batch except one of a step is a multiple
            of its `multiple_of`.
        chooses_blocks: Choose blocks to recompute if the step does not fit without.
    """

    effective_batch_size: int
    world_size: int
    objective: Objective
    search: SearchOptions
    chooses_blocks: bool = False

    @classmethod
    def of(
        cls,
        effective_batch_size: object,
        search: SearchOptions,
        *,
        world_size: object = 1,
        objective: str | Objective = Objective.LARGEST,
        chooses_blocks: bool = False,
    ) -> PlanTarget:
        """Check the arguments.

        Raises:
            UsageError: An argument is not valid.
        """
        samples, ranks = partition.check_target(effective_batch_size, world_size)
        known = [choice.value for choice in Objective]
        if objective not in known:
            raise UsageError(
                f"There is no objective {objective!r}; choose one of {', '.join(known)}."
            )
        return cls(
            effective_batch_size=samples,
            world_size=ranks,
            objective=Objective(objective),
            search=search,
            chooses_blocks=chooses_blocks,
        )

    @property
    def share(self) -> int:
        """The samples of the first rank."""
        return partition.share_of(self.effective_batch_size, self.world_size)

    def part_of(self, num_steps: int) -> int:
        """Return the most samples in a micro-batch if there are at least so many steps."""
        part = -(-self.share // num_steps)
        rounded = -(-part // self.search.multiple_of) * self.search.multiple_of
        # If rounding gives the whole share, the share would not be cut.
        part = rounded if rounded < self.share else part
        return min(part, self.search.max_batch_size or part)

    @property
    def search_below(self) -> SearchOptions:
        """The options of the search for a micro-batch if two steps are too few."""
        return dataclasses.replace(self.search, max_batch_size=self.part_of(3))


def plan_on(
    opened: Backend,
    step: TrainingStep,
    target: PlanTarget,
    *,
    progress: Callable[[Trial], None] | None = None,
) -> Plan:
    """Plan on a backend, and close it.

    Args:
        opened: The backend that runs trials.
        step: The step to train; its precision may still be `AUTO`.
        target: The effective batch and the limits of the plan.
        progress: Called with each trial when it has ended.

    Raises:
        UsageError: No plan can meet the target.
        DoesNotFitError: Not even the smallest micro-batch fits with the headroom.
    """
    with opened as backend:
        step = as_rank(with_precision(step, backend), target, backend)
        if not target.chooses_blocks:
            return _planned(backend, step, target, progress)
        start = time.perf_counter()
        chosen = recomputed(
            backend,
            step,
            share=target.share,
            part_of=target.part_of,
            options=target.search,
            progress=progress,
        )
        if chosen.largest is not None:
            limited = dataclasses.replace(target.search, max_batch_size=chosen.largest)
            target = dataclasses.replace(target, search=limited)
        plan = _planned(backend, chosen.step, target, progress)
        remark = _NOTHING_AGAIN if chosen.found is None else _how_to(chosen.found)
        return dataclasses.replace(
            plan,
            recomputation=chosen.found,
            remarks=(*plan.remarks, remark),
            seconds=time.perf_counter() - start,
        )


def _planned(
    backend: Backend,
    step: TrainingStep,
    target: PlanTarget,
    progress: Callable[[Trial], None] | None,
) -> Plan:
    options = dataclasses.replace(step.options, accumulate=True)
    accumulating = dataclasses.replace(step, options=options)
    return _Planner(backend, step, accumulating, target, progress).plan()


def _how_to(found: Recomputation) -> str:
    return f"In your script: memfit.checkpoint(model, {list(found.blocks)!r})"


def as_rank(step: TrainingStep, target: PlanTarget, backend: Backend) -> TrainingStep:
    """Return the step of one rank in a `DistributedDataParallel`, if the backend can try it.

    Args:
        step: The step.
        target: The target of the plan.
        backend: The backend that will try it.
    """
    options = step.options
    if target.world_size == 1 or options.parallel is not None or not backend.takes_ranks:
        return step
    if target.chooses_blocks or options.compile:
        # Blocks are chosen by a trace, and a compiled model is not wrapped.
        return step
    ranked = dataclasses.replace(options, parallel=Parallel.DDP, world_size=target.world_size)
    return dataclasses.replace(step, options=ranked)


def remarks_on(step: TrainingStep, target: PlanTarget) -> tuple[str, ...]:
    """Return what a user of any plan for this step and this target has to know.

    Args:
        step: The step that was tried.
        target: The target of the plan.
    """
    remarks = []
    if step.sums_samples and target.effective_batch_size > 1:
        remarks.append(_ADDS_UP)
    if target.world_size == 1 or step.options.parallel is not None:
        return tuple(remarks)
    remarks.append(
        f"Trials were of one process alone. What {target.world_size} ranks add on each of them is "
        "not counted: DistributedDataParallel's buckets are as large as all gradients. A "
        "rehearsal counts them (--parallel ddp)."
    )
    return tuple(remarks)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    """The largest micro-batches that fit and that keep the headroom; `proved` at the edge."""

    largest: int
    recommended: int
    proved: bool


class _Planner:
    """Makes a plan on one device."""

    def __init__(
        self,
        backend: Backend,
        whole_step: TrainingStep,
        step: TrainingStep,
        target: PlanTarget,
        progress: Callable[[Trial], None] | None,
    ) -> None:
        self._start = time.perf_counter()
        self._backend = backend
        self._whole_step = whole_step
        self._step = step
        self._target = target
        self._progress = progress
        self._trials: list[Trial] = []
        self._capacity = backend.capacity()
        self._limit_bytes = search.limit_of(self._capacity.safe_bytes, target.search.headroom)
        self._smallest = _FEWEST
        self._refused: Exception | None = None

    def plan(self) -> Plan:
        target, share = self._target, self._target.share
        is_timed = target.objective is Objective.FASTEST
        remarks: list[str] = []
        whole = share if self._fits_whole(remarks) else 0
        if whole:
            limits = _Limits(largest=share, recommended=share, proved=False)
            largest = self._timed(share // 2) if is_timed else 0
        else:
            limits = self._limits(remarks)
            largest = self._timed(limits.recommended) if is_timed else limits.recommended
        while whole or largest:
            parts = self._parts(whole, largest)
            size, step = parts.sizes[0], self._whole_step if len(parts.sizes) == 1 else self._step
            trial = self._known(step, size) or self._run(step, size)
            if search.has_headroom(trial, self._limit_bytes):
                if not self._runs_smallest(step, parts, remarks):
                    continue
                tried = [trial, *self._smaller(step, parts)]
                trial = tried[-1]
                if search.has_headroom(trial, self._limit_bytes):
                    highest = max(tried, key=lambda each: each.peak_reserved_bytes or 0)
                    return self._plan_of(step, highest, parts, limits, tuple(remarks))
            # A smaller micro-batch may fail where a larger one fits, or need more. So each of
            # the plan's own is tried.
            largest = trial.batch_size - 1
        raise DoesNotFitError(
            f"{self._step.name} fits in larger micro-batches than the plan's but "
            "not in the plan's own. Its memory differs too much from trial to "
            "trial to make a plan."
        )

    def _smaller(self, step: TrainingStep, parts: partition.Parts) -> Iterator[Trial]:
        """Try the rank's smaller micro-batches, until one does not keep the headroom."""
        for size in sorted({*parts.sizes} - {parts.sizes[0]}, reverse=True):
            if size < _FEWEST:
                return  # that it runs is another question: `_runs_smallest`
            trial = self._known(step, size) or self._run(step, size)
            yield trial
            if not search.has_headroom(trial, self._limit_bytes):
                return

    def _runs_smallest(
        self, step: TrainingStep, parts: partition.Parts, remarks: list[str]
    ) -> bool:
        """Whether the step runs with the smallest part; if not, require larger parts.

        Raises:
            UsageError: There are no larger parts.
        """
        target = self._target
        size = partition.smallest_of(
            parts.sizes,
            target.effective_batch_size,
            world_size=target.world_size,
            multiple_of=target.search.multiple_of,
            smallest=self._smallest,
        )
        if size < self._smallest and self._refused is not None:
            what = partition.too_small(
                target.effective_batch_size, target.world_size, parts.sizes[0], size
            )
            raise UsageError(f"{what} ({self._refused})") from self._refused
        if any(trial.batch_size <= size for trial in self._trials):
            return True
        if self._trials[-1].source is Source.SIMULATED:
            if size < _FEWEST:
                remarks.append(
                    "One part has a single sample. Batch norm may refuse a single sample, "
                    "and a simulation does not see that."
                )
            return True
        try:
            self._run(step, size)
        except Exception as error:
            if not getattr(error, "raised_in_step", False):
                raise
            self._refused, self._smallest = error, size + 1
            return False
        return True

    def _fits_whole(self, remarks: list[str]) -> bool:
        """Whether the first rank's share fits in one step with the headroom."""
        options, share = self._target.search, self._target.share
        if share > (options.max_batch_size or share):
            return False
        trial = self._run(self._whole_step, share)
        if search.has_headroom(trial, self._limit_bytes):
            return True
        if trial.fits:
            why = (
                "need allocator retries"
                if trial.num_alloc_retries
                else f"leave less than {options.headroom:.0%} free"
            )
            remarks.append(f"{share} samples do fit in one step, but {why}.")
        return False

    def _limits(self, remarks: list[str]) -> _Limits:
        """Find the largest micro-batch of a step that accumulates."""
        half = self._target.part_of(2)
        trial = self._run(self._step, half)
        if search.has_headroom(trial, self._limit_bytes):
            return _Limits(largest=half, recommended=half, proved=False)
        result = run_search(
            self._backend, self._step, self._target.search_below, progress=self._note
        )
        remarks += result.remarks
        return _Limits(
            largest=result.max_batch_size,
            recommended=self._recommended(result),
            proved=result.edge_found,
        )

    def _recommended(self, result: ProbeResult) -> int:
        """Return the largest micro-batch that keeps the headroom."""
        options, largest = self._target.search, result.recommended_batch_size
        if largest is None:
            multiple = options.multiple_of
            unit = f" that is a multiple of {multiple}" if multiple > 1 else ""
            raise DoesNotFitError(
                f"{self._step.name} fits, but no micro-batch{unit} leaves "
                f"{options.headroom:.0%} of the memory free without allocator retries. "
                f"The largest that fits at all is {result.max_batch_size}. Ask for less "
                "headroom."
            )
        return largest

    def _parts(self, largest_whole: int, largest_accumulating: int) -> partition.Parts:
        target = self._target
        return partition.split(
            target.effective_batch_size,
            world_size=target.world_size,
            largest_whole=largest_whole,
            largest_accumulating=largest_accumulating,
            objective=target.objective,
            multiple_of=target.search.multiple_of,
            smallest=self._smallest,
            speeds=self._speeds(),
        )

    def _speeds(self) -> list[partition.Speed]:
        return [
            partition.Speed(
                batch_size=trial.batch_size, samples_per_second=trial.samples_per_second
            )
            for trial in self._trials
            if trial.samples_per_second is not None
            and search.has_headroom(trial, self._limit_bytes)
        ]

    def _timed(self, largest: int) -> int:
        """Try micro-batches to measure their speed; return the largest that keeps the headroom."""
        sizes = partition.sizes_to_time(largest, multiple_of=self._target.search.multiple_of)
        trials = [self._known(self._step, size) or self._run(self._step, size) for size in sizes]
        fitting = [t.batch_size for t in trials if search.has_headroom(t, self._limit_bytes)]
        return max(fitting, default=0)

    def _known(self, step: TrainingStep, batch_size: int) -> Trial | None:
        earlier = (
            trial
            for trial in reversed(self._trials)
            if (trial.batch_size, trial.num_micro_batches) == (batch_size, step.num_micro_batches)
        )
        return next(earlier, None)

    def _run(self, step: TrainingStep, batch_size: int) -> Trial:
        trial = run_trial(self._backend, step, batch_size, is_first=not self._trials)
        self._note(trial)
        return trial

    def _note(self, trial: Trial) -> None:
        self._trials.append(trial)
        if self._progress is not None:
            self._progress(trial)

    def _plan_of(
        self,
        step: TrainingStep,
        trial: Trial,
        parts: partition.Parts,
        limits: _Limits,
        remarks: tuple[str, ...],
    ) -> Plan:
        target = self._target
        return Plan(
            subject=step.name,
            device=self._backend.device_name,
            source=trial.source,
            options=step.options,
            capacity=self._capacity,
            effective_batch_size=target.effective_batch_size,
            world_size=target.world_size,
            objective=target.objective,
            micro_batch_sizes=parts.sizes,
            multiple_of=target.search.multiple_of,
            smallest_micro_batch_size=self._smallest,
            headroom=target.search.headroom,
            max_micro_batch_size=limits.largest,
            edge_found=limits.proved,
            recommended_micro_batch_size=limits.recommended,
            peak_reserved_bytes=trial.peak_reserved_bytes,
            samples_per_second=parts.samples_per_second,
            trials=tuple(self._trials),
            environment=self._backend.environment,
            remarks=(*remarks, *parts.remarks, *remarks_on(step, target)),
            seconds=time.perf_counter() - self._start,
            torch_version=torch.__version__,
        )

"""Finds the batch size of a user's own command by running it with different batch sizes.

In the command's words, `{}` stands for the batch size and `{steps}` for the accumulation steps.
Each trial runs the command until its peak has settled. This takes long, so few trials are made.
`memfit.search` chooses the next batch size from the bytes of the earlier trials.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from memfit import search
from memfit.cards import Gpu
from memfit.errors import DoesNotFitError, StepCrashedError, ToldToEnd, UsageError
from memfit.partition import check_target, equal_part
from memfit.records import (
    Capacity,
    CommandPlan,
    CommandProbe,
    Outcome,
    ReadKind,
    Rehearsal,
    RehearsalEnd,
    Trial,
)
from memfit.rehearsal.children import Output
from memfit.rehearsal.ranks import LoneRank, launcher_of
from memfit.rehearsal.run import Rehearsed, capacity_of, rehearse_command
from memfit.units import format_bytes, parse_count

__all__ = ["Progress", "ScriptSearch", "plan_command", "probe_command"]

_BATCH: Final = "{}"
_STEPS: Final = "{steps}"
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_NUM_LAST_LINES: Final = 12
_MAX_SHRINKS: Final = 12
_LINE_ERROR: Final = 100

Progress = Callable[[Trial], None]
"""A function that is called with each trial when it has ended."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ScriptSearch:
    """The settings of a search for a command's batch size.

    Args:
        gpu: The card; `None` for this machine's own GPU.
        environment: Variables that put the command on the card.
        headroom: The share of the capacity that the recommendation keeps free.
        multiple_of: The recommendation is a multiple of this number.
        max_batch_size: The largest batch size that is tried; `None` for the search's own limit.
        lone_rank: The rank that each run is; `None` if the command starts its ranks itself, or has
            none.
    """

    gpu: Gpu | None
    environment: Mapping[str, str]
    headroom: float = 0.05
    multiple_of: int = 1
    max_batch_size: int | None = None
    lone_rank: LoneRank | None = None

    def __post_init__(self) -> None:
        """Refuse settings with which no search is possible."""
        search.checked_headroom(self.headroom)
        for name in ("multiple_of", "max_batch_size"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, parse_count(name, value))


def probe_command(
    template: Sequence[str], bounds: ScriptSearch, *, progress: Progress = lambda _trial: None
) -> CommandProbe:
    """Find the largest batch size of a command that fits, and prove it.

    Args:
        template: The command's words. `{}` is the batch size. Words such as `NAME={}` before the
            program are environment variables.
        bounds: The settings of the search.
        progress: Called with each trial.

    Raises:
        UsageError: No word has a place for the batch size, or there is no such command.
        DoesNotFitError: Not even the smallest batch fits.
        StepCrashedError: The command failed by itself.
    """
    _check(template, needs=(_BATCH,))
    start = time.perf_counter()
    runs = _Runs(template, bounds, progress)
    found, notes = _largest(runs, bounds.max_batch_size or search.DEFAULT_CEILING)
    assert found.batch_size is not None
    recommended = runs.recommended(found)
    return CommandProbe(
        command=tuple(template),
        device=runs.last.device,
        source=runs.last.source,
        capacity=runs.last.capacity,
        max_batch_size=found.batch_size,
        recommended_batch_size=recommended,
        proved=found.proved,
        headroom=bounds.headroom,
        multiple_of=bounds.multiple_of,
        trials=tuple(runs.trials),
        notes=(*notes, *_rank_notes(template, bounds), *runs.doubts()),
        seconds=time.perf_counter() - start,
    )


def plan_command(
    template: Sequence[str],
    effective_batch_size: int,
    bounds: ScriptSearch,
    *,
    world_size: int = 1,
    progress: Progress = lambda _trial: None,
) -> CommandPlan:
    """Turn an effective batch size into a command that fits, and prove it.

    Args:
        template: The command's words. `{}` is the micro-batch, `{steps}` the accumulation steps.
        effective_batch_size: The samples in each optimizer step, over all ranks.
        bounds: The settings of the search.
        world_size: The number of ranks that share the samples.
        progress: Called with each trial.

    Raises:
        UsageError: `{}` or `{steps}` is missing, or the samples cannot be shared equally.
        DoesNotFitError: Not even the smallest micro-batch fits.
        StepCrashedError: The command failed by itself.
    """
    _check(template, needs=(_BATCH, _STEPS))
    samples, ranks = check_target(effective_batch_size, world_size)
    share, rest = divmod(samples, ranks)
    if rest:
        raise UsageError(
            f"{samples} samples cannot be shared equally by {ranks} ranks, and a "
            f"command has one batch size for all ranks. Give {share * ranks} or "
            f"{(share + 1) * ranks}."
        )
    start = time.perf_counter()
    runs = _Runs(template, bounds, progress)
    micro = _micro_batch(runs, share, bounds)
    return CommandPlan(
        template=tuple(template),
        command=runs.words(micro, share // micro),
        device=runs.last.device,
        source=runs.last.source,
        capacity=runs.last.capacity,
        effective_batch_size=samples,
        world_size=ranks,
        micro_batch_size=micro,
        accumulation_steps=share // micro,
        headroom=bounds.headroom,
        trials=tuple(runs.trials),
        notes=(*_rank_notes(template, bounds, num_ranks=ranks), *runs.doubts()),
        seconds=time.perf_counter() - start,
    )


def _rank_notes(
    template: Sequence[str], bounds: ScriptSearch, *, num_ranks: int = 1
) -> tuple[str, ...]:
    """Say that runs were one rank of many, or that they were not although there are several."""
    if bounds.lone_rank is not None:
        return (bounds.lone_rank.note,)
    if num_ranks == 1 or launcher_of(template) is not None:
        return ()
    return (
        (
            f"Each run was one process alone, so what {num_ranks} ranks add on each of them is not "
            "counted. With --gpu, one rank is rehearsed."
        ),
    )


def _micro_batch(runs: _Runs, share: int, bounds: ScriptSearch) -> int:
    """Return the largest equal part of a share that fits. It has been tried."""
    if runs.has_headroom(runs.trial(share, 1)):
        return share
    # Accumulation keeps gradients between micro-batches, so at least two must run.
    runs.num_accumulated = 2
    found, _ = _largest(runs, max(1, share - 1))
    largest = runs.recommended(found) or found.batch_size
    while largest:
        part = equal_part(share, largest, multiple_of=bounds.multiple_of)
        if part is None:
            break
        if runs.has_headroom(runs.trial(part, share // part)):
            return part
        largest = part - 1
    raise DoesNotFitError(
        f"No equal part of {share} samples fits {runs.last.device} with {bounds.headroom:.0%} kept "
        "free."
    )


def _largest(runs: _Runs, ceiling: int) -> tuple[search.Found, list[str]]:
    """Search below the batch sizes at which the command takes no optimizer step."""
    notes: list[str] = []
    if runs.capacity_bytes is None:
        # The first run says what this machine's GPU has, and the search needs to know that.
        runs.of_batch_size(min(2, ceiling))
    for _ in range(_MAX_SHRINKS):
        try:
            found = search.find_largest(
                runs.of_batch_size,
                capacity_bytes=runs.capacity_bytes,
                known=tuple(runs.comparable()),
                ceiling=ceiling,
                starts_afresh=True,
                stop_bytes=runs.stop_bytes,
            )
        except _NoStepError as stop:
            low = max((trial.batch_size for trial in runs.fits()), default=1)
            ceiling = max(low, math.isqrt(low * stop.batch_size))
            note = (
                f"At {stop.batch_size} samples the command takes no optimizer step. Its "
                f"data set may be smaller. Nothing above {ceiling} was tried."
            )
            notes = [note]
            continue
        if found.batch_size is None:
            raise DoesNotFitError(
                f"{shlex.join(runs.template)} does not fit {runs.last.device}, even at batch size "
                f"{found.trials[-1].batch_size}: {found.trials[-1].message or 'out of memory'}"
            )
        return found, notes
    raise UsageError(
        "At most batch sizes the command takes no optimizer step, so memfit "
        "cannot find the largest."
    )


class _NoStepError(Exception):
    """The command takes no optimizer step at this batch size, but it did at another one."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.batch_size = batch_size


class _Runs:
    """The runs of a command, each with one batch size."""

    def __init__(self, template: Sequence[str], bounds: ScriptSearch, progress: Progress) -> None:
        self.template = tuple(template)
        self.trials: list[Trial] = []
        self.num_accumulated = 1
        self._bounds = bounds
        self._progress = progress
        self._last: Rehearsal | None = None
        self._doubtful: dict[int, Rehearsal] = {}
        self._accumulated: list[int] = []

    @property
    def last(self) -> Rehearsal:
        """The last run."""
        assert self._last is not None
        return self._last

    @property
    def capacity_bytes(self) -> int | None:
        """The bytes that a process can use; `None` for this machine's GPU before the first run."""
        capacity = self._capacity
        return None if capacity is None else capacity.usable_bytes

    @property
    def stop_bytes(self) -> int:
        """The bytes that a recommended run may reserve, less what a line may be off by."""
        return self._limit_bytes - self._limit_bytes // _LINE_ERROR

    @property
    def _capacity(self) -> Capacity | None:
        if self._bounds.gpu is not None:
            return capacity_of(self._bounds.gpu)
        return None if self._last is None else self._last.capacity

    @property
    def _limit_bytes(self) -> int:
        """The bytes that are not to be kept free, once the capacity is known."""
        capacity = self._capacity
        assert capacity is not None
        return search.limit_of(capacity.safe_bytes, self._bounds.headroom)

    def words(self, batch_size: int, steps: int) -> tuple[str, ...]:
        """Return the command for a batch size."""
        return tuple(
            word.replace(_STEPS, str(steps)).replace(_BATCH, str(batch_size))
            for word in self.template
        )

    def of_batch_size(self, batch_size: int) -> Trial:
        """Try a batch size, with the accumulation steps of the search."""
        return self.trial(batch_size, self.num_accumulated)

    def trial(self, batch_size: int, steps: int) -> Trial:
        """Run the command.

        Raises:
            StepCrashedError: The command failed, and memory was not the cause.
        """
        words = self.words(batch_size, steps)
        variables = dict(self._bounds.environment)
        variables |= {
            name: value.replace(_STEPS, str(steps)).replace(_BATCH, str(batch_size))
            for name, value in os.environ.items()
            if value in (_BATCH, _STEPS)
        }
        while words and _VARIABLE.match(words[0]):
            name, _, value = words[0].partition("=")
            variables[name] = value
            words = words[1:]
        found = rehearse_command(
            words,
            self._bounds.gpu,
            variables,
            output=Output.KEPT,
            lone_rank=self._bounds.lone_rank,
        )
        self._last = found.rehearsal
        trial = _trial_of(found, batch_size, steps)
        took_steps = any(earlier.num_iterations for earlier in self.trials)
        if trial.fits and took_steps and not trial.num_iterations:
            raise _NoStepError(batch_size)
        if not found.rehearsal.is_trusted:
            self._doubtful[batch_size] = found.rehearsal
        self.trials.append(trial)
        self._accumulated.append(steps)
        self._progress(trial)
        return trial

    def comparable(self) -> list[Trial]:
        """Return the trials with the accumulation steps of the search."""
        return [
            trial
            for trial, steps in zip(self.trials, self._accumulated, strict=True)
            if (steps > 1) == (self.num_accumulated > 1)
        ]

    def fits(self) -> list[Trial]:
        """Return the trials that fitted and that can be compared."""
        return [trial for trial in self.comparable() if trial.fits]

    def has_headroom(self, trial: Trial) -> bool:
        """Whether a trial leaves the headroom free."""
        return search.has_headroom(trial, self._limit_bytes)

    def recommended(self, found: search.Found) -> int | None:
        """Return the batch size to train with."""
        return search.recommended(
            self.of_batch_size,
            found,
            capacity_bytes=self.last.capacity.safe_bytes,
            headroom=self._bounds.headroom,
            multiple_of=self._bounds.multiple_of,
            accepts_close=True,
        ).batch_size

    def doubts(self) -> list[str]:
        """Return the places at which the command ran differently than with real values."""
        lines: dict[bool, set[str]] = {True: set(), False: set()}
        for rehearsal in self._doubtful.values():
            for process in rehearsal.processes:
                for read in process.reads:
                    if read.changes_course and (place := read.line or read.library_line):
                        lines[read.kind is ReadKind.SIZE].add(place)
        sizes, decisions = (", ".join(sorted(lines[is_size])[:3]) for is_size in (True, False))
        told = []
        if sizes:
            told.append(f"Do not trust these figures. Sizes that no kernel computed: {sizes}.")
        if decisions:
            told.append(
                f"Values that no kernel computed decide here: {decisions}. The figures hold if "
                "values on the card decide in the same way as zeros."
            )
        return told


def _trial_of(found: Rehearsed, batch_size: int, steps: int) -> Trial:
    rehearsal = found.rehearsal
    if rehearsal.end is RehearsalEnd.INTERRUPTED:
        raise KeyboardInterrupt
    if rehearsal.end is RehearsalEnd.TERMINATED:
        raise ToldToEnd
    if rehearsal.end is RehearsalEnd.FAILED:
        lines = found.last_words.strip().splitlines()[-_NUM_LAST_LINES:]
        raise StepCrashedError(
            f"{rehearsal.subject} failed by itself with exit code {rehearsal.exit_code}, and not "
            "because memory ran out:\n" + "\n".join((*lines, *rehearsal.notes))
        )
    largest, peak = rehearsal.largest, rehearsal.peak
    if largest is None or peak is None:
        raise UsageError(f"{rehearsal.subject} did not use the card, so nothing can be found.")
    message = rehearsal.message
    if message is None and rehearsal.shortage is not None:
        message = f"{format_bytes(rehearsal.shortage.missing_bytes)} were missing"
    return Trial(
        batch_size=batch_size,
        outcome=Outcome.FITS if rehearsal.fits else Outcome.OUT_OF_MEMORY,
        source=rehearsal.source,
        peak_requested_bytes=peak.requested_bytes,
        peak_allocated_bytes=peak.allocated_bytes,
        peak_reserved_bytes=peak.reserved_bytes,
        num_alloc_retries=largest.num_alloc_retries,
        num_iterations=largest.num_steps,
        num_micro_batches=steps,
        message=None if message is None else message.partition("\n")[0],
    )


def _check(template: Sequence[str], *, needs: Sequence[str]) -> None:
    meanings = {_BATCH: "the batch size", _STEPS: "the accumulation steps"}
    for place in needs:
        if not any(place in word for word in (*template, *_set_in_environment())):
            raise UsageError(
                f"The command has no {place} for {meanings[place]}: write, say, -- python train.py "
                "--batch-size {}" + (" --grad-accum-steps {steps}." if _STEPS in needs else ".")
            )


def _set_in_environment() -> list[str]:
    return [value for value in os.environ.values() if value in (_BATCH, _STEPS)]

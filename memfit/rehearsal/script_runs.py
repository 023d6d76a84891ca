"""The runs of a user's own command, each with one batch size, and what they say of others."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from memfit import search
from memfit.cards import Gpu
from memfit.errors import StepCrashedError, ToldToEnd, UsageError
from memfit.records import Capacity, Outcome, ReadKind, Rehearsal, RehearsalEnd, Trial
from memfit.rehearsal.children import Output
from memfit.rehearsal.forecast import Forecast, Recording
from memfit.rehearsal.ranks import LoneRank
from memfit.rehearsal.run import Rehearsed, capacity_of, rehearse_command
from memfit.units import format_bytes, parse_count

__all__ = ["BATCH", "STEPS", "NoStepError", "Progress", "Runs", "ScriptSearch"]

BATCH: Final = "{}"
"""Stands for the batch size in a command's words."""

STEPS: Final = "{steps}"
"""Stands for the accumulation steps."""

_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=")
_NUM_LAST_LINES: Final = 12
_LINE_ERROR: Final = 100
_FIRST: Final = 2
_MAX_FORECASTS: Final = 4
# A batch size that is larger by less than this part is not worth another run.
_CLOSE: Final = 50
# A look at a forecast takes a few milliseconds.
_NUM_LOOKS: Final = 100

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


class NoStepError(Exception):
    """The command takes no optimizer step at this batch size, but it did at another one."""

    def __init__(self, batch_size: int) -> None:
        super().__init__(batch_size)
        self.batch_size = batch_size


class Runs:
    """The runs of a command, each with one batch size.

    Args:
        template: The command's words.
        bounds: The settings of the search.
        progress: Called with each trial.
    """

    def __init__(self, template: Sequence[str], bounds: ScriptSearch, progress: Progress) -> None:
        self.template = tuple(template)
        self.trials: list[Trial] = []
        self.num_accumulated = 1
        self._bounds = bounds
        self._progress = progress
        self._last: Rehearsal | None = None
        self._doubtful: dict[int, Rehearsal] = {}
        self._recordings: list[Recording] = []

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
            word.replace(STEPS, str(steps)).replace(BATCH, str(batch_size))
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
        while words and _VARIABLE.match(words[0]):
            name, _, value = words[0].partition("=")
            variables[name] = value
            words = words[1:]
        found = rehearse_command(
            words,
            self._bounds.gpu,
            variables,
            output=Output.KEPT,
            keeps_requests=True,
            lone_rank=self._bounds.lone_rank,
        )
        self._last = found.rehearsal
        trial = _trial_of(found, batch_size, steps)
        took_steps = any(earlier.num_iterations for earlier in self.trials)
        if trial.fits and took_steps and not trial.num_iterations:
            raise NoStepError(batch_size)
        if not found.rehearsal.is_trusted:
            self._doubtful[batch_size] = found.rehearsal
        self.trials.append(trial)
        self._keep_recording(found, trial, variables)
        self._progress(trial)
        return trial

    def _keep_recording(self, found: Rehearsed, trial: Trial, variables: Mapping[str, str]) -> None:
        # With retries, cuDNN may have taken plans for which there was room.
        if found.requests is None or found.process is None or trial.num_alloc_retries:
            return
        recording = Recording.of(trial, found.process, found.requests, {**os.environ, **variables})
        if recording is not None:
            self._recordings.append(recording)

    def comparable(self) -> list[Trial]:
        """Return the trials with the accumulation steps of the search."""
        accumulates = self.num_accumulated > 1
        return [each for each in self.trials if (each.num_micro_batches > 1) == accumulates]

    def fits(self) -> list[Trial]:
        """Return the trials that fitted and that can be compared."""
        return [trial for trial in self.comparable() if trial.fits]

    def has_headroom(self, trial: Trial) -> bool:
        """Whether a trial leaves the headroom free."""
        return search.has_headroom(trial, self._limit_bytes)

    def forecast(self) -> Forecast | None:
        """Return what the runs say of other batch sizes; `None` if they say too little."""
        if self.capacity_bytes is None:
            return None
        return Forecast.of(
            [
                recording
                for recording in self._recordings
                if recording.trial.num_micro_batches == self.num_accumulated
            ],
            capacity_bytes=self.capacity_bytes,
        )

    def expected_edge(self, ceiling: int) -> int | None:
        """Say where the edge is, after runs of batch sizes that may be recommended.

        Two runs with few samples say which one will be. Its run says it better.

        Args:
            ceiling: The largest batch size of interest.

        Returns:
            The largest batch size that is expected to fit; `None` if the runs do not say it.
        """
        if not self.comparable():
            self.of_batch_size(min(_FIRST, ceiling))
        if len(self.comparable()) == 1 and (further := self._further(ceiling)) is not None:
            self.of_batch_size(further)
        edge = None
        for _ in range(_MAX_FORECASTS):
            forecast = self.forecast()
            if forecast is None:
                break
            edge = search.find_largest(
                forecast.trial, capacity_bytes=self.capacity_bytes, ceiling=ceiling
            ).batch_size
            size = None if edge is None else self._foreseen(forecast, edge)
            if size is None or self._is_answered(size):
                break
            self.of_batch_size(size)
        failed = (trial.batch_size for trial in self.comparable() if not trial.fits)
        return edge if edge is not None and edge < min(failed, default=edge + 1) else None

    def recommended(self, found: search.Found) -> int | None:
        """Return the batch size to train with."""
        best, forecast = self._best(), self.forecast()
        if best is not None and forecast is not None and found.batch_size is not None:
            size = self._foreseen(forecast, found.batch_size)
            if size is None or self._is_answered(size):
                return best
            return size if self.has_headroom(self.of_batch_size(size)) else best
        return search.recommended(
            self.of_batch_size,
            found,
            capacity_bytes=self.last.capacity.safe_bytes,
            headroom=self._bounds.headroom,
            multiple_of=self._bounds.multiple_of,
            accepts_close=True,
        ).batch_size

    def _further(self, ceiling: int) -> int | None:
        """Return the second batch size to run: one that the first run leaves room for."""
        [first] = self.comparable()
        if not first.fits or not first.peak_reserved_bytes or self.capacity_bytes is None:
            return None
        point = first.batch_size, first.peak_reserved_bytes
        further = min(search.further(point, self.capacity_bytes, has_retries=True), ceiling)
        return further if further > first.batch_size else None

    def _foreseen(self, forecast: Forecast, edge: int) -> int | None:
        """Return the batch size that a forecast recommends."""
        return search.foreseen(
            forecast.trial,
            forecast.trial(edge),
            capacity_bytes=self.last.capacity.safe_bytes,
            headroom=self._bounds.headroom,
            multiple_of=self._bounds.multiple_of,
            num_looks=_NUM_LOOKS,
        )

    def _is_answered(self, size: int) -> bool:
        """Whether a batch size has been run, or one that is hardly smaller keeps the headroom."""
        best = self._best() or 0
        is_close = size - best <= size // _CLOSE
        return is_close or any(trial.batch_size == size for trial in self.comparable())

    def _best(self) -> int | None:
        """Return the largest batch size of which a run kept the headroom."""
        sizes = [trial.batch_size for trial in self.fits() if self.has_headroom(trial)]
        multiples = (size for size in sizes if size % self._bounds.multiple_of == 0)
        return max(multiples, default=None)

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

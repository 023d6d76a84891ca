"""Says what a command would hold at a batch size that was not run, from the requests of two runs.

A run records every request to torch's allocator. Two runs of one script make the same requests in
the same order, and the bytes of each grow with the batch size. Only scratch memory can differ:
cuDNN takes other plans for other batch sizes. So the requests of a third batch size are known, and
the model of the allocator (`memfit.simulation.allocator`) says what they reserve.

A forecast chooses which batch sizes are run. It is never an answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from memfit.errors import UsageError
from memfit.records import Action, Event, Outcome, RehearsedProcess, Source, Trial
from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError
from memfit.simulation.allocator.compiled import new_allocator
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.growth import grown
from memfit.simulation.history import read_history
from memfit.simulation.program import Program

__all__ = ["Forecast", "Recording"]

# The replay of a run has to reserve what the run did, to this part of it.
_ERROR = 50


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The requests of one run.

    Args:
        trial: What the run held.
        step_ends: For each optimizer step, the number of requests and frees until its end.
        events: The requests and frees. The id of a request is its place among them.
        settings: The options of the run's allocator.
    """

    trial: Trial
    step_ends: tuple[int, ...]
    events: tuple[Event, ...]
    settings: AllocatorSettings

    @classmethod
    def of(
        cls,
        trial: Trial,
        process: RehearsedProcess,
        requests: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> Recording | None:
        """Read what a run recorded.

        Args:
            trial: What the run held.
            process: The process that recorded.
            requests: What it recorded (`watch.requests`).
            environment: The variables that the command ran with.

        Returns:
            The recording; `None` if the run's allocator is not modelled.
        """
        major, minor, *_ = process.torch_version.split(".")
        try:
            settings = AllocatorSettings.from_environment(
                environment, torch_release=(int(major), int(minor))
            )
        except UsageError:
            return None
        ends, step_ends = list(requests["step_ends_ns"]), []
        events: list[Event] = []
        ids: dict[int, int] = {}
        for entry in read_history(requests["traces"][process.device_index]):
            while ends and entry.time_ns >= ends[0]:
                step_ends.append(len(events))
                ends.pop(0)
            if entry.action is Action.ALLOC:
                ids[entry.address] = len(events)
                events.append(Event(action=Action.ALLOC, id=len(events), num_bytes=entry.num_bytes))
            elif entry.action is Action.FREE_COMPLETED and entry.address in ids:
                number = ids.pop(entry.address)
                events.append(Event(action=entry.action, id=number, num_bytes=entry.num_bytes))
        step_ends += [len(events)] * len(ends)
        return cls(trial=trial, step_ends=tuple(step_ends), events=tuple(events), settings=settings)

    def until_step(self, number: int) -> Sequence[Event]:
        """Return the events until the end of a step; all of them if there are no steps."""
        return self.events[: self.step_ends[number - 1]] if number else self.events


class Forecast:
    """What a command would hold at batch sizes that were not run.

    Args:
        program: The requests, with their growth.
        settings: The options of the allocator.
        capacity_bytes: The bytes that the process can use.
    """

    def __init__(
        self,
        program: Program,
        settings: AllocatorSettings,
        *,
        capacity_bytes: int,
    ) -> None:
        self._program = program
        self._settings = settings
        self._capacity_bytes = capacity_bytes
        self._trials: dict[int, Trial] = {}

    @classmethod
    def of(cls, recordings: Sequence[Recording], *, capacity_bytes: int) -> Forecast | None:
        """Make a forecast from the runs of a command.

        Args:
            recordings: Runs of different batch sizes.
            capacity_bytes: The bytes that the process can use.

        Returns:
            The forecast. `None` if there are fewer than two runs, if they did not do the same, or
            if the replay of a run does not reserve what the run did.
        """
        ordered = sorted(recordings, key=lambda recording: recording.trial.batch_size)
        if len(ordered) < 2:  # noqa: PLR2004 - growth is seen between two
            return None
        # The largest says most about the edge. Close to it, other plans of cuDNN would look like
        # growth.
        last = ordered.pop()
        size = last.trial.batch_size
        below = [each for each in ordered if 5 * each.trial.batch_size <= 4 * size]
        other = below[-1] if below else ordered[0]
        num_steps = min(len(last.step_ends), len(other.step_ends))
        lines = _paired(
            last.until_step(num_steps),
            other.until_step(num_steps),
            samples=other.trial.batch_size - size,
        )
        if lines is None:
            return None
        program = Program([event for event, _ in lines], [growth for _, growth in lines], size)
        found = cls(program, last.settings, capacity_bytes=capacity_bytes)
        return found if found._agrees_with(last.trial) else None

    def trial(self, batch_size: int) -> Trial:
        """Return what a batch size would hold."""
        found = self._trials.get(batch_size)
        if found is None:
            found = self._trials[batch_size] = self._replayed(batch_size)
        return found

    def _replayed(self, batch_size: int) -> Trial:
        allocator = new_allocator(capacity_bytes=self._capacity_bytes, settings=self._settings)
        outcome = Outcome.FITS
        try:
            self._program.play(allocator, batch_size, sizes=None, plans={})
        except AllocatorOutOfMemoryError:
            outcome = Outcome.OUT_OF_MEMORY
        stats = allocator.stats
        return Trial(
            batch_size=batch_size,
            outcome=outcome,
            source=Source.SIMULATED,
            peak_requested_bytes=stats.peak_requested_bytes,
            peak_allocated_bytes=stats.peak_allocated_bytes,
            peak_reserved_bytes=stats.peak_reserved_bytes,
            num_alloc_retries=stats.num_alloc_retries,
        )

    def _agrees_with(self, run: Trial) -> bool:
        """Whether the replay of a run reserves what the run did, as far as that can be said."""
        replayed = self.trial(run.batch_size)
        if replayed.fits != run.fits:
            return False
        if run.num_alloc_retries or replayed.num_alloc_retries:
            return True
        seen, told = run.peak_reserved_bytes or 0, replayed.peak_reserved_bytes or 0
        return abs(told - seen) * _ERROR <= seen


def _paired(
    events: Sequence[Event], others: Sequence[Event], *, samples: int
) -> list[tuple[Event, float]] | None:
    """Return the events of a run, each with what a further sample adds to its bytes.

    Args:
        events: The run.
        others: The run of another batch size. Scratch memory may be missing in either.
        samples: How many samples more the other has; negative if it has fewer.

    Returns:
        The events and their growth, until one of the runs ends. `None` if the runs differ.
    """
    lines: list[tuple[Event, float]] = []
    twins: dict[int, int] = {}
    at = there = 0
    while at < len(events) and there < len(others):
        event, other = events[at], others[there]
        is_scratch, is_other_scratch = _is_scratch(events, at), _is_scratch(others, there)
        if is_scratch:
            # Where there is no room for a convolution's workspace, cuDNN takes a smaller one.
            event = dataclasses.replace(event, action=Action.ALLOC_IF_ROOM)
        if is_scratch and not is_other_scratch:
            lines += ((event, 0.0), (events[at + 1], 0.0))
            at += 2
            continue
        if is_other_scratch and not is_scratch:
            there += 2
            continue
        if events[at].action is not other.action:
            return None
        growth = 0.0
        if other.action is Action.ALLOC:
            twins[event.id] = other.id
            _, growth = grown(event, other, samples)
        elif twins.get(event.id) != other.id:
            return None
        # Another plan of cuDNN can need less for more samples. It is not known for how many.
        lines.append((event, max(growth, 0.0)))
        at, there = at + 1, there + 1
    return lines


def _is_scratch(events: Sequence[Event], at: int) -> bool:
    """Whether a request is freed by the next event, as a kernel's scratch memory is."""
    if events[at].action is not Action.ALLOC or at + 1 == len(events):
        return False
    following = events[at + 1]
    return following.action is Action.FREE_COMPLETED and following.id == events[at].id

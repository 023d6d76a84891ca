"""Finds the iteration of a traced step that repeats.

A training step repeats itself, but seldom from its first iteration on. The first iteration creates
the optimizer's state, and tables that a model makes at their first use. If a model keeps tensors
from one iteration to the next, the second iteration is the first that frees such tensors. This
module compares iterations until two in a row do the same. The later one then stands for all
iterations after it. This module does not use torch.

How much an allocation grows with the batch size is known from two batch sizes. If a step frees all
that it allocates, two iterations in a row can have two sizes. If it keeps something, what it keeps
has the size of the batch that it came from. So the step then runs twice from its beginning, with
one size each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from memfit.errors import MemfitError, WorkloadError
from memfit.records import Action, Event
from memfit.simulation.schedule import (
    Schedule,
    StepSchedule,
    StreamsDifferError,
    id_in_iteration,
)

__all__ = ["Choose", "Iteration", "Recorded", "settle"]

_MAX_ITERATIONS = 6
# The last of three iterations, of which the second and the third do the same.
_SECOND_AND_THIRD = 2
_FREE = Action.FREE_COMPLETED


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """What one iteration of a step allocated and freed.

    Args:
        batch_size: Samples in each micro-batch.
        run: Forward and backward. Their sizes depend on the batch size.
        update: The optimizer's step. Its sizes do not depend on the batch size.
    """

    batch_size: int
    run: tuple[Event, ...]
    update: tuple[Event, ...]

    @property
    def events(self) -> tuple[Event, ...]:
        """All events, in order."""
        return self.run + self.update

    def left(self) -> tuple[Event, ...]:
        """Return the allocations that the iteration did not free."""
        freed = {event.id for event in self.events if event.action is _FREE}
        return tuple(e for e in self.events if e.action is Action.ALLOC and e.id not in freed)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """A step that ran from its beginning.

    Args:
        setup: The allocations that exist before the first iteration.
        iterations: What the iterations did, in order.
    """

    setup: tuple[Event, ...]
    iterations: tuple[Iteration, ...]


Choose = Callable[[Sequence[Iteration]], int | None]
"""Told the iterations so far; returns the batch size of the next one, or `None` to end."""


def settle(
    record: Callable[[Choose], Recorded], *, batch_sizes: tuple[int, int], only_first: str
) -> StepSchedule:
    """Iterate a step until it repeats itself, and return what it does from then on.

    Args:
        record: Runs the step from its beginning.
        batch_sizes: Two different batch sizes, because one does not show the growth.
        only_first: The origin of events that only the first iteration with a shape has.

    Returns:
        The step. If later iterations keep something too, or it takes more than one to settle, the
        allocations that the earlier ones left behind exist from the start, and their other events
        are left out.

    Raises:
        StreamsDifferError: No two iterations in a row did the same.
    """
    small, large = batch_sizes
    num_done = 0

    def in_turn(done: Sequence[Iteration]) -> int | None:
        nonlocal num_done
        num_done = len(done)
        return (large, small, None)[num_done]

    try:
        recorded = record(in_turn)
    except Exception as error:
        # A model may refuse a batch if it keeps a tensor of a batch of another size. Such an error
        # can have any type. If it has another cause, it comes again below, with one size, and is
        # raised there.
        if not num_done or not _may_come_from_the_size(error):
            raise
    else:
        warm, other = recorded.iterations
        if not other.left():
            with contextlib.suppress(StreamsDifferError):
                return _plain(recorded.setup, warm, other, only_first)

    def until_it_repeats(done: Sequence[Iteration]) -> int | None:
        steps = _Steps(done)
        # If memory only grows, it may be a queue that is not full yet.
        ends = len(done) >= _MAX_ITERATIONS or (steps.is_steady and not steps.keeps_for_good)
        return None if ends else small

    others = record(until_it_repeats).iterations
    recorded = record(lambda done: large if len(done) < len(others) else None)
    steps = _Steps(recorded.iterations, others)
    if not steps.is_steady:
        raise StreamsDifferError(
            f"No two of {_MAX_ITERATIONS} iterations in a row allocate the same, with {large} "
            "samples in each."
        )
    return steps.repeated(recorded.setup, only_first)


def _may_come_from_the_size(error: Exception) -> bool:
    """Whether an error is the user's own; `WorkloadError` explains some of those."""
    return isinstance(error, WorkloadError) or not isinstance(error, MemfitError)


def _plain(
    setup: Sequence[Event], warm: Iteration, other: Iteration, only_first: str
) -> StepSchedule:
    """Return a step that frees all that it allocates, from its second iteration on."""
    sizes = (other.batch_size, warm.batch_size)
    later = Schedule.between(other.run, warm.run, batch_sizes=sizes)
    return StepSchedule(
        setup=Schedule.fixed(setup),
        first=later.seen_in(warm.run, batch_size=warm.batch_size).then(warm.update),
        later=later.then(other.update).without(only_first),
    )


class _Steps:
    """Iterations in which an allocation is identified by its position in its own iteration.

    Args:
        iterations: The iterations, all at one batch size.
        others: The same iterations at another batch size, if they are known.
    """

    def __init__(
        self, iterations: Sequence[Iteration], others: Sequence[Iteration] | None = None
    ) -> None:
        self._iterations = iterations
        self._others = others or iterations
        self._pairs: dict[int, list[tuple[Event, float]]] = {}
        # For each id, the iteration and the position among the iteration's allocations.
        self._places: dict[int, tuple[int, int]] = {}
        self._made: list[list[Event]] = []
        for number, iteration in enumerate(iterations):
            made = [event for event in iteration.events if event.action.is_request]
            self._made.append(made)
            self._places.update({event.id: (number, at) for at, event in enumerate(made)})
        self._last = len(iterations) - 1

    @property
    def is_steady(self) -> bool:
        """Whether the last two iterations do the same."""
        return self._last > 0 and self._course(self._last) == self._course(self._last - 1)

    @property
    def keeps_for_good(self) -> bool:
        """Whether the last iteration allocates something that no later iteration frees."""
        lags = self._lags()
        return any(lags.get(event.id) is None for event in self._iterations[self._last].left())

    def repeated(self, setup: Sequence[Event], only_first: str) -> StepSchedule:
        """Return the last iteration, repeated, after the first one or what earlier ones left."""
        later = self._later().without(only_first)
        if self._last == _SECOND_AND_THIRD and not later.outliving:
            # Only the first iteration keeps something, such as a table that the model makes then.
            with contextlib.suppress(StreamsDifferError):
                events, growth = zip(*self._grown(0), strict=True)
                first = Schedule(events=events, growth_bytes=growth, batch_size=later.batch_size)
                return StepSchedule(setup=Schedule.fixed(setup), first=first, later=later)
        return StepSchedule(
            setup=self._with_left_over(setup, later), first=later.iteration(0), later=later
        )

    def _course(self, number: int) -> list[tuple[Any, ...]]:
        """Return an iteration's events in a form that can be compared with another iteration."""
        course: list[tuple[Any, ...]] = []
        for event in self._iterations[number].events:
            told: tuple[int, int] | None = None
            if event.action is _FREE:
                # An allocation from before the first iteration is identified by its id.
                made_in, at = self._places.get(event.id, (None, event.id))
                told = (-1 if made_in is None else number - made_in, at)
            course.append((event.action, event.origin, event.num_bytes, told))
        return course

    def _lags(self) -> dict[int, int]:
        """Return how many iterations later each kept allocation is freed, by its id."""
        made = self._made[self._last]
        lags = {}
        for event in self._iterations[self._last].events:
            made_in, at = self._places.get(event.id, (self._last, 0))
            if event.action is _FREE and made_in != self._last:
                lags[made[at].id] = self._last - made_in
        return lags

    def _grown(self, number: int) -> list[tuple[Event, float]]:
        """Return an iteration's events, each with what it grows by with every further sample."""
        if number not in self._pairs:
            one, other = self._iterations[number], self._others[number]
            between = Schedule.between(
                one.events, other.events, batch_sizes=(one.batch_size, other.batch_size)
            )
            self._pairs[number] = list(zip(between.events, between.growth_bytes, strict=True))
        return self._pairs[number]

    def _later(self) -> Schedule:
        last, made = self._iterations[self._last], self._made[self._last]
        events, growth = [], []
        for event, grows_by in self._grown(self._last):
            made_in, at = self._places.get(event.id, (self._last, 0))
            is_older = event.action is _FREE and made_in != self._last
            events.append(dataclasses.replace(event, id=made[at].id) if is_older else event)
            growth.append(grows_by)
        return Schedule(
            events=tuple(events),
            growth_bytes=tuple(growth),
            batch_size=last.batch_size,
            outliving={event.id: 0 for event in last.left()} | self._lags(),
        )

    def _with_left_over(self, setup: Sequence[Event], later: Schedule) -> Schedule:
        made = self._made[self._last]
        sizes = {
            event.id: (event, growth)
            for event, growth in zip(later.events, later.growth_bytes, strict=True)
            if event.action is Action.ALLOC
        }
        earlier = self._iterations[:-1]
        freed = {e.id for iteration in earlier for e in iteration.events if e.action is _FREE}
        events, growth = list(setup), [0.0] * len(setup)
        for number, iteration in enumerate(earlier):
            left = {event.id for event in iteration.left()} - freed
            for event, grows_by in self._grown(number) if left else ():
                if event.action is not Action.ALLOC or event.id not in left:
                    continue
                _, at = self._places[event.id]
                counterpart = made[at].id if at < len(made) else None
                back = self._last - number
                if counterpart is not None and back <= later.outliving.get(counterpart, 0):
                    like, grown = sizes[counterpart]
                    number_then = id_in_iteration(counterpart, -back)
                    events.append(dataclasses.replace(like, id=number_then))
                    growth.append(grown * 1.0)
                else:
                    events.append(event)
                    growth.append(grows_by)
        # Use the batch size of `later`, because its events were recorded at that size.
        return Schedule(
            events=tuple(events), growth_bytes=tuple(growth), batch_size=later.batch_size
        )

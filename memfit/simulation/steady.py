"""Finds the iteration of a traced step that repeats.

A training step repeats itself, but seldom from its first iteration on. The first iteration creates
the optimizer's state, and tables that a model makes at their first use. If a model keeps tensors
from one iteration to the next, the second iteration is the first that frees such tensors. This
module compares iterations until two in a row do the same. The later one then stands for all
iterations after it. This module does not use torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from memfit.records import Action, Event
from memfit.simulation.growth import grown
from memfit.simulation.schedule import (
    Schedule,
    StepSchedule,
    StreamsDifferError,
    id_in_iteration,
)

__all__ = ["Iteration", "settle"]

_MAX_ITERATIONS = 6
_FREE = Action.FREE_COMPLETED
_MAKES = (Action.ALLOC, Action.TRY_ALLOC, Action.ALLOC_IF_ROOM)


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


def settle(
    setup: Sequence[Event],
    iterate: Callable[[int], Iteration],
    *,
    batch_sizes: tuple[int, int],
    only_first: str,
) -> StepSchedule:
    """Iterate a step until it repeats itself, and return what it does from then on.

    Args:
        setup: The allocations that exist before the first iteration.
        iterate: Runs one iteration at a batch size.
        batch_sizes: Two different batch sizes. Iterations take them in turn, because the growth
            with the batch size is known only from two.
        only_first: The origin of events that only the first iteration with a shape has.

    Returns:
        The step. If no later iteration is like the first one, the allocations that it left behind
        exist from the start, and its other events are left out.

    Raises:
        StreamsDifferError: No two iterations in a row did the same.
    """
    small, large = batch_sizes
    iterations = [iterate(large), iterate(small)]
    if not iterations[1].left():
        try:
            return _plain(setup, iterations[0], iterations[1], only_first)
        except StreamsDifferError:
            pass
    steps = None
    while len(iterations) < _MAX_ITERATIONS:
        iterations.append(iterate(large if len(iterations) % 2 == 0 else small))
        latest = _Steps(iterations)
        steps = latest if latest.is_steady else None
        # If memory only grows, it may be a queue that is not full yet.
        if steps is not None and not steps.keeps_for_good:
            break
    if steps is not None:
        return steps.repeated(setup, only_first)
    raise StreamsDifferError(
        f"No two of {_MAX_ITERATIONS} iterations in a row allocate the same, at the batch sizes "
        f"{small} and {large} in turn."
    )


def _plain(
    setup: Sequence[Event], warm: Iteration, other: Iteration, only_first: str
) -> StepSchedule:
    """Return a step that frees all that it allocates, from its second iteration on."""
    sizes = (other.batch_size, warm.batch_size)
    later = Schedule.between(other.run, warm.run, batch_sizes=sizes).then(other.update)
    first = Schedule.between(warm.run, other.run, batch_sizes=sizes[::-1]).then(warm.update)
    return StepSchedule(setup=Schedule.fixed(setup), first=first, later=later.without(only_first))


class _Steps:
    """Iterations in which an allocation is identified by its position in its own iteration."""

    def __init__(self, iterations: Sequence[Iteration]) -> None:
        self._iterations = iterations
        # For each id, the iteration and the position among the iteration's allocations.
        self._places: dict[int, tuple[int, int]] = {}
        self._made: list[list[Event]] = []
        for number, iteration in enumerate(iterations):
            made = [event for event in iteration.events if event.action in _MAKES]
            self._made.append(made)
            self._places.update({event.id: (number, at) for at, event in enumerate(made)})
        self._last = len(iterations) - 1

    @property
    def is_steady(self) -> bool:
        """Whether the last two iterations do the same."""
        return self._course(self._last) == self._course(self._last - 1)

    @property
    def keeps_for_good(self) -> bool:
        """Whether the last iteration allocates something that no later iteration frees."""
        return 0 in self._later().outliving.values()

    def repeated(self, setup: Sequence[Event], only_first: str) -> StepSchedule:
        """Return the last iteration, repeated, after what the earlier iterations left behind."""
        later = self._later().without(only_first)
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
            course.append((event.action, event.origin, told))
        return course

    def _later(self) -> Schedule:
        last, before = self._iterations[self._last], self._iterations[self._last - 1]
        made = self._made[self._last]
        samples = last.batch_size - before.batch_size
        lags = {event.id: 0 for event in last.left()}
        events, growth = [], []
        for event, other in zip(last.events, before.events, strict=True):
            named = event
            made_in, at = self._places.get(event.id, (self._last, 0))
            if event.action is _FREE and made_in != self._last:
                named = dataclasses.replace(event, id=made[at].id)
                lags[named.id] = self._last - made_in
            # The earlier iteration is compared, so its samples count the other way.
            kept, grows_by = grown(named, other, -samples)
            events.append(kept)
            growth.append(grows_by)
        return Schedule(
            events=tuple(events),
            growth_bytes=tuple(growth),
            batch_size=last.batch_size,
            outliving=lags,
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
            for event in iteration.left():
                if event.id in freed:
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
                    growth.append(0)
        # Use the batch size of `later`, because its events were recorded at that size.
        return Schedule(
            events=tuple(events), growth_bytes=tuple(growth), batch_size=later.batch_size
        )

"""Iterations are compared until they repeat: this shows what a step keeps, and how long."""

from __future__ import annotations

import collections
import copy

import pytest

from memfit.errors import NotSimulatedError, WorkloadError
from memfit.records import Action, Event
from memfit.simulation.allocator.caching import CachingAllocator
from memfit.simulation.schedule import StepSchedule, StreamsDifferError, traced_id
from memfit.simulation.steady import Choose, Iteration, Recorded, settle

SAMPLE = 1000
WEIGHTS = 5000


class Step:
    """A made-up step that keeps one tensor of each iteration in a queue.

    Args:
        queue_length: How many it keeps; `None` for all.
        extra_at: Iterations that allocate something more.
        begins_unlike: Whether the first iteration allocates something more for each sample.
    """

    def __init__(
        self,
        queue_length: int | None,
        extra_at: tuple[int, ...] = (),
        *,
        begins_unlike: bool = False,
    ) -> None:
        self.begins_unlike = begins_unlike
        self.queue: collections.deque[int] = collections.deque()
        self.queue_length = queue_length
        self.extra_at = extra_at
        self.num_ids = 1
        self.num_iterations = 0

    def iterate(self, batch_size: int) -> Iteration:
        events: list[Event] = []

        def alloc(num_bytes: int) -> int:
            self.num_ids += 1
            made = Event(action=Action.ALLOC, id=self.num_ids, num_bytes=num_bytes, origin="op")
            events.append(made)
            return self.num_ids

        def free(number: int) -> None:
            events.append(Event(action=Action.FREE_COMPLETED, id=number, num_bytes=0))

        for _ in range(batch_size if self.begins_unlike and not self.num_iterations else 0):
            free(alloc(11))
        batch = alloc(SAMPLE * batch_size)
        if self.num_iterations in self.extra_at:
            alloc(7)
        if self.queue_length != 0:
            self.queue.append(alloc(SAMPLE * batch_size))
        if self.queue_length is not None and len(self.queue) > self.queue_length:
            free(self.queue.popleft())
        free(batch)
        self.num_iterations += 1
        return Iteration(batch_size=batch_size, run=tuple(events), update=())


def settled(
    step: Step,
    *,
    error: Exception | None = None,
    fails_always: bool = False,
    runs: list[int] | None = None,
) -> StepSchedule:
    """Settle a step.

    Args:
        step: The step.
        error: What its second iteration raises if its batch has another size.
        fails_always: The second iteration raises it with a batch of any size.
        runs: How many iterations each run from the beginning began is added to this.
    """
    weights = Event(action=Action.ALLOC, id=1, num_bytes=WEIGHTS, origin="model")
    runs = [] if runs is None else runs

    def record(choose: Choose) -> Recorded:
        fresh = copy.deepcopy(step)
        iterations: list[Iteration] = []
        runs.append(0)
        while (batch_size := choose(iterations)) is not None:
            runs[-1] += 1
            is_second = len(iterations) == 1
            if (
                error is not None
                and is_second
                and (fails_always or iterations[0].batch_size != batch_size)
            ):
                raise error
            iterations.append(fresh.iterate(batch_size))
        return Recorded(setup=(weights,), iterations=tuple(iterations))

    return settle(record, batch_sizes=(2, 3), only_first="plan")


def peak_and_rest(schedule: StepSchedule, batch_size: int) -> tuple[int, int]:
    """Return the peak of the held bytes, and the bytes held after each of many iterations."""
    allocator = CachingAllocator()
    for stretch in schedule._stretches(12):
        stretch.play(allocator, batch_size)
    rest = sum(event.num_bytes for event in schedule.setup.at(batch_size))
    return allocator.stats.peak_requested_bytes, rest


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_what_is_kept_for_some_iterations_counts_once(length: int) -> None:
    """A queue holds its own length of tensors, however often the iteration is replayed."""
    schedule = settled(Step(length))
    peak, held = peak_and_rest(schedule, 100)
    assert held == WEIGHTS + length * SAMPLE * 100
    # Besides the batch: the new tensor is allocated before the oldest one is freed.
    assert peak == held + SAMPLE * 100 * (2 if length else 1)
    assert not schedule.grows(100, peak)


def test_what_is_kept_for_good_grows() -> None:
    """Nothing is ever freed, and the schedule says so."""
    schedule = settled(Step(None))
    peak, _ = peak_and_rest(schedule, 100)
    assert schedule.later.kept_bytes(100) == SAMPLE * 100
    assert peak >= WEIGHTS + 12 * SAMPLE * 100
    assert schedule.grows(100, peak)


def test_a_little_that_is_kept_is_no_growth() -> None:
    """A loss in a list is no reason for a warning."""
    schedule = settled(Step(None))
    assert not schedule.grows(1, 2000 * SAMPLE)


def test_replays_until_the_end_where_it_grows() -> None:
    """It takes six iterations, like a trial, even if the allocator needs no more memory."""
    allocator = CachingAllocator()
    assert len(list(settled(Step(None)).play(allocator, 1))) == 6
    assert len(list(settled(Step(1)).play(allocator, 1))) < 6


def test_what_only_the_first_iteration_keeps_is_made_there() -> None:
    """So it lies among what else that iteration allocates."""
    schedule = settled(Step(0, extra_at=(0,)))
    parts = (schedule.setup, schedule.first, schedule.later)
    told = [[event.num_bytes for event in part.events if event.num_bytes] for part in parts]
    assert told == [[WEIGHTS], [SAMPLE * 3, 7], [SAMPLE * 3]]
    assert next(iter(schedule.first.at(100))).num_bytes == SAMPLE * 100


def test_a_first_iteration_that_no_size_tells_of_is_left_out() -> None:
    """It has other events for another batch size, so nothing is known of a third one."""
    schedule = settled(Step(0, begins_unlike=True))
    assert 11 not in [event.num_bytes for event in schedule.first.events]
    assert schedule.first == schedule.later


def test_what_only_early_iterations_do_is_there_from_the_start() -> None:
    """The first two iterations are unlike any other; the next two are alike."""
    schedule = settled(Step(0, extra_at=(0, 1)))
    assert [event.num_bytes for event in schedule.setup.events] == [WEIGHTS, 7, 7]
    assert 7 not in [event.num_bytes for event in schedule.later.events]


def test_iterations_that_never_repeat_are_an_error() -> None:
    """Here every second iteration does something else."""
    with pytest.raises(StreamsDifferError, match="No two of 6 iterations"):
        settled(Step(0, extra_at=(1, 3, 5)))


@pytest.mark.parametrize("error", [RuntimeError("size"), KeyError("rows"), WorkloadError("kept")])
def test_a_batch_of_another_size_that_is_refused(error: Exception) -> None:
    """A model that keeps the last batch may refuse the next one, with an error of any type."""
    assert peak_and_rest(settled(Step(1), error=error), 100) == peak_and_rest(settled(Step(1)), 100)


@pytest.mark.parametrize(
    ("error", "num_runs"), [(RuntimeError("a bug"), 2), (NotSimulatedError("a value"), 1)]
)
def test_errors_that_have_another_cause(error: Exception, num_runs: int) -> None:
    """They are raised as they came. memfit's own do not depend on the last batch's size."""
    runs: list[int] = []
    with pytest.raises(type(error), match=str(error)):
        settled(Step(1), error=error, fails_always=True, runs=runs)
    assert runs == [2] * num_runs


def test_renamed_allocations_are_known_by_their_traced_id() -> None:
    """The traced id says what they are for."""
    schedule = settled(Step(2))
    traced = {event.id for event in schedule.later.events}
    for number in range(5):
        events = schedule.later.iteration(number).events
        assert {traced_id(event.id) for event in events} == traced

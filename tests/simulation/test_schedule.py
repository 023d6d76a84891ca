"""Tapes: what they hold at any batch size, and when a replay may end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.cards import Gpu, find_gpu
from memfit.records import Action, Event
from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError, CachingAllocator
from memfit.simulation.allocator.compiled import new_allocator
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.needs import Need, NeedEvent
from memfit.simulation.schedule import Schedule, StepSchedule
from memfit.units import MIB


def alloc(number: int, num_bytes: int) -> Event:
    return Event(action=Action.ALLOC, id=number, num_bytes=num_bytes, origin="test")


def free(number: int) -> Event:
    return Event(action=Action.FREE_COMPLETED, id=number, num_bytes=0, origin="")


def step(events: list[Event], growth: list[int], *, fixed: int = 0) -> StepSchedule:
    stretch = Schedule(events=tuple(events), growth_bytes=tuple(growth), batch_size=1)
    return StepSchedule(
        setup=Schedule.fixed([alloc(-1, fixed)]),
        first=stretch,
        later=dataclasses.replace(stretch),
    )


@st.composite
def stretches(draw: st.DrawFn) -> tuple[list[Event], list[int]]:
    """Return allocations of several growth rates that are freed in any order."""
    events: list[Event] = []
    growth: list[int] = []
    live: list[int] = []
    for number in range(draw(st.integers(1, 12))):
        slope = draw(st.integers(0, 3000))
        events.append(alloc(number, slope + draw(st.integers(1, 5000))))
        growth.append(slope)
        live.append(number)
        for _ in range(draw(st.integers(0, len(live)))):
            events.append(free(live.pop(draw(st.integers(0, len(live) - 1)))))
            growth.append(0)
    events += [free(number) for number in live]
    growth += [0] * len(live)
    return events, growth


def requested_peak(schedule: StepSchedule, batch_size: int) -> int:
    allocator = CachingAllocator()
    for _ in schedule.play(allocator, batch_size):
        pass
    return allocator.stats.peak_requested_bytes


@settings(deadline=None)
@given(stretches(), st.integers(0, 10**6), st.integers(0, 5000))
def test_tensors_bound_the_batch(
    stretch: tuple[list[Event], list[int]], room: int, fixed: int
) -> None:
    """It is the last batch size whose peak of requested bytes has room."""
    schedule = step(*stretch, fixed=fixed)
    found = schedule.largest_within(room)
    if not any(stretch[1]):
        assert found is None
        return
    assert found is not None
    assert requested_peak(schedule, found + 1) > room
    if found:
        assert requested_peak(schedule, found) <= room


def test_a_replay_ends_when_an_iteration_asks_nothing_of_the_device() -> None:
    """The second iteration finds all it needs in the cache, so a third would be the same."""
    schedule = step([alloc(1, 8 * MIB), free(1)], [MIB, 0])
    assert list(schedule.play(CachingAllocator(), 4)) == [12 * MIB, 12 * MIB]


def test_a_replay_goes_on_while_the_peak_grows() -> None:
    """It has at most six iterations, like a measured trial."""
    leaking = step([alloc(1, 12 * MIB)], [0])
    peaks = list(leaking.play(CachingAllocator(), 1))
    assert peaks == [12 * MIB * count for count in range(1, 7)]


def test_a_replay_that_always_asks_ends_when_two_peaks_agree() -> None:
    """Here each iteration gives back its cache, so it never ends in its first state."""
    emptied = Event(action=Action.EMPTY_CACHE, id=0, num_bytes=0, origin="test")
    schedule = step([alloc(1, 30 * MIB), free(1), emptied], [0] * 3)
    assert list(schedule.play(CachingAllocator(), 1)) == [30 * MIB] * 3


def test_a_smaller_plan_is_taken_where_the_first_has_no_room_and_kept() -> None:
    """torch tries the plans in order, and takes from then on the one whose workspace found room."""
    asked: list[str] = []

    def others(_gpu: Gpu, *_numbers: int) -> Iterator[int]:
        for num_bytes in (80 * MIB, 30 * MIB, 0):
            asked.append(f"{num_bytes // MIB} MiB")
            yield num_bytes

    need = Need(rule=lambda _gpu: 90 * MIB, is_slow=True, others=others)
    plan = NeedEvent(action=Action.ALLOC_IF_ROOM, id=1, num_bytes=0, origin="test", need=need)
    traced = step([plan, free(1)], [0, 0], fixed=60 * MIB).on(find_gpu("rtx3090"))
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    assert list(traced.play(allocator, 1)) == [90 * MIB, 90 * MIB]
    assert asked == ["80 MiB", "30 MiB"]
    assert allocator.stats.num_alloc_retries == 2

    roomy = CachingAllocator(capacity_bytes=200 * MIB)
    assert list(traced.play(roomy, 1)) == [150 * MIB, 150 * MIB]


def test_a_plan_without_any_room_is_out_of_memory() -> None:
    """If every plan needs a workspace and none finds room, the step does not fit."""
    need = Need(rule=lambda _gpu: 90 * MIB, others=lambda _gpu: iter((70 * MIB,)))
    plan = NeedEvent(action=Action.ALLOC_IF_ROOM, id=1, num_bytes=0, origin="test", need=need)
    traced = step([plan, free(1)], [0, 0], fixed=60 * MIB).on(find_gpu("rtx3090"))
    with pytest.raises(AllocatorOutOfMemoryError):
        list(traced.play(CachingAllocator(capacity_bytes=100 * MIB), 1))


def kept(num_bytes: int) -> NeedEvent:
    """Return what a library keeps on every card."""
    need = Need(rule=lambda _gpu: num_bytes)
    return NeedEvent(action=Action.ALLOC, id=-7, num_bytes=0, origin="library", need=need)


def ids(schedule: Schedule) -> list[int]:
    return [event.id for event in schedule.events if event.action is Action.ALLOC]


def test_what_a_library_keeps_comes_at_its_first_call() -> None:
    """It follows the allocation before it in the first iteration, and never comes again."""
    plain = step([alloc(1, 12 * MIB), alloc(2, 12 * MIB), free(1), free(2)], [0] * 4)
    run = plain.as_run([(1, kept(30 * MIB))]).on(find_gpu("rtx3090"))
    assert [ids(run.setup), ids(run.first), ids(run.later)] == [[-1], [1, -7, 2], [1, 2]]
    assert list(run.play(CachingAllocator(), 1)) == [54 * MIB, 54 * MIB]


def test_what_a_library_keeps_is_there_from_the_start_where_its_call_is_not_known() -> None:
    """A step that settles late is replayed without its first iteration."""
    plain = step([alloc(1, 12 * MIB), free(1)], [0, 0])
    run = plain.as_run([(99, kept(30 * MIB))])
    assert [ids(run.setup), ids(run.first)] == [[-1, -7], [1]]


def test_what_a_library_keeps_may_come_in_the_setup() -> None:
    """An evaluation within a training is recorded after a step of the training."""
    plain = step([alloc(1, 12 * MIB), free(1)], [0, 0])
    setup = Schedule.fixed([alloc(-1, 12 * MIB), alloc(-2, 12 * MIB), free(-2)])
    run = dataclasses.replace(plain, setup=setup).as_run([(-1, kept(30 * MIB))])
    assert [ids(run.setup), ids(run.first)] == [[-1, -7, -2], [1]]


def test_a_library_that_keeps_nothing_on_a_card_takes_nothing() -> None:
    """Both allocators leave it out."""
    plain = step([alloc(1, 12 * MIB), free(1)], [0, 0])
    run = plain.as_run([(1, kept(0))]).on(find_gpu("rtx3090"))
    for allocator in (
        CachingAllocator(),
        new_allocator(capacity_bytes=None, settings=AllocatorSettings()),
    ):
        assert list(run.play(allocator, 1)) == [12 * MIB, 12 * MIB]

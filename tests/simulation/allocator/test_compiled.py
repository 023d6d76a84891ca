"""The allocator in C: it does what the one in Python does, and is built cleanly and safely."""

from __future__ import annotations

import ctypes
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.cards import Gpu, find_gpu
from memfit.records import Action, Event
from memfit.simulation.allocator import compiled as module
from memfit.simulation.allocator.blocks import BlockOrder
from memfit.simulation.allocator.caching import AllocatorOutOfMemoryError, CachingAllocator
from memfit.simulation.allocator.compiled import CompiledAllocator, new_allocator
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.needs import Need, NeedEvent
from memfit.simulation.program import Allocator
from memfit.simulation.schedule import Schedule, StepSchedule
from memfit.units import KIB, MIB
from memfit.user_cache import compiler

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or compiler() is None, reason="needs Linux and a C compiler"
)

CARD = find_gpu("rtx3090")
ACTIONS = (
    Action.ALLOC,
    Action.ALLOC,
    Action.ALLOC,
    Action.TRY_ALLOC,
    Action.ALLOC_IF_ROOM,
    Action.FREE_COMPLETED,
    Action.FREE_COMPLETED,
    Action.EMPTY_CACHE,
    Action.USER_DEFINED,
)


def _workspace(_: Gpu, num_bytes: int) -> int:
    return num_bytes


def _smaller(_: Gpu, num_bytes: int) -> Iterator[int]:
    yield num_bytes // 2
    yield num_bytes // 8


@st.composite
def stretches(draw: st.DrawFn) -> Schedule:
    """Return any events: sizes that grow, needs with other plans, frees, an emptied cache."""
    events: list[Event] = []
    growth: list[float] = []
    live: list[int] = []
    sizes = st.one_of(st.integers(0, 4 * KIB), st.integers(1, 3 * MIB), st.integers(MIB, 48 * MIB))
    for number in range(draw(st.integers(1, 40))):
        action = draw(st.sampled_from(ACTIONS))
        grows_by = draw(st.sampled_from((0, 0, 512, 100_001, 0.5, 1234.25)))
        if action in (Action.EMPTY_CACHE, Action.USER_DEFINED):
            events.append(Event(action=action, id=0, num_bytes=0))
            growth.append(0)
        elif action is Action.FREE_COMPLETED:
            if not live:
                continue
            place = draw(st.integers(0, len(live) - 1))
            events.append(Event(action=action, id=live.pop(place), num_bytes=0))
            growth.append(0)
        elif draw(st.booleans()) and action is not Action.ALLOC:
            need = Need(rule=_workspace, numbers=(draw(sizes),), others=_smaller)
            made = NeedEvent(action=action, id=number, num_bytes=0, need=need, growth=(grows_by,))
            events += [made, Event(action=Action.FREE_COMPLETED, id=number, num_bytes=0)]
            growth += [0, 0]
        else:
            live.append(number)
            events.append(Event(action=action, id=number, num_bytes=draw(sizes)))
            growth.append(grows_by)
    for number in live:
        events.append(Event(action=Action.FREE_COMPLETED, id=number, num_bytes=0))
        growth.append(0)
    return Schedule(events=tuple(events), growth_bytes=tuple(growth), batch_size=3)


def both(
    capacity_bytes: int | None, order: BlockOrder
) -> tuple[CachingAllocator, CompiledAllocator]:
    usual = AllocatorSettings(block_order=order)
    quick = new_allocator(capacity_bytes=capacity_bytes, settings=usual)
    assert isinstance(quick, CompiledAllocator)
    return CachingAllocator(capacity_bytes=capacity_bytes, settings=usual), quick


def played(schedule: StepSchedule, allocator: Allocator, batch_size: int) -> tuple[object, ...]:
    message = None
    peaks: list[int] = []
    try:
        peaks.extend(schedule.play(allocator, batch_size))
    except AllocatorOutOfMemoryError as error:
        message = str(error)
    return message, peaks, allocator.stats, allocator.num_device_calls


@settings(max_examples=150, deadline=None)
@given(
    first=stretches(),
    later=stretches(),
    held=st.integers(1, 30 * MIB),
    capacity_mib=st.one_of(st.none(), st.integers(2, 300)),
    batch_size=st.integers(1, 40),
    order=st.sampled_from(BlockOrder),
)
def test_gives_the_figures_of_the_one_in_python(  # noqa: PLR0917 - what Hypothesis draws
    first: Schedule,
    later: Schedule,
    held: int,
    capacity_mib: int | None,
    batch_size: int,
    order: BlockOrder,
) -> None:
    """Every peak, retry, call of the device and message is the same, with and without a limit."""
    setup = Schedule.fixed([Event(action=Action.ALLOC, id=-1, num_bytes=held)])
    traced = StepSchedule(setup=setup, first=first, later=later).on(CARD)
    slow, quick = both(None if capacity_mib is None else capacity_mib * MIB, order)
    assert played(traced, quick, batch_size) == played(traced, slow, batch_size)


def test_many_blocks_and_ids_of_any_size() -> None:
    """Its tables grow, and ids that collide or were freed do not disturb each other."""
    slow, quick = both(None, BlockOrder.SEGMENT)
    ids = [(-1) ** number * number * (1 << 40) + number % 7 for number in range(3000)]
    for allocator in (slow, quick):
        for number in ids:
            allocator.allocate(number, abs(number) % (5 * MIB) + 1)
    frees = [Event(action=Action.FREE_COMPLETED, id=number, num_bytes=0) for number in ids[::2]]
    again = [Event(action=Action.ALLOC, id=number, num_bytes=700 * KIB) for number in ids[::2]]
    stretch = Schedule.fixed([*frees, *again, Event(action=Action.EMPTY_CACHE, id=0, num_bytes=0)])
    for allocator in (slow, quick):
        stretch.play(allocator, 1)
    assert quick.stats == slow.stats


def test_other_settings_are_left_to_python() -> None:
    """It knows the default settings, and segments of another size."""
    for other in (
        AllocatorSettings(expandable_segments=True),
        AllocatorSettings(max_split_size_bytes=32 * MIB),
        AllocatorSettings(roundup_power2_divisions=(4,) * 16),
        AllocatorSettings(memory_fraction=0.5),
    ):
        assert isinstance(new_allocator(capacity_bytes=None, settings=other), CachingAllocator)
    wide = AllocatorSettings(large_segment_bytes=64 * MIB)
    allocator = new_allocator(capacity_bytes=None, settings=wide)
    assert isinstance(allocator, CompiledAllocator)
    allocator.allocate(1, 2 * MIB)
    assert allocator.stats.reserved_bytes == 64 * MIB


def test_without_a_compiler_steps_are_replayed_in_python(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There is no error: only the speed differs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "compiler", lambda: None)
    module._library.cache_clear()
    try:
        allocator = new_allocator(capacity_bytes=None, settings=AllocatorSettings())
    finally:
        module._library.cache_clear()
    assert isinstance(allocator, CachingAllocator)


def test_the_source_compiles_without_warnings_and_touches_no_foreign_memory(tmp_path: Path) -> None:
    """A step that runs out, gives back, changes plans and splits runs under the sanitizers."""
    command = compiler()
    assert command is not None
    flags = ("-Wall", "-Wextra", "-Werror", "-fsanitize=undefined", "-fno-sanitize-recover=all")
    module.compile_library(tmp_path, command, flags=flags)
    library = module.opened(tmp_path)
    events = [
        Event(action=Action.ALLOC, id=number, num_bytes=(number + 1) * MIB) for number in range(20)
    ]
    events += [dataclasses.replace(e, action=Action.FREE_COMPLETED) for e in events[::3]]
    events += [Event(action=Action.ALLOC, id=100, num_bytes=230 * MIB)]
    stretch = Schedule.fixed(events)
    quick = CompiledAllocator(library, capacity_bytes=270 * MIB, settings=AllocatorSettings())
    slow = CachingAllocator(capacity_bytes=270 * MIB)
    for allocator in (slow, quick):
        with pytest.raises(AllocatorOutOfMemoryError):
            stretch.play(allocator, 1)
    assert quick.stats == slow.stats
    assert isinstance(library, ctypes.CDLL)

"""The replay of the caching allocator: its invariants, and the figures of its sources."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.records import Action, Event
from memfit.simulation.allocator import caching as module
from memfit.simulation.allocator.blocks import BlockOrder
from memfit.simulation.allocator.caching import (
    AllocatorOutOfMemoryError,
    CachingAllocator,
    round_request,
)
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.units import GIB, KIB, MIB

CONFIGURATIONS = (
    *(AllocatorSettings(block_order=order) for order in BlockOrder),
    *(AllocatorSettings(block_order=order, expandable_segments=True) for order in BlockOrder),
    AllocatorSettings(max_split_size_bytes=32 * MIB),
    AllocatorSettings(roundup_power2_divisions=(4,) * 16),
    AllocatorSettings(garbage_collection_threshold=0.6, memory_fraction=0.9),
)

requests = st.one_of(st.integers(1, 4 * KIB), st.integers(1, 2 * MIB), st.integers(MIB, 64 * MIB))
scripts = st.lists(st.tuples(st.booleans(), requests, st.integers(0, 2**16)), max_size=120)


def free_blocks(allocator: CachingAllocator) -> list[tuple[int, int]]:
    """Return address and size of every free block."""
    return [
        (block.address, block.size)
        for pool in (allocator._small, allocator._large)
        for block in pool.blocks
    ]


def check(allocator: CachingAllocator, capacity_bytes: int) -> None:
    stats = allocator.stats
    live = [(block.address, block.size) for block in allocator._live.values()]
    free = free_blocks(allocator)
    assert stats.requested_bytes <= stats.allocated_bytes <= stats.reserved_bytes <= capacity_bytes
    assert sum(size for _, size in live) == stats.allocated_bytes
    assert sum(size for _, size in live + free) == stats.reserved_bytes
    spans = sorted(live + free)
    assert all(
        address + size <= following for (address, size), (following, _) in itertools.pairwise(spans)
    )
    for pool in (allocator._small, allocator._large):
        order = [(block.size, block.rank, block.address) for block in pool.blocks]
        assert order == [tuple(entry[:-1]) for entry in pool.order] == sorted(order)
        for block in pool.blocks:
            assert block.next is None or not block.next.is_free


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@settings(max_examples=60, deadline=None)
@given(script=scripts)
def test_conserves_bytes(
    configuration: AllocatorSettings, script: list[tuple[bool, int, int]]
) -> None:
    """No blocks overlap or are lost, free neighbours are joined, and in the end all are free."""
    capacity_bytes = 400 * MIB
    allocator = CachingAllocator(capacity_bytes=capacity_bytes, settings=configuration)
    live: list[int] = []
    for number, (is_free, num_bytes, choice) in enumerate(script):
        if is_free and live:
            allocator.free(live.pop(choice % len(live)))
        else:
            try:
                allocator.allocate(number, num_bytes)
            except AllocatorOutOfMemoryError:
                assert not allocator.try_allocate(number, num_bytes)
            else:
                live.append(number)
        check(allocator, capacity_bytes)
    for number in live:
        allocator.free(number)
    allocator.empty_cache()
    assert allocator.stats.allocated_bytes == 0
    assert allocator.stats.reserved_bytes == 0
    assert allocator.stats.requested_bytes == 0


@settings(max_examples=60, deadline=None)
@given(script=scripts)
def test_a_roomy_device_changes_nothing(script: list[tuple[bool, int, int]]) -> None:
    """If the capacity is above the peak, all is as without a limit."""

    def run(capacity_bytes: int | None) -> CachingAllocator:
        allocator = CachingAllocator(capacity_bytes=capacity_bytes)
        live: list[int] = []
        for number, (is_free, num_bytes, choice) in enumerate(script):
            if is_free and live:
                allocator.free(live.pop(choice % len(live)))
            else:
                allocator.allocate(number, num_bytes)
                live.append(number)
        return allocator

    unlimited = run(None).stats
    assert run(max(1, unlimited.peak_reserved_bytes)).stats == unlimited


@pytest.mark.parametrize(
    ("num_bytes", "reserved_bytes"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB + 1, 12 * MIB),
    ],
)
def test_segments(num_bytes: int, reserved_bytes: int) -> None:
    """Small requests share 2 MiB, medium ones share 20 MiB, large ones get their own."""
    allocator = CachingAllocator()
    allocator.allocate(1, num_bytes)
    assert allocator.stats.reserved_bytes == reserved_bytes


def test_unsplit_rest_is_allocated_but_not_requested() -> None:
    """A large block whose rest is at most 1 MiB is handed out whole."""
    allocator = CachingAllocator()
    allocator.allocate(1, 11 * MIB + 1)
    stats = allocator.stats
    assert (stats.requested_bytes, stats.allocated_bytes) == (11 * MIB + 1, 12 * MIB)


def test_retry_gives_back_the_cache() -> None:
    """A cached segment that is too small is freed to make room, and that is counted."""
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.allocate(1, 60 * MIB)
    allocator.free(1)
    allocator.allocate(2, 80 * MIB)
    stats = allocator.stats
    assert (stats.reserved_bytes, stats.num_alloc_retries) == (80 * MIB, 1)


def test_a_split_segment_is_not_given_back() -> None:
    """Half a segment in use keeps all of it, so the device is full: fragmentation."""
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.allocate(1, 60 * MIB)
    allocator.free(1)
    allocator.allocate(2, 20 * MIB)
    with pytest.raises(AllocatorOutOfMemoryError, match="capacity is 104857600"):
        allocator.allocate(3, 50 * MIB)


def test_expandable_segments_do_not_fragment() -> None:
    """The same requests fit in expandable segments, whose free pages are unmapped."""
    allocator = CachingAllocator(
        capacity_bytes=100 * MIB, settings=AllocatorSettings(expandable_segments=True)
    )
    allocator.allocate(1, 60 * MIB)
    allocator.free(1)
    allocator.allocate(2, 20 * MIB)
    allocator.allocate(3, 50 * MIB)
    assert allocator.stats.reserved_bytes == 80 * MIB


def test_what_can_be_done_without_gives_nothing_back() -> None:
    """An optional request does not empty the cache; freeing a refused one is harmless."""
    allocator = CachingAllocator(capacity_bytes=100 * MIB)
    allocator.allocate(1, 60 * MIB)
    allocator.free(1)
    assert not allocator.try_allocate(2, 80 * MIB)
    allocator.free(2)
    assert allocator.stats.num_alloc_retries == 0
    assert allocator.try_allocate(3, 50 * MIB)


def test_max_split_size_withholds_oversize_blocks() -> None:
    """A block at or above the split limit is not split for a smaller request."""
    allocator = CachingAllocator(settings=AllocatorSettings(max_split_size_bytes=64 * MIB))
    allocator.allocate(1, 100 * MIB)
    allocator.free(1)
    allocator.allocate(2, 30 * MIB)
    assert allocator.stats.reserved_bytes == 130 * MIB
    allocator.allocate(3, 90 * MIB)
    assert allocator.stats.reserved_bytes == 130 * MIB


def test_garbage_collection_needs_a_cap() -> None:
    """Above the threshold unused segments are freed, but only if the process capped itself."""

    def reserved_bytes(*, is_capped: bool) -> int:
        allocator = CachingAllocator(
            capacity_bytes=GIB,
            settings=AllocatorSettings(garbage_collection_threshold=0.5),
            is_capped=is_capped,
        )
        for number in range(6):
            allocator.allocate(number, (100 + 2 * number) * MIB)
        for number in range(6):
            allocator.free(number)
        allocator.allocate(9, 200 * MIB)
        return allocator.stats.reserved_bytes

    assert reserved_bytes(is_capped=True) < reserved_bytes(is_capped=False)


def test_replay_follows_events() -> None:
    """Events of a stream run in order; segments in the events are computed again."""
    allocator = CachingAllocator()
    allocator.replay(
        (
            Event(action=Action.SEGMENT_ALLOC, id=9, num_bytes=20 * MIB),
            Event(action=Action.ALLOC, id=1, num_bytes=3 * MIB),
            Event(action=Action.TRY_ALLOC, id=2, num_bytes=30 * MIB),
            Event(action=Action.FREE_COMPLETED, id=2, num_bytes=0),
            Event(action=Action.EMPTY_CACHE, id=0, num_bytes=0),
        )
    )
    assert allocator.stats.reserved_bytes == 20 * MIB
    assert allocator.stats.peak_reserved_bytes == 50 * MIB


@pytest.mark.parametrize(
    ("num_bytes", "divisions", "rounded"),
    [
        (1, 0, 512),
        (513, 0, 1024),
        (1200 * MIB, 4, 1280 * MIB),
        (1024 * MIB, 4, 1024 * MIB),
        (1000, 4, 1024),
    ],
)
def test_rounding(num_bytes: int, divisions: int, rounded: int) -> None:
    """Sizes are rounded up to 512 B, or to a division of the next power of two."""
    configuration = AllocatorSettings(roundup_power2_divisions=(divisions,) * 16)
    assert round_request(num_bytes, configuration) == rounded


def test_constants_are_those_of_the_installed_torch() -> None:
    """The header that ships with torch has the same numbers."""
    header = Path(torch.__file__).parent / "include/c10/core/AllocatorConfig.h"
    if not header.exists():
        pytest.skip("this torch ships without AllocatorConfig.h")
    text = header.read_text()
    constants = {
        name: int(value) for name, value in re.findall(r"constexpr size_t (k\w+) = (\d+);", text)
    }
    ours = {
        "kMinBlockSize": module.MIN_BLOCK_BYTES,
        "kSmallSize": module.SMALL_REQUEST_BYTES,
        "kSmallBuffer": module.SMALL_SEGMENT_BYTES,
        "kMinLargeAlloc": module.MIN_OWN_SEGMENT_BYTES,
        "kRoundLarge": module.SEGMENT_ROUNDING_BYTES,
    }
    assert {name: constants[name] for name in ours} == ours

"""The layout of the allocator's memory."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.simulation.allocator.caching import CachingAllocator
from memfit.simulation.allocator.settings import AllocatorSettings

SIZES = st.integers(1, 50_000_000)


@pytest.mark.parametrize("is_expandable", [False, True])
@settings(deadline=None, max_examples=50)
@given(sizes=st.lists(SIZES, min_size=1, max_size=40), freed=st.sets(st.integers(0, 39)))
def test_segments_are_what_is_reserved(
    is_expandable: bool, sizes: list[int], freed: set[int]
) -> None:
    """Blocks fill their segments without gaps, and the sums are the allocator's figures."""
    chosen = AllocatorSettings(expandable_segments=is_expandable)
    allocator = CachingAllocator(settings=chosen)
    for number, num_bytes in enumerate(sizes):
        allocator.allocate(number, num_bytes)
    for number in freed:
        allocator.free(number)
    segments = allocator.segments()
    stats = allocator.stats
    assert sum(segment.num_bytes for segment in segments) == stats.reserved_bytes
    assert sum(segment.allocated_bytes for segment in segments) == stats.allocated_bytes
    blocks = [block for segment in segments for block in segment.blocks]
    assert sum(block.requested_bytes for block in blocks) == stats.requested_bytes
    live = {block.id: block.address for block in blocks if block.id is not None}
    assert set(live) == set(range(len(sizes))) - freed
    assert all(allocator.address_of(number) == address for number, address in live.items())
    for segment in segments:
        address = segment.address
        for block in segment.blocks:
            assert block.address == address
            address += block.num_bytes

"""The driver's addresses, held against what a real card recorded."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memfit.simulation.allocator.addresses import HANDLE_BYTES, Addresses
from memfit.simulation.allocator.blocks import BlockOrder
from memfit.simulation.allocator.caching import CachingAllocator
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.units import MIB

DATA = Path(__file__).parents[2] / "data"
RECORDED = ("h100-swin_tiny", "h100-vit_small")
HANDLE_WORKSPACE_BYTES = 32 * MIB


def recorded(name: str) -> Any:
    """Return a history of the caching allocator on an H100. Its file says of which program."""
    return json.loads(gzip.decompress((DATA / f"{name}.json.gz").read_bytes()))


class RecordedAddresses(Addresses):
    """The addresses that the real driver gave, in their order."""

    def __init__(self, events: list[tuple[str, int, int]]) -> None:
        super().__init__()
        self._recorded = iter([event[1:] for event in events if event[0] == "segment_alloc"])

    def place(self, num_bytes: int) -> int:
        address, recorded_bytes = next(self._recorded)
        assert recorded_bytes == num_bytes
        return address

    def vacate(self, address: int, num_bytes: int) -> None:
        pass


def replayed(history: Any, addresses: Addresses, *, checks_addresses: bool) -> None:
    """Replay a history, and compare the reserved bytes after every request."""
    torch_2_11 = AllocatorSettings(block_order=BlockOrder.ADDRESS)
    allocator = CachingAllocator(settings=torch_2_11)
    allocator._device.addresses = addresses
    allocator.allocate(0, 4)
    allocator.free(0)
    reserved = 0
    was_freeing = False
    for at, (action, address, num_bytes) in enumerate(history["events"]):
        if at == history["first_kernel"]:
            addresses.run_kernels()
        if action == "segment_free" and not was_freeing:
            allocator.empty_cache()
        was_freeing = action == "segment_free"
        if action.startswith("segment"):
            reserved += -num_bytes if was_freeing else num_bytes
        elif action == "free_completed":
            allocator.free(address)
        else:
            if num_bytes == HANDLE_WORKSPACE_BYTES and not checks_addresses:
                addresses.place(HANDLE_BYTES)
            allocator.allocate(address, num_bytes)
            assert allocator.stats.reserved_bytes == reserved, f"event {at}"
            if checks_addresses:
                assert allocator.address_of(address) == address, f"event {at}"


@pytest.mark.parametrize("name", RECORDED)
def test_the_allocator_is_the_real_one_at_the_real_addresses(name: str) -> None:
    """With segments where the driver put them, every block lies where it lay."""
    history = recorded(name)
    replayed(history, RecordedAddresses(history["events"]), checks_addresses=True)


@pytest.mark.parametrize("name", RECORDED)
def test_a_real_history_reserves_the_same_bytes(name: str) -> None:
    """With the model of the driver, the reserved bytes are the real ones after every request."""
    replayed(recorded(name), Addresses(), checks_addresses=False)


def test_the_newest_region_is_used_first_and_new_ones_lie_below() -> None:
    """The rest of a region is used before older ones. Empty regions are given up."""
    addresses = Addresses()
    first = addresses.place(2 * MIB)
    assert addresses.place(24 * MIB) == first + 74 * MIB  # what the first region has free
    a, b, c = (addresses.place(20 * MIB) for _ in range(3))
    assert (a - b, b - c) == (32 * MIB, 32 * MIB)
    assert addresses.place(2 * MIB) == c + 20 * MIB
    assert addresses.place(12 * MIB) == b + 20 * MIB
    addresses.vacate(a, 20 * MIB)
    assert addresses.place(40 * MIB) == c - 64 * MIB
    assert addresses.place(30 * MIB) == a
    assert addresses.run_kernels()
    assert not addresses.run_kernels()
    assert addresses.place(200 * MIB) == first - 414 * MIB


@settings(max_examples=60, deadline=None)
@given(
    script=st.lists(
        st.tuples(st.booleans(), st.integers(1, 60), st.integers(0, 2**16)), max_size=80
    )
)
def test_what_is_taken_never_overlaps(script: list[tuple[bool, int, int]]) -> None:
    """Ranges are disjoint, whatever is taken and given back in whatever order."""
    addresses = Addresses()
    taken: dict[int, int] = {}
    for number, (is_given_back, pages, choice) in enumerate(script):
        if number == len(script) // 2:
            addresses.run_kernels()
        if is_given_back and taken:
            address = sorted(taken)[choice % len(taken)]
            addresses.vacate(address, taken.pop(address))
            continue
        address = addresses.place(2 * MIB * pages)
        assert address not in taken
        taken[address] = 2 * MIB * pages
        ends = 0
        for start in sorted(taken):
            assert start >= ends
            ends = start + taken[start]

"""PyTorch's CUDA caching allocator without CUDA. It computes the bytes that requests reserve.

It runs the allocator's algorithm on integers: rounding, best fit, splitting, merging, giving back
cached memory when memory is short, and out of memory. It models native and expandable segments, on
one device and one stream. It does not handle more streams, private pools of CUDA graphs, or the
`cudaMallocAsync` backend. It does not use torch, so events of a traced step and events recorded on
a GPU are handled in the same way.

Source: c10/cuda/CUDACachingAllocator.cpp, with the constants of
    torch/include/c10/core/AllocatorConfig.h.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Final

from memfit.errors import MemfitError
from memfit.records import Action, Event
from memfit.simulation.allocator.addresses import HANDLE_BYTES
from memfit.simulation.allocator.blocks import Block, DeviceMemory, Pool, absorb, split
from memfit.simulation.allocator.expandable import expand, preferred, unmap
from memfit.simulation.allocator.segments import Segment, lay_out
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.units import MIB

__all__ = ["AllocatorOutOfMemoryError", "AllocatorStats", "CachingAllocator", "round_request"]

MIN_BLOCK_BYTES: Final = 512
SMALL_REQUEST_BYTES: Final = MIB
SMALL_SEGMENT_BYTES: Final = 2 * MIB
MIN_OWN_SEGMENT_BYTES: Final = 10 * MIB
SEGMENT_ROUNDING_BYTES: Final = 2 * MIB


class AllocatorOutOfMemoryError(MemfitError):
    """The simulated device has no room for a request, even after the cache was given back."""

    @classmethod
    def because(
        cls,
        num_bytes: int,
        *,
        reserved_bytes: int,
        allocated_bytes: int,
        capacity_bytes: float | None,
    ) -> AllocatorOutOfMemoryError:
        """Return the error of a request, with what the allocator held then."""
        return cls(
            f"The simulated device ran out of memory: {num_bytes} bytes were asked for, "
            f"{reserved_bytes} are reserved of which {allocated_bytes} are in use, and its "
            f"capacity is {capacity_bytes}."
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorStats:
    """Current and peak bytes of an allocator, named as in `torch.cuda.memory_stats`.

    Args:
        requested_bytes: Bytes that were requested for the blocks in use.
        allocated_bytes: Bytes of the blocks in use, including rounding and rests that were not
            split off.
        reserved_bytes: Bytes that are taken from the device.
        peak_requested_bytes: The largest `requested_bytes` so far.
        peak_allocated_bytes: The largest `allocated_bytes` so far.
        peak_reserved_bytes: The largest `reserved_bytes` so far.
        num_alloc_retries: How often the whole cache was given back to serve a request.
    """

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    peak_requested_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    num_alloc_retries: int


def round_request(num_bytes: int, settings: AllocatorSettings) -> int:
    """Return the size of the block that a request needs.

    Args:
        num_bytes: Bytes requested, at least 1.
        settings: The allocator's options.
    """
    if num_bytes < MIN_BLOCK_BYTES:
        return MIN_BLOCK_BYTES
    divisions = settings.divisions_at(num_bytes)
    if divisions > 1 and num_bytes > MIN_BLOCK_BYTES * divisions:
        return _next_division(num_bytes, divisions)
    return -(-num_bytes // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def _next_division(num_bytes: int, divisions: int) -> int:
    if num_bytes & (num_bytes - 1) == 0:
        return num_bytes
    floor = 1 << (num_bytes.bit_length() - 1)
    step = floor >> (divisions.bit_length() - 1)
    return -(-num_bytes // step) * step if step else floor * 2


class CachingAllocator:
    """The allocator of one device and one stream.

    Args:
        capacity_bytes: Bytes that can be taken from the device; `None` for no limit.
        settings: The allocator's options.
        is_capped: Whether the process set the capacity itself, as a share of the device
            (`set_per_process_memory_fraction`). Garbage collection runs only in this case.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int | None = None,
        settings: AllocatorSettings | None = None,
        is_capped: bool = False,
    ) -> None:
        self._settings = settings = settings or AllocatorSettings()
        if capacity_bytes is not None and settings.memory_fraction is not None:
            capacity_bytes = int(capacity_bytes * settings.memory_fraction)
        self._device = DeviceMemory(float("inf") if capacity_bytes is None else capacity_bytes)
        is_capped = is_capped or settings.memory_fraction is not None
        self._collects_above = (
            self._device.capacity_bytes * settings.garbage_collection_threshold
            if is_capped and settings.garbage_collection_threshold is not None
            else float("inf")
        )
        self._max_split = (
            float("inf") if settings.max_split_size_bytes is None else settings.max_split_size_bytes
        )
        self._rounds_to_divisions = max(settings.roundup_power2_divisions) > 1
        self._expandable = settings.expandable_segments
        self._is_plain = not self._expandable and settings.max_split_size_bytes is None
        order = settings.block_order
        self._small = Pool(is_small=True, page_bytes=SMALL_SEGMENT_BYTES, block_order=order)
        large_bytes = settings.large_segment_bytes
        self._large = Pool(is_small=False, page_bytes=large_bytes, block_order=order)
        self._live: dict[int, Block] = {}
        self._requested = self._allocated = 0
        self._peak_requested = self._peak_allocated = 0
        self._num_alloc_retries = 0

    @property
    def stats(self) -> AllocatorStats:
        """The current and peak bytes."""
        return AllocatorStats(
            requested_bytes=self._requested,
            allocated_bytes=self._allocated,
            reserved_bytes=self._device.taken_bytes,
            peak_requested_bytes=self._peak_requested,
            peak_allocated_bytes=self._peak_allocated,
            peak_reserved_bytes=self._device.peak_bytes,
            num_alloc_retries=self._num_alloc_retries,
        )

    @property
    def num_device_calls(self) -> int:
        """How often memory was taken from the device or given back to it."""
        return self._device.num_calls

    def replay(self, events: Iterable[Event]) -> None:
        """Carry out a stream of events.

        Args:
            events: Allocations and frees. Events of segments in a recorded history are ignored,
                because segments are computed here.

        Raises:
            AllocatorOutOfMemoryError: A request found no room.
        """
        for event in events:
            self.carry_out(event.action, event.id, event.num_bytes)

    def carry_out(self, action: Action, block_id: int, num_bytes: int) -> bool:
        """Carry out one action. Actions on segments do nothing, because segments are computed here.

        A phase that begins runs kernels.

        Args:
            action: The action.
            block_id: The id of the allocation.
            num_bytes: Bytes requested.

        Returns:
            Whether a request was served. An optional request may fail.

        Raises:
            AllocatorOutOfMemoryError: A request found no room.
        """
        if action is Action.ALLOC:
            self.allocate(block_id, num_bytes)
        elif action is Action.FREE_COMPLETED:
            self.free(block_id)
        elif action is Action.TRY_ALLOC:
            return self.try_allocate(block_id, num_bytes)
        elif action is Action.ALLOC_IF_ROOM:
            try:
                self.allocate(block_id, num_bytes)
            except AllocatorOutOfMemoryError:
                return False
        elif action is Action.EMPTY_CACHE:
            self.empty_cache()
        elif action is Action.USER_DEFINED:
            self._run_kernels()
        return True

    def allocate(self, block_id: int, num_bytes: int) -> None:
        """Serve a request.

        Args:
            block_id: An id for `free`. No other block in use has it.
            num_bytes: Bytes requested. For 0, nothing is allocated, as in PyTorch.

        Raises:
            AllocatorOutOfMemoryError: There is no room, even after the cache was given back.
        """
        if num_bytes <= 0:
            return
        # The code of `_rounded`, repeated here because a replay runs it very often.
        if self._rounds_to_divisions:
            size = round_request(num_bytes, self._settings)
        else:
            size = (num_bytes + 511) & -512
        pool = self._small if size <= SMALL_REQUEST_BYTES else self._large
        block = self._take_free(pool, size) or self._take_new(pool, size)
        if block is None:
            raise AllocatorOutOfMemoryError.because(
                num_bytes,
                reserved_bytes=self._device.taken_bytes,
                allocated_bytes=self._allocated,
                capacity_bytes=self._device.capacity_bytes,
            )
        self._hand_out(block, block_id, size, num_bytes)

    def try_allocate(self, block_id: int, num_bytes: int) -> bool:
        """Try to serve an optional request, such as a convolution's workspace.

        PyTorch drops a cuDNN plan that needs more than both the largest free block and the free
        memory of the device. So no cached memory is given back for such a request.

        Args:
            block_id: An id for `free`. If the request was not served, `free` does nothing.
            num_bytes: Bytes requested.

        Returns:
            Whether it was served.

        Source: `cacheInfo` and its use in aten/src/ATen/native/cudnn/Conv_v8.cpp.
        """
        if num_bytes <= 0:
            return False
        size, pool = self._rounded(num_bytes)
        block = self._take_free(pool, size) or self._new_block(pool, size)
        if block is None:
            return False
        self._hand_out(block, block_id, size, num_bytes)
        return True

    def free(self, block_id: int) -> None:
        """Free a block. It merges with its free neighbours and stays reserved.

        Args:
            block_id: The id from `allocate`. An unknown id belongs to an empty request or to one
                that was not served.
        """
        block = self._live.pop(block_id, None)
        if block is None:
            return
        self._requested -= block.requested
        self._allocated -= block.size
        pool = block.pool
        block.born = pool.num_searches
        neighbour = block.previous
        if neighbour is not None and neighbour.is_free and neighbour.is_mapped:
            pool.remove(neighbour)
            absorb(block, neighbour)
        neighbour = block.next
        if neighbour is not None and neighbour.is_free and neighbour.is_mapped:
            pool.remove(neighbour)
            absorb(block, neighbour)
        # The code of Pool.insert, repeated here because a replay runs it very often.
        insort(pool.order, (block.size, block.rank, block.address, block))
        block.is_free = True

    def empty_cache(self) -> None:
        """Give back all segments, and all pages of expandable segments, without blocks in use."""
        for pool in (self._small, self._large):
            for block in pool.blocks:
                if self._expandable:
                    unmap(block, self._device)
                elif block.is_whole_segment:
                    self._release(block)

    def address_of(self, block_id: int) -> int:
        """Return the address of a block in use."""
        return self._live[block_id].address

    def segments(self) -> tuple[Segment, ...]:
        """Return the segments that were taken from the device, with their blocks."""
        return lay_out(self._live, [*self._small.blocks, *self._large.blocks])

    # --- finding a block -----------------------------------------------------------------------

    def _rounded(self, num_bytes: int) -> tuple[int, Pool]:
        if self._rounds_to_divisions:
            size = round_request(num_bytes, self._settings)
        else:
            size = (num_bytes + 511) & -512
        return size, self._small if size <= SMALL_REQUEST_BYTES else self._large

    def _take_free(self, pool: Pool, size: int) -> Block | None:
        """Best fit: the smallest free block that is large enough."""
        pool.num_searches += 1
        order = pool.order
        index = bisect_left(order, (size,))
        if index == len(order):
            return None
        if self._is_plain:
            block = order.pop(index)[3]
            block.is_free = False
            return block
        block = preferred(pool, index) if self._expandable else order[index][3]
        if size < self._max_split:
            if block.size >= self._max_split:
                return None
        elif block.size >= size + self._settings.max_non_split_rounding_bytes:
            return None
        pool.remove(block)
        return block

    def _take_new(self, pool: Pool, size: int) -> Block | None:
        """Take memory from the device. If there is not enough, give back cached memory first."""
        if self._device.taken_bytes > self._collects_above:
            self._collect_garbage()
        block = self._new_block(pool, size)
        if block is None and self._release_available(pool, size):
            block = self._new_block(pool, size)
        if block is None:
            self.empty_cache()
            self._num_alloc_retries += 1
            block = self._new_block(pool, size)
        return block

    def _new_block(self, pool: Pool, size: int) -> Block | None:
        if self._expandable:
            return expand(pool, size, self._device)
        segment = self._segment_bytes(size)
        if not self._device.take(segment):
            return None
        address = self._device.addresses.place(segment)
        return Block(address, segment, pool, rank=pool.new_rank())

    def _segment_bytes(self, size: int) -> int:
        if size <= SMALL_REQUEST_BYTES:
            return SMALL_SEGMENT_BYTES
        if size < MIN_OWN_SEGMENT_BYTES:
            return self._settings.large_segment_bytes
        return -(-size // SEGMENT_ROUNDING_BYTES) * SEGMENT_ROUNDING_BYTES

    def _hand_out(self, block: Block, block_id: int, size: int, num_bytes: int) -> None:
        rest = block.size - size
        if rest and (
            rest >= MIN_BLOCK_BYTES
            if block.pool.is_small or self._expandable
            else rest > SMALL_REQUEST_BYTES and size < self._max_split
        ):
            split(block, size)
        block.requested = num_bytes
        self._live[block_id] = block
        # max() would be slower, and this code runs a hundred thousand times in a search.
        self._requested = requested = self._requested + num_bytes
        if requested > self._peak_requested:  # noqa: PLR1730
            self._peak_requested = requested
        self._allocated = allocated = self._allocated + block.size
        if allocated > self._peak_allocated:  # noqa: PLR1730
            self._peak_allocated = allocated

    # --- giving back ---------------------------------------------------------------------------

    def _release(self, block: Block) -> None:
        block.pool.remove(block)
        self._device.give_back(block.size)
        self._device.addresses.vacate(block.address, block.size)

    def _release_available(self, pool: Pool, size: int) -> bool:
        """With `max_split_size_mb`, give back just enough oversized blocks for a request."""
        if self._max_split == float("inf") or self._expandable:
            return False
        wanted = max(size, int(self._max_split))
        index = pool.first_of(wanted)
        if index < len(pool.order):
            self._release(pool.order[index][3])
            return True
        released = 0
        for block in reversed(pool.blocks):
            if released >= wanted or block.size < self._max_split:
                break
            self._release(block)
            released += block.size
        return released >= wanted

    def _run_kernels(self) -> None:
        addresses = self._device.addresses
        if addresses.run_kernels():
            # cuBLAS's first handle is made soon after.
            addresses.place(HANDLE_BYTES)

    def _collect_garbage(self) -> None:
        """Give back free segments that were unused for longer than the average."""
        target = self._device.taken_bytes - self._collects_above
        pool = self._large
        reclaimed = 0
        freeable = [block for block in pool.blocks if block.is_whole_segment]
        while reclaimed < target and freeable:
            ages = {id(block): pool.num_searches - block.born for block in freeable}
            average = sum(ages.values()) / len(freeable)
            old = [block for block in freeable if ages[id(block)] >= average]
            for block in old:
                self._release(block)
                reclaimed += block.size
            freeable = [block for block in freeable if block.is_free]

"""The caching allocator's bookkeeping: blocks, the pools that index them, the device's memory.

`caching` and `expandable` decide which block to take, when to split it, and what to give back.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, insort

from memfit.simulation.allocator.addresses import Addresses

__all__ = ["Block", "BlockOrder", "DeviceMemory", "Pool", "absorb", "split"]


class BlockOrder(enum.IntEnum):
    """Which of the free blocks of one size torch takes: the one with the lowest rank.

    Source: the comparators of blocks in c10/cuda/CUDACachingAllocator.cpp by release (in their
        names in libc10_cuda.so: `BlockComparatorSize` up to torch 2.11,
        `BlockComparatorRegistrationCounter` in 2.12, `BlockComparatorSizeCounterAddress` since
        2.13), and pytorch/pytorch#178362 and #183591.
    """

    ADDRESS = 0
    """Up to torch 2.11: the one at the lowest address."""

    BLOCK = 1
    """torch 2.12: the oldest. The front of a block that is split is a new one."""

    SEGMENT = 2
    """Since torch 2.13: the one in the oldest segment; in one segment, at the lowest address."""

    @classmethod
    def of(cls, torch_release: tuple[int, int]) -> BlockOrder:
        """Return the order of a release of torch.

        Args:
            torch_release: Its major and minor version.
        """
        if torch_release < (2, 12):
            return cls.ADDRESS
        return cls.BLOCK if torch_release < (2, 13) else cls.SEGMENT


class DeviceMemory:
    """Counts the bytes that are taken from a device, and has their addresses.

    Args:
        capacity_bytes: Bytes that the device has; infinity for no limit.
    """

    __slots__ = ("addresses", "capacity_bytes", "num_calls", "peak_bytes", "taken_bytes")

    def __init__(self, capacity_bytes: float) -> None:
        self.capacity_bytes = capacity_bytes
        self.taken_bytes = 0
        self.peak_bytes = 0
        self.num_calls = 0
        self.addresses = Addresses()

    def take(self, num_bytes: int) -> bool:
        """Take memory if there is enough. Return whether it was taken."""
        if self.taken_bytes + num_bytes > self.capacity_bytes:
            return False
        self.num_calls += 1
        self.taken_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.taken_bytes)
        return True

    def give_back(self, num_bytes: int) -> None:
        """Give memory back."""
        self.num_calls += 1
        self.taken_bytes -= num_bytes


class Block:
    """A part of a segment. A free block is in its pool's index, mapped or not."""

    __slots__ = (
        "address",
        "born",
        "is_free",
        "is_mapped",
        "next",
        "pool",
        "previous",
        "rank",
        "requested",
        "size",
    )

    def __init__(
        self,
        address: int,
        size: int,
        pool: Pool,
        previous: Block | None = None,
        following: Block | None = None,
        *,
        rank: int = 0,
    ) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.rank = rank
        self.requested = 0
        self.is_free = False
        self.is_mapped = True
        self.previous = previous
        self.next = following
        self.born = 0

    @property
    def is_whole_segment(self) -> bool:
        """Whether the block is the only one in its segment."""
        return self.previous is None and self.next is None


class Pool:
    """The free blocks for small or for large requests, by size, then by rank, then by address.

    Args:
        is_small: Whether it serves small requests.
        page_bytes: The pages of its expandable segments.
        block_order: What a block's rank is.
    """

    __slots__ = (
        "_block_order",
        "_newest_rank",
        "is_small",
        "num_searches",
        "order",
        "page_bytes",
        "ranks_fronts",
        "unmapped",
    )

    def __init__(self, *, is_small: bool, page_bytes: int, block_order: BlockOrder) -> None:
        self.is_small = is_small
        self.page_bytes = page_bytes
        self.ranks_fronts = block_order is BlockOrder.BLOCK
        self._block_order = block_order
        self._newest_rank = 0
        self.order: list[tuple[int, int, int, Block]] = []
        self.num_searches = 0
        # For expandable segments: addresses that have no memory yet.
        self.unmapped: list[Block] = []

    def new_rank(self) -> int:
        """Return the rank of a new segment, or of a new block where blocks have their own."""
        if self._block_order is not BlockOrder.ADDRESS:
            self._newest_rank += 1
        return self._newest_rank

    @property
    def blocks(self) -> list[Block]:
        """The free blocks, smallest first."""
        return [entry[-1] for entry in self.order]

    def first_of(self, num_bytes: int) -> int:
        """Return the index in `order` of the smallest block of at least `num_bytes` bytes."""
        return bisect_left(self.order, (num_bytes,))

    def insert(self, block: Block) -> None:
        """Put a free block into the index."""
        insort(self.order, (block.size, block.rank, block.address, block))
        block.is_free = True

    def remove(self, block: Block) -> None:
        """Take a free block out of the index."""
        # A shorter tuple sorts before a longer one with the same start, so no blocks are compared.
        del self.order[bisect_left(self.order, (block.size, block.rank, block.address))]
        block.is_free = False


def absorb(block: Block, neighbour: Block) -> None:
    """Join a neighbour to a block. The neighbour has already left the index."""
    if neighbour is block.previous:
        block.address = neighbour.address
        block.previous = neighbour.previous
        if block.previous is not None:
            block.previous.next = block
    else:
        block.next = neighbour.next
        if block.next is not None:
            block.next.previous = block
    block.size += neighbour.size


def split(block: Block, size: int) -> None:
    """Keep the first `size` bytes of a block, and put the rest into the index as a free block."""
    following, pool = block.next, block.pool
    rest = Block(block.address + size, block.size - size, pool, block, following, rank=block.rank)
    rest.born = block.born
    if following is not None:
        following.previous = rest
    block.next = rest
    block.size = size
    if pool.ranks_fronts:
        block.rank = pool.new_rank()
    # The code of Pool.insert, repeated here because a replay runs it very often.
    insort(pool.order, (rest.size, rest.rank, rest.address, rest))
    rest.is_free = True

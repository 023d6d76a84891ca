"""The caching allocator's bookkeeping: blocks, the pools that index them, the device's memory.

Policy (which block, when to split, what to give back) is in `caching` and `expandable`.
"""

from __future__ import annotations

from bisect import bisect_left, insort

__all__ = ["Block", "DeviceMemory", "Pool", "absorb", "split"]


class DeviceMemory:
    """How much of a device is taken.

    Args:
        capacity_bytes: What there is; infinity for no limit.
    """

    __slots__ = ("capacity_bytes", "num_calls", "peak_bytes", "taken_bytes")

    def __init__(self, capacity_bytes: float) -> None:
        self.capacity_bytes = capacity_bytes
        self.taken_bytes = 0
        self.peak_bytes = 0
        self.num_calls = 0

    def take(self, num_bytes: int) -> bool:
        """Take memory if there is enough, and say whether there was."""
        self.num_calls += 1
        if self.taken_bytes + num_bytes > self.capacity_bytes:
            return False
        self.taken_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.taken_bytes)
        return True

    def give_back(self, num_bytes: int) -> None:
        """Give memory back."""
        self.num_calls += 1
        self.taken_bytes -= num_bytes


class Block:
    """A stretch of a segment. Free ones are in their pool's index, mapped or not."""

    __slots__ = (
        "address",
        "born",
        "is_free",
        "is_mapped",
        "next",
        "pool",
        "previous",
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
    ) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.requested = 0
        self.is_free = False
        self.is_mapped = True
        self.previous = previous
        self.next = following
        self.born = 0

    @property
    def is_whole_segment(self) -> bool:
        """Whether nothing else is in its segment."""
        return self.previous is None and self.next is None


class Pool:
    """Free blocks of small or of large requests, ordered by size, then address."""

    __slots__ = ("is_small", "num_searches", "order", "page_bytes", "unmapped")

    def __init__(self, *, is_small: bool, page_bytes: int) -> None:
        self.is_small = is_small
        self.page_bytes = page_bytes
        self.order: list[tuple[int, int, Block]] = []
        self.num_searches = 0
        # Of expandable segments: the rest of the address space that no memory is behind yet.
        self.unmapped: list[Block] = []

    @property
    def blocks(self) -> list[Block]:
        """The free blocks, smallest first."""
        return [block for _, _, block in self.order]

    def first_of(self, num_bytes: int) -> int:
        """Return the index in `order` of the smallest block of at least so many bytes."""
        return bisect_left(self.order, (num_bytes,))

    def insert(self, block: Block) -> None:
        """Index a block as free."""
        insort(self.order, (block.size, block.address, block))
        block.is_free = True

    def remove(self, block: Block) -> None:
        """Take a free block out of the index."""
        # A shorter tuple comes before the one that it begins, so blocks are never compared.
        del self.order[bisect_left(self.order, (block.size, block.address))]
        block.is_free = False


def absorb(block: Block, neighbour: Block) -> None:
    """Join a neighbour, which is in no index any more, to a block."""
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
    """Keep the first `size` bytes of a block and index the rest as free."""
    following, pool = block.next, block.pool
    rest = Block(block.address + size, block.size - size, pool, block, following)
    rest.born = block.born
    if following is not None:
        following.previous = rest
    block.next = rest
    block.size = size
    # As Pool.insert, which a replay would call as often as this.
    insort(pool.order, (rest.size, rest.address, rest))
    rest.is_free = True

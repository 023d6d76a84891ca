"""Expandable segments: each pool has one growing range of addresses, mapped page by page.

Source: `ExpandableSegment`, `try_allocate_expandable_block`, `map_block` and `unmap_block` in
    c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from typing import Final

from memfit.simulation.allocator.blocks import Block, DeviceMemory, Pool, absorb

__all__ = ["expand", "preferred", "unmap"]

# More than any step needs. PyTorch uses 9/8 of the device's memory.
_ADDRESS_SPACE_BYTES: Final = 1 << 60


def preferred(pool: Pool, index: int) -> Block:
    """Return the block to take. Of the blocks that are large enough, prefer one that can grow less.

    Args:
        pool: The pool to look in.
        index: The index of the smallest block that is large enough, in the pool's order.
    """
    block = pool.order[index][3]
    for *_, following in pool.order[index + 1 :]:
        if _expandable_size(following) >= _expandable_size(block):
            break
        block = following
    return block


def expand(pool: Pool, size: int, device: DeviceMemory) -> Block | None:
    """Map memory at the lowest free range of addresses that is long enough.

    Args:
        pool: The pool that grows.
        size: Bytes wanted.
        device: The device that gives the memory.

    Returns:
        A block of at least that size, which is in no index; `None` if the device has too little
        memory left.
    """
    if not pool.unmapped:
        base = 1 << (62 if pool.is_small else 61)
        pool.unmapped.append(_endless(address=base, pool=pool))
    for unmapped in pool.unmapped:
        first = unmapped
        if unmapped.previous is not None and unmapped.previous.is_free:
            first = unmapped.previous
        if _room_from(first, size):
            break
    block = first if first.is_mapped else _map(first, size, device)
    while block is not None and block.size < size:
        following = block.next
        assert following is not None
        block = _map(following, size - block.size, device)
    if block is not None:
        pool.remove(block)
    return block


def _map(block: Block, size: int, device: DeviceMemory) -> Block | None:
    """Map pages at the start of an unmapped block, and merge them with free neighbours."""
    pool = block.pool
    pages = -(-min(size, block.size) // pool.page_bytes) * pool.page_bytes
    if not device.take(pages):
        return None
    pool.unmapped.remove(block)
    if pages < block.size:
        rest = Block(block.address + pages, block.size - pages, pool, rank=_rank_of_part(block))
        rest.is_mapped = False
        rest.previous, rest.next = block, block.next
        if block.next is not None:
            block.next.previous = rest
        block.next = rest
        block.size = pages
        _insert_by_address(pool.unmapped, rest)
    block.is_mapped = True
    for neighbour in (block.previous, block.next):
        if neighbour is not None and neighbour.is_free:
            pool.remove(neighbour)
            absorb(block, neighbour)
    pool.insert(block)
    return block


def unmap(block: Block, device: DeviceMemory) -> None:
    """Give back the whole pages inside a free block."""
    pool, page = block.pool, block.pool.page_bytes
    begin = -(-block.address // page) * page
    end = (block.address + block.size) // page * page
    if begin >= end:
        return
    pool.remove(block)
    if begin > block.address:
        before = Block(block.address, begin - block.address, pool, rank=_rank_of_part(block))
        before.previous, before.next = block.previous, block
        if block.previous is not None:
            block.previous.next = before
        block.previous = before
        pool.insert(before)
    if block.address + block.size > end:
        after = Block(end, block.address + block.size - end, pool, rank=_rank_of_part(block))
        after.previous, after.next = block, block.next
        if block.next is not None:
            block.next.previous = after
        block.next = after
        pool.insert(after)
    block.address, block.size, block.is_mapped = begin, end - begin, False
    device.give_back(block.size)
    for neighbour in (block.previous, block.next):
        if neighbour is not None and not neighbour.is_mapped:
            pool.unmapped.remove(neighbour)
            absorb(block, neighbour)
    _insert_by_address(pool.unmapped, block)


def _rank_of_part(block: Block) -> int:
    return block.pool.new_rank() if block.pool.ranks_fronts else block.rank


def _endless(*, address: int, pool: Pool) -> Block:
    first_page = address // pool.page_bytes * pool.page_bytes
    block = Block(first_page, _ADDRESS_SPACE_BYTES, pool, rank=pool.new_rank())
    block.is_mapped = False
    return block


def _insert_by_address(blocks: list[Block], block: Block) -> None:
    blocks.append(block)
    blocks.sort(key=lambda member: member.address)


def _expandable_size(block: Block) -> int:
    following = block.next
    grows = following is not None and not following.is_mapped
    return block.size + (following.size if grows and following is not None else 0)


def _room_from(block: Block, size: int) -> bool:
    """Whether this block and the free or unmapped blocks after it have room for a request."""
    room = 0
    here: Block | None = block
    while here is not None and room < size and (here.is_free or not here.is_mapped):
        room += here.size
        here = here.next
    return room >= size

"""The layout of the caching allocator's memory: segments, divided into blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from memfit.simulation.allocator.blocks import Block

__all__ = ["Segment", "SegmentBlock", "lay_out"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SegmentBlock:
    """A part of a segment.

    Args:
        address: The address of its first byte.
        num_bytes: Its size.
        requested_bytes: Bytes that were requested; 0 if it is free.
        id: The id of the allocation in it; `None` if it is free.
    """

    address: int
    num_bytes: int
    requested_bytes: int
    id: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A range of memory taken from the device. For an expandable segment, a mapped range.

    Args:
        address: The address of its first byte.
        is_small: Whether it serves small requests.
        blocks: The blocks that it is divided into, in the order of addresses.
    """

    address: int
    is_small: bool
    blocks: tuple[SegmentBlock, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that were taken from the device."""
        return sum(block.num_bytes for block in self.blocks)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of it that are in use."""
        return sum(block.num_bytes for block in self.blocks if block.id is not None)


def lay_out(live: Mapping[int, Block], free: Iterable[Block]) -> tuple[Segment, ...]:
    """Return the segments that blocks belong to.

    Args:
        live: The blocks in use, by allocation.
        free: The cached blocks.

    Returns:
        The segments, in the order of addresses.
    """
    known: list[tuple[Block, int | None]] = [(block, number) for number, block in live.items()]
    known += [(block, None) for block in free]
    known.sort(key=lambda pair: pair[0].address)
    runs: list[list[tuple[Block, int | None]]] = []
    for block, number in known:
        if runs and runs[-1][-1][0] is block.previous:
            runs[-1].append((block, number))
        else:
            runs.append([(block, number)])
    return tuple(
        Segment(
            address=run[0][0].address,
            is_small=run[0][0].pool.is_small,
            blocks=tuple(
                SegmentBlock(
                    address=block.address,
                    num_bytes=block.size,
                    requested_bytes=0 if number is None else block.requested,
                    id=number,
                )
                for block, number in run
            ),
        )
        for run in runs
    )

"""How the caching allocator's memory lies: segments, and the blocks that they are divided into."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from memfit.simulation.allocator.blocks import Block

__all__ = ["Segment", "SegmentBlock", "lay_out"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SegmentBlock:
    """A stretch of a segment.

    Args:
        address: Where it begins.
        num_bytes: How long it is.
        requested_bytes: What was asked for; 0 where it is free.
        id: Which allocation is in it; `None` where it is free.
    """

    address: int
    num_bytes: int
    requested_bytes: int
    id: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of memory taken from the device; of an expandable segment, one that is mapped.

    Args:
        address: Where it begins.
        is_small: It serves small requests.
        blocks: What it is divided into, in the order of addresses.
    """

    address: int
    is_small: bool
    blocks: tuple[SegmentBlock, ...]

    @property
    def num_bytes(self) -> int:
        """How much was taken from the device."""
        return sum(block.num_bytes for block in self.blocks)

    @property
    def allocated_bytes(self) -> int:
        """How much of it is handed out."""
        return sum(block.num_bytes for block in self.blocks if block.id is not None)


def lay_out(live: Mapping[int, Block], free: Iterable[Block]) -> tuple[Segment, ...]:
    """Put blocks back together.

    Args:
        live: Blocks that are handed out, by allocation.
        free: Those that are cached.

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

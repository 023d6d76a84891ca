"""Which blocks to recompute so that a step fits, with the fewest operations done again.

A step is seen as moments, each with the bytes that are held then and with the blocks that are
*parked*: their forward has ended and their backward has not begun. If a parked block is recomputed,
its activations are not held at that moment. Before its own backward they are made again. So the
choice is a knapsack with one condition for each moment, and it is solved exactly, block by block.
This module does not use torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

__all__ = ["Block", "Moment", "Recomputable"]

# So many choices are followed at a time. Blocks that are alike need few.
_WIDTH = 2000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block that can be recomputed.

    Args:
        name: The path of its module.
        flops: Operations of its forward.
        parked_bytes: What is not held between its forward and its backward if it is recomputed.
        recomputed_bytes: The bytes that are held when it is computed again, if no other block is
            recomputed: those before its backward, without its own activations, and the peak of its
            forward.
    """

    name: str
    flops: int
    parked_bytes: int
    recomputed_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """A part of the step between two of its marks.

    Args:
        held_bytes: The most that is held in it.
        num_parked: How many blocks, counted from the first one, are parked in it.
    """

    held_bytes: int
    num_parked: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Choice:
    """A choice for the first blocks: which (as bits), what it frees and what it costs."""

    freed_bytes: int
    flops: int
    chosen: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recomputable:
    """A step whose blocks can be recomputed.

    Args:
        blocks: Its blocks, in the order of forward.
        moments: Its moments.
        total_flops: Operations of the whole forward.
    """

    blocks: tuple[Block, ...]
    moments: tuple[Moment, ...]
    total_flops: int

    def cheapest(self, limit_bytes: int) -> tuple[str, ...] | None:
        """Return the blocks to recompute so that no moment holds more than a limit.

        Args:
            limit_bytes: The most that may be held.

        Returns:
            The names of the blocks whose recomputation does the fewest operations again, in the
            order of forward; `None` if not even all blocks are enough.
        """
        needed = self._needed(limit_bytes)
        choices = [_Choice(0, 0, 0)] if needed[0] <= 0 else []
        for index, block in enumerate(self.blocks):
            again = [
                _Choice(
                    choice.freed_bytes + block.parked_bytes,
                    choice.flops + block.flops,
                    choice.chosen | 1 << index,
                )
                for choice in choices
                if block.recomputed_bytes - choice.freed_bytes <= limit_bytes
            ]
            choices = _best([*choices, *again], least_bytes=needed[index + 1])
        if not choices:
            return None
        found = min(choices, key=lambda choice: (choice.flops, choice.chosen.bit_count()))
        return tuple(
            block.name for index, block in enumerate(self.blocks) if found.chosen >> index & 1
        )

    def peak_of(self, names: Sequence[str]) -> int:
        """Return the most bytes that the step holds if some blocks are recomputed."""
        chosen = set(names)
        freed = [0]
        for block in self.blocks:
            freed.append(freed[-1] + (block.parked_bytes if block.name in chosen else 0))
        held = [moment.held_bytes - freed[moment.num_parked] for moment in self.moments]
        held += [
            block.recomputed_bytes - freed[index]
            for index, block in enumerate(self.blocks)
            if block.name in chosen
        ]
        return max(held, default=0)

    def share_of(self, names: Sequence[str]) -> float:
        """Return the operations of some blocks' forward, as a share of the whole forward."""
        chosen = set(names)
        again = sum(block.flops for block in self.blocks if block.name in chosen)
        return again / self.total_flops if self.total_flops else 0.0

    def _needed(self, limit_bytes: int) -> list[int]:
        """Return what the first blocks have to free together, for each number of them."""
        needed = [0] * (len(self.blocks) + 1)
        for moment in self.moments:
            over = moment.held_bytes - limit_bytes
            needed[moment.num_parked] = max(needed[moment.num_parked], over)
        return needed


def _best(choices: list[_Choice], *, least_bytes: int) -> list[_Choice]:
    """Return the choices that free enough, and for which no other frees as much and costs less."""
    found: list[_Choice] = []
    for choice in sorted(choices, key=lambda one: (-one.freed_bytes, one.flops)):
        if choice.freed_bytes < least_bytes:
            break
        if not found or choice.flops < found[-1].flops:
            found.append(choice)
    if len(found) <= _WIDTH:
        return found
    # What frees almost the same is told apart by its cost.
    first, last = found[0].freed_bytes, found[-1].freed_bytes
    step = (first - last) // _WIDTH + 1
    kept: dict[int, _Choice] = {}
    for choice in found:
        kept[(first - choice.freed_bytes) // step] = choice
    return [found[0], *(choice for choice in kept.values() if choice is not found[0])]

"""What the tensors of a step hold at most, as a maximum of lines over the batch size.

Each moment of a step holds some bytes, and more with every sample. The peak of any batch size is
one of these lines. The rounding and the cache of the allocator are not here. This module does not
use torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from memfit.records import Action, Event

__all__ = ["largest_within", "tensor_lines"]

_ALLOC, _FREE_COMPLETED = Action.ALLOC, Action.FREE_COMPLETED


def tensor_lines(
    stretches: Iterable[tuple[Sequence[Event], Sequence[float], int]],
) -> dict[float, float]:
    """Find the moments that can be the peak of some batch size.

    Args:
        stretches: The events of each stretch of a step, what each event's bytes grow by with a
            sample, and the batch size of the events.

    Returns:
        What tensors hold at some moment: for each growth with a sample, the most at no sample.
        Moments that are the peak of no batch size are left out.
    """
    held = growth = 0.0
    live: dict[int, tuple[float, float]] = {}
    lines: dict[float, float] = {}
    for events, growth_bytes, batch_size in stretches:
        for event, slope in zip(events, growth_bytes, strict=True):
            if event.action is _ALLOC:
                base = event.num_bytes - slope * batch_size
                live[event.id] = (base, slope)
                held, growth = held + base, growth + slope
                lines[growth] = max(held, lines.get(growth, held))
            elif event.action is _FREE_COMPLETED:
                freed = live.pop(event.id, (0.0, 0.0))
                held, growth = held - freed[0], growth - freed[1]
    return _highest(lines)


def _highest(lines: Mapping[float, float]) -> dict[float, float]:
    """Return the lines of which each is the highest at some number of samples."""
    kept: list[tuple[float, float]] = []
    for slope, base in sorted(lines.items(), reverse=True):
        # From the steepest on: a flatter line counts only where it is above all steeper ones.
        if kept and base <= kept[-1][1]:
            continue
        while len(kept) > 1 and _meet(kept[-2], (slope, base)) >= _meet(kept[-2], kept[-1]):
            kept.pop()
        kept.append((slope, base))
    return dict(kept)


def _meet(steeper: tuple[float, float], flatter: tuple[float, float]) -> float:
    """Return the number of samples from which on the steeper line is higher."""
    return (flatter[1] - steeper[1]) / (steeper[0] - flatter[0])


def largest_within(lines: Mapping[float, float], num_bytes: int) -> int | None:
    """Return a batch size beyond which the tensors alone need more than the memory.

    Args:
        lines: See `tensor_lines`.
        num_bytes: The bytes of the memory.

    Returns:
        The batch size, possibly 0; `None` if tensors do not grow with the batch size.
    """
    growth, held = max(lines.items())
    if growth <= 0:
        return None
    batch_size = max(0, int((num_bytes - held) // growth))
    # Newton's method on a maximum of lines: from above, and never past the edge.
    while batch_size:
        held, growth = max((base + slope * batch_size, slope) for slope, base in lines.items())
        if held <= num_bytes:
            break
        held -= growth * batch_size
        batch_size = max(0, int((num_bytes - held) // growth)) if growth > 0 else 0
    return batch_size

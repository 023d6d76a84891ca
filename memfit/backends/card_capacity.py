"""What a process can use of a card that is not there: its memory, less what the process holds."""

from __future__ import annotations

from memfit.cards import Gpu
from memfit.records import Capacity, Source
from memfit.units import format_bytes

__all__ = ["card_capacity"]


def card_capacity(gpu: Gpu, source: Source) -> Capacity:
    """Return what the caching allocator can take of a card of the catalogue.

    Where the process's own memory is estimated from similar cards, what is recommended keeps to the
    most that any of them held.

    Args:
        gpu: The card.
        source: How trials on it are run.
    """
    held = gpu.context_range_bytes
    about = "" if gpu.context_origin.startswith("measured") else "about "
    seen = "" if held is None else f", {' to '.join(map(format_bytes, held))} on similar cards"
    return Capacity(
        usable_bytes=gpu.usable_bytes,
        total_bytes=gpu.total_bytes,
        origin=(
            f"{source.value}: {format_bytes(gpu.total_bytes)} as torch reports it, less "
            f"{about}{format_bytes(gpu.context_bytes)} for the process itself{seen}"
        ),
        cautious_bytes=gpu.cautious_bytes,
    )

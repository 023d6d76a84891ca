"""The catalogue of GPUs for the terminal."""

from __future__ import annotations

from rich.console import RenderableType
from rich.table import Table

from memfit.simulation.gpus import Gpu
from memfit.units import format_bytes

__all__ = ["render"]


def render(cards: tuple[Gpu, ...]) -> RenderableType:
    """Lay out cards: name, short names, architecture, memory, and how each figure is known.

    Args:
        cards: What to list.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("GPU")
    table.add_column("also")
    table.add_column("architecture")
    table.add_column("memory", justify="right")
    table.add_column("known from")
    table.add_column("process", justify="right")
    table.add_column("known from")
    for card in cards:
        context = card.context_origin
        table.add_row(
            card.name,
            ", ".join(card.aliases),
            card.architecture,
            format_bytes(card.total_bytes),
            "torch" if card.total_origin == "seen" else card.total_origin,
            format_bytes(card.context_bytes),
            "similar cards" if context == "band" else "measured",
        )
    return table

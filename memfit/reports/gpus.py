"""Shows the catalogue of GPUs in the terminal."""

from __future__ import annotations

import re

from rich.console import Group, RenderableType
from rich.text import Text

from memfit.cards import Gpu
from memfit.reports.tables import plain_table
from memfit.units import format_bytes

__all__ = ["render"]

_ESTIMATED = "~"
_TOTAL_ORIGINS = {
    "seen": "as torch or the driver printed it on such cards",
    "derived": "estimated from similar cards or other prints",
    "given": "given with --memory",
}


def render(cards: tuple[Gpu, ...]) -> RenderableType:
    """Lay out cards: one line for each card, or all known facts for a single card.

    Args:
        cards: The cards to list.
    """
    return _details(cards[0]) if len(cards) == 1 else _list(cards)


def _list(cards: tuple[Gpu, ...]) -> RenderableType:
    table = plain_table()
    table.add_column("--gpu", no_wrap=True)
    table.add_column("GPU")
    table.add_column("arch", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    table.add_column("process", justify="right", no_wrap=True)
    for card in cards:
        table.add_row(
            card.aliases[0] if card.aliases else "",
            card.name,
            card.architecture,
            _mark(card.total_origin != "derived") + format_bytes(card.total_bytes),
            _mark(card.context_origin != "band") + format_bytes(card.context_bytes),
        )
    note = (
        "memory: as torch reports it. process: what a process holds beside the caching allocator. "
        f"{_ESTIMATED}: estimated from similar cards. `memfit gpus NAME` says where a card's "
        "figures come from."
    )
    return Group(table, "", Text(note))


def _mark(is_known: bool) -> str:
    return "" if is_known else _ESTIMATED


def _details(card: Gpu) -> RenderableType:
    table = plain_table(has_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    table.add_row(
        "memory",
        format_bytes(card.total_bytes),
        _TOTAL_ORIGINS.get(card.total_origin, card.total_origin),
    )
    table.add_row(
        "process",
        format_bytes(card.context_bytes),
        _context_origin(card),
    )
    table.add_row("for training", format_bytes(card.usable_bytes), "memory less the process")
    table.add_row(
        "BLAS workspace",
        format_bytes(card.blas_workspace_bytes()),
        "of each product; kept by two threads before torch 2.15",
    )
    vendor = "compute capability" if card.vendor == "NVIDIA" else "AMD"
    table.add_row("architecture", card.architecture, vendor)
    sources = Text("\n").join(
        Text.assemble(("sources  " if index == 0 else " " * 9, "dim"), source)
        for index, source in enumerate(_sources(card))
    )
    names = Text("also: " + ", ".join(card.aliases), "dim") if card.aliases else Text("")
    return Group(Text(card.name, "bold"), names, "", table, "", sources)


def _sources(card: Gpu) -> list[str]:
    """Return where the memory's figure was seen, one place a line, with units apart."""
    return [re.sub(r"(\d)([MG]i?B)\b", r"\1 \2", place.strip()) for place in card.source.split(";")]


def _context_origin(card: Gpu) -> str:
    if card.context_origin != "band":
        return card.context_origin
    held = card.context_range_bytes
    if held is None:
        return "estimated from NVIDIA's cards of similar size; none of AMD's was measured"
    least, most = map(format_bytes, held)
    return f"estimated: processes on similar cards held {least} to {most}"

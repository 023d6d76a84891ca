"""The table of the catalogue can be read at 80 columns, and its names can be typed."""

from __future__ import annotations

from rich.console import Console

from memfit.cards import Gpu, catalogue, find_gpu
from memfit.reports.gpus import render


def text(cards: tuple[Gpu, ...], width: int) -> str:
    console = Console(width=width, record=True)
    console.print(render(cards))
    return console.export_text()


def test_a_line_each_at_80_columns() -> None:
    """Only the longest names need a second line, and every short name finds its card."""
    lines = [line.rstrip() for line in text(catalogue(), 80).splitlines()]
    rows = lines[1 : lines.index("")]
    begun = [line for line in rows if not line.startswith(" ")]
    assert max(map(len, lines)) <= 80
    assert len(begun) == len(catalogue())
    assert len(rows) < 1.3 * len(begun)
    for line, card in zip(begun, catalogue(), strict=True):
        assert find_gpu(line.split()[0]) == card


def test_no_name_is_cut_where_there_is_room() -> None:
    """At 120 columns every card has one line and its whole name."""
    lines = text(catalogue(), 120).splitlines()
    assert all(card.name in line for line, card in zip(lines[1:], catalogue(), strict=False))


def test_estimates_are_marked() -> None:
    """A figure without a print of torch or of a process behind it has a mark."""
    lines = dict(
        zip(
            (card.name for card in catalogue()),
            text(catalogue(), 120).splitlines()[1:],
            strict=False,
        )
    )
    assert "~" not in lines["Tesla T4"]
    assert lines["NVIDIA A2"].count("~") == 2


def test_an_estimate_has_a_range() -> None:
    """The text says how much similar cards held, and that no AMD card was measured."""
    assert "processes on similar cards held 520 MiB to 764 MiB" in text((find_gpu("h800"),), 120)
    assert "none of AMD's was measured" in text((find_gpu("mi300x"),), 120)


def test_one_card_has_its_sources() -> None:
    """The text says where each figure comes from, and what is left for training."""
    card = find_gpu("3090")
    shown = text((card,), 100)
    assert "NVIDIA GeForce RTX 3090" in shown
    assert "rtx3090" in shown
    assert card.context_origin.split(":")[0] in shown
    assert "for training" in shown


def test_sources_are_a_line_each() -> None:
    """They were one long cell of log lines, with numbers and units in one word."""
    lines = [line.strip() for line in text((find_gpu("rtx3060"),), 100).splitlines()]
    first = next(index for index, line in enumerate(lines) if line.startswith("sources"))
    assert (
        len([line for line in lines[first:] if line]) == find_gpu("rtx3060").source.count(";") + 1
    )
    assert "11910 MiB" in lines[first]

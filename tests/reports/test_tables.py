"""Names are shown exactly, although rich reads brackets as markup."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console, RenderableType

from memfit.records import MixesIn, MixingLayer, Source
from memfit.reports import equivalence
from memfit.reports.tables import cards_table, plain_table
from reports.test_equivalence_report import DIFFERS


def printed(shown: RenderableType, *, width: int = 100) -> str:
    """Return the text that a terminal would show."""
    out = io.StringIO()
    Console(file=out, width=width).print(shown)
    return out.getvalue()


@pytest.mark.parametrize("name", ["user[item]", "a[/b]", "[bold]x", "\\[x"])
def test_a_name_with_brackets_is_shown(name: str) -> None:
    """It is shown in a table, and in a report's table."""
    table = plain_table("name")
    table.add_row(name)
    assert name in printed(table)
    layer = MixingLayer(
        name=name, type_name=name, mixes_in=MixesIn.FORWARD, moved=0.5, stops_in_eval=True
    )
    report = printed(equivalence.render(dataclasses.replace(DIFFERS, mixing_layers=(layer,))))
    assert report.count(name) >= 2


def test_a_long_name_of_a_card_takes_two_lines() -> None:
    """Figures and their headings are whole beside it in 80 columns."""
    table = cards_table(Source.SIMULATED, "largest", "recommended", "peak", "left")
    name = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"
    figures = ("amp-bf16", "8009", "5093", "89.2 GiB", "5228 MiB")
    table.add_row(name, *figures)
    heading, first, *others = printed(table, width=80).splitlines()
    assert heading.split()[2:] == ["precision", "largest", "recommended", "peak", "left"]
    assert " ".join(first.split()).endswith(" ".join(figures))
    assert name.split() == [*first.split()[:4], *" ".join(others).split()]

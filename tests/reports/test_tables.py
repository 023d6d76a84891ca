"""Names are shown exactly, although rich reads brackets as markup."""

from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console, RenderableType

from memfit.records import MixesIn, MixingLayer
from memfit.reports import equivalence
from memfit.reports.tables import plain_table
from reports.test_equivalence_report import DIFFERS


def printed(shown: RenderableType) -> str:
    """Return the text that a terminal would show."""
    out = io.StringIO()
    Console(file=out, width=100).print(shown)
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

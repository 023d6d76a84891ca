"""Progress is shown if work takes time and somebody can see it; afterwards it is gone."""

from __future__ import annotations

import io
import sys
import types
from typing import Any

import pytest
from rich.console import Console

from memfit.records import Outcome, Source, Trial
from memfit.reports.progress import Progress
from memfit.units import MIB

TRIAL = Trial(
    batch_size=64,
    outcome=Outcome.FITS,
    source=Source.SIMULATED,
    peak_reserved_bytes=900 * MIB,
)


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)


def text_of(bar: Progress) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(bar)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_stages_are_counted_and_trials_are_listed() -> None:
    """It shows what runs, how much of it is done, and what was tried so far."""
    bar = Progress(terminal(), "probing net", quiet_seconds=0)
    assert "probing net, 0 s" in text_of(bar)
    bar.stage("Tesla T4", 3, 12)
    bar.trial(TRIAL)
    shown = text_of(bar)
    assert "Tesla T4, 3 of 12 done, 1 trial so far" in shown
    assert "900 MiB" in shown
    # The text never says that a trial runs when it does not.
    assert "running" not in shown
    bar.stage("NVIDIA L4", 4, 12)
    assert "900 MiB" not in text_of(bar)


@pytest.mark.parametrize("stage", ["Tesla T4", "NVIDIA GeForce RTX 2080 Ti", "x" * 54])
def test_a_line_fits_a_terminal_of_80_columns(stage: str) -> None:
    """A line that wraps jumps, and is not removed whole after Ctrl-C. The bar gives way."""
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    bar = Progress(console, quiet_seconds=0)
    bar.stage(stage, 3, 12)
    with console.capture() as shown:
        console.print(bar)
    lines = shown.get().strip().splitlines()
    assert len(lines) == 1
    assert len(lines[0]) <= 80 - len("^C")
    assert f"{stage}, 3 of 12 done, 0 s" in lines[0]
    assert ("\u2501" in lines[0]) is (len(stage) < 50)


def test_what_is_quick_shows_nothing() -> None:
    """For two seconds nothing is shown."""
    bar = Progress(terminal(), "probing net")
    bar.trial(TRIAL)
    assert text_of(bar).strip() == ""


def test_a_terminal_shows_it_and_a_pipe_does_not() -> None:
    """A pipe does not even get an empty line."""
    for console, is_shown in ((terminal(), True), (Console(file=io.StringIO()), False)):
        with Progress(console, "probing net", quiet_seconds=0):
            pass
        assert isinstance(console.file, io.StringIO)
        assert ("probing net" in console.file.getvalue()) is is_shown


def test_a_notebook_shows_it_in_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is HTML that replaces itself, and is empty at the end."""
    shown: list[str] = []

    class Cell:
        def update(self, made: str) -> None:
            shown.append(made)

    display = types.ModuleType("IPython.display")
    display.HTML = str  # type: ignore[attr-defined]
    display.display = lambda *_args, **_kwargs: Cell()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    console: Any = Console(file=io.StringIO(), force_jupyter=True)
    with Progress(console, "probing <net>") as bar:
        bar.stage("Tesla T4", 1, 2)
        bar.trial(TRIAL)
    assert '<progress max="2" value="1"></progress> Tesla T4, 1 of 2 done' in shown[0]
    assert "last: 64 fits (900 MiB)" in shown[1]
    assert shown[-1] == ""

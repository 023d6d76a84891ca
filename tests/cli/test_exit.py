"""The exit codes of the program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memfit import cli


@pytest.mark.parametrize(
    ("code", "ends_with", "says"),
    [(None, 0, ""), (0, 0, ""), (3, 3, ""), ("no such data", 1, "no such data\n")],
)
def test_an_exit_ends_as_pythons_does(
    code: object, ends_with: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's `sys.exit("text")` is a failure: the text is printed, and the code is 1."""
    assert cli._exit_code(code) == ends_with
    assert capsys.readouterr().err == says


def test_an_interrupt_while_modules_load_is_one_sentence(tmp_path: Path) -> None:
    """The interrupt comes while the first library is imported."""
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt\n", encoding="utf-8")
    ended = subprocess.run(
        [sys.executable, "-m", "memfit", "--help"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 130
    assert ended.stderr == "memfit: interrupted before it began.\n"

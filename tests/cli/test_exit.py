"""The exit codes of the program."""

from __future__ import annotations

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

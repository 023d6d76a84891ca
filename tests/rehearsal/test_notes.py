"""What a report says of a command beside its figures."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from memfit.rehearsal.run import _notes, _other_python


def test_what_a_killed_command_took_last_is_not_known() -> None:
    """Only after Ctrl-C, Python runs on to the end of the watch."""
    note, _ = _notes((), (), -signal.SIGSEGV, None)
    assert "by the signal SIGSEGV, so what it took after its last step or phase is not" in note
    note, _ = _notes((), (), -signal.SIGINT, None)
    assert note == "The command was ended by the signal SIGINT."


def test_another_python_is_named(tmp_path: Path) -> None:
    """Without its environment, a shell's python has no torch, and the command ends at once."""
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    assert _other_python([str(other), "train.py"]) == str(other)
    assert _other_python([sys.executable, "train.py"]) is None
    assert _other_python(["no-such-program"]) is None
    (note,) = [n for n in _notes((), (), 1, str(other)) if "activate" in n]
    assert f"The command's Python is {other}, and memfit runs in {sys.executable}." in note

"""What a report says of a command beside its figures."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from memfit.cards import find_gpu
from memfit.records import Rehearsal, RehearsalEnd
from memfit.rehearsal.activate import rehearsed_environment
from memfit.rehearsal.run import _notes, _other_python, rehearse_command

CARD = find_gpu("rtx3060")
TAKES = """
import sys
import torch

try:
    torch.empty(int(sys.argv[1]) << 20, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError:
    if sys.argv[2:] != ["catch"]:
        raise
"""
MASKED = """
import torch

y = torch.nn.Linear(8, 8).cuda()(torch.randn(4, 8, device="cuda"))
y[y > 0.5].sum().backward()
float(y.sum())
z = y[y < 0] if (y > 1).any() else y[y > 1]
"""


def take(num_mib: int, *words: str) -> Rehearsal:
    """Rehearse a command that takes one block, and catches the error if it is told to."""
    command = [sys.executable, "-c", TAKES, str(num_mib), *words]
    return rehearse_command(command, CARD, rehearsed_environment(CARD)).rehearsal


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


@pytest.mark.rehearses
def test_an_error_that_is_caught_ends_nothing() -> None:
    """A command that catches its last error and ends well has not run out of memory."""
    caught, ended = take(20000, "catch"), take(20000)
    assert (caught.end, ended.end) == (RehearsalEnd.FINISHED, RehearsalEnd.OUT_OF_MEMORY)
    (shortage,) = caught.processes[0].shortages
    assert not shortage.ended_script
    assert caught.notes[0].startswith("1 request for memory failed, and the command went on")
    assert ended.shortage is not None
    assert ended.shortage.ended_script


@pytest.mark.rehearses
def test_the_asynchronous_allocator_runs_out_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error has words of its own, and torch calls no observer before it."""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    fits, ran_out = take(200), take(20000)
    assert (fits.end, ran_out.end) == (RehearsalEnd.FINISHED, RehearsalEnd.OUT_OF_MEMORY)
    assert fits.processes[0].peak.allocated_bytes == 200 << 20
    for found in (fits, ran_out):
        (note,) = found.notes
        assert note.startswith("torch's allocator is cudaMallocAsync")


@pytest.mark.rehearses
def test_what_backward_reads_has_a_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A mask is read again in autograd's thread. One line may read a truth value and a size.

    What torch warns of is the script's line too.
    """
    script = tmp_path / "masked.py"
    script.write_text(MASKED, "utf-8")
    command = [sys.executable, "-W", "always", str(script)]
    found = rehearse_command(command, CARD, rehearsed_environment(CARD)).rehearsal
    reads = {(read.line, read.kind.value, read.num_reads) for read in found.processes[0].reads}
    assert reads == {
        (f"{script}:5", "size", 2),
        (f"{script}:6", "number", 1),
        (f"{script}:7", "decision", 1),
        (f"{script}:7", "size", 1),
    }
    assert "memfit" not in capfd.readouterr().err

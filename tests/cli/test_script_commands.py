"""`memfit probe` and `memfit plan` of a user's own command."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from click.testing import CliRunner

from memfit.cards import find_gpu
from memfit.cli import main
from memfit.rehearsal import run
from memfit.rehearsal.activate import rehearsed_environment

TRAINING = str(Path(__file__).parents[1] / "rehearsal" / "scripts" / "training.py")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("probe", "--gpu", "t4", "--", "python", "train.py"), "has no {} for the batch size"),
        (
            ("probe", "--gpu", "t4", "--precision", "fp32", "--", "python", "t.py", "{}"),
            "--precision cannot be given with a command after --",
        ),
        (
            ("probe", "--memory", "8GiB", "--", "python", "t.py", "{}"),
            "--memory says how much memory a card",
        ),
        (
            ("probe", "--gpu", "t4", "--gpu", "l4", "--html", "x", "--", "python", "t.py", "{}"),
            "--html shows one card",
        ),
        (
            ("plan", "--effective-batch", "64", "--gpu", "t4", "--", "python", "t.py", "{}"),
            "has no {steps} for the accumulation steps",
        ),
        (
            ("plan", "--effective-batch", "64", "--explore", "--", "python", "{}", "{steps}"),
            "--explore cannot be given with a command after --",
        ),
        (
            ("probe", "--world-size", "2", "--", "python", "t.py", "{}"),
            "--world-size rehearses one rank of many: name a card",
        ),
        (
            ("probe", "--gpu", "t4", "--world-size", "2", "--", "torchrun", "t.py", "{}"),
            "The command starts its ranks itself (torchrun)",
        ),
        (
            ("probe", "--gpu", "t4", "--world-size", "0", "--", "python", "t.py", "{}"),
            "--world-size must be at least 1, not 0",
        ),
        pytest.param(
            ("probe", "--", "python", "t.py", "{}"),
            "There is no GPU here. Name a card with --gpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
        (
            ("probe", "--gpu", "t4", "--parallel", "ddp", "--", "python", "t.py", "{}"),
            "--parallel cannot be given with a command after --",
        ),
    ],
)
def test_mistakes_get_a_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    """The exit code is 2, and nothing runs."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert sentence in result.output
    assert "Traceback" not in result.output


@pytest.mark.rehearses
def test_a_plan_is_a_command_that_was_tried() -> None:
    """If the whole effective batch fits, the plan is one micro-batch."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "memfit", "plan", "--effective-batch", "16", "--json"),
            *("--gpu", "any", "--memory", "1GiB", "--"),
            *(sys.executable, TRAINING, "{}", "4", "accumulate={steps}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)["results"]
    assert found["source"] == "rehearsed"
    assert (found["micro_batch_size"], found["accumulation_steps"]) == (16, 1)
    assert found["command"][-3:] == ["16", "4", "accumulate=1"]
    assert [trial["outcome"] for trial in found["trials"]] == ["fits"]


@pytest.mark.rehearses
def test_a_command_that_fails_before_it_came_to_the_gpu_is_said_to_fail() -> None:
    """Without `--gpu` it runs on this machine's GPU, which is a rehearsed one here."""
    result = subprocess.run(
        [
            *(sys.executable, "-m", "memfit", "probe", "--"),
            *(sys.executable, "-c", "raise SystemExit('no data: {}')", "{}"),
        ],
        env={**os.environ, **rehearsed_environment(find_gpu("t4"), environment=os.environ)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "failed by itself with exit code 1" in result.stderr
    assert "no data: " in result.stderr
    assert "no GPU" not in result.stderr


@pytest.mark.rehearses
def test_a_signal_that_ends_memfit_is_not_a_failure_of_the_command() -> None:
    """A search says so in one sentence, with a code of its own, and starts no other run."""
    child = subprocess.Popen(
        [
            *(sys.executable, "-m", "memfit", "probe", "--gpu", "rtx3060", "--"),
            *(sys.executable, TRAINING, "{}", "1000000"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    end = time.monotonic() + 120
    while not (children := psutil.Process(child.pid).children()) and time.monotonic() < end:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (
        143,
        "memfit: was told to end, and has ended the command.\n",
    )
    assert not any(process.is_running() for process in children)


@pytest.mark.rehearses
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_two_runs_ends_memfit_in_the_same_way(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The sentence and the code are those of a signal in a run, and no file is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def read_reports(folder: Path, **_: object) -> list[object]:
        assert folder.parent == tmp_path
        os.kill(os.getpid(), number)
        return []

    monkeypatch.setattr(run, "read_reports", read_reports)

    def own(_number: int, _frame: object) -> None:
        pass

    earlier = signal.signal(number, own)
    try:
        result = CliRunner().invoke(
            main, ("probe", "--gpu", "rtx3060", "--", sys.executable, "-c", "pass", "{}")
        )
        assert signal.getsignal(number) is own
    finally:
        signal.signal(number, earlier)
    assert (result.exit_code, result.output) == (
        143,
        "memfit: was told to end, and has ended the command.\n",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.rehearses
def test_a_signal_that_is_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memfit under nohup goes on when its terminal is closed, in a run and between two."""

    def read_reports(_folder: Path, **_: object) -> list[object]:
        os.kill(os.getpid(), signal.SIGHUP)
        return []

    monkeypatch.setattr(run, "read_reports", read_reports)
    hang_up = "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"
    earlier = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = CliRunner().invoke(
            main, ("probe", "--gpu", "rtx3060", "--", sys.executable, "-c", hang_up, "{}")
        )
    finally:
        signal.signal(signal.SIGHUP, earlier)
    assert result.exit_code == 2
    assert "did not use the card" in result.output

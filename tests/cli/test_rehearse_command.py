"""`memfit rehearse` as a user calls it."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from memfit.cli import main

TRAINING = str(Path(__file__).parents[1] / "rehearsal" / "scripts" / "training.py")


def rehearse(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "memfit", "rehearse", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.rehearses
def test_every_output_at_once(tmp_path: Path) -> None:
    """One run gives JSON, a page and a snapshot; the script's own output goes elsewhere."""
    page, snapshot = tmp_path / "out.html", tmp_path / "out.pickle"
    result = rehearse(
        "--gpu", "rtx3060", "--html", str(page), "--snapshot", str(snapshot), "--json", "--",
        sys.executable, TRAINING, "4", "100",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(result.stdout)["results"]
    assert (found["source"], found["end"], found["fits"]) == ("rehearsed", "settled", True)
    assert result.stderr.startswith("peak ")
    text = page.read_text("utf-8")
    assert text.startswith("<!doctype html>")
    assert "where the memory goes" in text
    assert "optimizer state" in text
    content = pickle.loads(snapshot.read_bytes())  # noqa: S301 - written above
    assert content["device_traces"][0]


@pytest.mark.rehearses
def test_cards_are_one_table_and_the_smallest_decides() -> None:
    """The exit code is 3 if memory runs out on any of them."""
    result = rehearse(
        "--gpu", "rtx3060", "--gpu", "h100", "--", sys.executable, TRAINING, "3000", "3"
    )
    assert result.returncode == 3, result.stderr
    rows = {
        line[: line.index("  ")]: line
        for line in result.stdout.splitlines()
        if line.startswith("NVIDIA") and "  " in line
    }
    assert "out of memory" in rows["NVIDIA GeForce RTX 3060"]
    assert "settled" in rows["NVIDIA H100 80GB HBM3"] or "finished" in rows["NVIDIA H100 80GB HBM3"]
    assert "torch.OutOfMemoryError: CUDA out of memory." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--", "python", "train.py"), "Name the card with --gpu"),
        (("--gpu", "rtx3060"), "Name the command to rehearse after --"),
        (("--gpu", "rtx3061", "--", "python"), "did you mean"),
        (("--gpu", "rtx3060", "--rank", "1", "--", "python"), "--rank says which rank"),
        (
            ("--gpu", "rtx3060", "--world-size", "2", "--rank", "2", "--", "python"),
            "There is no rank 2 in a world of 2",
        ),
        (
            ("--gpu", "h100", "--world-size", "2", "--", "torchrun", "--nproc-per-node=2", "x.py"),
            "The command starts its ranks itself",
        ),
        (("--gpu", "rtx3060", "--", "pyhton", "train.py"), "There is no command 'pyhton'"),
        (
            ("--gpu", "rtx3060", "--num-gpus", "0", "--", "python"),
            "can rehearse 1 to 16 GPUs, not 0",
        ),
        (
            ("--gpu", "rtx3060", "--gpu", "h100", "--html", "x.html", "--", "python"),
            "Give one --gpu",
        ),
    ],
)
def test_mistakes_get_a_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    """The exit code is 2."""
    result = CliRunner().invoke(main, ["rehearse", *arguments])
    assert result.exit_code == 2
    assert sentence in result.output
    assert "Traceback" not in result.output

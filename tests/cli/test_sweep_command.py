"""`memfit sweep` and `memfit choose`, as they are typed."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from memfit.cli import main

# The precision is left to the card, as most users do.
STEP = ("--gpu", "t4")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.needs("pyarrow")
def test_every_format(tmp_path: Path) -> None:
    """One sweep of a good and a bad model gives a table of values, Parquet and a page."""
    import pyarrow.parquet as pq

    table, html = tmp_path / "sweep.parquet", tmp_path / "sweep.html"
    journal = tmp_path / "sweep.jsonl"
    files = ("--parquet", str(table), "--html", str(html), "--journal", str(journal))
    models = ("test_vit", "qwen3_vit_88m_enc")
    result = run("sweep", *models, *STEP, "--workers", "1", *files, "--csv")
    assert result.exit_code == 0, result.output
    good, bad = csv.DictReader(io.StringIO(result.stdout))
    assert int(good["max_batch_size"]) > 1000
    assert bad["max_batch_size"] == ""
    assert "classifier" in bad["reason"]
    read = pq.read_table(table).to_pylist()
    assert [row["max_batch_size"] for row in read] == [int(good["max_batch_size"]), None]
    assert "test_vit" in html.read_text(encoding="utf-8")
    # The journal has all of it, so nothing is traced again.
    again = run("sweep", *models, *STEP, "--journal", str(journal), "--json")
    (plain,) = json.loads(again.stdout)["results"]
    assert plain["is_complete"]
    assert [row["max_batch_size"] for row in plain["rows"]] == [int(good["max_batch_size"]), None]
    shown = run("sweep", *models, *STEP, "--journal", str(journal), "--sort", "largest")
    assert "test_vit" in shown.stdout
    # The model is named once in the line that says why.
    assert "1 without a batch size" in shown.stdout
    assert "  qwen3_vit_88m_enc: has no classifier" in shown.stdout


def test_ctrl_c_keeps_what_is_done(tmp_path: Path) -> None:
    """The exit code is 130, what is done is printed, and the journal has it."""
    journal = tmp_path / "sweep.jsonl"
    command = ("sweep", "test_vit", "test_convnext@320", "swin_base_patch4_window12_384", *STEP)
    started = subprocess.Popen(
        [sys.executable, "-m", "memfit", *command, "--workers", "1", "--csv", "--journal", journal],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(started.pid, signal.SIGINT)
    printed, said = started.communicate(timeout=60)
    assert started.returncode == 130, said
    assert "the same command goes on where it stopped" in said
    done = [row["model"] for row in csv.DictReader(io.StringIO(printed))]
    assert "test_vit" in done
    assert len(done) < 3
    assert len(journal.read_text().splitlines()) == len(done)


def test_a_choice_is_best_first(tmp_path: Path) -> None:
    """The accuracy decides, and each model has its plan."""
    models = ("test_vit", "test_resnet", "test_vit2@96")
    asked = ("--effective-batch", "4000", "--memory", "4GiB", "--num-classes", "10")
    kept = ("--journal", str(tmp_path / "choice.jsonl"))
    result = run("choose", *models, *STEP, *asked, "--workers", "1", *kept, "--json")
    assert result.exit_code == 0, result.output
    (plain,) = json.loads(result.stdout)["results"]
    known = [row["top1_percent"] for row in plain["rows"]]
    assert known == sorted(known, reverse=True)
    assert {row["options"]["num_classes"] for row in plain["rows"]} == {10}
    for row in plain["rows"]:
        assert sum(row["micro_batch_sizes"]) == 4000
    exact = {row["model"].partition(".")[0]: row["is_exact"] for row in plain["rows"]}
    assert exact["test_vit"] is True
    assert exact["test_resnet"] is False
    shown = run("choose", *models, *STEP, *asked, *kept)
    assert "batch norm: not exact" in shown.stdout
    assert "as timm publishes it" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sweep", "resnet1", *STEP), "has no model 'resnet1'"),
        (("sweep", "resnet18", "--gpu", "rtx9999"), "There is no GPU 'rtx9999'"),
        (("sweep", "resnet18", *STEP, "--csv", "--json"), "Give --json or --csv"),
        (("sweep", "resnet18", *STEP, "--csv", "s.csv"), "end the command with > s.csv"),
        (("probe", "resnet18", *STEP, "--json", "p.json"), "end the command with > p.json"),
        (("sweep", "resnet18", *STEP, "--fresh", "--journal", "x.jsonl"), "--fresh or --journal"),
        (("choose", "--effective-batch", "64"), "A choice is for one card"),
        (("choose", "--gpu", "t4", "--effective-batch", "0"), "must be at least 1"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], words: str) -> None:
    """Each ends with one sentence and exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.output
    assert "Traceback" not in result.output

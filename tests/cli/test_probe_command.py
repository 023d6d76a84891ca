"""`memfit probe`, as it is typed."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import memfit
from memfit import api, records
from memfit.cli import main
from memfit.cli.options import parse_model_kwargs
from memfit.errors import UsageError

SMALL = ["probe", "resnet10t", "--device", "cpu", "--memory", "160MiB", "--image-size", "48"]


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def test_a_probe_prints_both_numbers_and_its_proof() -> None:
    """It prints the edge, the recommendation, and the reasons."""
    result = run(*SMALL, "--max-batch-size", "200")
    assert result.exit_code == 0, result.output
    assert "resnet10t on CPU" in result.output
    assert "48x48 px" in result.output
    assert "ran out of memory" in result.output
    assert "recommended" in result.output


def test_json_is_all_that_is_printed() -> None:
    """A script can read the whole output."""
    result = run(*SMALL, "--max-batch-size", "4", "--json", "--model-kwargs", "in_chans=1")
    printed = json.loads(result.stdout)
    assert printed.keys() == {"schema_version", "results"}
    assert printed["schema_version"] == 1
    (plain,) = printed["results"]
    assert plain["max_batch_size"] == 4
    assert plain["options"]["model_kwargs"] == [["in_chans", 1]]
    assert plain["trials"][0]["outcome"] == "fits"


def test_json_of_several_cards_is_a_list_of_results() -> None:
    """Each card has one result with the same keys, even if one sample does not fit."""
    result = run(
        "probe", "test_vit", "--gpu", "3080", "--gpu", "4080", "--memory", "290MiB", "--json"
    )
    printed = json.loads(result.stdout)
    assert [each["max_batch_size"] for each in printed["results"]] == [None, None]
    assert all(each["source"] == "simulated" for each in printed["results"])
    assert all("does not fit" in each["reason"] for each in printed["results"])
    assert result.exit_code == 3


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (["resnet5O"], 2, "did you mean resnet50"),
        (["resnet10t", "--memory", "8GBB"], 2, "did you mean '8GB'"),
        (["resnet10t", "--memory", "9TiB"], 2, "more than this machine has left"),
        (["resnet10t", "--image-size", "0"], 2, "is not an image size"),
        (["resnet10t", "--model-kwargs", "x"], 2, "not of the form KEY=VALUE"),
        (["resnet10t", "--precision", "fp8"], 2, "no precision 'fp8'. Choose one of fp32"),
        (["resnet10t", "--precision", "fp16"], 2, "did you mean amp-fp16?"),
        (["resnet10t", "--headroom", "5%"], 2, "not '5%'; did you mean 0.05?"),
        (["resnet10t", "--multiple-of", "2.5"], 2, "must be a whole number, not 2.5"),
        (["resnet10t", "--max-batch-size", "many"], 2, "must be a whole number, not 'many'"),
        (["resnet10t", "--prefetch", "x"], 2, "'x' is not a valid whole number"),
        (["./train.py"], 2, "memfit rehearse --gpu NAME -- python ./train.py"),
        (["timm/resnet18.a1_in1k"], 2, "did you mean resnet18.a1_in1k?"),
        (["resnet10t", "--model-kwargs", "act_layer=x"], 2, "act_layer='x': KeyError 'x'"),
        (["resnet10t", "--model-kwargs", "checkpoint_path=x"], 2, "leave out checkpoint_path"),
        (["resnet10t", "--model-kwargs", "in_chans=0"], 2, "in_chans must be at least 1, not 0"),
        (["resnet10t", "--device", "cpu:1"], 2, "give cpu, which is all processors"),
        (["resnet10t", "--memory", "20MiB"], 3, "and 20.0 MiB are available"),
    ],
)
def test_mistakes_get_one_sentence_and_their_exit_code(
    arguments: list[str], exit_code: int, says: str
) -> None:
    """It says what was wrong, the value, and what to do; there is no traceback."""
    result = run("probe", "--device", "cpu", *arguments)
    assert result.exit_code == exit_code, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()[-1:]) == 1


def test_a_models_own_error_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its type and first line are shown, the exit code is 1, and there is no traceback."""

    def broken(*_: Any, **__: Any) -> None:
        error = RuntimeError("mat1 and mat2 shapes cannot be multiplied\nsecond line")
        error.raised_in_step = True  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(api, "probe", broken)
    result = run("probe", "resnet10t", "--device", "cpu")
    assert result.exit_code == 1
    assert result.stderr.strip() == (
        "memfit: the training step raised RuntimeError: mat1 and mat2 shapes cannot be multiplied"
    )


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of memfit's is not shown as a fault of the user's."""

    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("bug")

    monkeypatch.setattr(api, "probe", broken)
    assert isinstance(run("probe", "resnet10t", "--device", "cpu").exception, KeyError)


def test_ctrl_c_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit code is the shell's own for an interrupt."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "probe", interrupted)
    result = run("probe", "resnet10t", "--device", "cpu")
    assert result.exit_code == 130
    assert "everything is as it was" in result.stderr


def test_ctrl_c_does_not_lose_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tried until then is printed, and standard output stays empty."""
    probe = api.probe

    def interrupted(*given: Any, progress: Any, **options: Any) -> None:
        def first(trial: Any) -> None:
            progress(trial)
            raise KeyboardInterrupt

        probe(*given, progress=first, **options)

    monkeypatch.setattr(api, "probe", interrupted)
    result = run("probe", "test_vit", "--gpu", "rtx3060", "--engine", "simulate", "--json")
    assert result.exit_code == 130
    assert result.stdout == ""
    _, _, tried = result.stderr.partition("Tried until then:")
    assert re.search(r"\d+ +fits +\d", tried)


def test_a_card_without_bf16_is_told_in_a_sentence() -> None:
    """The precision auto is another there, and bf16 is slow."""
    given = ("probe", "test_vit", "--engine", "simulate", "--max-batch-size", "2", "--gpu", "t4")
    auto = " ".join(run(*given).stdout.split())
    assert "Tesla T4 has no bf16, so the precision auto is amp-fp16 there." in auto
    asked = " ".join(run(*given, "--precision", "amp-bf16").stdout.split())
    assert "Tesla T4 has no bf16: torch computes it in software, which is slow." in asked
    several = run(*given, "--gpu", "rtx2080ti", "--gpu", "rtx3060")
    said = " ".join(several.stdout.split())
    assert "Tesla T4 and NVIDIA GeForce RTX 2080 Ti have no bf16" in said
    # No card ran out of memory: its largest batch size is not known.
    assert said.count("≥ 2") == 3
    assert (
        "≥: the search ended there, and more may fit (max_batch_size=, --max-batch-size)." in said
    )


def test_model_kwargs_are_python_literals_or_text() -> None:
    """Numbers become numbers, and words stay text."""
    pairs = ("a=1", "b=0.5", "c=True", "d=avg", "e=(1, 2)", "f=x=y")
    assert parse_model_kwargs(pairs) == {
        "a": 1,
        "b": 0.5,
        "c": True,
        "d": "avg",
        "e": (1, 2),
        "f": "x=y",
    }
    with pytest.raises(UsageError, match="KEY=VALUE"):
        parse_model_kwargs(("1a=3",))


def test_help_imports_no_slow_library() -> None:
    """`memfit --help` and the help of each command come at once."""
    script = (
        "import sys, click.testing\n"
        "from memfit.cli import main\n"
        "for words in ([], *([name] for name in main.commands)):\n"
        "    assert click.testing.CliRunner().invoke(main, [*words, '--help']).exit_code == 0\n"
        "slow = {'torch', 'timm', 'numpy', 'rich', 'jinja2', 'plotly', 'matplotlib', 'email'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_module_runs_as_a_program() -> None:
    """`python -m memfit --version` prints the installed version."""
    done = subprocess.run(
        [sys.executable, "-m", "memfit", "--version"], check=True, capture_output=True, text=True
    )
    assert memfit.__version__ in done.stdout


def test_the_public_names_are_all_there() -> None:
    """Each name of the package can be imported, and no other."""
    for name in memfit.__all__:
        assert getattr(memfit, name) is not None
    assert set(memfit.__all__) <= set(dir(memfit))
    assert memfit.Trial is records.Trial
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = memfit.nonsense


def test_torch_is_the_one_that_was_tested_or_newer() -> None:
    """The oldest torch that memfit supports is 2.8."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    assert (major, minor) >= (2, 8)


@pytest.mark.parametrize("cards", [("t4",), ("t4", "rtx3090")])
def test_a_page(tmp_path: Path, cards: tuple[str, ...]) -> None:
    """One card's trials, or several cards, are written to a page, beside the table."""
    path = tmp_path / "probe.html"
    named = [part for card in cards for part in ("--gpu", card)]
    step = ["test_vit.r160_in1k", "--image-size", "96"]
    result = CliRunner().invoke(main, ["probe", *step, *named, "--html", str(path)])
    assert result.exit_code == 0, result.output
    assert "the largest batch size" in path.read_text(encoding="utf-8")[:2000]
    nowhere = str(tmp_path / "nowhere" / "probe.html")
    refused = CliRunner().invoke(main, ["probe", *step, *named, "--html", nowhere])
    assert refused.exit_code == 2
    assert "cannot be written: there is no folder" in refused.output


def test_several_models_are_asked_about_one_after_another() -> None:
    """One list has them all; a model that does not fit does not stop the others."""
    cards = ("--gpu", "any", "--memory", "540MiB", "--image-size", "96", "--max-batch-size", "4")
    result = run("probe", "test_vit", "resnet18", *cards, "--csv")
    assert result.exit_code == 3, result.output
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(row["model"], row["max_batch_size"]) for row in rows] == [("test_vit", "4")]
    assert rows[0]["source"] == "simulated"
    assert int(rows[0]["capacity_bytes"]) < 470 * 2**20
    assert "resnet18 does not fit even at batch size 1" in result.stderr
    assert "1 of 2 models do not fit" in result.stderr
    refused = run("probe", "test_vit", "resnet5O", *cards)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "did you mean resnet50" in refused.stderr


def test_a_table_of_values_has_a_row_for_each_card() -> None:
    """Cards that it does not fit have rows too."""
    cards = ("--gpu", "3090", "--gpu", "3060", "--memory", "330MiB", "--csv")
    result = run("probe", "test_vit", *cards)
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["device"] for row in rows] == ["NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 3060"]
    assert "does not fit" in rows[0]["reason"]
    assert (rows[0]["max_batch_size"], rows[1]["reason"]) == ("", "")
    both = run("probe", "test_vit", "--csv", "--json")
    assert both.exit_code == 2
    assert "--json or --csv, not both" in both.stderr


def test_pictures_are_drawn_or_refused(tmp_path: Path) -> None:
    """One card or several are drawn; an unknown ending is refused before any work."""
    step = ("test_vit", "--image-size", "96", "--max-batch-size", "4")
    one, several = tmp_path / "one.svg", tmp_path / "several.svg"
    assert run("probe", *step, "--gpu", "t4", "--plot", str(one)).exit_code == 0
    assert "train with 4" in one.read_text(encoding="utf-8")
    cards = ("--gpu", "t4", "--gpu", "l4")
    assert run("probe", *step, *cards, "--plot", str(several)).exit_code == 0
    assert "NVIDIA L4" in several.read_text(encoding="utf-8")
    refused = run("probe", *step, "--gpu", "t4", "--plot", str(tmp_path / "one.gif"))
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "no ending of a picture" in refused.stderr
    two = run("probe", "test_vit", "resnet18", "--gpu", "t4", "--plot", str(one))
    assert two.exit_code == 2
    assert "--plot shows one model, but 2 were given" in two.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, probe measures")
def test_memory_without_a_card_is_one_card(tmp_path: Path) -> None:
    """The output says which card, where and why."""
    result = run("probe", "test_vit", "--memory", "2GiB", "--image-size", "96")
    assert result.exit_code == 0
    assert (
        "There is no GPU here and none was named, so memfit simulates a card of 2048 MiB"
        in result.stderr
    )
    assert "test_vit on any GPU" in result.stdout


def test_what_is_mistyped_is_refused_before_torch_is_imported() -> None:
    """So the error comes at once."""
    script = (
        "import sys, click.testing\n"
        "from memfit.cli import main\n"
        "run = click.testing.CliRunner().invoke\n"
        "for typed, says in [\n"
        "    ('probe resnet18 --gpu rtx309O', 'did you mean'),\n"
        "    ('sweep resnet18 --gpu rtx309O', 'did you mean'),\n"
        "    ('choose --gpu rtx309O --effective-batch 8', 'did you mean'),\n"
        "    ('rehearse --gpu rtx309O -- python x.py', 'did you mean'),\n"
        "    ('rehearse --gpu t4 -- no-such-program', 'no command'),\n"
        "    ('plan resnet18 --gpu t4 --effective-batch 0', 'at least 1, not 0'),\n"
        "    ('choose --gpu t4 --effective-batch 0', 'at least 1, not 0'),\n"
        "    ('profile resnet18 --gpu t4 --batch-size 0', 'at least 1, not 0'),\n"
        "    ('verify resnet18 --micro-batch 0 --accumulation-steps 2', 'at least 1, not 0'),\n"
        "]:\n"
        "    found = run(main, typed.split())\n"
        "    assert found.exit_code == 2 and says in found.stderr, (typed, found.output)\n"
        "    assert not {'torch', 'timm', 'numpy'} & set(sys.modules), typed\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.rehearses
def test_models_on_a_rehearsed_card_import_torch_once() -> None:
    """The command line and the process that rehearses share the import; the answers are proved."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "memfit", "probe", "test_vit", "test_resnet"),
            *("--gpu", "rtx3060", "--memory", "600MiB", "--engine", "rehearse", "--json"),
        ],
        env={**os.environ, "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)["results"]
    assert [result["subject"] for result in found] == ["test_vit", "test_resnet"]
    assert all(result["source"] == "rehearsed" and result["edge_found"] for result in found)
    assert len(re.findall(r"\| +torch$", done.stderr, flags=re.MULTILINE)) == 1

"""`memfit plan`, as it is typed."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from memfit import api
from memfit.cli import main
from memfit.records import Alternative, Capacity, Exploration, Precision, StepOptions
from memfit.units import GIB

SIMULATED = ("test_vit", "--gpu", "any", "--memory", "1GiB", "--image-size", "96")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["plan", *arguments])


def test_a_plan_shows_its_parts_and_both_limits() -> None:
    """It is simulated if a GPU is named."""
    result = run(*SIMULATED, "--effective-batch", "9000")
    assert result.exit_code == 0, result.output
    assert "effective batch  9000" in result.stdout
    assert "micro-batches a step" in result.stdout
    assert "ran out of memory" in " ".join(result.stdout.split())
    assert "kept free" in result.stdout
    assert "Simulated in" in result.stdout


def test_a_plan_is_measured_on_the_cpu() -> None:
    """Real steps run under a limit."""
    result = run(
        *("test_vit", "--device", "cpu", "--memory", "60MiB", "--image-size", "96"),
        *("--effective-batch", "64", "--json"),
    )
    assert result.exit_code == 0, result.output
    (plain,) = json.loads(result.stdout)["results"]
    assert (plain["source"], sum(plain["micro_batch_sizes"])) == ("measured", 64)
    assert plain["accumulation_steps"] >= 2


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--emit", "timm", "--frozen", "blocks.*"), "has no flag that freezes parameters"),
        (("--emit", "timm", "--checkpoint", "blocks.0"), "no flag that recomputes single blocks"),
        (("--emit", "fastai", "--precision", "bf16"), "fastai cannot train weights in bf16"),
        (("--emit", "accelerate", "--world-size", "3"), "cannot be shared equally by 3 ranks"),
        (("--emit", "lightning", "--gpu", "t4", "--together"), "cards of this plan take different"),
    ],
)
def test_what_cannot_be_emitted_is_refused_before_the_search(
    options: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search takes seconds or minutes, and its result would be lost."""
    for name in ("plan", "plan_together"):
        monkeypatch.setattr(f"memfit.api.{name}", lambda *_, **__: pytest.fail("it searched"))
    result = run("test_vit", "--effective-batch", "64", "--gpu", "rtx3060", *options)
    assert result.exit_code == 2, result.output
    assert says in result.stderr


def test_what_is_emitted_is_all_there_is_on_standard_output() -> None:
    """The report goes to standard error, so that the lines can be piped."""
    result = run(*SIMULATED, "--effective-batch", "2000", "--emit", "timm")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("# 2000 = ")
    assert "python train.py --data-dir DATA --model test_vit --batch-size" in result.stdout
    assert "effective batch" in result.stderr


def test_equal_parts_that_are_not_there_are_refused() -> None:
    """The effective batch is not changed instead."""
    limit = ("--max-batch-size", "30")
    result = run(*SIMULATED, *limit, "--effective-batch", "61", "--emit", "fastai")
    assert result.exit_code == 2
    assert "61 samples have no equal parts near 21: plan for 60, or emit pytorch" in result.stderr


@pytest.fixture
def exploration(monkeypatch: pytest.MonkeyPatch) -> Exploration:
    """Return what `memfit.explore` would find; `tests/api/test_planning.py` runs it."""
    options = StepOptions(precision=Precision.FP32)
    found = Exploration(
        subject="test_vit",
        device="any GPU",
        capacity=Capacity(usable_bytes=GIB, total_bytes=GIB, origin="given"),
        effective_batch_size=64,
        world_size=1,
        baseline=Alternative(change="", costs="", options=options, reason="it does not fit"),
        alternatives=(
            Alternative(
                change="gradient checkpointing",
                costs="time",
                options=options,
                micro_batch_sizes=(32, 32),
            ),
        ),
    )
    monkeypatch.setattr(api, "explore", lambda *_args, **_kwargs: found)
    return found


@pytest.mark.usefixtures("exploration")
def test_single_changes_are_explored() -> None:
    """They come after the plan, in text and in JSON."""
    arguments = (*SIMULATED, "--effective-batch", "64", "--explore")
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.index("effective batch") < result.stdout.index("What one change would do")
    assert "gradient checkpointing" in result.stdout
    (plain,) = json.loads(run(*arguments, "--json").stdout)["results"]
    assert plain["exploration"]["source"] == "simulated"
    assert plain["micro_batch_sizes"] == [64]


@pytest.mark.usefixtures("exploration")
def test_what_does_not_fit_is_explored_and_still_ends_with_3() -> None:
    """The table comes first, then the sentence."""
    tight = ("test_vit", "--gpu", "any", "--memory", "460MiB", "--effective-batch", "64")
    result = run(*tight, "--explore")
    assert result.exit_code == 3, result.output
    assert "What one change would do" in result.stdout
    assert "does not fit even at batch size 1" in result.stderr
    (plain,) = json.loads(run(*tight, "--explore", "--json").stdout)["results"]
    assert plain["baseline"]["micro_batch_sizes"] == []
    bare = run(*tight)
    assert (bare.exit_code, bare.stdout) == (3, "")


SIMULATE = ("--engine", "simulate")


def test_several_cards_come_in_one_table() -> None:
    """All of them are simulated."""
    cards = ("--gpu", "3070", "--gpu", "h200")
    result = run("test_vit", *cards, "--effective-batch", "512", "--world-size", "2")
    assert result.exit_code == 0, result.output
    assert "512 samples a step over 2 ranks" in result.stdout
    assert "1 x 256" in result.stdout
    assert "Simulated, not measured" in result.stdout
    plain = json.loads(run("test_vit", *cards, "--effective-batch", "512", "--json").stdout)
    assert [answer["source"] for answer in plain["results"]] == ["simulated"] * 2
    alone = run(
        "test_vit", "--gpu", "3070", "--engine", "simulate", "--effective-batch", "512", "--json"
    )
    (one,) = json.loads(alone.stdout)["results"]
    assert all(answer.keys() == one.keys() for answer in plain["results"])
    small = ("--gpu", "3070", "--gpu", "3060", "--memory", "400MiB")
    (none, _) = json.loads(run("resnet18", *small, "--effective-batch", "64", "--json").stdout)[
        "results"
    ]
    assert none.keys() - {"reason"} <= one.keys()
    assert (none["micro_batch_sizes"], none["micro_batch_size"]) == ([], None)
    little = run("resnet18", *small, "--effective-batch", "64")
    assert little.exit_code == 3
    assert "does not fit" in little.stdout
    assert "resnet18 fits none of these cards" in little.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, plan measures")
def test_without_a_gpu_common_ones_are_planned_for() -> None:
    """They are a dozen cards from 8 to 141 GB."""
    result = run("test_vit", "--effective-batch", "64")
    assert result.exit_code == 0
    table = result.stdout.partition("Simulated, not measured")[0]
    assert table.count("NVIDIA") + table.count("Tesla") == 12


@pytest.mark.parametrize(
    ("arguments", "exit_code", "says"),
    [
        (("--effective-batch", "0"), 2, "at least 1, not 0"),
        (("--effective-batch", "64.5"), 2, "must be a whole number, not 64.5"),
        (("--effective-batch", "many"), 2, "must be a whole number, not 'many'"),
        (("--effective-batch", "3", "--world-size", "4"), 2, "Give at least 4"),
        (("--effective-batch", "64", "--world-size", "0"), 2, "world size must be at least 1"),
        (("--effective-batch", "64", "--objective", "fastest"), 2, "has no real seconds"),
        (("--effective-batch", "64", "--objective", "best"), 2, "'best' is not one of"),
        (("--effective-batch", "64", "--emit", "keras"), 2, "'keras' is not one of"),
        (("--effective-batch", "64", "--emit", "timm", "--json"), 2, "--emit or --json, not both"),
        (("--effective-batch", "64", "--gpu", "t4", "--explore"), 2, "--explore is for one device"),
        (("--effective-batch", "64", "--gpu", "t4", "--emit", "timm"), 2, "--emit is for one"),
        ((), 2, "Give --effective-batch, the samples in each optimizer step"),
    ],
)
def test_mistakes_get_one_sentence(arguments: tuple[str, ...], exit_code: int, says: str) -> None:
    """There is no traceback."""
    result = run(*SIMULATED, *arguments)
    assert result.exit_code == exit_code, result.output
    assert says in result.stderr
    assert "Traceback" not in result.output


def test_exploring_a_cpu_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before the plan is measured."""
    monkeypatch.setattr("memfit.api.plan", lambda *_args, **_kwargs: pytest.fail("it planned"))
    result = run("test_vit", "--device", "cpu", "--effective-batch", "8", "--explore")
    assert result.exit_code == 2
    assert "only GPUs can be simulated. Give it with --gpu" in result.stderr


@pytest.mark.parametrize("cards", [("t4",), ("t4", "l4")])
def test_a_plan_has_a_page_a_picture_and_a_table_of_values(
    tmp_path: Path, cards: tuple[str, ...]
) -> None:
    """This holds for one card and for several, without exploring."""
    named = [part for card in cards for part in ("--gpu", card)]
    page, picture = tmp_path / "plan.html", tmp_path / "plan.svg"
    files = ("--html", str(page), "--plot", str(picture), "--csv")
    step = ("test_vit", "--image-size", "96", "--effective-batch", "64")
    result = run(*step, *named, *files)
    assert result.exit_code == 0, result.output
    assert "test_vit: 64 samples a step" in page.read_text(encoding="utf-8")[:2000]
    assert "Tesla T4" in picture.read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["micro_batch_sizes"] for row in rows] == ["1 x 64"] * len(cards)
    assert rows[0]["device"] == "Tesla T4"


@pytest.mark.usefixtures("exploration")
def test_a_page_shows_the_plan_and_what_was_explored(tmp_path: Path) -> None:
    """One page has both."""
    path = tmp_path / "plan.html"
    result = run(*SIMULATED, "--effective-batch", "64", "--explore", "--html", str(path))
    assert result.exit_code == 0, result.output
    text = path.read_text(encoding="utf-8")
    assert "test_vit: 64 samples a step" in text[:2000]
    assert "The largest micro-batch, one change at a time" in text


def test_a_plan_is_shown_before_what_else_would_fit_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan is known much earlier."""

    def interrupted(*_args: Any, **_kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "explore", interrupted)
    result = run(*SIMULATED, "--effective-batch", "64", "--explore")
    assert result.exit_code == 130
    assert "effective batch" in result.stdout


def test_several_models_are_planned_for_one_after_another() -> None:
    """Options that are for one model only are refused."""
    models = ("test_vit", "test_vit2", *SIMULATED[1:], "--effective-batch", "16")
    result = run(*models)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("effective batch  16") == 2
    refused = run(*models, "--emit", "timm")
    assert refused.exit_code == 2
    assert "--emit shows one model, but 2 were given" in refused.stderr


def test_train_pys_arguments_are_planned_and_the_flags_to_change_printed() -> None:
    """The effective batch is that of the arguments."""
    place = ("--gpu", "any", "--memory", "8GiB")
    arguments = "--model test_vit --img-size 96 --opt adamw --mixup 0.2 -b 2000"
    result = run("--train-args", arguments, *place, "--max-batch-size", "500")
    assert result.exit_code == 0, result.output
    assert "Change train.py's arguments: --batch-size 500 --grad-accum-steps 4" in result.stdout
    assert "Mixup and cutmix are not in the trials" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Name a model, such as resnet50, or give --train-args"),
        (("test_vit",), "Give --effective-batch"),
        (("test_vit", "--train-args", "-b 8"), "--train-args has the model: leave test_vit out"),
        (("--train-args", "-b 8", "--fused"), "has the step's options: leave --fused out"),
    ],
)
def test_a_plan_needs_one_model_and_one_effective_batch(
    arguments: tuple[str, ...], says: str
) -> None:
    """The sentence says what to give, or what to leave out."""
    result = run(*arguments, "--gpu", "t4")
    assert result.exit_code == 2
    assert says in result.stderr

"""Defaults from pyproject.toml, and completion in the shell."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from memfit.cli import completion, main
from memfit.cli.defaults import defaults_of, find_table, parameters_of


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


def write(folder: Path, text: str) -> None:
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")


def test_a_projects_options_are_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They count in subfolders too; a command's own table and typed options override them."""
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    write(
        tmp_path,
        "[tool.memfit]\n"
        'gpu = ["t4"]\n'
        'precision = "fp32"\n'
        "image-size = 64\n"
        "channels-last = true\n"
        "model-kwargs = { in_chans = 1 }\n"
        "[tool.memfit.probe]\n"
        "max-batch-size = 3\n",
    )
    result = run("probe", "test_vit", "--json", "--precision", "amp-fp16", "--engine", "simulate")
    assert result.exit_code == 0, result.output
    (plain,) = json.loads(result.stdout)["results"]
    assert plain["device"] == "Tesla T4"
    assert plain["max_batch_size"] == 3
    options = plain["options"]
    assert (options["precision"], options["image_size"]) == ("amp-fp16", [64, 64])
    assert (options["channels_last"], options["model_kwargs"]) == (True, [["in_chans", 1]])
    assert "Defaults from" in result.stderr
    assert "gpu t4" in result.stderr


def test_a_default_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line about defaults has only those that count, and how a switch is turned off."""
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        "[tool.memfit]\n"
        'gpu = "t4"\n'
        "channels-last = true\n"
        "accumulate = true\n"
        "ema = true\n"
        'precision = "fp32"\n'
        "max-batch-size = 1\n",
    )
    given = ("probe", "test_vit", "--engine", "simulate", "--json")
    kept = run(*given, "--device", "cpu")
    assert "accumulate (off with --no-accumulate)" in kept.stderr
    assert "gpu t4" not in kept.stderr
    (found,) = json.loads(kept.stdout)["results"]
    assert (found["options"]["channels_last"], found["options"]["ema"]) == (True, "device")
    typed = ("--no-channels-last", "--no-accumulate", "--ema", "none", "--precision", "amp-fp16")
    changed = run(*given, *typed)
    said = changed.stderr.partition(": ")[2].strip()
    assert said == "gpu t4, max-batch-size 1."
    (found,) = json.loads(changed.stdout)["results"]
    options = found["options"]
    assert (options["channels_last"], options["accumulate"]) == (False, False)
    assert (options["ema"], options["precision"]) == (None, "amp-fp16")


def test_every_flag_has_an_off_that_help_does_not_show() -> None:
    """A flag without one could not be overridden."""
    for name, command in main.commands.items():
        flags = [p for p in command.params if isinstance(p, click.Option) and p.is_flag]
        for flag in flags:
            assert flag.secondary_opts, (name, flag.opts)
            assert f"{flag.secondary_opts[0]} " not in run(name, "--help").stdout
    given = main.commands["probe"].make_context("probe", ["x", "--no-grad", "--grad"]).params
    assert given["no_grad"] is False


@pytest.mark.parametrize(
    ("default", "typed", "device"),
    [('gpu = "t4"', ("--device", "cpu"), "CPU"), ('device = "cpu"', ("--gpu", "t4"), "Tesla T4")],
)
def test_a_typed_place_counts_before_a_default_one(
    default: str,
    typed: tuple[str, ...],
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device of this machine and a card that is not here exclude each other."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, f"[tool.memfit]\n{default}\n")
    result = run(
        "probe", "test_vit", "--image-size", "64", "--max-batch-size", "1", "--json", *typed
    )
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["results"]
    assert device.lower() in found["device"].lower()


def test_the_batch_of_train_args_counts_before_a_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was typed overrides the project's file, also inside --train-args."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "[tool.memfit.plan]\neffective-batch = 64\n")
    result = run("plan", "--train-args", "--model test_vit -b 48 --amp", "--gpu", "t4", "--json")
    assert result.exit_code == 0, result.output
    (plan,) = json.loads(result.stdout)["results"]
    assert plan["effective_batch_size"] == 48, plan


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[tool.memfit.prob]\n", "no option 'prob'; did you mean probe?"),
        ("[tool]\nmemfit = 3\n", "tool.memfit must be a table, not 3"),
        ('[tool.memfit]\nprecisoin = "fp32"\n', "no option 'precisoin'; did you mean precision?"),
        ("[tool.memfit.probe]\neffective-batch = 3\n", "[tool.memfit.probe] has no option"),
        ("[tool.memfit]\nprobe = 3\n", "probe is the name of a command, so it must be a table"),
        ("[tool.memfit\n", "cannot be read"),
    ],
)
def test_mistakes_in_it_get_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    """The sentence has the file's name."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, text)
    result = run("gpus", "t4")
    assert result.exit_code == 2
    assert says in result.stderr
    assert "pyproject.toml" in result.stderr


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("num-classes = 2.5", "num-classes takes a whole number, not 2.5"),
        ("prefetch = 1.5", "prefetch takes a whole number, not 1.5"),
        ("multiple-of = 2.5", "multiple_of must be a whole number, not 2.5"),
        ('headroom = "5%"', "not '5%'; did you mean 0.05?"),
        ('channels-last = "yes"', "channels-last takes true or false, not 'yes'"),
        ("channels-last = 1", "channels-last takes true or false, not 1"),
        ("image-size = [224, 224]", "image-size takes one value, not [224, 224]"),
        ("optimizer = true", "optimizer takes a value, not True"),
        ('precision = "fp16"', "did you mean amp-fp16?"),
        ("memory = 16", "Did you mean '16GiB'?"),
        ('gpu = "rtx309o"', "There is no GPU 'rtx309o'"),
        ('gpu = ["t4", 3]', "There is no GPU '3'"),
    ],
)
def test_values_of_another_kind_get_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str
) -> None:
    """Before, 2.5 was the whole number 2, and a text in place of a list was its letters."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, f"[tool.memfit.probe]\n{text}\n")
    more = (
        ()
        if "gpu" in text
        else ("--gpu", "any", "--memory", "4GiB")[: 2 + 2 * ("memory" not in text)]
    )
    result = run("probe", "test_vit", "--engine", "simulate", *more)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert str(tmp_path) in result.stderr


def test_one_value_may_stand_for_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers and precisions are lists for sweep only, and each command takes what it needs."""
    monkeypatch.chdir(tmp_path)
    write(
        tmp_path,
        "[tool.memfit]\n"
        'gpu = "t4"\n'
        'optimizer = "lion"\n'
        "ema = true\n"
        "[tool.memfit.sweep]\n"
        'precision = ["fp32", "amp-fp16"]\n',
    )
    probed = run("probe", "test_vit", "--json", "--engine", "simulate", "--max-batch-size", "3")
    (plain,) = json.loads(probed.stdout)["results"]
    assert (plain["options"]["optimizer"], plain["options"]["ema"]) == ("lion", "device")
    sweep, found = main.commands["sweep"], find_table(tmp_path)
    assert found is not None
    own = defaults_of(*found, main.commands, "sweep")
    given = sweep.make_context("sweep", ["test_vit"], default_map=parameters_of(own, sweep)).params
    assert given["optimizers"] == ("lion",)
    assert given["precisions"] == ("fp32", "amp-fp16")
    assert given["gpus"] == ("t4",)


def test_a_project_without_the_table_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is printed about it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "[tool.other]\nx = 1\n")
    assert "Defaults" not in run("gpus", "t4").stderr


def completed(words: list[str], typed: str) -> list[str]:
    made = BashComplete(main, {}, "memfit", "_MEMFIT_COMPLETE")
    return [item.value for item in made.get_completions(words, typed)]


def test_names_in_the_cache_are_completed_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell asks at every key press, and importing torch takes seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = completion.model_names(), completion.optimizer_names()
    code = (
        "import sys; from memfit.cli import completion as made;"
        "print(len(made.model_names()), len(made.optimizer_names()), 'torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [*map(str, map(len, names)), "False"]


def test_models_and_cards_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names come from timm once, and then from the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "resnet50" in completed(["probe"], "resnet5")
    (kept,) = (tmp_path / "memfit").iterdir()
    assert "resnet50" in kept.read_text(encoding="utf-8").split()
    monkeypatch.setattr("memfit.step.timm_models.import_timm", lambda: pytest.fail("imported"))
    for command in ("probe", "plan", "profile", "verify"):
        assert completed([command], "vit_base_patch16_2") == [
            name for name in completion.model_names() if name.startswith("vit_base_patch16_2")
        ]
    for before in (["probe", "resnet50", "--gpu"], ["rehearse", "--gpu"], ["gpus"]):
        assert "rtx4090" in completed(before, "rtx40")
    assert completed(["probe", "resnet50", "--optimizer"], "adamw")[0] == "adamw"

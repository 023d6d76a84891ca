"""A user's own step on the command line: `package.module:function`."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from memfit.cli import main
from memfit.cli.subjects import subject_of

_STEP = """
import torch
from torch import nn

import memfit

def make_workload():
    batch = (torch.zeros(2, 8), torch.zeros(2, dtype=torch.long))
    return memfit.Workload(nn.Linear(8, 4), batch, nn.functional.cross_entropy, "sgd")

class Holder:
    ready = make_workload()

def needs(width, *, depth=1): ...
def fails(): raise RuntimeError("no data here\\nsecond line")
def model(): return nn.Linear(2, 2)
def name(): return "resnet18"
"""
_numbers = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a module in the current folder, another one in every test."""
    name = f"my_step_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(_STEP)
    (tmp_path / f"{name}_broken.py").write_text("import surely_not_installed_anywhere\n")
    (tmp_path / f"{name}_wrong.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    return name


def run(*words: str) -> Result:
    """Run memfit in this process."""
    return CliRunner().invoke(main, words)


def test_a_step_of_ones_own_is_probed_planned_and_profiled(module: str) -> None:
    """Each command takes it as it takes a model's name, and shows its name."""
    place = ("--gpu", "rtx3060", "--engine", "simulate")
    probed = run("probe", f"{module}:make_workload", *place, "--max-batch-size", "64", "--json")
    assert probed.exit_code == 0, probed.output
    assert '"max_batch_size": 64' in probed.output
    planned = run("plan", f"{module}:Holder.ready", *place, "--effective-batch", "64")
    assert planned.exit_code == 0, planned.output
    assert "Linear" in planned.output
    emitted = run(
        "plan", f"{module}:Holder.ready", *place, "--effective-batch", "64", "--emit", "timm"
    )
    assert emitted.exit_code == 2
    assert "trains timm's models by their names, and Linear is not one" in emitted.stderr
    profiled = run("profile", f"{module}:make_workload", *place, "--batch-size", "8")
    assert profiled.exit_code == 0, profiled.output


def test_a_step_of_ones_own_is_verified(module: str) -> None:
    """Its gradients are compared like a model's."""
    found = run(
        "verify", f"{module}:make_workload", "--micro-batch", "2", "--accumulation-steps", "2",
        "--device", "cpu",
    )  # fmt: skip
    assert found.exit_code == 0, found.output


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("{}x:make_workload", "There is no module '{}x'"),
        ("{}:make_workloads", "did you mean make_workload?"),
        ("{}:needs", "needs the arguments width, but memfit gives none"),
        ("{}:fails", "raised RuntimeError: no data here"),
        (
            "{}:model",
            "{}:model must return a memfit.Workload(model, batch, loss, optimizer), not Linear.",
        ),
        ("{}:name", "is the text 'resnet18'"),
        ("{}_broken:make", "imports surely_not_installed_anywhere"),
        ("{}_wrong:make", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_what_gives_no_workload_gets_one_sentence(module: str, place: str, says: str) -> None:
    """The exit code is that of a usage error, and no traceback is shown."""
    found = run("probe", place.format(module), "--gpu", "rtx3060", "--engine", "simulate")
    assert found.exit_code == 2
    assert says.format(module) in found.output
    assert "Traceback" not in found.output
    assert len(found.output.strip().splitlines()) == 1


def test_names_of_models_and_hubs_stay_names() -> None:
    """Only a module's place is imported."""
    for name in ("resnet50", "resnet50.a1_in1k", "hf-hub:timm/resnet50"):
        assert subject_of(name) == name

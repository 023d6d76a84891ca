"""The examples run unmodified, and they train with the full batch's gradient."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accumulation.parts import GradientRecorder, full_batch_gradients, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from memfit import Accumulator
from memfit.step.calling import call_model, split_batch

EXAMPLES = Path(__file__).parent.parent / "examples"
TRAINED = ("timm_fine_tuning", "two_targets", "collaborative_filtering", "token_weighted_loss")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    """The lists below have all examples."""
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*TRAINED, "road_to_the_top"}


@pytest.mark.parametrize("name", TRAINED)
def test_gradients_are_the_full_batchs(name: str) -> None:
    """This is in float64, for micro-batches of any size and a short last batch."""
    example = load(name)

    @settings(deadline=None, max_examples=6)
    @given(st.integers(1, 20), st.integers(1, 9))
    def check(num_samples: int, micro: int) -> None:
        torch.manual_seed(0)
        model = example.make_model().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batch: Any = pytree.tree_map(
            lambda leaf: leaf.double() if leaf.is_floating_point() else leaf,
            example.make_batch(num_samples),
        )
        inputs, targets = split_batch(batch)
        total = getattr(example, "total_loss", example.loss)
        expected = full_batch_gradients(
            model, optimizer, lambda: total(call_model(model, inputs), *targets)
        )
        seen = GradientRecorder(optimizer)
        weight: Any = getattr(example, "weight", "samples")
        accumulator = Accumulator(model, optimizer, micro, loss=example.loss, weight=weight)
        accumulator.step(batch)
        assert relative_error(seen.steps[0], expected) < 1e-10

    check()


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("timm_fine_tuning", "64 = 32 + 32"),
        ("two_targets", "96 = "),
        ("collaborative_filtering", "8000 = "),
        ("token_weighted_loss", "30 = 8 + 8 + 7 + 7"),
    ],
)
def test_examples_run(name: str, first: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan accumulates, and three steps are taken."""
    load(name).main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(first)
    assert " + " in lines[0]
    assert sum(line.startswith("step ") for line in lines) == 3
    if name == "token_weighted_loss":
        assert re.search(r"is off by \de-0[78]$", lines[1])
    if name == "timm_fine_tuning":
        assert "step 2: 32 samples" in lines[-1]


def test_road_to_the_top_comes_to_the_courses_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """2 steps for the transformers and convnext_large at 320x240, 1 for convnext_small."""
    load("road_to_the_top").main()
    header, *rows, took = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "px", "steps", "course", "peak", "of"]
    steps = {tuple(row.split()[:2]): row.split()[2] for row in rows}
    # This row is borderline, so it is marked, or it has two steps.
    borderline = next(row for row in rows if row.startswith("convnext_large ") and " 224 " in row)
    assert "(borderline)" in borderline or steps.pop(("convnext_large", "224")) == "2"
    steps.pop(("convnext_large", "224"), None)
    assert steps == {
        ("convnext_large", "320x240"): "2",
        ("vit_large_patch16_224", "224"): "2",
        ("swinv2_large_window12_192", "192"): "2",
        ("swin_large_patch4_window7_224", "224"): "2",
        ("convnext_small", "128"): "1",
    }
    for row in rows:
        assert row.count("iB") == 2
    assert took.startswith("Simulated for a card of 16,280 MiB")

"""`memfit verify`, as it is typed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import memfit
from memfit.cli import main

SIZES = ("--micro-batch", "4", "--accumulation-steps", "2", "--image-size", "32")
ON_CPU = (*SIZES, "--device", "cpu", "--num-classes", "10")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, ["verify", *arguments])


def test_equal_gradients_end_with_0() -> None:
    """The first line is the verdict."""
    result = run("test_vit", *ON_CPU)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("equal: test_vit at 2 x 4, to ")
    assert "0 of 80" in result.stdout


def test_a_model_that_mixes_ends_with_4_and_frozen_with_0() -> None:
    """It names the layers that mix, and what stops them."""
    result = run("test_resnet", *ON_CPU)
    assert result.exit_code == 4, result.output
    assert result.stdout.startswith("differs: test_resnet at 2 x 4, 15 layers mix samples; ")
    assert "BatchNorm2d" in result.stdout
    # The list below begins with the parameter that the first line speaks of.
    first = result.stdout.partition("furthest apart")[2].splitlines()[2]
    largest = " ".join(result.stdout.split()).partition("off by up to ")[2].split()[0]
    assert first.split()[1] == largest
    frozen = run("test_resnet", *ON_CPU, "--freeze-bn")
    assert frozen.exit_code == 0, frozen.output
    assert "15 layers frozen" in frozen.stdout


def test_json_is_all_that_is_printed() -> None:
    """The exit code is the same as without it."""
    result = run("test_resnet", *ON_CPU, "--json", "--samples", "6")
    assert result.exit_code == 4
    (plain,) = json.loads(result.stdout)["results"]
    assert (plain["schema_version"], plain["verdict"]) == (1, "differs")
    assert plain["effective_batch_size"] == 8
    assert sum(plain["checks"][0]["cut"]) == 6
    assert plain["mixing_layers"][0]["type_name"] == "BatchNorm2d"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("resnet5O", *SIZES), "did you mean resnet50"),
        (("test_vit", "--micro-batch", "0", "--accumulation-steps", "2"), "at least 1, not 0"),
        (("test_vit", "--micro-batch", "8", "--accumulation-steps", "1"), "at least 2, not 1"),
        (("test_vit", *SIZES, "--samples", "1"), "samples must be at least 2, not 1"),
        (("test_vit", "--micro-batch", "8"), "Missing option '--accumulation-steps'"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(arguments: tuple[str, ...], says: str) -> None:
    """There is no traceback."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert says in result.output
    assert "Traceback" not in result.output


def test_a_model_s_own_error_is_one_sentence() -> None:
    """Here the images are too small for the model."""
    result = run("test_resnet", *ON_CPU, "--model-kwargs", "in_chans=0")
    assert result.exit_code in {1, 2}
    assert "Traceback" not in result.output


def test_the_public_function_takes_a_workload_and_a_loop() -> None:
    """The workload is the user's own, and the loop has a fault."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    batch = (torch.randn(12, 6), torch.randint(3, (12,)))
    workload = memfit.Workload(model, batch, nn.functional.cross_entropy, "sgd")

    def mean_of_means(model: Any, micro_batches: Any, loss: Any, _optimizer: Any) -> None:
        for inputs, targets in micro_batches:
            (loss(model(inputs), targets) / len(micro_batches)).backward()

    result = memfit.verify(
        workload, micro_batch_size=4, accumulation_steps=3, accumulate=mean_of_means
    )
    assert result.verdict is memfit.Verdict.DIFFERS
    assert result.loop_faults == (memfit.LoopFault.MEAN_OF_MEANS,)
    assert result.options.precision is memfit.Precision.FP32


def test_a_device_that_is_not_there() -> None:
    """The error is that of a probe."""
    result = run("test_vit", *SIZES, "--device", "tpu")
    assert result.exit_code == 2
    assert "'tpu' is not a device" in result.output

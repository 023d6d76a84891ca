"""Blocks that are recomputed: which there are, their names, and gradients that are the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import timm
import torch
from torch import nn

import memfit
from memfit.errors import UsageError
from memfit.step.checkpointing import blocks_of, matched_blocks
from memfit.step.workload import Workload


class Residual(nn.Module):
    """A block with two layers and dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(8, width), nn.Linear(width, 8)
        self.drop = nn.Dropout(0.3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return numbers of the shape of the inputs."""
        added: torch.Tensor = inputs + self.drop(self.outer(self.inner(inputs).relu()))
        return added


def tower(depth: int = 3) -> nn.Sequential:
    """Return a model of residual blocks."""
    blocks = nn.Sequential(*(Residual(4 * index + 8) for index in range(depth)))
    return nn.Sequential(nn.Linear(4, 8), blocks, nn.Linear(8, 2))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """Return the gradients of one step with a given seed."""
    torch.manual_seed(0)
    model(torch.randn(16, 4)).square().mean().backward()
    found = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return [gradient for gradient in found if gradient is not None]


def test_gradients_and_names_are_the_same() -> None:
    """Dropout draws the same again; a copy recomputes its own blocks."""
    model = tower()
    before, names = gradients(model), list(model.state_dict())
    calls: list[str] = []
    memfit.checkpoint(model, ["1.0", "1.2"])
    for name in ("1.0", "1.1", "1.2"):
        inner = model.get_submodule(f"{name}.inner")
        inner.register_forward_hook(lambda *_args, name=name: calls.append(name))
    after = gradients(model)
    assert all(map(torch.equal, before, after))
    assert sorted(calls) == ["1.0", "1.0", "1.1", "1.2", "1.2"]
    assert list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(map(torch.equal, before, gradients(model)))
    assert not any(map(torch.any, gradients(twin)[:2]))


def test_a_pickled_model_keeps_its_weights() -> None:
    """A model whose blocks are recomputed can be saved whole."""
    model = tower()
    memfit.checkpoint(model, "1.*")
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
    assert all(map(torch.equal, gradients(model), gradients(again)))


def test_the_innermost_lists_are_the_blocks() -> None:
    """Stages are not blocks, and neither are single layers or a block's shortcut."""
    assert blocks_of(tower()) == ("1.0", "1.1", "1.2")
    assert blocks_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ()
    resnet, vit = timm.create_model("test_resnet"), timm.create_model("test_vit")
    convnext = timm.create_model("test_convnext")
    assert blocks_of(resnet) == ("layer1.0", "layer2.0", "layer3.0", "layer4.0")
    assert blocks_of(vit) == tuple(f"blocks.{index}" for index in range(len(vit.blocks)))
    assert all(".blocks." in name for name in blocks_of(convnext))


def test_a_name_that_matches_nothing_gets_the_nearest() -> None:
    """A module inside a chosen one is left out, and none is wrapped twice."""
    model = tower()
    assert matched_blocks(model, ["1.*"], name="Tower") == ("1.0", "1.1", "1.2")
    with pytest.raises(UsageError, match=r"Sequential has no module '1\.7'; did you mean '1\.2'"):
        memfit.checkpoint(model, "1.7")
    with pytest.raises(UsageError, match=r"its blocks are named like '1\.0'"):
        memfit.checkpoint(model, "encoder.layer")
    memfit.checkpoint(model, "1.1")
    with pytest.raises(UsageError, match=r"'1\.1' of Sequential is recomputed already"):
        memfit.checkpoint(model, "1.1")


def test_a_trial_puts_the_blocks_back() -> None:
    """The user's model is as before, and what is recomputed was not held."""
    model = tower(8)
    batch = (torch.randn(2, 4), torch.randn(2, 2))
    workload = Workload(model, batch, nn.functional.mse_loss, "sgd")

    def peak(**options: Any) -> int:
        found = memfit.estimate(workload, 20_000, gpu="rtx3060", precision="fp32", **options)
        assert found.peak_requested_bytes is not None
        return found.peak_requested_bytes

    assert peak(checkpoint="1.*") < peak(checkpoint=["1.6", "1.7"]) < peak()
    memfit.probe(workload, device="cpu", memory="100MiB", max_batch_size=4, checkpoint="1.*")
    assert not any("forward" in vars(module) for module in model.modules())
    with pytest.raises(UsageError, match="grad_checkpointing recomputes every block"):
        peak(checkpoint="1.*", grad_checkpointing=True)
    with pytest.raises(UsageError, match=r"checkpoint 'auto' .* ask memfit\.plan"):
        peak(checkpoint="auto")

"""`plan(..., checkpoint="auto")`: the fewest operations again for which the plan fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import memfit
from memfit.api.steps import describe
from memfit.backends.simulated import SimulatedBackend
from memfit.cards import find_gpu
from memfit.errors import DoesNotFitError, UsageError
from memfit.integrations import lines_for
from memfit.planning.blocks import recomputable
from memfit.simulation.tracing.scratch import kept_workspace_bytes
from memfit.step.checkpointing import blocks_of
from memfit.units import MIB

ON: dict[str, Any] = {"gpu": "any", "precision": "fp32", "progress": None}


class Stage(nn.Module):
    """A block whose activations and operations depend on its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(256, width), nn.Linear(width, 256)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return numbers of the shape of the inputs."""
        added: torch.Tensor = inputs + self.outer(self.inner(inputs).sin().cos().exp())
        return added


WIDTHS = (512, 256) * 4


def workload() -> memfit.Workload:
    """Return a workload of blocks that differ."""
    model = nn.Sequential(*map(Stage, WIDTHS))
    batch = (torch.randn(2, 256), torch.randn(2, 256))
    return memfit.Workload(model, batch, nn.functional.mse_loss, "sgd")


def kept_bytes(card: str) -> int:
    """Return what BLAS keeps on a card beside every step: nothing since torch 2.15."""
    return kept_workspace_bytes(find_gpu(card))


def planned(samples: int, mib: int, **options: Any) -> memfit.Plan:
    """Return a plan on a card that has so many MiB for the step."""
    memory = mib * MIB + kept_bytes("rtx3090")
    found = memfit.plan(workload(), samples, memory=memory, **{**ON, **options})
    assert isinstance(found, memfit.Plan)
    return found


def test_it_fits_where_nothing_did_and_costs_less_than_all() -> None:
    """The whole share runs in one step; with less room, more is recomputed."""
    assert planned(8192, 850).accumulation_steps > 1
    costs = []
    for mib in (850, 790):
        found = planned(8192, mib, checkpoint="auto")
        assert found.micro_batch_sizes == (8192,)
        again = found.recomputation
        assert again is not None
        assert found.options.checkpoint == again.blocks
        assert 0 < again.forward_share < again.forward_share_of_all <= 1
        assert found.peak_reserved_bytes is not None
        assert found.peak_reserved_bytes <= 0.95 * found.capacity.usable_bytes
        costs.append(again.forward_share)
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


@pytest.mark.parametrize("model", ["test_resnet", "test_vit"])
def test_what_is_foreseen_is_what_a_step_with_these_blocks_holds(model: str) -> None:
    """From the trace of the unchanged step, the peak is known within 2% for any choice."""
    step = describe(model, image_size=160, precision="amp-bf16")
    card = SimulatedBackend(find_gpu("rtx3060"))
    data = recomputable(step, card.gpu, 96)
    names = [block.name for block in data.blocks]
    assert 0.5 < data.share_of(names) <= 1
    for chosen in ((), names[::2], names):
        found = memfit.estimate(
            model, 96, gpu="rtx3060", image_size=160, precision="amp-bf16", checkpoint=chosen
        )
        foreseen = data.peak_of(chosen) + kept_bytes("rtx3060")
        assert found.peak_requested_bytes == pytest.approx(foreseen, rel=0.02), chosen


def test_what_fits_as_it_is_is_left_alone() -> None:
    """No block is chosen, and the plan says so."""
    found = planned(64, 810, checkpoint="auto")
    assert found.recomputation is None
    assert found.options.checkpoint == ()
    assert "fits without recomputing any block" in found.remarks[-1]


def test_what_never_fits_whole_accumulates_with_the_fewest_steps() -> None:
    """The micro-batch is the largest that fits with every block recomputed."""
    found = planned(16_384, 650, checkpoint="auto")
    plain = planned(16_384, 650)
    assert found.recomputation is not None
    assert 1 < found.accumulation_steps < plain.accumulation_steps
    with pytest.raises(DoesNotFitError):
        planned(64, 470, checkpoint="auto")


def test_the_lines_to_paste_recompute_the_same_blocks() -> None:
    """They need nothing of memfit, and gradients are equal."""
    found = planned(8192, 790, checkpoint="auto")
    text = lines_for(found, "pytorch")
    start = text.index("import functools")
    lines = text[start : text.index("loader = ", start)]
    model = workload().model
    inputs = torch.randn(4, 256)
    model(inputs).square().mean().backward()
    before = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    exec(lines, {"model": model})  # noqa: S102 - our own lines
    chosen = {name for name in blocks_of(model) if "forward" in vars(model.get_submodule(name))}
    assert chosen == set(found.options.checkpoint)
    model(inputs).square().mean().backward()
    after = [parameter.grad for parameter in model.parameters()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"train\.py has no flag that recomputes single blocks"):
        lines_for(found, "timm")
    assert f"memfit.checkpoint(model, {list(found.options.checkpoint)!r})" in found.remarks[-1]


def test_bad_input_gets_a_sentence() -> None:
    """What cannot be chosen, and what excludes it, is named."""
    with pytest.raises(UsageError, match="'auto', or names of blocks, not both"):
        planned(64, 1024, checkpoint=["auto", "0"])
    with pytest.raises(UsageError, match="leave one of the two out"):
        planned(64, 1024, checkpoint="auto", grad_checkpointing=True)
    with pytest.raises(UsageError, match="has none: name the blocks"):
        memfit.plan(workload(), 64, device="cpu", memory="500MiB", checkpoint="auto")
    flat = memfit.Workload(
        nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)),
        (torch.randn(2, 256), torch.randn(2, 256)),
        nn.functional.mse_loss,
        "sgd",
    )
    with pytest.raises(UsageError, match="has no blocks that could be recomputed"):
        memfit.plan(flat, 100_000, memory="700MiB", checkpoint="auto", **ON)

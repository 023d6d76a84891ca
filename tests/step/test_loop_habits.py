"""What a loop holds or leaves out: averages, frozen parts, prefetched batches, evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import memfit
from memfit.api.steps import describe
from memfit.errors import UsageError
from memfit.records import Precision, StepOptions
from memfit.step.loop_habits import freeze
from memfit.step.runner import PreparedStep
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload

_MIB = 2**20


class Tower(nn.Module):
    """Two stems and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(256, 512), nn.BatchNorm1d(512))
        self.body = nn.Linear(512, 512)
        self.head = nn.Linear(512, 16)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 16)."""
        scores: torch.Tensor = self.head(self.body(self.stem(inputs)).relu())
        return scores


def tower(**changes: Any) -> Workload:
    """Return a workload of the tower."""
    parts: dict[str, Any] = {
        "model": Tower(),
        "batch": (torch.randn(4, 256), torch.randint(16, (4,))),
        "loss": nn.functional.cross_entropy,
        "optimizer": "adamw",
    }
    return Workload(**{**parts, **changes})


def prepared(subject: Workload, **options: Any) -> PreparedStep:
    """Return a step on the CPU in fp32."""
    step = TrainingStep(subject=subject, options=StepOptions(precision=Precision.FP32, **options))
    return step.prepare(torch.device("cpu"))


def requested(**options: Any) -> int:
    """Return what a simulated step of the tower asks for at its peak, with 512 samples."""
    found = memfit.estimate(tower(), 512, gpu="rtx3060", engine="simulate", **options)
    assert found.peak_requested_bytes is not None
    return found.peak_requested_bytes


def test_options_add_the_bytes_that_they_hold() -> None:
    """An average is a copy of the weights; a batch that waits is a batch; outputs are outputs."""
    model = Tower()
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    base = requested(precision="fp32")
    assert requested(precision="fp32", ema=True) - base == held
    assert requested(precision="fp32", ema="cpu") == base
    batch_bytes = 512 * (256 * 4 + 8)
    assert requested(precision="fp32", prefetch=2) - base == 2 * batch_bytes
    assert requested(precision="fp32", keeps_outputs=True) >= base
    assert requested(precision="fp32", frozen=["stem.*", "body.*"]) < base
    assert requested(precision="fp32", optimizer_in_backward=True) < base
    alone = requested(precision="fp32", evaluate=True)
    beside = requested(precision="fp32", evaluate="in-training")
    assert alone < beside < base


def test_a_workload_says_itself_that_its_loop_keeps_outputs() -> None:
    """The option and the workload mean the same, and what was kept is gone at the end."""
    step = prepared(tower(keeps_outputs=True))
    step.begin()
    step.iterate(4)
    kept = step._held
    assert kept["outputs"].shape == (4, 16)
    assert {"batch", "outputs", "loss"} == kept.keys()
    step.end()
    assert not kept


def test_the_average_follows_the_weights() -> None:
    """After a step it has moved a little towards them, and its buffers are theirs."""
    subject = tower(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    step = prepared(subject, ema=memfit.records.Averaging.DEVICE)
    step.begin()
    before = [copy.clone() for copy in step.averages]
    step.iterate(4)
    weights = list(subject.model.parameters())
    for copy, old, weight in zip(step.averages, before, weights, strict=False):
        torch.testing.assert_close(copy, old + (weight.detach() - old) * 0.0002)
    step.end()
    assert not step.averages


def test_frozen_parameters_do_not_move_and_thaw_afterwards() -> None:
    """A live model's frozen weights keep their bits, and are trained again after the trial."""
    subject = tower()
    memfit.estimate(subject, 4, gpu="rtx3060", engine="simulate", frozen="stem.*")
    assert all(parameter.requires_grad for parameter in subject.model.parameters())
    from memfit.memory.restore import preserved

    with preserved(subject.model):
        step = prepared(subject, frozen=("stem.*",))
        step.iterate(4)
        frozen = [p for name, p in subject.model.named_parameters() if name.startswith("stem")]
        assert not any(parameter.requires_grad for parameter in frozen)
        step.end()
    assert all(parameter.requires_grad for parameter in subject.model.parameters())


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("sten.*", "did you mean 'stem.*'"),
        ("stem", "did you mean 'stem.*'"),
        ("*", "froze every parameter"),
        ("qqq", "named like 'stem.0.weight'"),
    ],
)
def test_a_pattern_that_freezes_nothing_or_everything_is_refused(pattern: str, says: str) -> None:
    """The sentence names the nearest pattern."""
    with pytest.raises(UsageError, match=says.replace("*", r"\*")):
        freeze(Tower(), [pattern], name="Tower")


def test_a_step_in_backward_equals_the_step_after_it() -> None:
    """Both end with the same weights, and no gradient is left between."""
    after = tower()
    within = tower(batch=after.batch)
    within.model.load_state_dict(after.model.state_dict())
    torch.manual_seed(0)
    first = prepared(after)
    first.iterate(4)
    torch.manual_seed(0)
    second = prepared(within, optimizer_in_backward=True)
    second.begin()
    second.accumulate(4)
    assert all(parameter.grad is None for parameter in within.model.parameters())
    second.update()
    second.end()
    for one, other in zip(after.model.parameters(), within.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    # The hooks are gone: gradients stay again.
    nn.functional.cross_entropy(
        within.model(torch.randn(4, 256)), torch.randint(16, (4,))
    ).backward()
    assert all(parameter.grad is not None for parameter in within.model.parameters())


def test_an_evaluation_has_no_gradients_and_puts_training_back() -> None:
    """The model is in evaluation mode in the pass only, and nothing of it can train."""
    subject = tower()
    step = prepared(subject, evaluate=memfit.records.Evaluation.ALONE, keeps_outputs=True)
    before = subject.model.stem[1].running_mean.clone()  # type: ignore[index, union-attr]
    step.begin()
    step.iterate(4)
    assert not subject.model.training
    assert not step._held["outputs"].requires_grad
    step.end()
    assert all(module.training for module in subject.model.modules())
    assert torch.equal(before, subject.model.stem[1].running_mean)  # type: ignore[index, union-attr]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ema": "gpu"}, "ema is True, False, 'device' or 'cpu'"),
        ({"evaluate": "never"}, "'alone' or 'in-training'"),
        ({"prefetch": -1}, "prefetch"),
        ({"frozen": ""}, "frozen is a pattern"),
        ({"no_grad": True}, "give evaluate too"),
        ({"fused": True, "optimizer": "lion"}, "no fused implementation"),
        ({"optimizer_in_backward": True, "precision": "amp-fp16"}, "GradScaler"),
        ({"evaluate": True, "ema": "device"}, "leave ema out, or give evaluate='in-training'"),
        ({"evaluate": True, "fused": True}, "holds nothing but the model: leave fused out"),
    ],
)
def test_impossible_habits_get_a_sentence(options: dict[str, Any], says: str) -> None:
    """What was wrong, and what there is."""
    with pytest.raises(UsageError, match=says):
        memfit.estimate("resnet18", 2, gpu="rtx3060", engine="simulate", image_size=32, **options)


def test_a_model_without_a_classifier_is_evaluated() -> None:
    """An evaluation has no loss, so the model need not have classes."""
    found = memfit.estimate(
        "test_vit",
        2,
        gpu="rtx3060",
        engine="simulate",
        evaluate=True,
        model_kwargs={"num_classes": 0},
    )
    assert found.fits


def test_what_accumulates_refuses_a_step_without_gradients() -> None:
    """A plan and a verification say where to go instead."""
    refused: tuple[dict[str, Any], ...] = ({"evaluate": True}, {"optimizer_in_backward": True})
    for options in refused:
        with pytest.raises(UsageError, match="A plan accumulates gradients"):
            memfit.plan("resnet18", 64, gpu="rtx3060", engine="simulate", **options)
        with pytest.raises(UsageError, match="verify accumulates gradients"):
            memfit.verify("resnet18", micro_batch_size=2, accumulation_steps=2, **options)


def test_a_workloads_own_optimizer_is_made_fused_by_its_owner() -> None:
    """memfit does not make it, so it says who does."""
    with pytest.raises(UsageError, match="give that one fused=True"):
        describe(tower(optimizer=torch.optim.AdamW), fused=True)

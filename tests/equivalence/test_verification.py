"""Tests of memfit.equivalence.verification: whole verifications of models as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from equivalence.models import (
    WIDTH,
    Counting,
    Detaching,
    DetachingLater,
    HandWrittenNorm,
    MixingInBackward,
    OnePercentOff,
    check,
    mlp,
    vectors,
)
from equivalence.test_weighting import contrastive
from memfit.equivalence import verify
from memfit.records import MixesIn, Precision, StepOptions, Verdict
from memfit.step.training_step import TrainingStep

CPU = torch.device("cpu")


def verify_timm(
    name: str, *, precision: Precision = Precision.FP32, freeze_bn: bool = False
) -> Any:
    """Verify a timm model on small images."""
    options = StepOptions(precision=precision, image_size=(32, 32))
    return verify(
        TrainingStep(subject=name, options=options),
        CPU,
        micro_batch_size=4,
        accumulation_steps=2,
        freeze_bn=freeze_bn,
    )


# --- models that do not mix, and models that do ---------------------------------------------------


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.AMP_BF16, Precision.BF16])
@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_model_that_mixes_nothing_is_equal(name: str, precision: Precision) -> None:
    """Gradients agree to 1e-10 in float64, and within rounding in the precision of training."""
    result = verify_timm(name, precision=precision)
    assert result.verdict is Verdict.EQUAL
    assert result.mixing_layers == ()
    assert result.worst_relative_error("fp64") < 1e-10
    assert {len(set(check.cut)) for check in result.checks} == {1, 2}


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_batch_norm_differs_and_frozen_is_equal(name: str) -> None:
    """The layers that mix are found by what they do, and so is what stops them."""
    result = verify_timm(name)
    assert result.verdict is Verdict.DIFFERS
    assert result.worst_relative_error("fp64") > 1e-3
    assert result.mixing_layers
    assert all(mixer.stops_in_eval for mixer in result.mixing_layers)
    assert all("running" in drift.name for drift in result.buffers)
    assert result.num_drifting_buffers == 3 * len(result.mixing_layers)
    frozen = verify_timm(name, precision=Precision.AMP_BF16, freeze_bn=True)
    assert frozen.verdict is Verdict.EQUAL
    assert frozen.worst_relative_error("fp64") < 1e-10
    assert [mixer.name for mixer in frozen.mixing_layers] == [
        mixer.name for mixer in result.mixing_layers
    ]
    assert all(mixer.frozen for mixer in frozen.mixing_layers)
    assert frozen.buffers == ()


def resnet_on_80_px() -> TrainingStep:
    options = StepOptions(precision=Precision.FP32, image_size=(80, 80))
    return TrainingStep(subject="test_resnet", options=options)


def test_a_known_verdict_takes_no_more_passes_than_it_needs() -> None:
    """Layers that mix are found on small images, and only equal micro-batches are compared."""
    seen: list[str] = []
    result = verify(
        resnet_on_80_px(),
        CPU,
        micro_batch_size=4,
        accumulation_steps=2,
        progress=lambda what, _done, _planned: seen.append(what),
    )
    assert result.verdict is Verdict.DIFFERS
    assert result.used_smaller_images
    assert [(one.precision, one.cut) for one in result.checks] == [
        ("fp64", (4, 4)),
        ("fp32", (4, 4)),
    ]
    assert result.order_error is not None
    assert [what for what in seen if what[:4] in ("fp64", "fp32")] == [
        "fp64: 8",
        "fp64: 2 x 4",
        "fp64: the samples in another order",
        "fp32: 8",
        "fp32: 2 x 4",
    ]


def test_an_open_verdict_is_found_on_whole_images() -> None:
    """If the layers that mix are frozen, all comparisons have images of the user's size."""
    result = verify(
        resnet_on_80_px(),
        CPU,
        micro_batch_size=4,
        accumulation_steps=2,
        freeze_bn=True,
    )
    assert result.verdict is Verdict.EQUAL
    assert not result.used_smaller_images
    assert [one.cut for one in result.checks] == [(4, 4), (4, 2, 2)] * 2


def test_a_hand_written_batch_norm() -> None:
    """The layer is found although no list of names contains it."""
    result = check(mlp(HandWrittenNorm(WIDTH)))
    assert result.verdict is Verdict.DIFFERS
    assert [(mixer.name, mixer.type_name) for mixer in result.mixing_layers] == [
        ("2", "HandWrittenNorm")
    ]
    assert check(mlp(HandWrittenNorm(WIDTH)), freeze_bn=True).verdict is Verdict.EQUAL


def test_batch_statistics_that_evaluation_does_not_stop() -> None:
    """Freezing changes nothing here, and the report does not claim that it does."""
    layer = nn.BatchNorm1d(WIDTH, track_running_stats=False)
    result = check(mlp(layer), freeze_bn=True)
    assert result.verdict is Verdict.DIFFERS
    assert [(m.name, m.stops_in_eval, m.frozen) for m in result.mixing_layers] == [
        ("2", False, False)
    ]


def test_a_contrastive_loss() -> None:
    """The loss is named, and no layer of the model is."""
    result = check(mlp(), contrastive)
    assert result.verdict is Verdict.DIFFERS
    assert [(mixer.name, mixer.mixes_in) for mixer in result.mixing_layers] == [
        ("loss", MixesIn.LOSS)
    ]


def test_mixing_in_backward_is_looked_for_where_nothing_else_explains() -> None:
    """The outputs do not show this mixing."""
    result = check(mlp(MixingInBackward()))
    assert result.verdict is Verdict.DIFFERS
    assert [(m.name, m.mixes_in) for m in result.mixing_layers] == [("2", MixesIn.BACKWARD)]


def test_copies_of_one_sample_are_made_different() -> None:
    """In a batch of copies, batch normalisation would look harmless."""
    result = check(mlp(nn.BatchNorm1d(WIDTH)), batch=vectors(1))
    assert result.verdict is Verdict.DIFFERS
    assert result.num_jittered_samples == 11


# --- layers that lose gradients -------------------------------------------------------------------


def test_a_layer_that_detaches() -> None:
    """The other gradients are equal; the parameters without a gradient are named."""
    result = check(mlp(Detaching()))
    assert result.verdict is Verdict.DETACHED
    assert result.detaching == ("2",)
    assert result.unreached == ("0.weight", "0.bias")


def test_a_layer_that_detaches_after_the_first_micro_batch() -> None:
    """The fault shows in the gradients, and the layer is named."""
    result = check(mlp(DetachingLater()))
    assert result.verdict is Verdict.DIFFERS
    assert result.detaching == ("2",)


def test_a_layer_that_counts_its_calls() -> None:
    """It mixes no samples, but several calls still give another result than one."""
    result = check(mlp(Counting()))
    assert result.verdict is Verdict.DIFFERS
    assert (result.mixing_layers, result.stateful) == ((), ("2",))


def test_parameters_that_nothing_uses_are_no_difference() -> None:
    """timm's mask tokens are such parameters."""
    model = mlp()
    model.register_parameter("spare", nn.Parameter(torch.ones(3)))
    result = check(model)
    assert result.verdict is Verdict.EQUAL
    assert (result.unreached, result.detaching) == (("spare",), ())


def test_a_gradient_that_is_zero_but_for_rounding_is_no_difference() -> None:
    """A bias before a softmax over the same dimension moves nothing."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x + self.shift, dim=1)

    result = check(mlp(Shifted()), precision=Precision.AMP_BF16)
    assert result.verdict is Verdict.EQUAL
    vanishing = {d.name for c in result.checks for d in c.worst if d.vanishes}
    assert vanishing == {"2.shift"}


# --- precision ------------------------------------------------------------------------------------


def test_a_model_that_computes_partly_in_float32_is_proved_in_float64() -> None:
    """The types that its code names do not matter."""

    class Narrow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(x.float(), dim=1).to(x.dtype)

    result = check(mlp(Narrow()))
    assert result.verdict is Verdict.EQUAL
    error = result.worst_relative_error("fp64")
    assert error is not None
    assert error < 1e-12


def test_one_percent_in_one_parameter_is_caught_in_bf16() -> None:
    """Roundings average out over the elements, and the error does not."""
    model = mlp(OnePercentOff(WIDTH, WIDTH), nn.Tanh())
    result = check(model, precision=Precision.AMP_BF16)
    assert result.verdict is Verdict.DIFFERS
    fp64, *_, bf16 = result.checks
    assert fp64.passed
    assert not bf16.passed
    assert [d.name for d in bf16.worst if d.differs] == ["2.weight"]
    assert bf16.worst[0].scale == pytest.approx(1.01, abs=2e-3)


def test_the_same_layer_without_the_error_passes_in_bf16() -> None:
    """So the test above caught the error and not the layer."""
    model = mlp(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    assert check(model, precision=Precision.AMP_BF16).verdict is Verdict.EQUAL


class KernelBySize(nn.Module):
    """A product that sums in another order in large batches, as BLAS libraries do."""

    def __init__(self, *, loses_gradient: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.full((WIDTH,), 30.0))
        self.loses_gradient = loses_gradient

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= 4 or x.dtype is torch.float64:
            return F.linear(x, self.weight, self.bias)
        half = WIDTH // 2
        weight = self.weight.detach() if self.loses_gradient else self.weight
        first = F.linear(x[:, :half], weight[:, :half], self.bias)
        return first + F.linear(x[:, half:], weight[:, half:])


@pytest.mark.parametrize("loses_gradient", [False, True])
def test_rounding_that_depends_on_the_batch_size(loses_gradient: bool) -> None:
    """It is noise in bf16, and no difference. A gradient that is missing there is one."""
    torch.manual_seed(0)
    model = mlp(KernelBySize(loses_gradient=loses_gradient), nn.LayerNorm(WIDTH))
    result = check(model, precision=Precision.AMP_BF16)
    assert all(one.passed for one in result.checks if one.precision == "fp64")
    noisy = [one for one in result.checks if one.num_in_noise]
    assert noisy
    assert all(one.precision == "amp-bf16" for one in noisy)
    assert all(one.worst_relative_error < (one.noise or 0) for one in noisy if one.passed)
    assert result.verdict is (Verdict.DIFFERS if loses_gradient else Verdict.EQUAL)


def test_fp16_autocast_scales_its_loss() -> None:
    """After an overflow the scale is smaller, as with a GradScaler."""

    def large(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 100 * F.cross_entropy(outputs, targets)

    assert check(mlp(), large, precision=Precision.AMP_FP16).verdict is Verdict.EQUAL


@pytest.mark.gpu
@pytest.mark.computes
@pytest.mark.parametrize("precision", [Precision.AMP_BF16, Precision.AMP_FP16, Precision.FP32])
@pytest.mark.parametrize("name", ["test_vit", "convnext_atto", "test_resnet"])
def test_no_false_alarm_on_a_gpu(name: str, precision: Precision) -> None:
    """The rounding of a GPU's kernels is not reported as a difference."""
    options = StepOptions(precision=precision, image_size=(64, 64))
    result = verify(
        TrainingStep(subject=name, options=options),
        torch.device("cuda"),
        micro_batch_size=4,
        accumulation_steps=4,
        freeze_bn=True,
    )
    assert result.verdict is Verdict.EQUAL


# --- what models are made of ----------------------------------------------------------------------


def test_draws_are_replayed_when_checkpointing_draws_again() -> None:
    """Recomputed activations drop the same values as the first time."""
    options = StepOptions(
        precision=Precision.FP32,
        image_size=(32, 32),
        grad_checkpointing=True,
        model_kwargs=(("drop_path_rate", 0.3), ("attn_drop_rate", 0.2)),
    )
    result = verify(
        TrainingStep(subject="test_vit", options=options),
        CPU,
        micro_batch_size=2,
        accumulation_steps=2,
    )
    assert result.verdict is Verdict.EQUAL
    assert "blocks.0.attn" in result.replayed
    assert result.switched_off == ()

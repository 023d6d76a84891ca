"""Tests of memfit.equivalence.verification: what users give it, and what it leaves behind."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

import memfit
from equivalence.models import (
    WIDTH,
    Counting,
    TokenModel,
    check,
    mlp,
    sentences,
    token_loss,
    vectors,
)
from memfit.equivalence import verify
from memfit.errors import DoesNotFitError, UsageError, WorkloadError
from memfit.records import LossWeighting, Precision, StepOptions, Verdict
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (lambda model, loss: None, r"called with model, micro_batches, loss, optimizer, but <lam"),
        (3, "a function that takes model, micro_batches, loss, optimizer, not 3"),
    ],
)
def test_a_loop_that_cannot_be_called_is_refused(loop: Any, message: str) -> None:
    """It is refused before anything runs, and not as an error of the user's code."""
    workload = Workload(mlp(), vectors(4), F.cross_entropy, torch.optim.SGD)
    with pytest.raises(UsageError, match=message):
        memfit.verify(workload, micro_batch_size=2, accumulation_steps=2, accumulate=loop)


class Structured(nn.Module):
    """Has inputs by name, a recurrent layer, nested outputs and a sparse gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, WIDTH, sparse=True)
        self.recur = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        embedded = self.embed(tokens) * mask[..., None]
        return {"last": self.recur(embedded)[0][:, -1], "parts": [embedded.mean(dim=1)]}


def test_inputs_and_outputs_of_any_nesting() -> None:
    """A right loop over them passes too."""

    def loss(outputs: dict[str, Any], targets: torch.Tensor) -> torch.Tensor:
        distance: torch.Tensor = (outputs["last"] - targets).square().mean()
        return distance.add(outputs["parts"][0].abs().mean())

    def loop(model: nn.Module, micro_batches: Any, loss: Any, _optimizer: Any) -> None:
        total = sum(len(targets) for _, targets in micro_batches)
        for inputs, targets in micro_batches:
            (loss(model(**inputs), targets) * (len(targets) / total)).backward()

    batch = (
        {"tokens": torch.randint(20, (12, 5)), "mask": torch.ones(12, 5)},
        torch.randn(12, WIDTH),
    )
    result = check(Structured(), loss, batch, accumulate=loop)
    assert (result.verdict, result.loop_faults) == (Verdict.EQUAL, ())


def test_timm_s_variants_without_batch_norm_are_named() -> None:
    """They are found by name alone, and named only if a layer mixes."""
    step = TrainingStep(subject="resnet50.a1_in1k", options=StepOptions())
    assert step.batch_norm_free_variants == ("resnet50_gn", "nf_resnet50", "resnetv2_50x1_bit")


# --- losses ---------------------------------------------------------------------------------------


def test_a_mean_over_tokens_is_weighted_by_tokens() -> None:
    """The sentences have different lengths."""
    result = check(TokenModel(), token_loss, sentences)
    assert (result.verdict, result.weighting) == (Verdict.EQUAL, LossWeighting.TARGETS)


class OwnLoss(nn.Module):
    """Computes its loss itself, from labels among its inputs, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = TokenModel()

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return token_loss(self.inner(tokens), labels)


def test_a_model_that_computes_its_own_loss() -> None:
    """The gradients show what the loss averages over."""

    def batch(batch_size: int) -> dict[str, torch.Tensor]:
        tokens, labels = sentences(batch_size)
        return {"tokens": tokens, "labels": labels}

    result = check(OwnLoss(), lambda loss: loss, batch)
    assert (result.verdict, result.weighting) == (Verdict.EQUAL, LossWeighting.TARGETS)


def test_a_loss_with_parameters_of_its_own() -> None:
    """The gradients of the loss's parameters are compared too."""

    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(2.0))

        def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(outputs / self.temperature, targets)

    result = check(mlp(), Tempered())
    assert result.verdict is Verdict.EQUAL
    assert "loss.temperature" in {d.name for d in result.checks[0].worst}


def test_a_loss_that_is_not_finite_is_refused() -> None:
    """Such a loss leaves nothing to compare."""
    with pytest.raises(WorkloadError, match="The loss is nan in fp64"):
        check(mlp(), lambda outputs, _targets: (outputs * torch.nan).mean())


# --- a device that is too small -------------------------------------------------------------------


class Hungry(nn.Module):
    """Runs out of memory above a number of samples when it trains in float32."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most and x.dtype is torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return x


def test_a_full_batch_that_does_not_fit_is_cut_in_two_ways() -> None:
    """The report says so."""
    result = check(mlp(Hungry(4)))
    assert result.verdict is Verdict.EQUAL
    *fp64, cut = result.checks
    assert all(len(check.reference) == 1 and check.message is None for check in fp64)
    assert (cut.reference, cut.cut) == ((4, 4, 4), (4, 2, 4, 2))
    assert cut.message is not None
    assert "does not fit" in cut.message


def test_a_micro_batch_that_does_not_fit() -> None:
    """Then nothing can run, and the error says so."""
    with pytest.raises(DoesNotFitError, match="A micro-batch of 4 does not fit cpu"):
        check(mlp(Hungry(2)))


def test_a_model_s_own_error_is_raised_as_it_came() -> None:
    """The error is not about memory, so it is raised unchanged."""

    class Broken(nn.Module):
        def forward(self, _x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("the user's own")

    with pytest.raises(RuntimeError, match="the user's own"):
        check(mlp(Broken()))


# --- what is asked for, and what is left behind ---------------------------------------------------


@pytest.mark.parametrize(
    ("micro_batch_size", "accumulation_steps", "samples", "message"),
    [
        (0, 4, None, "micro-batch size must be at least 1, not 0"),
        (8, 1, None, "accumulation steps must be at least 2, not 1"),
        (8, 4, 1, "samples must be at least 2, not 1"),
    ],
)
def test_numbers_that_cannot_be(
    micro_batch_size: int, accumulation_steps: int, samples: int | None, message: str
) -> None:
    """The error is one sentence with the value."""
    with pytest.raises(UsageError, match=message):
        check(
            mlp(),
            micro_batch_size=micro_batch_size,
            accumulation_steps=accumulation_steps,
            samples=samples,
        )


def test_samples_bound_every_comparison() -> None:
    """The bound holds in float64 and in the precision of training."""
    result = check(mlp(), micro_batch_size=32, accumulation_steps=8, samples=10)
    assert {sum(check.cut) for check in result.checks} == {10}
    assert result.effective_batch_size == 256


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_small_micro_batches(micro_batch_size: int) -> None:
    """Micro-batches may be as small as one sample."""
    result = check(mlp(), micro_batch_size=micro_batch_size, accumulation_steps=2)
    assert result.verdict is Verdict.EQUAL


def test_micro_batches_of_one_that_batch_norm_cannot_take() -> None:
    """No other cut can be compared."""
    with pytest.raises(WorkloadError, match="takes no micro-batch of one sample"):
        check(mlp(nn.BatchNorm1d(WIDTH)), micro_batch_size=1)


class _NotOfOne(nn.Module):
    """Refuses a single sample, as batch normalisation does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) == 1:
            raise ValueError("Expected more than 1 value per channel")
        return x


def test_a_last_micro_batch_of_one_that_the_model_cannot_take() -> None:
    """The even cut is compared, and the report says that the other is missing."""
    result = check(mlp(_NotOfOne()), micro_batch_size=2)
    assert [check.cut for check in result.checks] == [(2, 2, 2)] * 2
    assert result.checks[0].message is not None
    assert "so 2 + 1 + 2 + 1 was not compared" in result.checks[0].message


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_everything_of_the_user_s_is_as_before(precision: Precision) -> None:
    """Weights, buffers, gradients, optimizer, modes, attributes and random states are equal."""
    model = mlp(nn.BatchNorm1d(WIDTH), nn.Dropout(0.2), Counting())
    nn.init.zeros_(model[-1].weight)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters())
    inputs, targets = vectors(6)
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(value) for value in (*model.parameters(), *model.buffers())]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]
    modes = [module.training for module in model.modules()]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    rng = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # type: ignore[index]

    workload = Workload(model, (inputs, targets), F.cross_entropy, optimizer)
    options = StepOptions(precision=precision)
    verify(
        TrainingStep(subject=workload, options=options),
        CPU,
        micro_batch_size=3,
        accumulation_steps=2,
        freeze_bn=True,
        accumulate=lambda model, batches, loss, _optimizer: [
            loss(model(x), y).backward() for x, y in batches
        ],
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert value.dtype is before[name].dtype
    assert [id(value) for value in (*model.parameters(), *model.buffers())] == identities
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    assert [module.training for module in model.modules()] == modes
    assert model[4].calls == 1
    for state, moment in zip(optimizer.state.values(), moments, strict=True):
        assert torch.equal(state["exp_avg"], moment)
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert random.getstate() == rng[1]
    assert (np.random.get_state()[1] == rng[2]).all()  # type: ignore[index]
    hooks = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    assert not any(hooks)


def test_progress_never_passes_its_end() -> None:
    """It gets what runs, how many passes are done and how many there are."""
    told: list[tuple[str, int, int]] = []
    workload = Workload(mlp(), vectors, F.cross_entropy, "sgd")
    verify(
        TrainingStep(subject=workload, options=StepOptions(precision=Precision.FP32)),
        CPU,
        micro_batch_size=4,
        accumulation_steps=2,
        progress=lambda *what: told.append(what),
    )
    assert [done for _, done, _ in told] == list(range(len(told)))
    assert all(done < total for _, done, total in told)


def test_the_record_goes_through_json() -> None:
    """The JSON has the verdict and whether each check passed."""
    result = check(mlp(nn.BatchNorm1d(WIDTH)))
    read = json.loads(json.dumps(result.to_dict()))
    assert read["schema_version"] == 1
    assert read["verdict"] == "differs"
    assert [check["passed"] for check in read["checks"]] == [False] * 2
    assert read["mixing_layers"][0]["mixes_in"] == "forward"

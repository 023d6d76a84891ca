"""An accumulated step has the full batch's gradients for all sizes, weights and nestings."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

import memfit
from accumulation.parts import GradientRecorder, full_batch_gradients, relative_error
from memfit import Accumulator
from memfit.errors import UsageError, WorkloadError
from memfit.records import Precision

BOUND = 1e-10


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """Make float64 the default type during a test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 4))


def batch_of(num_samples: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_samples, 5, generator=generator)
    return images, torch.randint(4, (num_samples,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 50))
def test_a_mean_over_samples_is_the_full_batchs(num_samples: int, micro: int) -> None:
    """Batch and micro-batch may have any size; the last micro-batch may be short."""
    model = small_model()
    optimizer = sgd(model)
    x, y = batch_of(num_samples)
    expected = full_batch_gradients(model, optimizer, lambda: F.cross_entropy(model(x), y))
    whole = F.cross_entropy(model(x), y).item()
    seen = GradientRecorder(optimizer)
    loss = Accumulator(model, optimizer, micro, loss=F.cross_entropy).step((x, y))
    assert relative_error(seen.steps[0], expected) < BOUND
    assert float(loss) == pytest.approx(whole, rel=1e-12)
    assert not loss.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


@settings(deadline=None, max_examples=60)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 12), st.booleans())
def test_a_mean_over_valid_targets_is_the_full_batchs(
    valid: list[bool], micro: int, as_tensor: bool
) -> None:
    """The user's function counts; a count may be 0, and a number or a tensor."""
    model = small_model()
    optimizer = sgd(model)
    x, y = batch_of(len(valid))
    y[~torch.tensor(valid)] = -100

    def weight(batch: Any) -> Any:
        count = (batch[1] != -100).sum()
        return count if as_tensor else int(count)

    accumulator = Accumulator(model, optimizer, micro, loss=F.cross_entropy, weight=weight)
    if not any(valid):
        with pytest.raises(WorkloadError, match="weight of the whole batch is 0"):
            accumulator.step((x, y))
        return
    expected = full_batch_gradients(model, optimizer, lambda: F.cross_entropy(model(x), y))
    seen = GradientRecorder(optimizer)
    accumulator.step((x, y))
    assert relative_error(seen.steps[0], expected) < BOUND


@pytest.mark.parametrize("weight", [{"samples": "samples", "valid": None}, ("samples", None)])
def test_losses_that_average_over_different_things_are_each_exact(weight: Any) -> None:
    """One loss averages over samples, one over valid targets; they are added."""

    def count(batch: Any) -> Any:
        return (batch[1] >= 0).sum()

    if isinstance(weight, dict):
        weight = {"samples": "samples", "valid": count}
    else:
        weight = ("samples", count)
    model = small_model()
    optimizer = sgd(model)
    x, y = batch_of(11)
    y[2:9] = -100

    def losses(outputs: torch.Tensor, targets: torch.Tensor) -> Any:
        first, second = outputs.square().mean(), F.cross_entropy(outputs, targets)
        return (first, second) if isinstance(weight, tuple) else {"valid": second, "samples": first}

    def total() -> torch.Tensor:
        outputs: torch.Tensor = model(x)
        return outputs.square().mean() + F.cross_entropy(outputs, y)

    expected = full_batch_gradients(model, optimizer, total)
    whole = total().item()
    seen = GradientRecorder(optimizer)
    loss = Accumulator(model, optimizer, 3, loss=losses, weight=weight).step((x, y))
    assert relative_error(seen.steps[0], expected) < BOUND
    assert float(loss) == pytest.approx(whole, rel=1e-12)


def test_losses_of_one_weight_are_added() -> None:
    """The losses are a tuple, and all average over samples."""
    model = small_model()
    optimizer = sgd(model)
    x, y = batch_of(7)

    def losses(outputs: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
        return [F.cross_entropy(outputs, targets), outputs.abs().mean()]

    expected = full_batch_gradients(model, optimizer, lambda: sum(losses(model(x), y)))  # type: ignore[arg-type, return-value]
    seen = GradientRecorder(optimizer)
    Accumulator(model, optimizer, 3, loss=losses).step((x, y))
    assert relative_error(seen.steps[0], expected) < BOUND


def test_a_sum_is_not_weighted() -> None:
    """Each micro-batch's sum counts unchanged."""
    model = small_model()
    optimizer = sgd(model)
    x, y = batch_of(7)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs, targets, reduction="sum")

    expected = full_batch_gradients(model, optimizer, lambda: loss(model(x), y))
    seen = GradientRecorder(optimizer)
    Accumulator(model, optimizer, 3, loss=loss, weight="sum").step((x, y))
    assert relative_error(seen.steps[0], expected) < BOUND


class TwoInputs(nn.Module):
    """Takes two tensors by name or one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 4)."""
        scores: torch.Tensor = self.left(a) * self.right(b)
        return scores


@pytest.mark.parametrize("nesting", ["flat", "pair", "dict", "mapping", "two targets"])
def test_batches_of_any_nesting_are_split(nesting: str) -> None:
    """Model and loss get the same arguments as for the whole batch."""
    torch.manual_seed(0)
    model = TwoInputs()
    optimizer = sgd(model)
    a, b, y = torch.randn(7, 3), torch.randn(7, 2), torch.randint(4, (7,))
    batches: dict[str, Any] = {
        "flat": (a, b, y),
        "pair": [(a, b), y],
        "dict": ({"a": a, "b": b}, y),
        "mapping": UserDict({"a": a, "b": b}),
        "two targets": ((a, b), (y, y)),
    }

    def loss(outputs: torch.Tensor, *targets: torch.Tensor) -> torch.Tensor:
        if not targets:
            return outputs.square().mean()
        return torch.stack([F.cross_entropy(outputs, target) for target in targets]).sum()

    targets: dict[str, Any] = {"mapping": (), "two targets": (y, y)}
    expected = full_batch_gradients(
        model, optimizer, lambda: loss(model(a, b), *targets.get(nesting, (y,)))
    )
    seen = GradientRecorder(optimizer)
    num_inputs = 2 if nesting == "flat" else 1
    accumulator = Accumulator(model, optimizer, 3, loss=loss, num_inputs=num_inputs)
    accumulator.step(batches[nesting])
    assert relative_error(seen.steps[0], expected) < BOUND


def test_the_norm_is_clipped_once_and_after_accumulation() -> None:
    """The result is that of clipping the whole batch's gradient."""
    model = small_model()
    optimizer = sgd(model)
    x, y = batch_of(10)
    full_batch_gradients(model, optimizer, lambda: F.cross_entropy(model(x), y))
    (F.cross_entropy(model(x), y)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    seen = GradientRecorder(optimizer)
    Accumulator(model, optimizer, 3, loss=F.cross_entropy, clip_grad_norm=0.01).step((x, y))
    assert relative_error(seen.steps[0], list(expected)) < BOUND


class CountingScaler(torch.amp.GradScaler):
    """Records the scale of each loss, and counts unscalings and steps."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=1024.0)
        self.calls: list[str] = []

    def scale(self, outputs: Any) -> Any:
        self.calls.append("scale")
        return super().scale(outputs)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append("unscale")
        super().unscale_(optimizer)

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls.append("step")
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale: Any = None) -> None:
        self.calls.append("update")
        super().update(new_scale)


def test_a_step_has_one_scale_and_one_unscaling() -> None:
    """All micro-batches have the same scale; gradients are unscaled before clipping, once."""
    torch.set_default_dtype(torch.float32)
    model = small_model()
    optimizer = sgd(model)
    x, y = batch_of(10)
    expected = full_batch_gradients(model, optimizer, lambda: F.cross_entropy(model(x), y))
    scaler = CountingScaler()
    seen = GradientRecorder(optimizer)
    accumulator = Accumulator(
        model, optimizer, 4, loss=F.cross_entropy, scaler=scaler, clip_grad_norm=1e9
    )
    accumulator.step((x, y))
    assert scaler.calls == ["scale"] * 3 + ["unscale", "step", "update"]
    assert relative_error(seen.steps[0], expected) < 1e-5


def test_schedulers_step_once_and_not_after_an_overflow() -> None:
    """A step that the scaler skipped does not count."""
    torch.set_default_dtype(torch.float32)
    model = small_model()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accumulator = Accumulator(
        model, optimizer, 4, loss=F.cross_entropy, scaler=scaler, scheduler=scheduler
    )
    x, y = batch_of(10)
    accumulator.step((x, y))
    assert scheduler.get_last_lr() == [0.05]
    before = [p.clone() for p in model.parameters()]
    accumulator.step((x * float("inf"), y))
    assert scheduler.get_last_lr() == [0.05]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() == 2.0


def test_the_plans_precision_is_the_loops() -> None:
    """Forward runs under autocast, fp16 gets a scaler, and `precision` overrides the plan."""
    torch.set_default_dtype(torch.float32)
    seen = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(outputs.dtype)
        return F.cross_entropy(outputs.float(), targets)

    plan = memfit.plan("test_vit", 8, gpu="any", memory="2GiB", precision="amp-fp16", image_size=32)
    model = small_model()
    accumulator = Accumulator(model, sgd(model), plan, loss=loss)
    assert accumulator.scaler is not None
    accumulator.step(batch_of(3))
    overruled = Accumulator(model, sgd(model), plan, loss=loss, precision="fp32")
    assert overruled.scaler is None
    overruled.step(batch_of(3))
    halved = Accumulator(model, sgd(model), 4, loss=loss, precision=Precision.AMP_BF16)
    halved.step(batch_of(3))
    assert seen == [torch.float16, torch.float32, torch.bfloat16]


def test_gradients_that_were_there_are_dropped() -> None:
    """`.grad` is None when a step begins, as after `optimizer.zero_grad()`."""
    model = small_model()
    optimizer = sgd(model)
    x, y = batch_of(6)
    expected = full_batch_gradients(model, optimizer, lambda: F.cross_entropy(model(x), y))
    F.cross_entropy(model(x), y).backward()
    seen = GradientRecorder(optimizer)
    Accumulator(model, optimizer, 4, loss=F.cross_entropy).step((x, y))
    assert relative_error(seen.steps[0], expected) < BOUND


@pytest.mark.parametrize(
    ("batch", "options", "says"),
    [
        (torch.tensor(1.0), {}, "no tensor with a leading dimension"),
        ((torch.zeros(4, 5), torch.zeros(3)), {}, "leading dimensions differ"),
        ((torch.zeros(0, 5), torch.zeros(0)), {}, "leading dimension is 0"),
        (batch_of(4), {"loss": lambda out, y: out.sum(1)}, r"the loss has the shape \(2,\)"),
        (batch_of(4), {"loss": lambda out, y: 3.0}, "must be a tensor of one number, not float"),
        (batch_of(4), {"loss": lambda out, y: out.sum().detach()}, "has no gradient"),
        (batch_of(4), {"loss": lambda out, y: (out.sum(),) * 3}, "3 losses, and there are 2"),
        (batch_of(4), {"weight": lambda batch: -1}, "must be a count, at least 0, not -1"),
        (batch_of(4), {"weight": lambda batch: float("nan")}, "at least 0, not nan"),
        (batch_of(4), {"weight": lambda batch: "many"}, "must be one number, not str"),
        (batch_of(4), {"weight": lambda batch: batch[0]}, r"not a tensor of shape \(2, 5\)"),
    ],
)
@pytest.mark.parametrize("recover", [True, False])
def test_what_makes_no_step_gets_a_sentence(
    batch: Any, options: dict[str, Any], says: str, recover: bool
) -> None:
    """Batches without samples, losses that are not one number, and wrong weights are refused."""
    torch.set_default_dtype(torch.float32)  # as when the parameters were made
    model = small_model()
    if "3 losses" in says:
        options = {**options, "weight": ("samples", "samples")}
    arguments = {"loss": F.cross_entropy, **options}
    accumulator = Accumulator(model, sgd(model), 2, recover=recover, **arguments)
    with pytest.raises(WorkloadError, match=f"(?i){says}"):
        accumulator.step(batch)


@pytest.mark.parametrize(
    ("plan", "options", "says"),
    [
        (0, {}, "at least 1 sample, not 0"),
        (2.5, {}, "or a micro-batch size, not 2.5"),
        (True, {}, "or a micro-batch size, not True"),
        (2, {"weight": "tokens"}, "not 'tokens'"),
        (2, {"weight": None}, "not None"),
        (2, {"clip_grad_norm": 0.0}, "must be above 0, not 0.0"),
        (2, {"precision": "auto"}, "no precision 'auto'. Choose one of fp32"),
        (2, {"multiple_of": 0}, "must be at least 1, not 0"),
        (2, {"loss": "mse"}, "must be a function of the outputs and targets, .* not str"),
        (2, {"loss": nn.MSELoss}, "is the class MSELoss, not an instance"),
    ],
)
def test_arguments_that_cannot_be_get_a_sentence(
    plan: Any, options: dict[str, Any], says: str
) -> None:
    """The error comes when the accumulator is made, not at its first step."""
    model = small_model()
    with pytest.raises(UsageError, match=says):
        Accumulator(model, sgd(model), plan, **{"loss": F.cross_entropy, **options})


def test_a_model_without_parameters_gets_a_sentence() -> None:
    """Such a model has nothing to train."""
    model = small_model()
    with pytest.raises(UsageError, match="Identity has no parameters"):
        Accumulator(nn.Identity(), sgd(model), 2, loss=F.cross_entropy)


def test_parts_keep_to_a_multiple() -> None:
    """Every part but the last is a multiple."""
    seen: list[int] = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        seen.append(len(outputs))
        return F.cross_entropy(outputs, targets)

    model = small_model()
    Accumulator(model, sgd(model), 56, loss=loss, multiple_of=8).step(batch_of(100))
    assert seen == [56, 44]


def test_losses_that_are_named_otherwise_get_a_sentence() -> None:
    """The message has the names of the losses and of the weights."""
    model = small_model()
    weight: Any = {"ce": "samples"}
    accumulator = Accumulator(
        model, sgd(model), 2, loss=lambda out, y: {"mse": out.sum()}, weight=weight
    )
    with pytest.raises(WorkloadError, match="losses are 'mse', but the weights are for 'ce'"):
        accumulator.step(batch_of(4))


def test_a_poisoned_device_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Putting back or releasing anything would raise another error and hide the first."""
    model = small_model()

    def loss(*_: Any) -> torch.Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def touched(*_: Any) -> None:
        raise AssertionError("the device was touched")

    monkeypatch.setattr("memfit.accumulation.accumulator.release", touched)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        Accumulator(model, sgd(model), 2, loss=loss).step(batch_of(4))


def test_an_error_of_the_users_is_raised_as_it_came() -> None:
    """The same exception object arrives, with its own traceback."""
    model = small_model()
    error = KeyError("a bug")

    def loss(*_: Any) -> torch.Tensor:
        raise error

    with pytest.raises(KeyError) as caught:
        Accumulator(model, sgd(model), 2, loss=loss).step(batch_of(4))
    assert caught.value is error
    assert "in loss" in str(caught.getrepr(style="short"))

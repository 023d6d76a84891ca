"""Accelerate: exact accumulation over its prepared objects, and a search that ends at the edge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accumulation.parts import out_of_memory, plan_of
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

import memfit
from integrations import exact, zoo
from memfit.errors import DoesNotFitError, UsageError
from memfit.records import Plan

pytestmark = pytest.mark.filterwarnings("default")
accelerate = pytest.importorskip("accelerate", reason="it trains with Accelerate")

from memfit.accelerate import Accumulator, find_executable_batch_size  # noqa: E402 - as above


def test_import_memfit_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module of a trainer is loaded when it is named."""
    monkeypatch.delattr(memfit, "accelerate", raising=False)
    assert memfit.accelerate.find_executable_batch_size is find_executable_batch_size


def prepared(**options: Any) -> tuple[Any, Any, Any, Any]:
    zoo.reset_accelerate()
    accelerator = accelerate.Accelerator(cpu=True, **options)
    model = exact.Small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    return (accelerator, *accelerator.prepare(model, optimizer, schedule))


def plan() -> Plan:
    return plan_of(exact.SAMPLES, exact.MICRO, multiple_of=exact.MICRO)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_each_step_is_that_of_the_whole_batch(clip: float | None) -> None:
    """The second batch is short. The schedule steps with the optimizer."""
    accelerator, model, optimizer, schedule = prepared()
    accumulator = Accumulator(
        accelerator,
        model,
        optimizer,
        plan(),
        loss=F.cross_entropy,
        scheduler=schedule,
        clip_grad_norm=clip,
    )
    x, y = exact.data(160).tensors
    # Inside `accumulate`, or after a window that was left open, this is False.
    accelerator.gradient_state._set_sync_gradients(False)
    with exact.recorded() as steps:
        losses = [accumulator.step((x[:96], y[:96])), accumulator.step((x[96:], y[96:]))]
    assert model.sizes == [40, 40, 16, 40, 24]
    assert not accelerator.sync_gradients
    assert schedule.get_last_lr() == [0.1 / 4]
    expected = exact.plain([96, 64], clip=clip)
    assert exact.error(steps[:1], expected[:1]) < 1e-6
    assert exact.error(steps[1:], expected[1:]) < 2e-6
    assert float(losses[0]) == pytest.approx(float(F.cross_entropy(exact.Small()(x[:96]), y[:96])))


def test_settings_that_do_not_match_are_refused_in_a_sentence() -> None:
    """The sentence names the setting."""
    accelerator, model, optimizer, _ = prepared(gradient_accumulation_steps=4)
    with pytest.raises(UsageError, match="gradient_accumulation_steps must be 1, not 4"):
        Accumulator(accelerator, model, optimizer, 8, loss=F.cross_entropy)
    accelerator, model, optimizer, _ = prepared(mixed_precision="bf16")
    with pytest.raises(UsageError, match=r"plan is for fp32, .* mixed_precision='bf16'"):
        Accumulator(accelerator, model, optimizer, plan(), loss=F.cross_entropy)
    with pytest.raises(UsageError, match=r"the one that accelerator\.prepare returned, not SGD"):
        Accumulator(accelerator, model, optimizer.optimizer, 8, loss=F.cross_entropy)
    with pytest.raises(UsageError, match="first argument is an Accelerator, not Small"):
        Accumulator(model, model, optimizer, 8, loss=F.cross_entropy)


class Training:
    """A user's function, which runs out of memory above an edge."""

    def __init__(self, edge: int) -> None:
        self.edge = edge
        self.tried: list[int] = []
        self.finished: list[int] = []

    def __call__(self, batch_size: int, num_steps: int, *, rate: float) -> int:
        """Train for some steps."""
        self.tried.append(batch_size)
        optimizer = torch.optim.SGD(exact.Small().parameters(), rate)
        for _ in range(num_steps):
            if batch_size > self.edge:
                raise out_of_memory()
            optimizer.step()
        self.finished.append(batch_size)
        return batch_size


@pytest.mark.parametrize(("edge", "ceiling"), [(13, 16), (1, 4), (16, 16)])
def test_the_function_runs_to_its_end_at_the_edge_only(edge: int, ceiling: int) -> None:
    """Accelerate's own ends at 12 where 13 fits."""
    train = Training(edge)
    run = find_executable_batch_size(starting_batch_size=ceiling)(train)
    assert run(10, rate=0.1) == min(edge, ceiling)
    assert train.finished == [min(edge, ceiling)]
    assert len(train.tried) <= 6


def test_a_search_that_cannot_end_well_says_so() -> None:
    """Nothing fits; or the error is the user's own, which is raised as it came."""
    with pytest.raises(DoesNotFitError, match="even with a batch size of 1: CUDA out of memory"):
        find_executable_batch_size(Training(0), 8)(10, rate=0.1)

    def mistaken(batch_size: int) -> None:
        raise ValueError(batch_size)

    with pytest.raises(ValueError, match="8"):
        find_executable_batch_size(mistaken, 8)()
    with pytest.raises(memfit.UsageError, match="starting_batch_size must be at least 1, not 0"):
        find_executable_batch_size(mistaken, 0)

"""Tests of memfit.equivalence.loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from equivalence.models import WIDTH, TokenModel, check, mlp, sentences, token_loss
from memfit.equivalence import AccumulationLoop
from memfit.errors import WorkloadError
from memfit.records import LoopFault, Verdict

STEPS = 3
SIZE = 4

Window = Sequence[tuple[torch.Tensor, torch.Tensor]]


def of_windows(
    weight: Callable[[Window, int], float],
    *,
    keep: slice = slice(None),
    after_each: Callable[[nn.Module], Any] | None = None,
    after_all: Callable[[nn.Module], Any] | None = None,
    zero: bool = True,
    last: bool = True,
) -> AccumulationLoop:
    """Return a loop that steps after each window; the arguments can give it one fault."""

    def loop(model: nn.Module, micro_batches: Any, loss: Any, optimizer: Any) -> None:
        for start in range(0, len(micro_batches), STEPS):
            window = micro_batches[start : start + STEPS]
            for index, (x, y) in list(enumerate(window))[keep]:
                (loss(model(x), y) * weight(window, index)).backward()
                if after_each is not None:
                    after_each(model)
            if after_all is not None:
                after_all(model)
            if last or len(window) == STEPS:
                optimizer.step()
                if zero:
                    optimizer.zero_grad()

    return loop


def by_samples(window: Window, index: int) -> float:
    """Return the factor for a mean over samples."""
    return len(window[index][0]) / sum(len(x) for x, _ in window)


def by_tokens(window: Window, index: int) -> float:
    """Return the factor for a mean over valid targets."""
    counts = [int((y != -100).sum()) for _, y in window]
    return counts[index] / sum(counts)


def clip(model: nn.Module) -> None:
    """Clip the norm of the gradients."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)


def clip_values(model: nn.Module) -> None:
    """Clip the values of the gradients."""
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def leaving_gradients(model: nn.Module, micro_batches: Any, loss: Any, _optimizer: Any) -> None:
    """A loop that takes no step itself."""
    for index, (x, y) in enumerate(micro_batches):
        (loss(model(x), y) * by_samples(micro_batches, index)).backward()


RIGHT = {
    "by samples": of_windows(by_samples),
    "clipped once": of_windows(by_samples, after_all=clip),
    "values clipped once": of_windows(by_samples, after_all=clip_values),
    "no step of its own": leaving_gradients,
}

WRONG = {
    "divided by configured steps": (
        of_windows(lambda _window, _index: 1 / STEPS),
        (LoopFault.DIVIDED_BY_CONFIGURED_STEPS, LoopFault.MEAN_OF_MEANS),
    ),
    "divided by another number": (
        of_windows(lambda _window, _index: 1 / (STEPS + 2)),
        (LoopFault.DIVIDED_BY_WRONG_COUNT, LoopFault.MEAN_OF_MEANS),
    ),
    "samples over the configured batch": (
        of_windows(lambda window, index: len(window[index][0]) / (SIZE * STEPS)),
        (LoopFault.DIVIDED_BY_CONFIGURED_STEPS,),
    ),
    "mean of means": (
        of_windows(lambda window, _index: 1 / len(window)),
        (LoopFault.MEAN_OF_MEANS,),
    ),
    "not divided": (of_windows(lambda _window, _index: 1.0), (LoopFault.NOT_DIVIDED,)),
    "scaled": (
        of_windows(lambda window, index: 0.7 * by_samples(window, index)),
        (LoopFault.SCALED,),
    ),
    "a micro-batch skipped": (
        of_windows(by_samples, keep=slice(1, None)),
        (LoopFault.SKIPPED_MICRO_BATCH,),
    ),
    "the last window missing": (
        of_windows(by_samples, last=False),
        (LoopFault.MISSING_LAST_WINDOW,),
    ),
    "clipped per micro-batch": (
        of_windows(by_samples, after_each=clip),
        (LoopFault.CLIPPED_PER_MICRO_BATCH,),
    ),
    "values clipped per micro-batch": (
        of_windows(by_samples, after_each=clip_values),
        (LoopFault.CLIPPED_PER_MICRO_BATCH,),
    ),
    "not zeroed": (of_windows(by_samples, zero=False), (LoopFault.GRADIENTS_CARRIED_OVER,)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_loop_that_is_right_passes(name: str) -> None:
    """Every right way to write it passes."""
    result = check(mlp(), accumulate=RIGHT[name])
    assert (result.verdict, result.loop_faults) == (Verdict.EQUAL, ())
    for window in result.loop:
        assert window.weights == pytest.approx(window.expected_weights)


@pytest.mark.parametrize("name", WRONG)
def test_a_loop_that_is_wrong_is_told_what_is(name: str) -> None:
    """The weights of its micro-batches show the fault, and nothing else is needed."""
    loop, faults = WRONG[name]
    result = check(mlp(), accumulate=loop)
    assert (result.verdict, result.loop_faults) == (Verdict.DIFFERS, faults)


def test_a_step_after_every_micro_batch() -> None:
    """Such a loop does not accumulate at all."""

    def loop(model: nn.Module, micro_batches: Any, loss: Any, optimizer: Any) -> None:
        for x, y in micro_batches:
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()

    assert check(mlp(), accumulate=loop).loop_faults == (LoopFault.STEPPED_TOO_OFTEN,)


def test_a_mean_of_token_means() -> None:
    """It is right for a mean over samples, and wrong if sentences differ in length."""
    loop = of_windows(lambda window, _index: 1 / len(window))
    result = check(TokenModel(), token_loss, sentences, accumulate=loop)
    assert result.loop_faults == (LoopFault.MEAN_OF_TARGET_MEANS,)
    right = check(TokenModel(), token_loss, sentences, accumulate=of_windows(by_tokens))
    assert (right.verdict, right.loop_faults) == (Verdict.EQUAL, ())


def test_a_loop_is_judged_apart_from_a_model_that_mixes() -> None:
    """A right loop has no fault, although the model's gradients differ."""
    result = check(mlp(nn.BatchNorm1d(WIDTH)), accumulate=of_windows(by_samples))
    assert result.verdict is Verdict.DIFFERS
    assert result.loop_faults == ()


def test_a_loop_that_trains_something_else_is_refused() -> None:
    """Such a loop leaves no gradients to weigh."""

    def loop(*_parts: Any) -> None:
        return None

    with pytest.raises(WorkloadError, match="left no gradient and took no optimizer step"):
        check(mlp(), accumulate=loop)

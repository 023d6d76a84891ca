"""Accelerate: an `Accumulator` over its objects, and a search that ends at the edge.

Source: huggingface/accelerate, src/accelerate/accelerator.py (`backward` divides the loss by
    `gradient_accumulation_steps`), src/accelerate/optimizer.py (`AcceleratedOptimizer.step` does
    nothing while `sync_gradients` is False), src/accelerate/utils/memory.py
    (`find_executable_batch_size`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from memfit.accumulation import Accumulator as PlainAccumulator
from memfit.accumulation import Weight
from memfit.accumulation.stepping import PlainStepping
from memfit.errors import DoesNotFitError, UnsupportedError, UsageError
from memfit.integrations.accelerate import PRECISIONS
from memfit.memory import oom
from memfit.memory.release import release
from memfit.records import Plan, Precision
from memfit.step.optimizers import stepped_by
from memfit.units import parse_count

__all__ = ["Accumulator", "find_executable_batch_size"]

_NUM_STEPS: Final = 3


class Accumulator(PlainAccumulator):
    """`memfit.Accumulator` for objects that `accelerator.prepare` returned.

    Backward passes are `accelerator.backward`, gradients are clipped by
    `accelerator.clip_grad_norm_`, and the prepared optimizer steps once for each batch. The
    precision is Accelerate's, because the prepared model has it. No `accelerator.accumulate` is
    needed around it.

    Args:
        accelerator: The `Accelerator`, with `gradient_accumulation_steps=1`.
        model: The prepared model.
        optimizer: The prepared optimizer.
        plan: As for `memfit.Accumulator`.
        loss: As for `memfit.Accumulator`.
        weight: As for `memfit.Accumulator`.
        num_inputs: As for `memfit.Accumulator`.
        batch_dims: As for `memfit.Accumulator`.
        scheduler: The scheduler, prepared or not. It steps unless the optimizer skipped its step.
        clip_grad_norm: As for `memfit.Accumulator`.
        recover: As for `memfit.Accumulator`.

    Raises:
        UsageError: The accelerator's settings do not match the plan.
        UnsupportedError: The model is trained by DeepSpeed or in shards.
    """

    def __init__(
        self,
        accelerator: Any,
        model: torch.nn.Module,
        optimizer: Any,
        plan: Plan | int,
        *,
        loss: Callable[..., Any],
        weight: Weight = "samples",
        num_inputs: int = 1,
        batch_dims: Mapping[str | int, int | None] | None = None,
        scheduler: Any = None,
        clip_grad_norm: float | None = None,
        recover: bool = True,
    ) -> None:
        _check(accelerator, optimizer, plan)
        is_bf16 = isinstance(plan, Plan) and plan.options.precision is Precision.BF16
        super().__init__(
            model,
            optimizer,
            plan,
            loss=loss,
            weight=weight,
            num_inputs=num_inputs,
            batch_dims=batch_dims,
            scheduler=scheduler,
            clip_grad_norm=clip_grad_norm,
            # The prepared model runs in the accelerator's precision by itself.
            precision=Precision.BF16 if is_bf16 else Precision.FP32,
            recover=recover,
        )
        self._stepping = _AcceleratesStepping(
            accelerator, optimizer, scheduler=scheduler, clip_grad_norm=clip_grad_norm
        )


class _AcceleratesStepping(PlainStepping):
    """The steps of a loop with Accelerate."""

    def __init__(
        self, accelerator: Any, optimizer: Any, *, scheduler: Any, clip_grad_norm: float | None
    ) -> None:
        super().__init__(
            optimizer,
            scaler=accelerator.scaler,
            scheduler=scheduler,
            clip_grad_norm=clip_grad_norm,
        )
        self._accelerator = accelerator

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def step(self) -> None:
        accelerator = self._accelerator
        state = accelerator.gradient_state
        was_synced = state.sync_gradients
        # A prepared optimizer does nothing while this is False.
        state._set_sync_gradients(True)  # noqa: SLF001 - transformers' Trainer sets it so too
        try:
            if self._clip_grad_norm is not None:
                accelerator.clip_grad_norm_(list(stepped_by(self._optimizer)), self._clip_grad_norm)
            self._optimizer.step()
            is_skipped = self._optimizer.step_was_skipped  # type: ignore[attr-defined]
            if self._scheduler is not None and not is_skipped:
                self._scheduler.step()
        finally:
            state._set_sync_gradients(was_synced)  # noqa: SLF001 - as above


def _check(accelerator: Any, optimizer: Any, plan: Plan | int) -> None:
    """Refuse settings of an accelerator that do not match a plan.

    Raises:
        UsageError: They do not match.
        UnsupportedError: The accelerator counts backward passes itself.
    """
    if not hasattr(accelerator, "gradient_state"):
        raise UsageError(
            f"The first argument is an Accelerator, not {type(accelerator).__name__}: "
            "memfit.accelerate.Accumulator(accelerator, model, optimizer, plan, loss=loss)."
        )
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        raise UnsupportedError(
            f"memfit.accelerate.Accumulator does not work with {kind}: use "
            "Accelerator(gradient_accumulation_steps=...)."
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise UsageError(
            "The plan has the micro-batches, so the Accelerator's gradient_accumulation_steps "
            f"must be 1, not {accelerator.gradient_accumulation_steps}: it divides each loss."
        )
    if not hasattr(optimizer, "step_was_skipped"):
        raise UsageError(
            "The optimizer must be the one that accelerator.prepare returned, not "
            f"{type(optimizer).__name__}."
        )
    if isinstance(plan, Plan):
        given = accelerator.mixed_precision
        planned = plan.options.precision
        if PRECISIONS.get(planned) != (given if given in PRECISIONS.values() else None):
            raise UsageError(
                f"The plan is for {planned.value}, and the Accelerator has mixed_precision="
                f"{given!r}: plan with that precision."
            )


class _EnoughSteps(BaseException):
    """Ends a trial of `find_executable_batch_size`. A user's `except Exception` lets it through."""


def find_executable_batch_size(
    function: Callable[..., Any] | None = None,
    starting_batch_size: int = 128,
    *,
    num_steps: int = _NUM_STEPS,
) -> Any:
    """Run a function with the largest batch size that fits, up to a given one.

    It is used as Accelerate's decorator of the same name. That one multiplies the batch size by 0.9
    after each failure, so it ends below the edge. This one searches for the edge: a trial runs the
    function until its optimizer has stepped a few times. Then the function runs to its end with the
    largest batch size that fits.

    Args:
        function: A function whose first argument is the batch size. It makes everything that
            depends on it, because it is started several times.
        starting_batch_size: The largest batch size that is tried.
        num_steps: The optimizer steps of a trial. The optimizer's state is there after the first.

    Returns:
        The function without its first argument; without `function`, a decorator.

    Raises:
        UsageError: A number is not valid.
    """
    if function is None:
        return functools.partial(
            find_executable_batch_size,
            starting_batch_size=starting_batch_size,
            num_steps=num_steps,
        )
    ceiling = parse_count("starting_batch_size", starting_batch_size)
    steps = parse_count("num_steps", num_steps)

    @functools.wraps(function)
    def at_the_edge(*args: Any, **kwargs: Any) -> Any:
        _refuse_ranks()
        low, high = 0, ceiling + 1  # `low` fits, and `high` runs out or is not wanted
        batch_size = ceiling
        message = None
        while high - low > 1:
            message = _out_of_memory_in(
                functools.partial(function, batch_size, *args, **kwargs), steps
            )
            low, high = (batch_size, high) if message is None else (low, batch_size)
            batch_size = (low + high) // 2
        if low == 0:
            raise DoesNotFitError(
                f"{getattr(function, '__name__', 'The function')} runs out of memory even with a "
                f"batch size of 1: {message}"
            )
        return function(low, *args, **kwargs)

    return at_the_edge


def _refuse_ranks() -> None:
    """Refuse to search in several processes, which would end at different batch sizes.

    Raises:
        UnsupportedError: There are several processes.
    """
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        ranks = distributed.get_world_size()
        if ranks > 1:
            raise UnsupportedError(
                f"With {ranks} processes each would search for a batch size of its own: plan with "
                f"memfit.plan(..., world_size={ranks})."
            )


def _out_of_memory_in(run: Callable[[], Any], num_steps: int) -> str | None:
    """Run a function until optimizers have stepped so often, or to its end.

    Returns:
        The first line of the error if it ran out of memory; `None` if it did not.
    """
    num_done = 0

    def count(*_: Any) -> None:
        nonlocal num_done
        num_done += 1
        if num_done >= num_steps:
            raise _EnoughSteps

    handle = register_optimizer_step_post_hook(count)
    message = None
    try:
        run()
    except _EnoughSteps:
        pass
    except Exception as error:
        if oom.classify(error) is oom.Likelihood.NO:
            raise
        message = oom.first_line(error)
    finally:
        handle.remove()
    release(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return message

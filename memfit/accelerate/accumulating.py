"""An `Accumulator` over Accelerate's objects.

Source: huggingface/accelerate, src/accelerate/accelerator.py (`backward` divides the loss by
    `gradient_accumulation_steps`), src/accelerate/optimizer.py (`AcceleratedOptimizer.step` does
    nothing while `sync_gradients` is False).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from memfit.accumulation import Accumulator as PlainAccumulator
from memfit.accumulation import Weight
from memfit.accumulation.stepping import PlainStepping
from memfit.errors import UnsupportedError, UsageError
from memfit.integrations.accelerate import PRECISIONS
from memfit.records import Plan, Precision
from memfit.step.optimizers import stepped_by

__all__ = ["Accumulator"]


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

"""Exact accumulation in a transformers `Trainer`: a class to put before the trainer's own.

    class Trainer(memfit.transformers.Accumulating, transformers.Trainer):
        ...

The loader yields whole effective batches (`per_device_train_batch_size`), and
`gradient_accumulation_steps` stays 1. Each training step cuts its batch as the plan says. The
trainer's own `training_step` runs each micro-batch, so the rest of the loop is as it was: clipping,
the optimizer, the schedule, mixed precision, logging, checkpoints.

Source: huggingface/transformers, src/transformers/trainer.py (`training_step`, `compute_loss`,
    `get_batch_samples`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

from memfit.accumulation import MicroBatch, Weight, micro_batches
from memfit.accumulation.first_part import check_means
from memfit.accumulation.splitting import check_plan
from memfit.errors import UnsupportedError, UsageError
from memfit.integrations.equal import refuse_other_ranks
from memfit.records import Plan

__all__ = ["Accumulating"]

_IGNORED: Final = -100
# Twice the count halves a loss that is divided by it. Rounding changes far less than this.
_HALF_ERROR: Final = 0.1


class Accumulating:
    """What a `Trainer` inherits first, so that its steps accumulate exactly.

    A loss that transformers divides by the number of items in the whole batch is left as it is. Any
    other loss is weighted by its share of the valid labels (those that are not -100), or of what
    `weight` says.

    Args:
        *args: The arguments of the trainer.
        plan: The plan of `memfit.plan(trainer, ...)`.
        weight: What the loss averages over, as for `memfit.Accumulator`. Default: the valid labels
            if `labels` are whole numbers, otherwise the samples.
        batch_dims: As for `memfit.Accumulator`.
        **kwargs: The arguments of the trainer.

    Raises:
        UsageError: The trainer's arguments do not match the plan.
        UnsupportedError: The trainer runs the model in a way that counts backward passes.

    A loss that is certain to be a sum is refused in the first step (`WorkloadError`), because its
    gradient would be too small. With `weight="sum"` it is added up as it is.
    """

    def __init__(
        self,
        *args: Any,
        plan: Plan,
        weight: Weight | None = None,
        batch_dims: Mapping[str | int, int | None] | None = None,
        **kwargs: Any,
    ) -> None:
        parent: Any = super()
        parent.__init__(*args, **kwargs)
        trainer: Any = self
        _check(trainer, plan)
        self._plan = plan
        self._weight = weight
        self._batch_dims = batch_dims
        self._share: float | None = None
        self._divides_by_count: bool | None = None
        self._is_mean = False

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Run the trainer's own step on each micro-batch of the inputs.

        Args:
            model: The model, as the trainer wrapped it.
            inputs: The samples of one optimizer step of this process.
            num_items_in_batch: The valid labels of the whole step, if the loss is divided by them.

        Returns:
            The loss of the whole batch, detached.
        """
        trainer: Any = self
        parent: Any = super()
        _check_accumulation(trainer.args, self._plan)
        parts = micro_batches(
            self._plan,
            dict(inputs),
            weight=self._weight or _valid_labels(trainer, inputs),
            batch_dims=self._batch_dims,
        )
        if len(parts) > 1 and num_items_in_batch is not None and self._divides_by_count is None:
            self._divides_by_count = _divides_by_count(trainer, model, parts[-1], trainer.args)
        is_divided = num_items_in_batch is not None and self._divides_by_count is not False
        losses: list[torch.Tensor] = []
        trainer.current_gradient_accumulation_steps = 1
        for part in parts:
            if part.weight == 0 and not is_divided and not part.is_last:
                continue  # its mean over no label is 0 / 0
            alone = contextlib.nullcontext() if part.is_last else trainer.accelerator.no_sync(model)
            self._share = None if is_divided else part.weight
            try:
                with alone:
                    losses.append(
                        parent.training_step(
                            model, part.batch, num_items_in_batch if is_divided else None
                        )
                    )
            finally:
                self._share = None
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the trainer's own loss; in a training step, its part of the whole batch's loss."""
        parent: Any = super()
        returned = parent.compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
        )
        if self._share is None:
            return returned
        loss, outputs = returned if return_outputs else (returned, ())
        if not self._is_mean and self._weight in (None, "samples"):
            check_means([loss], outputs, weight="the weight of this Trainer's micro-batches")
            self._is_mean = True
        return (loss * self._share, outputs) if return_outputs else loss * self._share


def _check(trainer: Any, plan: Plan) -> None:
    """Refuse a trainer whose arguments do not match a plan.

    Raises:
        UsageError: They do not match.
        UnsupportedError: The trainer counts backward passes by itself.
    """
    check_plan(plan, "Accumulating")
    arguments = trainer.args
    _check_accumulation(arguments, plan)
    if arguments.n_gpu > 1 or trainer.is_deepspeed_enabled:
        how = "DeepSpeed" if trainer.is_deepspeed_enabled else "DataParallel"
        raise UnsupportedError(
            f"With {how} the Trainer does not see single backward passes. Use the Trainer's own "
            "gradient_accumulation_steps."
        )
    ranks = int(arguments.world_size)
    refuse_other_ranks(plan, ranks)
    given = arguments.per_device_train_batch_size * ranks
    if given != plan.effective_batch_size:
        raise UsageError(
            f"The plan is for {plan.effective_batch_size} samples in each step, and the Trainer's "
            f"loader yields {given}: give per_device_train_batch_size={plan.share_of(0)}, or plan "
            f"for {given}."
        )


def _check_accumulation(arguments: Any, plan: Plan) -> None:
    """Refuse accumulation by the trainer itself, which its arguments may get after it was made.

    Raises:
        UsageError: It accumulates.
    """
    if arguments.gradient_accumulation_steps != 1:
        raise UsageError(
            "The plan has the micro-batches, so gradient_accumulation_steps must be 1, not "
            f"{arguments.gradient_accumulation_steps}: give the whole batch as "
            f"per_device_train_batch_size={plan.share_of(0)}."
        )


def _valid_labels(trainer: Any, inputs: Mapping[str, Any]) -> Callable[[Any], Any] | Any:
    """Return what a mean loss averages over: the labels that are not ignored, or the samples."""
    labels = inputs.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return "samples"
    # Losses of causal language models leave out the first position.
    first = 1 if getattr(trainer, "_loss_shifts_labels", False) else 0

    def count(batch: Mapping[str, Any]) -> torch.Tensor:
        counted = batch["labels"][..., first:] if first else batch["labels"]
        num_valid: torch.Tensor = (counted != _IGNORED).sum()
        return num_valid

    return count


def _divides_by_count(trainer: Any, model: torch.nn.Module, part: MicroBatch, args: Any) -> bool:
    """Whether the loss is divided by `num_items_in_batch`. Some models take it and ignore it.

    Transformers then adds up means, so the gradient of k micro-batches would be k times too large.
    """
    inner = trainer.accelerator.unwrap_model(model)
    modes = [(module, module.training) for module in inner.modules()]
    inner.eval()
    try:
        with torch.no_grad(), trainer.compute_loss_context_manager():
            once, twice = (
                float(
                    trainer.compute_loss(
                        inner,
                        dict(part.batch),
                        num_items_in_batch=torch.tensor(count, device=args.device),
                    )
                )
                for count in (64, 128)
            )
    finally:
        for module, was_training in modes:
            module.training = was_training
    return abs(twice - once / 2) <= _HALF_ERROR * abs(once)

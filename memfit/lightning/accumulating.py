"""Exact accumulation around the `training_step` of a `LightningModule`.

    with memfit.lightning.accumulating(module, plan):
        trainer.fit(module, loader_of_whole_batches)

Lightning's own `accumulate_grad_batches` needs equal micro-batches, and divides a short last window
by the configured number. `accumulating` takes any parts. It runs the first micro-batches inside the
module's `training_step` and returns the loss of the last one, so optimization stays automatic:
clipping, schedules, precision, callbacks and checkpoints are Lightning's own.

Source: Lightning-AI/pytorch-lightning, src/lightning/pytorch/loops/optimization/automatic.py
    (`Closure.closure`), src/lightning/pytorch/strategies/strategy.py (`backward`,
    `batch_to_device`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from memfit.accumulation import MicroBatch, Weight, micro_batches
from memfit.accumulation.first_part import check_means
from memfit.accumulation.splitting import check_plan
from memfit.errors import UnsupportedError, UsageError, WorkloadError
from memfit.integrations.equal import refuse_other_ranks
from memfit.integrations.objects.step import replaced
from memfit.records import Plan

__all__ = ["accumulating"]

_TRANSFER = "_apply_batch_transfer_handler"


@contextlib.contextmanager
def accumulating(
    module: Any,
    plan: Plan,
    *,
    weight: Weight = "samples",
    batch_dims: Mapping[str | int, int | None] | None = None,
) -> Iterator[Any]:
    """Let a `LightningModule` train on whole batches in the plan's micro-batches.

    In the block, `training_step` is called for each micro-batch, and the batch stays in host memory
    until its micro-batches are moved to the device. After the block the module is as before.

    Args:
        module: The module. Its `training_step` returns the loss, or a dictionary with `"loss"`.
        plan: The plan of `memfit.plan(module, ...)`. The loader's batch size is the effective batch
            size of one process.
        weight: What the loss averages over, as for `memfit.Accumulator`.
        batch_dims: As for `memfit.Accumulator`.

    Yields:
        The module.

    Raises:
        UsageError: The trainer accumulates batches too, or the plan is for other ranks, or it is no
            plan.
        UnsupportedError: The module steps its optimizers itself.
    """
    check_plan(plan, "accumulating")
    if not module.automatic_optimization:
        raise UnsupportedError(
            f"{type(module).__name__} steps its optimizers itself (automatic_optimization is "
            "False): cut its batches with memfit.micro_batches in its training_step."
        )
    steps = _Steps(module, plan, weight=weight, batch_dims=batch_dims)
    transfer = {_TRANSFER: steps.transfer} if hasattr(module, _TRANSFER) else {}
    with replaced(
        module,
        training_step=steps.training_step,
        optimizer_zero_grad=_keep_gradients,
        **transfer,
    ):
        yield module


def _keep_gradients(*_arguments: Any, **_options: Any) -> None:
    """Stand in for `optimizer_zero_grad`, which Lightning calls between forward and backward."""


class _Steps:
    """A module's training step, in micro-batches."""

    def __init__(
        self,
        module: Any,
        plan: Plan,
        *,
        weight: Weight,
        batch_dims: Mapping[str | int, int | None] | None,
    ) -> None:
        self._module = module
        self._plan = plan
        self._weight = weight
        self._batch_dims = batch_dims
        self._own_step = module.training_step
        self._own_zero_grad = module.optimizer_zero_grad
        self._own_transfer = getattr(module, _TRANSFER, None)
        self._is_checked = False
        self._is_mean = False

    def transfer(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        """Leave a batch to train on in host memory, and move any other to the device."""
        trainer = self._module.trainer
        if trainer.training and not trainer.sanity_checking and not trainer.validating:
            return batch
        assert self._own_transfer is not None
        return self._own_transfer(batch, device=device, dataloader_idx=dataloader_idx)

    def training_step(self, batch: Any, *arguments: Any, **options: Any) -> Any:
        """Run forward and backward on all micro-batches but the last, and forward on that.

        Raises:
            WorkloadError: The module's own step returned no loss, or a sum that is weighted as a
                mean.
        """
        module, trainer = self._module, self._module.trainer
        self._check(trainer)
        parts = micro_batches(self._plan, batch, weight=self._weight, batch_dims=self._batch_dims)
        self._own_zero_grad(trainer.current_epoch, 0, module.optimizers(use_pl_optimizer=False))
        done = None
        for part in parts:
            output = self._own_step(self._moved(part, trainer), *arguments, **options)
            loss = output.get("loss") if isinstance(output, Mapping) else output
            if not isinstance(loss, torch.Tensor):
                raise WorkloadError(
                    f"{type(module).__name__}.training_step must return the loss of each "
                    f"micro-batch, or a dictionary with 'loss', not {type(loss).__name__}."
                )
            if self._weight == "samples" and not self._is_mean:
                check_means([loss], ())
                self._is_mean = True
            loss = loss * part.weight
            if part.is_last:
                # The earlier parts are numbers here: their gradients are there already.
                whole = loss if done is None else loss + done
                return {**output, "loss": whole} if isinstance(output, Mapping) else whole
            done = loss.detach() if done is None else done + loss.detach()
            with torch.autocast(loss.device.type, enabled=False):
                trainer.strategy.backward(loss, None)
        raise AssertionError("a plan has a last micro-batch")

    def _moved(self, part: MicroBatch, trainer: Any) -> Any:
        if self._own_transfer is None:
            return part.batch
        return self._own_transfer(part.batch, device=trainer.strategy.root_device)

    def _check(self, trainer: Any) -> None:
        """Refuse a trainer that accumulates by itself, or has other ranks than the plan.

        Raises:
            UsageError: It does.
            UnsupportedError: Its strategy takes the steps itself.
        """
        if self._is_checked:
            return
        self._is_checked = True
        if trainer.accumulate_grad_batches != 1:
            raise UsageError(
                "The plan has the micro-batches, so accumulate_grad_batches must be 1, not "
                f"{trainer.accumulate_grad_batches}: let the loader yield whole batches of "
                f"{self._plan.share_of(0)}."
            )
        refuse_other_ranks(self._plan, trainer.world_size)
        if trainer.strategy.handles_gradient_accumulation:
            raise UnsupportedError(
                f"{type(trainer.strategy).__name__} counts backward passes itself: use the "
                "Trainer's accumulate_grad_batches."
            )

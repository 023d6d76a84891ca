"""One optimizer step over an effective batch, in micro-batches that fit.

A step splits the batch, weighs the losses, runs forward and backward, clips, steps the optimizer
and clears the gradients. With `recover`, the step is repeated from its beginning in smaller
micro-batches if one runs out of memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from memfit import partition
from memfit.accumulation.arguments import (
    check_optimizer,
    check_ranks,
    check_scheduler,
    device_of,
    read_plan,
    with_precision,
)
from memfit.accumulation.first_part import check_left, check_means
from memfit.accumulation.ranks import AttemptOutcome, Ranks, ranks_of
from memfit.accumulation.recovery import RetryMonitor, StepStart, smaller
from memfit.accumulation.splitting import micro_batches_of
from memfit.accumulation.stepping import PlainStepping, Stepping
from memfit.accumulation.uncounted import check_counted
from memfit.accumulation.weighing import LossTerms, Weights
from memfit.errors import DoesNotFitError, RankFailedError, UsageError
from memfit.memory import oom
from memfit.memory.release import release
from memfit.records import Plan, Precision
from memfit.step import batches
from memfit.step.batches import BatchRules, Layout
from memfit.step.calling import call_loss, call_model, split_batch
from memfit.step.nesting import leaves_of
from memfit.step.optimizers import stepped_by
from memfit.step.refusals import check_loss
from memfit.step.runner import autocast

__all__ = ["Accumulator"]

_log = logging.getLogger("memfit")


class Accumulator:
    """Carries out optimizer steps over effective batches, in micro-batches that fit.

    A step changes the parameters as one step over the whole batch would, because each micro-batch's
    loss is weighted by its share of what the loss averages over. Layers that mix samples (batch
    norm) and layers that draw random numbers (dropout) still see micro-batches. `memfit.verify`
    names these layers.

    Args:
        model: The model, in the mode and on the device of training; or a
            `DistributedDataParallel` of it.
        optimizer: The optimizer over its parameters.
        plan: A plan, or the most samples in a micro-batch.
        loss: A function `loss(outputs, targets)` that returns one number, or several (a tuple, list
            or dictionary) that are added. Targets in a tuple or list are passed one by one. Without
            targets, `loss(outputs)` is called.
        weight: What the loss averages over: `"samples"`, `"sum"` for a loss that does not average,
            or a function that counts it in a batch, such as its valid targets. If several losses
            average over different things: one weight for each, nested as the losses are.
        multiple_of: Every micro-batch except the last is a multiple of this. Default: the plan's
            value, or 1 for a micro-batch size.
        num_inputs: How many leading elements of a flat batch such as `(x1, x2, y)` are inputs.
        batch_dims: As in `Workload`: for a part of the batch, the dimension that counts the
            samples; `None` for a part that all samples share.
        cut: As in `Workload`: a function `cut(batch, start, stop)` that returns those samples.
        count: As in `Workload`: a function that returns the samples of a batch.
        scaler: The `GradScaler`. Default: a new one if the precision is `amp-fp16`.
        scheduler: Stepped after each optimizer step that was not skipped because of an overflow. If
            its `step` needs a metric or an epoch, the training loop has to step it instead.
        clip_grad_norm: The norm that the accumulated gradient is clipped to.
        precision: The precision of the forward passes. Default: the plan's, or `"fp32"` for a
            micro-batch size. `"fp32"` does not change the type of any tensor.
        recover: Repeat a step that runs out of memory, in smaller micro-batches. False: the error
            is raised, and `DistributedDataParallel` sums gradients during the last backward pass.

    Raises:
        UsageError: An argument has a wrong type or value.
        WorkloadError: The optimizer holds no parameter of the model, or needs a closure.
        UnsupportedError: The model's parameters are sharded over ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        plan: Plan | int,
        *,
        loss: Callable[..., Any],
        weight: Weights = "samples",
        multiple_of: int | None = None,
        num_inputs: int = 1,
        batch_dims: Mapping[str | int, int | None] | None = None,
        cut: Callable[[Any, int, int], Any] | None = None,
        count: Callable[[Any], int] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        scheduler: LRScheduler | None = None,
        clip_grad_norm: float | None = None,
        precision: str | Precision | None = None,
        recover: bool = True,
    ) -> None:
        check_loss(loss)
        self._model = model
        self._optimizer = optimizer
        self._loss = loss
        self._terms = LossTerms(weight)
        self._rules = BatchRules(dims=batch_dims or {}, cut=cut, count=count, num_inputs=num_inputs)
        self._layout: Layout | None = None
        self._device = device_of(model)
        check_optimizer(optimizer, model)
        check_scheduler(scheduler)
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise UsageError(f"clip_grad_norm must be above 0, not {clip_grad_norm}.")
        self._planned_size, unit, options = read_plan(plan)
        self._multiple_of = unit if multiple_of is None else multiple_of
        self._smallest = plan.smallest_micro_batch_size if isinstance(plan, Plan) else 2
        if self._multiple_of < 1:
            raise UsageError(f"multiple_of must be at least 1, not {multiple_of}.")
        self._options = with_precision(options, precision)
        self._ranks: Ranks = ranks_of(model)
        if isinstance(plan, Plan):
            check_ranks(plan, self._ranks)
            self._planned_size = plan.micro_batch_size_of(self._ranks.rank)
        if scaler is None and self._options.precision is Precision.AMP_FP16:
            scaler = torch.amp.GradScaler(self._device.type)
        self.scaler = scaler
        self._stepping: Stepping = PlainStepping(
            optimizer, scaler=scaler, scheduler=scheduler, clip_grad_norm=clip_grad_norm
        )
        self._size = self._planned_size
        self._is_checked = False
        self._parameters: list[nn.Parameter] = []
        self._start = StepStart((model, loss)) if recover else None
        self._retries = RetryMonitor(self._device)

    @property
    def micro_batch_size(self) -> int:
        """The most samples in a micro-batch; less than planned after one ran out of memory."""
        return self._size

    def restore_micro_batch_size(self) -> None:
        """Use the plan's micro-batch size again; every rank has to call this."""
        self._size = self._planned_size

    def step(self, batch: Any) -> torch.Tensor:
        """Train on a batch: one optimizer step. `.grad` is None before and after it.

        With several ranks, each rank calls it with its own part of the batch.

        Args:
            batch: Tensors of shape (samples, ...) in any nesting, on any device and of any size:
                the effective batch, or a shorter last one. Lists of one entry for each sample are
                cut as well. The batch may stay in host memory, because micro-batches are moved to
                the model's device one by one.

        Returns:
            The loss of the whole effective batch, over all ranks: one number, detached.

        Raises:
            WorkloadError: The batch has no batch size, the loss is not one number or is a sum
                that is weighted as a mean, or it is NaN because a micro-batch has no valid target.
            DoesNotFitError: Not even a micro-batch of one sample fits. Buffers and random states
                are as before the step, and `.grad` is None.
            RankFailedError: The step failed on another rank.
        """
        self._parameters = self._now_held()
        self._drop_gradients()
        if self._start is None:
            try:
                loss = self._backward_all(batch)
            except BaseException:
                self._drop_gradients()
                raise
        else:
            self._start.mark(self._parameters)
            loss = self._backward_all_recovering(batch, self._start)
        self._update()
        return self._ranks.sum_tensor(loss)

    # --- forward and backward ---------------------------------------------------------------------

    def _backward_all(self, batch: Any) -> torch.Tensor:
        """Run all micro-batches; during the last, the model sums gradients over the ranks."""
        cut_up = self._cut(batch, self._size)
        # The model averages gradients over the ranks, but the step needs their sum.
        factor = self._ranks.world_size
        shares = self._terms.shares(cut_up.counts, self._totals(cut_up), factor=factor)
        loss = None
        for index, micro_batch in enumerate(cut_up.micro_batches):
            is_last = index == len(cut_up.micro_batches) - 1
            with contextlib.nullcontext() if is_last else self._ranks.unsynchronised():
                part = self._backward(micro_batch, shares[index], cut_up.layout, is_needed=is_last)
            loss = part if loss is None else loss + part
        assert loss is not None
        self._check_counted(loss, cut_up)
        return loss / self._ranks.world_size

    def _backward_all_recovering(self, batch: Any, start: StepStart) -> torch.Tensor:
        """Run all micro-batches; repeat with smaller ones while some rank runs out of memory."""
        size_before = self._size
        while True:
            attempt = self._attempt(batch)
            agreed = self._ranks.agree(attempt.ending)
            if not (agreed.failed or agreed.ran_out):
                self._shrink_to(agreed.micro_batch_size, "allocator retries in several steps")
                self._ranks.reduce()
                start.settle()
                assert attempt.loss is not None
                return attempt.loss
            # Outside of every `except` block, the failed attempt's tensors can be freed.
            self._drop_gradients()
            start.rewind()
            release(self._device)
            if agreed.failed:
                self._size = size_before
                raise attempt.error or RankFailedError(
                    "The training step failed on another rank, which has raised its own error."
                )
            self._shrink_to(agreed.micro_batch_size, attempt.message or "out of memory on a rank")

    def _attempt(self, batch: Any) -> _Attempt:
        """Run all micro-batches; take part in every collective, even after a failure."""
        cut_up = loss = None
        trouble = _Trouble()
        with trouble.noted(self._size, self._multiple_of):
            cut_up = self._cut(batch, self._size)
        totals = self._totals(cut_up)
        self._ranks.share_buffers()
        if cut_up is not None:
            with trouble.noted(cut_up.sizes[0], self._multiple_of):
                shares = self._terms.shares(cut_up.counts, totals)
                with self._ranks.unsynchronised():
                    for micro_batch, weights in zip(cut_up.micro_batches, shares, strict=True):
                        part = self._backward(micro_batch, weights, cut_up.layout)
                        loss = part if loss is None else loss + part
                self._check_counted(loss, cut_up)
                self._ranks.prepare()
        size = self._size
        if trouble.next_size is not None:
            size = trouble.next_size
        elif self._retries.is_repeated():
            size = smaller(size, multiple_of=self._multiple_of) or size
        return _Attempt(
            loss=loss,
            ending=AttemptOutcome(
                micro_batch_size=size,
                planned_size=self._planned_size,
                ran_out=trouble.next_size is not None,
                failed=trouble.error is not None,
            ),
            error=trouble.error,
            message=trouble.message,
        )

    def _backward(
        self,
        micro_batch: Any,
        weights: Sequence[float],
        layout: Layout,
        *,
        is_needed: bool = False,
    ) -> torch.Tensor:
        """Run one micro-batch; return its part of the whole batch's loss.

        Args:
            micro_batch: The micro-batch, on any device.
            weights: What its losses are multiplied by.
            layout: How its batch was cut.
            is_needed: Run backward even if it contributes nothing, because other ranks wait for it.
        """
        options = self._options
        placed = batches.to_device(
            micro_batch,
            self._device,
            dtype=torch.bfloat16 if options.precision is Precision.BF16 else None,
            memory_format=torch.channels_last if options.channels_last else None,
            # A model may change its inputs in place; a repeated step needs the original values.
            is_private=self._start is not None,
        )
        inputs, targets = split_batch(
            placed, num_inputs=self._rules.num_inputs, is_one_each=layout.is_one_each
        )
        with autocast(self._device, options.precision):
            outputs = call_model(self._model, inputs)
            losses = self._terms.losses(call_loss(self._loss, outputs, targets))
        if not self._is_checked:
            check_means(self._terms.meant(losses), outputs)
        weighted = [
            loss * weight
            # A loss that averages over nothing is 0 / 0, and adds nothing to the batch's loss.
            for loss, weight in zip(losses, self._terms.for_each(losses, weights), strict=True)
            if weight != 0
        ]
        flows = any(
            loss.requires_grad for loss in weighted
        )  # not if an accuracy is all that counts
        if not flows and not is_needed:
            zero = torch.zeros((), device=self._device, dtype=losses[0].dtype)
            return sum(weighted, start=zero)
        if not flows:
            # Such a loss is NaN, and NaN times 0 is NaN. Outputs times 0 are 0.
            leaves = [leaf for leaf in leaves_of(outputs) if _has_gradient(leaf)]
            weighted += [leaf.sum() * 0 for leaf in leaves]
        part = weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum()
        self._stepping.backward(part)
        if not self._is_checked:
            check_left(self._parameters)
            self._is_checked = True
        return part.detach()

    def _cut(self, batch: Any, size: int) -> _Cut:
        known = self._layout
        layout = Layout.of(batch, self._rules) if known is None else known.again(batch)
        sizes = partition.cut(
            layout.num_samples, size, multiple_of=self._multiple_of, smallest=self._smallest
        )
        micro_batches = micro_batches_of(batch, layout, sizes)
        if not layout.is_doubted:
            self._layout = layout
        return _Cut(
            layout=layout,
            micro_batches=micro_batches,
            sizes=sizes,
            counts=self._terms.counts(micro_batches, sizes),
        )

    def _check_counted(self, loss: torch.Tensor | None, cut_up: _Cut) -> None:
        if loss is not None and "samples" in self._terms.weights:
            check_counted(loss, cut_up.micro_batches, is_awaited=self._stepping.is_scaled)

    def _totals(self, cut_up: _Cut | None) -> list[float]:
        if cut_up is None:
            return self._ranks.summed([0.0] * len(self._terms.weights))
        return self._ranks.summed([sum(counts) for counts in cut_up.counts])

    # --- the optimizer's part ---------------------------------------------------------------------

    def _update(self) -> None:
        """Clip, step and schedule; after an error too, clear gradients and reset the scaler."""
        try:
            self._stepping.step()
        except BaseException:
            self._stepping.forget()
            raise
        finally:
            self._drop_gradients()

    def _now_held(self) -> list[nn.Parameter]:
        """Return all parameters that may have a gradient, also those added since the last step."""
        held = (*self._model.parameters(), *stepped_by(self._optimizer))
        return list({id(p): p for p in held}.values())

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _shrink_to(self, size: int, why: str) -> None:
        if size < self._size:
            if self._ranks.is_first:
                _log.warning(
                    "From now on, micro-batches of %d samples are cut to %d: %s",
                    self._size,
                    size,
                    why,
                )
            self._size = size


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """A batch in micro-batches, and each loss's counts in each of them."""

    layout: Layout
    micro_batches: list[Any]
    sizes: tuple[int, ...]
    counts: list[list[float]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """The outcome of running all micro-batches."""

    loss: torch.Tensor | None
    ending: AttemptOutcome
    error: Exception | None
    message: str | None


class _Trouble:
    """What went wrong in an attempt: a smaller size to try, or an error to raise."""

    def __init__(self) -> None:
        self.next_size: int | None = None
        self.error: Exception | None = None
        self.message: str | None = None

    @contextlib.contextmanager
    def noted(self, size: int, multiple_of: int) -> Iterator[None]:
        """Record the exception that the block raises, and continue after the block.

        Args:
            size: Samples in the largest micro-batch of the block.
            multiple_of: Smaller micro-batches should be multiples of this.
        """
        try:
            yield
        except Exception as error:
            verdict = oom.classify(error)
            if verdict is oom.Likelihood.NO and isinstance(error, torch.AcceleratorError):
                # The device's context is broken: no state can be restored, no rank informed.
                raise
            self.message = oom.first_line(error)
            if verdict is oom.Likelihood.NO:
                self.error = error
                return
            self.next_size = smaller(size, multiple_of=multiple_of)
            if self.next_size is None and verdict is oom.Likelihood.SUSPECTED:
                # Every batch size fails, so memory was not the cause.
                self.error = error
            elif self.next_size is None:
                self.error = DoesNotFitError(
                    f"The training step runs out of memory even in micro-batches of {size}: "
                    f"{self.message}"
                )


def _has_gradient(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad

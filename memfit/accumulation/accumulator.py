"""One optimizer step over an effective batch, in micro-batches that fit.

The whole of it: split, weigh, forward and backward, clip, step, zero. With `recover`, a micro-batch
that runs out of memory is cut smaller and the step is done again from its beginning.
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
from memfit._torch_private import pytree
from memfit.accumulation.arguments import (
    check_ranks,
    check_scheduler,
    device_of,
    read_plan,
    with_precision,
)
from memfit.accumulation.ranks import AttemptOutcome, Ranks, ranks_of
from memfit.accumulation.recovery import RetryMonitor, StepStart, smaller
from memfit.accumulation.splitting import micro_batches_of
from memfit.accumulation.weighing import LossTerms, Weights
from memfit.errors import DoesNotFitError, RankFailedError, UsageError
from memfit.memory import oom
from memfit.memory.release import release
from memfit.records import Plan, Precision
from memfit.step import batches
from memfit.step.batches import BatchRules, Layout
from memfit.step.closures import check_steps_alone
from memfit.step.runner import autocast, call_model, split_batch

__all__ = ["Accumulator"]

_log = logging.getLogger("memfit")


class Accumulator:
    """Carries out optimizer steps over effective batches, in micro-batches that fit.

    A step leaves the parameters where one over the whole batch would have: each micro-batch's loss
    is weighted by its share of what the loss averages over. Layers that mix samples (batch norm)
    and layers that draw random numbers (dropout) still see micro-batches; `memfit.verify` tells
    which those are.

    Args:
        model: The model, in the mode and on the device of training; or a
            `DistributedDataParallel` of it.
        optimizer: The optimizer over its parameters.
        plan: A plan, or the most samples in a micro-batch.
        loss: A function `loss(outputs, targets)` that returns one number, or several (a tuple, list
            or dictionary) that are added; targets that are a tuple or list are passed one by one,
            and without targets it is `loss(outputs)`.
        weight: What the loss averages over: `"samples"`, `"sum"` for a loss that does not average,
            or a function that counts it in a batch, such as its valid targets. For several losses
            that average over different things, one for each, nested as the losses are.
        multiple_of: What micro-batches are multiples of, the last one excepted; by default the
            plan's, and 1 for a micro-batch size.
        num_inputs: How many leading elements of a flat batch such as `(x1, x2, y)` are inputs.
        batch_dims: As in `Workload`: for a part of the batch the dimension that counts the samples;
            `None` for a part that belongs to all of them.
        cut: As in `Workload`: a function `cut(batch, start, stop)` that returns those samples.
        count: As in `Workload`: a function that returns the samples of a batch.
        scaler: The `GradScaler`; by default one of its own where the precision is `amp-fp16`.
        scheduler: Stepped after each optimizer step that was not skipped for an overflow. One whose
            `step` has to be told a metric or an epoch is stepped by the loop that knows it.
        clip_grad_norm: What the norm of the accumulated gradient is clipped to.
        precision: The precision of the forward passes; by default the plan's, and `"fp32"`, which
            leaves tensors as they are, for a micro-batch size.
        recover: Do a step that runs out of memory again in smaller micro-batches. Otherwise the
            error is raised as it comes, and `DistributedDataParallel` sums gradients during the
            last backward pass.

    Raises:
        UsageError: An argument is not what it has to be.
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
        if not callable(loss):
            raise UsageError(f"The loss must be a function, not {type(loss).__name__}.")
        self._model = model
        self._optimizer = optimizer
        self._loss = loss
        self._terms = LossTerms(weight)
        self._rules = BatchRules(dims=batch_dims or {}, cut=cut, count=count, num_inputs=num_inputs)
        self._layout: Layout | None = None
        check_steps_alone(optimizer)
        check_scheduler(scheduler)
        self._scheduler = scheduler
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise UsageError(f"clip_grad_norm must be above 0, not {clip_grad_norm}.")
        self._clip_grad_norm = clip_grad_norm
        self._planned_size, unit, options = read_plan(plan)
        self._multiple_of = unit if multiple_of is None else multiple_of
        self._smallest = plan.smallest_micro_batch_size if isinstance(plan, Plan) else 2
        if self._multiple_of < 1:
            raise UsageError(f"multiple_of must be at least 1, not {multiple_of}.")
        self._options = with_precision(options, precision)
        self._device = device_of(model)
        self._ranks: Ranks = ranks_of(model)
        if isinstance(plan, Plan):
            check_ranks(plan, self._ranks)
        if scaler is None and self._options.precision is Precision.AMP_FP16:
            scaler = torch.amp.GradScaler(self._device.type)
        self.scaler = scaler
        self._size = self._planned_size
        self._parameters: list[nn.Parameter] = []
        self._start = StepStart((model, loss)) if recover else None
        self._pressure = RetryMonitor(self._device)

    @property
    def micro_batch_size(self) -> int:
        """The most samples in a micro-batch, smaller than planned once one has run out."""
        return self._size

    def restore_micro_batch_size(self) -> None:
        """Try the plan's micro-batch size again; on several ranks, each has to."""
        self._size = self._planned_size

    def step(self, batch: Any) -> torch.Tensor:
        """Train on a batch: one optimizer step, gradients none before and after.

        On several ranks each calls it with its own share.

        Args:
            batch: Tensors of shape (samples, ...) in any nesting, on any device and of any size:
                the effective batch, or what is left for a short last one. Lists of one entry for
                each sample are cut as well. Micro-batches are moved to the model's device one by
                one, so it may stay in host memory.

        Returns:
            The loss of the whole effective batch, over all ranks: one number, detached.

        Raises:
            WorkloadError: The batch has no batch size, or the loss is not one number.
            DoesNotFitError: Not even a micro-batch of one sample fits. Buffers and random states
                are as before, and gradients are none.
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
        """Run all micro-batches; the last lets the model sum gradients over the ranks."""
        cut_up = self._cut(batch, self._size)
        # The model averages over ranks what is to be summed.
        factor = self._ranks.world_size
        shares = self._terms.shares(cut_up.counts, self._totals(cut_up), factor=factor)
        loss = None
        for index, micro_batch in enumerate(cut_up.micro_batches):
            is_last = index == len(cut_up.micro_batches) - 1
            with contextlib.nullcontext() if is_last else self._ranks.unsynchronised():
                part = self._backward(micro_batch, shares[index], cut_up.layout, is_needed=is_last)
            loss = part if loss is None else loss + part
        assert loss is not None
        return loss / self._ranks.world_size

    def _backward_all_recovering(self, batch: Any, start: StepStart) -> torch.Tensor:
        """Run all micro-batches, again and in smaller ones as long as some rank runs out."""
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
            # Here, out of every `except` block, the failed attempt's tensors can go.
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
        """Run all micro-batches, through every collective even if something fails in between."""
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
                self._ranks.prepare()
        size = self._size
        if trouble.next_size is not None:
            size = trouble.next_size
        elif self._pressure.is_repeated():
            size = smaller(size, multiple_of=self._multiple_of) or size
        return _Attempt(
            loss=loss,
            ending=AttemptOutcome(
                micro_batch_size=size,
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
            is_needed: Run backward even if it contributes nothing: other ranks wait for it.
        """
        options = self._options
        placed = batches.to_device(
            micro_batch,
            self._device,
            dtype=torch.bfloat16 if options.precision is Precision.BF16 else None,
            memory_format=torch.channels_last if options.channels_last else None,
            # What a model changes in place must be there again if the step is done again.
            is_private=self._start is not None,
        )
        inputs, targets = split_batch(
            placed, num_inputs=self._rules.num_inputs, is_one_each=layout.is_one_each
        )
        with autocast(self._device, options.precision):
            outputs = call_model(self._model, inputs)
            losses = self._terms.losses(self._loss(outputs, *targets))
        weighted = [
            loss * weight
            # What has nothing to average over is 0 / 0, and no part of the whole batch's loss.
            for loss, weight in zip(losses, self._terms.for_each(losses, weights), strict=True)
            if weight != 0
        ]
        if not weighted and not is_needed:
            return torch.zeros((), device=self._device, dtype=losses[0].dtype)
        if not weighted:
            # A loss of 0 / 0 times 0 is no 0, and what the model returned times 0 is.
            leaves = [leaf for leaf in pytree.tree_leaves(outputs) if _has_gradient(leaf)]
            weighted = [leaf.sum() * 0 for leaf in leaves]
        part = weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum()
        (part if self.scaler is None else self.scaler.scale(part)).backward()
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

    def _totals(self, cut_up: _Cut | None) -> list[float]:
        if cut_up is None:
            return self._ranks.summed([0.0] * len(self._terms.weights))
        return self._ranks.summed([sum(counts) for counts in cut_up.counts])

    # --- the optimizer's part ---------------------------------------------------------------------

    def _update(self) -> None:
        """Clip, step and schedule; leave no gradient, and no scaler half way, whatever fails."""
        try:
            self._step_optimizer()
        except BaseException:
            if self.scaler is not None:
                # It forgets that it has unscaled, and keeps its scale.
                self.scaler.update(self.scaler.get_scale())
            raise
        finally:
            self._drop_gradients()

    def _step_optimizer(self) -> None:
        if self._clip_grad_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self._optimizer)
            stepped = [p for group in self._optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(stepped, self._clip_grad_norm)
        is_skipped = False
        if self.scaler is None:
            self._optimizer.step()
        else:
            scale = None if self._scheduler is None else self.scaler.get_scale()
            self.scaler.step(self._optimizer)
            self.scaler.update()
            is_skipped = scale is not None and self.scaler.get_scale() < scale
        if self._scheduler is not None and not is_skipped:
            self._scheduler.step()

    def _now_held(self) -> list[nn.Parameter]:
        """Return what gradients may sit at: more may have been added since the last step."""
        stepped = [p for group in self._optimizer.param_groups for p in group["params"]]
        return list({id(p): p for p in (*self._model.parameters(), *stepped)}.values())

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _shrink_to(self, size: int, why: str) -> None:
        if size < self._size:
            if self._ranks.is_first:
                _log.warning(
                    "micro-batches of %d are cut to %d from here on: %s", self._size, size, why
                )
            self._size = size


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """A batch in micro-batches, and what each of the losses averages over in each of them."""

    layout: Layout
    micro_batches: list[Any]
    sizes: tuple[int, ...]
    counts: list[list[float]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    """What came of running all micro-batches."""

    loss: torch.Tensor | None
    ending: AttemptOutcome
    error: Exception | None
    message: str | None


class _Trouble:
    """What went wrong in an attempt: something smaller to try, or an error to raise."""

    def __init__(self) -> None:
        self.next_size: int | None = None
        self.error: Exception | None = None
        self.message: str | None = None

    @contextlib.contextmanager
    def noted(self, size: int, multiple_of: int) -> Iterator[None]:
        """Note what the block raises, and go on after it.

        Args:
            size: Samples in the largest micro-batch of the block.
            multiple_of: What smaller ones should be multiples of.
        """
        try:
            yield
        except Exception as error:
            verdict = oom.classify(error)
            if verdict is oom.Likelihood.NO and isinstance(error, torch.AcceleratorError):
                # The device's context is poisoned: nothing can be put back, and nobody told.
                raise
            self.message = oom.first_line(error)
            if verdict is oom.Likelihood.NO:
                self.error = error
                return
            self.next_size = smaller(size, multiple_of=multiple_of)
            if self.next_size is None and verdict is oom.Likelihood.SUSPECTED:
                # No batch is small enough, so it was not for want of memory.
                self.error = error
            elif self.next_size is None:
                self.error = DoesNotFitError(
                    f"The training step runs out of memory even in micro-batches of {size}: "
                    f"{self.message}"
                )


def _has_gradient(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad

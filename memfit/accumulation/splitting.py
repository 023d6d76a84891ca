"""Splits a batch by a plan, into micro-batches with their weights."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import distributed

from memfit import partition
from memfit.accumulation.weighing import Weight, check_weight, counts_of, shares_of
from memfit.errors import UsageError
from memfit.records import Plan
from memfit.step.batches import BatchRules, Layout

__all__ = ["MicroBatch", "check_plan", "micro_batches", "micro_batches_of"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """A part of a batch.

    Args:
        batch: Views of the batch's tensors, in its nesting.
        num_samples: Samples in this micro-batch.
        weight: The factor for its loss, so that the losses add up to the whole batch's loss.
        is_last: This is the last micro-batch of the optimizer step.
    """

    batch: Any
    num_samples: int
    weight: float
    is_last: bool


def micro_batches(
    plan: Plan,
    batch: Any,
    *,
    weight: Weight = "samples",
    num_inputs: int = 1,
    batch_dims: Mapping[str | int, int | None] | None = None,
    cut: Callable[[Any, int, int], Any] | None = None,
    count: Callable[[Any], int] | None = None,
) -> tuple[MicroBatch, ...]:
    """Cut a batch into micro-batches and weigh them, for a loop that calls backward itself.

    `for micro in micro_batches(plan, batch): (loss(model(x), y) * micro.weight).backward()`, with
    `x` and `y` from `micro.batch`, leaves the gradient of the whole batch in `.grad`.

    With a plan for several ranks, each rank has to call this for its own batch, because counts are
    added up over all ranks. The weights then expect that gradients are averaged over the ranks, as
    `DistributedDataParallel` does. Run all micro-batches except the last inside its `no_sync()`.

    Args:
        plan: The result of `memfit.plan`.
        batch: Tensors of shape (samples, ...) in any nesting, of any size. A short last batch is
            weighed by its own counts. Lists with one entry for each sample are cut as well.
        weight: What the loss averages over: `"samples"`, `"sum"` for a loss that does not average,
            or a function that counts it in a batch, such as its valid targets.

        num_inputs: As in `Workload`. It matters if inputs and targets are lists.
        batch_dims: As in `Workload`.
        cut: As in `Workload`.
        count: As in `Workload`.

    Returns:
        The micro-batches, larger ones first.

    Raises:
        WorkloadError: The batch has no batch size, or the loss has nothing to average over.
        UsageError: The plan is for several ranks, and the process group does not match it,
            or it is no plan.
    """
    check_weight(weight)
    check_plan(plan, "micro_batches")
    if plan.world_size > 1:
        _check_world(plan.world_size)
    rules = BatchRules(dims=batch_dims or {}, cut=cut, count=count, num_inputs=num_inputs)
    layout = Layout.of(batch, rules)
    sizes = partition.cut(
        layout.num_samples,
        plan.micro_batch_size_of(distributed.get_rank()) if plan.ranks else plan.micro_batch_size,
        multiple_of=plan.multiple_of,
        smallest=plan.smallest_micro_batch_size,
    )
    parts = micro_batches_of(batch, layout, sizes)
    counts = counts_of(weight, parts, sizes)
    total = sum(counts)
    if plan.world_size > 1:
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        summed = torch.tensor(total, dtype=torch.float64, device=device)
        distributed.all_reduce(summed)
        total = float(summed)
    shares = shares_of(weight, counts, total)
    return tuple(
        MicroBatch(
            batch=part,
            num_samples=size,
            weight=share * plan.world_size,
            is_last=index == len(sizes) - 1,
        )
        for index, (part, size, share) in enumerate(zip(parts, sizes, shares, strict=True))
    )


def check_plan(plan: object, taker: str) -> None:
    """Refuse what is not a plan.

    Args:
        plan: What was given.
        taker: The function or class that it was given to.

    Raises:
        UsageError: It is no plan.
    """
    if not isinstance(plan, Plan):
        shown = repr(plan) if isinstance(plan, (int, str)) else f"a {type(plan).__name__}"
        raise UsageError(
            f"{taker} takes the Plan that memfit.plan returns, not {shown}. An Accumulator "
            "also takes a number of samples."
        )


def _check_world(world_size: int) -> None:
    """Refuse to run a plan with another number of ranks than it was made for.

    Raises:
        UsageError: There is no process group, or it has another size.
    """
    is_there = distributed.is_available() and distributed.is_initialized()
    seen = distributed.get_world_size() if is_there else 1
    if seen != world_size:
        raise UsageError(
            f"The plan is for {world_size} ranks, and there "
            f"{'is' if seen == 1 else 'are'} {seen}: plan with world_size={seen}."
        )


def micro_batches_of(batch: Any, layout: Layout, sizes: tuple[int, ...]) -> list[Any]:
    """Return parts of consecutive samples, as views where possible.

    Args:
        batch: The batch.
        layout: How it is cut.
        sizes: Samples in each part; they add up to the batch size.
    """
    stops = itertools.accumulate(sizes)
    return [layout.take(batch, stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]

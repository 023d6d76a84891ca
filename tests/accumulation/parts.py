"""Shared by the tests of accumulation: gradients to compare, a failing loss, a plan."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it
from torch.optim import Optimizer

from memfit import Plan
from memfit.partition import cut
from memfit.records import Capacity, Objective, Precision, RankPart, Source, StepOptions
from memfit.units import GIB


class GradientRecorder:
    """Keeps the gradients of each step of an optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.steps: list[list[torch.Tensor | None]] = []
        optimizer.register_step_pre_hook(self._record)

    def _record(self, optimizer: Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.steps.append([None if p.grad is None else p.grad.clone() for p in parameters])


def relative_error(ours: list[torch.Tensor | None], reference: list[torch.Tensor | None]) -> float:
    """Return the largest relative distance of two lists of gradients, over all parameters."""
    errors = []
    for one, other in zip(ours, reference, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None and not torch.equal(one, other):
            errors.append(float((one - other).norm() / other.norm()))
    return max(errors, default=0.0)


def full_batch_gradients(
    model: nn.Module, optimizer: Optimizer, loss: Callable[[], torch.Tensor]
) -> list[torch.Tensor | None]:
    """Return what one backward pass over the whole batch leaves in the parameters."""
    optimizer.zero_grad()
    loss().backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
    optimizer.zero_grad()
    return gradients


class Restless(nn.Module):
    """Changes everything that a forward pass can: buffers, attributes and all random states."""

    queue: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(8, 3)
        self.num_calls = 0
        self.register_buffer("queue", torch.zeros(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 3)."""
        hidden = self.dropout(self.norm(self.first(x)))
        self.num_calls += 1
        # One buffer is written to, and another takes its place.
        self.queue = torch.cat([self.queue[1:], hidden.detach().mean(0, keepdim=True)])
        noise = random.random() + float(np.random.rand())  # noqa: S311 - a state to be put back
        scores: torch.Tensor = self.last(hidden) * (1 + noise)
        return scores


class Failing:
    """A loss that runs out of memory in chosen calls, in forward or in backward."""

    def __init__(self, calls: set[int], make_error: Callable[[], Exception], where: str) -> None:
        self.calls = calls
        self.make_error = make_error
        self.where = where
        self.num_calls = 0

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        is_failing = self.num_calls in self.calls
        self.num_calls += 1
        if is_failing and self.where == "forward":
            raise self.make_error()
        if is_failing:
            outputs.register_hook(self._fail)
        return F.cross_entropy(outputs, targets)

    def _fail(self, _gradient: torch.Tensor) -> None:
        raise self.make_error()


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


def plan_of_cards(*sizes: tuple[int, ...]) -> Plan:
    """Return a plan whose ranks have these micro-batches, each on a card of its own."""
    plan = plan_of(sum(map(sum, sizes)), sizes[0][0], world_size=len(sizes))
    ranks = tuple(
        RankPart(
            device=f"card {rank}",
            source=Source.SIMULATED,
            capacity=plan.capacity,
            micro_batch_sizes=parts,
            recommended_micro_batch_size=parts[0],
            peak_reserved_bytes=None,
            trials=(),
        )
        for rank, parts in enumerate(sizes)
    )
    return dataclasses.replace(plan, micro_batch_sizes=sizes[0], ranks=ranks)


def plan_of(effective: int, micro: int, *, world_size: int = 1, multiple_of: int = 1) -> Plan:
    share = -(-effective // world_size)
    return Plan(
        subject="net",
        device="cpu",
        source=Source.MEASURED,
        options=StepOptions(precision=Precision.FP32, accumulate=True),
        capacity=Capacity(usable_bytes=GIB, total_bytes=GIB, origin="given"),
        effective_batch_size=effective,
        world_size=world_size,
        objective=Objective.LARGEST,
        micro_batch_sizes=cut(share, micro, multiple_of=multiple_of),
        multiple_of=multiple_of,
        headroom=0.05,
        max_micro_batch_size=micro,
        edge_found=True,
        recommended_micro_batch_size=micro,
        peak_reserved_bytes=None,
        samples_per_second=None,
        trials=(),
        seconds=0.0,
        torch_version="2.15",
    )

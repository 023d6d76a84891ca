"""The workspaces that BLAS keeps: taken at the first product of forward and of backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from traced_steps import step_of

from memfit.backends.traces import trace
from memfit.cards import find_gpu
from memfit.records import Action, Event
from memfit.simulation.needs import NeedEvent
from memfit.simulation.schedule import BLAS_HANDLE, BLAS_LT_HANDLE, StepSchedule
from memfit.simulation.tracing.trace import TraceOptions
from memfit.simulation.tracing.workspace import Kernels
from memfit.step.workload import Workload
from memfit.units import MIB

LT_WORKSPACE = "cuBLASLt workspace"


def traced(model: nn.Module, inputs: torch.Tensor, release: tuple[int, int]) -> StepSchedule:
    workload = Workload(model, (inputs,), lambda outputs: outputs.sum(), "sgd")
    kernels = Kernels(compute_capability=(8, 6), torch_release=release)
    options = TraceOptions(compute_capability=(8, 6), kernels=kernels)
    return trace(step_of(workload), options).as_run


def made(events: tuple[Event, ...]) -> list[str]:
    return [event.origin for event in events if event.action is Action.ALLOC]


@pytest.mark.parametrize(
    ("release", "forward"),
    [
        ((2, 8), [LT_WORKSPACE, BLAS_HANDLE]),
        ((2, 11), [BLAS_LT_HANDLE, BLAS_HANDLE]),
        ((2, 14), [BLAS_HANDLE]),
    ],
)
def test_they_are_taken_at_the_first_products(release: tuple[int, int], forward: list[str]) -> None:
    """After the output and the copies of the first product, of forward and of backward."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    run = traced(model, torch.zeros(2, 8), release)
    origins = made(run.first.events)
    at = origins.index("aten.addmm.default")
    assert origins[at + 1 : at + 1 + len(forward)] == forward
    at = origins.index("aten.mm.default")
    assert origins[at + 1 : at + 3] == ["copy of operand 0", BLAS_HANDLE]
    assert origins.count(BLAS_HANDLE) == 2
    assert BLAS_HANDLE not in made(run.setup.events) + made(run.later.events)


def test_a_step_without_products_has_none() -> None:
    """Convolutions need no handle."""
    run = traced(nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8), (2, 8))
    assert BLAS_HANDLE not in made(run.setup.events) + made(run.first.events)


@pytest.mark.parametrize(
    ("gpu", "release", "num_bytes"),
    [
        ("rtx3090", (2, 8), 8_519_680),
        ("rtx3090", (2, 15), 0),
        ("rtx5090", (2, 11), 8_519_680),
        ("rtx5090", (2, 12), 32 * MIB),
        ("mi300x", (2, 15), 128 * MIB),
    ],
)
def test_a_handle_keeps_what_its_release_keeps(
    gpu: str, release: tuple[int, int], num_bytes: int
) -> None:
    """Since torch 2.15 it keeps nothing, except on ROCm."""
    run = traced(nn.Linear(8, 4), torch.zeros(2, 8), release)
    kept = [event for event in run.first.events if event.origin == BLAS_HANDLE]
    assert len(kept) == 2
    for event in kept:
        assert isinstance(event, NeedEvent)
        assert event.need.on(find_gpu(gpu)) == num_bytes

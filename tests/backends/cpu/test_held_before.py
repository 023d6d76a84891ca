"""What a process holds when a search begins: a user's objects, and compiled kernels."""

from __future__ import annotations

import sys

import pytest
import timm
import timm.optim
import torch
from torch import nn

from memfit import Workload
from memfit.backends.cpu.backend import CpuBackend
from memfit.backends.cpu.glibc_heap import block_bytes
from memfit.backends.cpu.kernel_cache import compiled_bytes, forget_kernels
from memfit.records import Precision, StepOptions
from memfit.step.training_step import TrainingStep
from memfit.units import KIB, MIB

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="trials on a CPU need Linux")
MODEL = "resnet10t"  # 21 MiB of weights
FP32 = StepOptions(precision=Precision.FP32)


def own_step() -> Workload:
    """Return the step that memfit makes for the name, from the user's own objects."""
    model = timm.create_model(MODEL)
    model.train()
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.01)
    batch = (torch.randn(4, 3, 64, 64), torch.randint(1000, (4,)))
    return Workload(model, batch, nn.functional.cross_entropy, optimizer)


def peak_bytes(step: TrainingStep) -> int:
    """Return the bytes that a step of two samples reserves."""
    with CpuBackend(memory_bytes=400 * MIB) as backend:
        trial = backend.trial(step, 2)
    assert trial.peak_reserved_bytes is not None
    return trial.peak_reserved_bytes


def test_own_objects_need_what_the_same_model_needs_by_name() -> None:
    """Existing weights, gradients and state count, before training and after it."""
    by_name = peak_bytes(
        TrainingStep(
            subject=MODEL,
            options=StepOptions(precision=Precision.FP32, optimizer="adamw", image_size=(64, 64)),
        )
    )
    workload = own_step()
    fresh = peak_bytes(TrainingStep(subject=workload, options=FP32))
    inputs, targets = workload.batch
    workload.loss(workload.model(inputs), targets).backward()
    assert isinstance(workload.optimizer, torch.optim.Optimizer)
    workload.optimizer.step()
    trained = peak_bytes(TrainingStep(subject=workload, options=FP32))
    assert by_name == pytest.approx(fresh, abs=3 * MIB)
    assert by_name == pytest.approx(trained, abs=3 * MIB)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_compiled_kernels_are_forgotten() -> None:
    """A trial compiles its own kernels, like a fresh process, whatever ran before."""
    before = compiled_bytes()
    for width in range(20, 28):
        layer = nn.Conv2d(4, 8, 3)
        layer(torch.randn(2, 4, width, 17)).sum().backward()
    grown = compiled_bytes()
    assert grown > before or before > 64 * MIB
    forget_kernels()
    assert compiled_bytes() < grown
    assert compiled_bytes() <= 8 * MIB


def test_large_blocks_are_whole_pages() -> None:
    """glibc takes them from the system like this; small ones are in its heap."""
    assert block_bytes(1000) == 1000
    assert block_bytes(128 * KIB) == 132 * KIB
    assert block_bytes(MIB - 64) == MIB

"""Profiles of real steps on the CPU, from torch.profiler's memory events."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import memfit
from memfit import DoesNotFitError, Precision, Source, StepOptions, UsageError, Workload
from memfit.backends import open_backend
from memfit.backends.traces import trace
from memfit.profiling import profile_device
from memfit.profiling.attribution import Attribution
from memfit.profiling.peak import peak_of
from memfit.profiling.replay import Replay, replay
from memfit.records import MemoryProfile, Peak, Role
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.tracing.trace import TraceOptions
from memfit.simulation.tracing.workspace import Kernels
from memfit.step.training_step import TrainingStep

CPU = torch.device("cpu")
BATCH_SIZE = 8


def vit(**options: object) -> TrainingStep:
    chosen = {"precision": Precision.FP32, "optimizer": "adamw", **options}
    return TrainingStep(
        subject="test_vit.r160_in1k",
        options=StepOptions(**chosen),  # type: ignore[arg-type]
    )


def measured(step: TrainingStep) -> MemoryProfile:
    with open_backend("cpu") as backend:
        return profile_device(step, BATCH_SIZE, backend, CPU).profile


def simulated(step: TrainingStep) -> Peak:
    """Return the same step, traced with the kernels of a CPU."""
    options = TraceOptions(
        compute_capability=(8, 0),
        kernels=Kernels(compute_capability=(8, 0), allows_tf32=False, torch_release=(2, 13)),
        uses_foreach=False,
        cudnn_benchmark=False,
    )
    attribution = Attribution()
    traced = trace(step, options, watcher=attribution)
    replayed = replay(
        traced.schedule,
        BATCH_SIZE,
        purpose=attribution.purpose,
        settings=AllocatorSettings(),
    )
    assert isinstance(replayed, Replay)
    return peak_of(replayed.blocks, replayed.timeline)


@pytest.mark.parametrize("options", [{}, {"accumulate": True}])
def test_the_simulation_agrees_with_the_real_step(options: dict[str, object]) -> None:
    """The peak is within 1% and every role within 2% of torch.profiler's figures."""
    real, model = measured(vit(**options)).peak, simulated(vit(**options))
    requested = model.allocated_bytes - model.bytes_of(Role.SLACK)
    assert requested == pytest.approx(real.total_bytes, rel=0.01)
    for role in Role:
        if role not in (Role.SLACK, Role.FRAGMENTATION):
            assert model.bytes_of(role) == pytest.approx(real.bytes_of(role), rel=0.02, abs=4096)


def test_a_measured_profile_is_explained() -> None:
    """Roles and modules sum to the peak; blocks know their module, operation and line."""
    profile = measured(vit(grad_checkpointing=True))
    assert profile.source is Source.MEASURED
    assert profile.peak.context_bytes == 0
    assert profile.bytes_per_sample is None
    assert [phase.name for phase in profile.timeline.phases] == ["forward", "backward", "optimizer"]
    modules = {block.module for block in profile.blocks}
    assert {"blocks.0.attn.qkv", "(batch)", "(optimizer)", "head"} <= modules
    assert "(unknown)" not in modules
    saved = [block for block in profile.blocks if block.role is Role.ACTIVATIONS]
    assert "aten::addmm" in {block.operation for block in saved}
    assert "aten::empty" not in {block.operation for block in profile.blocks}
    assert {(block.source_line or "timm/").split("/")[0] for block in profile.blocks} == {"timm"}
    assert any(block.source_line for block in saved)
    # Backward's temporaries belong to their modules, not to the loss.
    begin = profile.timeline.phases[1].begin
    late = [b for b in profile.blocks if b.role is Role.TEMPORARIES and (b.born or 0) > begin]
    assert sum(block.module.startswith("blocks.") for block in late) > 10


def test_mixed_precision_copies_on_the_cpu() -> None:
    """Autocast's real copies of weights are recognised."""
    profile = measured(vit(precision=Precision.AMP_BF16))
    copies = [block for block in profile.blocks if block.role is Role.AUTOCAST_COPIES]
    assert {"blocks.0.attn.qkv", "head"} <= {block.module for block in copies}


def test_a_users_objects_are_as_before(workload: Workload) -> None:
    """The model, its gradients and the optimizer are put back, and no hook is left."""
    model: Any = workload.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    calls = model.num_calls
    profile = memfit.profile(workload, 4, device="cpu")
    assert profile.subject == "SmallNet"
    assert profile.peak.bytes_of(Role.OPTIMIZER_STATE) > 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    assert model.num_calls == calls
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_running_out_is_one_sentence(workload: Workload) -> None:
    """If the machine refuses an allocation, the error says what was tried and what to do."""
    huge = Workload(
        workload.model,
        lambda samples: (torch.empty(samples, 3, 2**20, 2**20), torch.zeros(samples)),
        workload.loss,
        workload.optimizer,
    )
    with pytest.raises(DoesNotFitError, match="A batch of 64 does not fit CPU"):
        memfit.profile(huge, 64, device="cpu")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"batch_size": 0}, "at least 1, not 0"),
        ({"batch_size": 1, "device": "cpu", "gpu": "t4"}, "not both"),
        ({"batch_size": 1, "device": "cpu", "memory": "8GiB"}, "for a card that is not here"),
    ],
)
def test_what_cannot_be_asked(arguments: dict[str, object], sentence: str) -> None:
    """Questions that make no sense are refused before anything runs."""
    with pytest.raises(UsageError, match=sentence):
        memfit.profile("test_vit.r160_in1k", **arguments)  # type: ignore[arg-type]

"""How the tests of tracing name a step, its options and its peak."""

from __future__ import annotations

from memfit.records import Precision, StepOptions
from memfit.simulation.allocator.caching import CachingAllocator
from memfit.simulation.schedule import StepSchedule
from memfit.simulation.tracing.trace import TraceOptions
from memfit.simulation.tracing.workspace import Kernels
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload


def options(capability: tuple[int, int] = (8, 0), **changes: bool | int) -> TraceOptions:
    """Return the options of a torch whose BLAS workspaces do not belong to the step."""
    return TraceOptions(
        compute_capability=capability,
        kernels=Kernels(compute_capability=capability, torch_release=(2, 13)),
        **changes,  # type: ignore[arg-type]
    )


def step_of(
    subject: str | Workload, precision: Precision = Precision.FP32, **changes: int
) -> TrainingStep:
    optimizer = "adamw" if isinstance(subject, str) else None
    return TrainingStep(
        subject=subject,
        options=StepOptions(precision=precision, optimizer=optimizer, **changes),  # type: ignore[arg-type]
    )


def requested_peak(schedule: StepSchedule, batch_size: int) -> int:
    allocator = CachingAllocator()
    for _ in schedule.play(allocator, batch_size):
        pass
    return allocator.stats.peak_requested_bytes

"""Profiles a training step on a simulated GPU."""

from __future__ import annotations

import os
import time

import torch

from memfit.backends.simulated import SimulatedBackend
from memfit.backends.traces import TraceCache, trace, trace_options
from memfit.cards import Gpu
from memfit.profiling.attribution import Attribution
from memfit.profiling.peak import peak_of
from memfit.profiling.replay import Replay, ReplayOutOfMemory, replay
from memfit.profiling.snapshot import Profiled, snapshot_of
from memfit.records import Capacity, MemoryProfile, Outcome, Source
from memfit.simulation.allocator.settings import AllocatorSettings
from memfit.simulation.tracing.releases import torch_release
from memfit.step.training_step import TrainingStep
from memfit.units import format_bytes

__all__ = ["profile_gpu"]


def profile_gpu(
    step: TrainingStep,
    batch_size: int,
    gpu: Gpu,
    *,
    traces: TraceCache | None = None,
    keeps_history: bool = False,
) -> Profiled:
    """Profile a training step on a card of the catalogue.

    Args:
        step: The step to train. Its precision is chosen.
        batch_size: Samples in each micro-batch, at least 1.
        gpu: The card.
        traces: A cache that the trace is added to, so that later simulations need not trace again.
        keeps_history: Keep every event, so that a snapshot can be made.

    Raises:
        UnsupportedError: The step cannot be traced without values.
    """
    start = time.perf_counter()
    attribution = Attribution()
    options = trace_options(gpu)
    traced = trace(step, options, watcher=attribution)
    if traces is not None:
        traces.add(step, options, traced)
    settings = AllocatorSettings.from_environment(os.environ, torch_release=torch_release())

    def run(capacity_bytes: int | None) -> Replay | ReplayOutOfMemory:
        return replay(
            traced.as_run.on(gpu),
            batch_size,
            purpose=attribution.purpose,
            settings=settings,
            capacity_bytes=capacity_bytes,
            keeps_history=keeps_history,
        )

    capacity = SimulatedBackend(gpu).capacity()
    found = run(capacity.usable_bytes)
    shortage = found if isinstance(found, ReplayOutOfMemory) else None
    replayed = found if isinstance(found, Replay) else run(None)
    assert isinstance(replayed, Replay)
    peak = peak_of(replayed.blocks, replayed.timeline, context_bytes=gpu.context_bytes)
    profile = MemoryProfile(
        subject=step.name,
        device=gpu.name,
        source=Source.SIMULATED,
        options=step.options,
        batch_size=batch_size,
        num_micro_batches=step.num_micro_batches,
        capacity=capacity,
        outcome=Outcome.FITS if shortage is None else Outcome.OUT_OF_MEMORY,
        message=None if shortage is None else _shortage(shortage, peak.reserved_bytes, capacity),
        timeline=replayed.timeline,
        peak=peak,
        blocks=replayed.blocks,
        cards=(),
        advice=(),
        seconds=time.perf_counter() - start,
        torch_version=torch.__version__,
    )
    return Profiled(profile=profile, snapshot=snapshot_of(replayed) if keeps_history else None)


def _shortage(shortage: ReplayOutOfMemory, needed_bytes: int, capacity: Capacity) -> str:
    request = shortage.request
    missing = needed_bytes - capacity.usable_bytes
    return (
        f"It does not fit: {request.operation} in {request.module} "
        f"({shortage.phase or 'setting up'}) asked for {format_bytes(request.requested_bytes)} "
        f"while {format_bytes(shortage.allocated_bytes)} of "
        f"{format_bytes(capacity.usable_bytes)} were in use. With enough memory, the step takes "
        f"{format_bytes(needed_bytes)}: {format_bytes(missing)} more than there is."
    )

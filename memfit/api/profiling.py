"""`profile`: what holds the memory of a training step."""

from __future__ import annotations

import dataclasses
import pickle
import time
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import Unpack

from memfit.api.steps import StepKeywords, describe, own_device, step_on
from memfit.backends.simulated import SimulatedBackend, TraceCache
from memfit.errors import UsageError
from memfit.profiling import Recorded, profile_device, profile_gpu
from memfit.profiling.advice import advise
from memfit.profiling.cards import card_lines
from memfit.records import CardLine, Change, MemoryProfile
from memfit.simulation.gpus import COMMON_GPUS, Gpu, find_gpu, gpu_like
from memfit.units import parse_bytes
from memfit.workload import TrainingStep, Workload

__all__ = ["profile"]


def profile(
    subject: str | Workload,
    batch_size: int,
    *,
    device: str | None = None,
    gpu: str | None = None,
    compared: Sequence[str] = (),
    memory: str | int | None = None,
    accumulate: bool = False,
    snapshot: str | Path | None = None,
    **options: Unpack[StepKeywords],
) -> MemoryProfile:
    """Find what holds the memory of a training step, at its peak and moment by moment.

    The user's model, optimizer, gradients, random states and switches are as before when this
    returns, raises or is interrupted.

    Args:
        subject: A timm model's name, or a `Workload` of the user's own objects.
        batch_size: Samples in each micro-batch, at least 1.
        device: Where to run the step and record its allocations, as for `probe`.
        gpu: A card to simulate instead, as for `probe`.
        compared: Further cards to simulate for the lines of batch size against memory.
        memory: What each simulated card has, in place of the catalogue's figure.
        accumulate: Two micro-batches before the optimizer's step instead of one.
        snapshot: Where to write the allocator's history as a pickle in the format of
            `torch.cuda.memory._snapshot`; nothing is written by default.
        **options: The step itself, as for `probe`.

    Returns:
        Everything that lived in one step, its peak by role and by module, and what would lower it.
        A step that does not fit is profiled too, where it is simulated, and says so.

    Raises:
        UsageError: Something asked for cannot be, or the snapshot cannot be written.
        UnsupportedError: The step cannot be traced without values, or not be recorded here.
    """
    if batch_size < 1:
        raise UsageError(f"The batch size must be at least 1, not {batch_size}.")
    if gpu is not None and device is not None:
        raise UsageError(f"Give a device ({device}) or a GPU to simulate ({gpu}), not both.")
    if gpu is None and memory is not None:
        raise UsageError("memory is for a simulated card (gpu): a step is recorded with all of it.")
    start = time.perf_counter()
    described = describe(subject, accumulate=accumulate, **options)
    memory_bytes = None if memory is None else parse_bytes(memory)
    others = tuple(find_gpu(name, total_bytes=memory_bytes) for name in compared)
    traces = TraceCache()
    if gpu is not None:
        card: Gpu | None = find_gpu(gpu, total_bytes=memory_bytes)
        assert card is not None
        step = step_on(described, SimulatedBackend(card))
        recorded: Recorded = profile_gpu(
            step, batch_size, card, traces=traces, keeps_history=snapshot is not None
        )
    else:
        recorded = profile_device(
            described, batch_size, own_device(subject, device), keeps_history=snapshot is not None
        )
        card = _card_of(recorded.profile)
    if snapshot is not None:
        _write_snapshot(recorded, Path(snapshot))
    cards, advice = _simulated_parts(described, recorded.profile, card, others, traces)
    return dataclasses.replace(
        recorded.profile, cards=cards, advice=advice, seconds=time.perf_counter() - start
    )


def _simulated_parts(
    described: TrainingStep,
    found: MemoryProfile,
    card: Gpu | None,
    others: tuple[Gpu, ...],
    traces: TraceCache,
) -> tuple[tuple[CardLine, ...], tuple[Change, ...]]:
    """Return the lines of the cards and the advice, as far as there is a card to simulate."""
    gpus = (*(() if card is None else (card,)), *others)
    if not gpus:
        return (), ()
    backends = [SimulatedBackend(gpu, traces=traces) for gpu in gpus]
    steps = [(backend, step_on(described, backend)) for backend in backends]
    advice = () if card is None else advise(found, *reversed(steps[0]))
    return card_lines(steps, found.batch_size), advice

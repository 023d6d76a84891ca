"""`profile`: shows what uses the memory of a training step."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from typing_extensions import Unpack

from memfit.api.asking import check_place
from memfit.api.cards import Cards
from memfit.api.progress import StageProgress, watched
from memfit.api.steps import (
    Subject,
    SubjectKeywords,
    cards_instead,
    describe,
    own_device,
    refuse_rank,
    taken,
)
from memfit.backends import Backend, SimulatedGpu, device_of, open_backend, with_precision
from memfit.backends.cpu.machine import UnlimitedCpu
from memfit.backends.simulated import SimulatedBackend
from memfit.backends.traces import TraceCache
from memfit.cards import find_gpu
from memfit.errors import DoesNotFitError, UnsupportedError, UsageError
from memfit.profiling import (
    Profiled,
    advise,
    card_lines,
    profile_current_gpu,
    profile_device,
    profile_gpu,
)
from memfit.records import Engine, MemoryProfile, Parallel, Peak, Role, Source
from memfit.rehearsal.engines import engine_of
from memfit.step.refusals import check_subject
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload
from memfit.units import parse_bytes, parse_count

__all__ = ["DEFAULT_GPU", "grown_like", "profile"]

DEFAULT_GPU = "NVIDIA GeForce RTX 4090"
"""The card that is profiled where there is no GPU and none was named."""
# Bytes of a role that differ by no more than this share are the same tensors.
_SAME_SHARE = 0.01
_TEMPORARY = (Role.TEMPORARIES, Role.WORKSPACES)
_STAGES = ("the step", "batch size against memory", "what would lower the peak")


def profile(
    subject: Subject,
    batch_size: int,
    *,
    device: str | None = None,
    gpu: str | None = None,
    compared: Sequence[str] = (),
    memory: str | float | None = None,
    engine: str | Engine = Engine.AUTO,
    accumulate: bool = False,
    parallel: str | Parallel | None = None,
    world_size: int = 1,
    advice: bool = True,
    snapshot: str | Path | None = None,
    progress: StageProgress = "bar",
    **options: Unpack[SubjectKeywords],
) -> MemoryProfile:
    """Find what uses the memory of a training step, at its peak and at every moment.

    When this returns, raises or is interrupted, the user's model, optimizer, gradients, random
    states and switches are the same as before.

    Args:
        subject: As for `probe`.
        batch_size: Samples in each micro-batch, at least 1.
        device: Where to run the step and record its allocations, as for `probe`. On a machine
            without a GPU a card is simulated by default: a GeForce RTX 4090, or a card with
            `memory`.
        gpu: A card to rehearse or simulate instead, as for `probe`.
        compared: More cards to simulate, for the chart of memory by batch size.
        memory: The memory of each simulated card, instead of the catalogue's value.
        engine: As in `probe`. A step that does not fit is simulated, to show what it needs.
        accumulate: Run two micro-batches before the optimizer's step instead of one.
        parallel: As in `probe`. Then only the step itself is profiled, because other batch sizes,
            changes and cards would be simulated.
        world_size: As in `probe`.
        advice: Look for changes that would lower the peak, and at other batch sizes. This takes
            most of the time of a simulated profile.
        snapshot: A file for the allocator's history, a pickle in the format of
            `torch.cuda.memory._snapshot`. By default nothing is written.
        progress: `"bar"`, `None`, or a function. It is called with the name of the next stage, the
            number of stages done, and the number of all stages.
        **options: The step itself, as for `probe`.

    Returns:
        Every allocation of one step, its peak by role and by module, and changes that would lower
        the peak. In a simulation, a step that does not fit is profiled too, and the result says so.

    Raises:
        UsageError: An argument is not valid, or the snapshot cannot be written.
        UnsupportedError: The step cannot be traced, because it needs real values, or this system
            cannot record it.
    """
    batch_size = parse_count("The batch size", batch_size)
    check_place(device, gpu)
    start = time.perf_counter()
    subject, step_options = taken(subject, options)
    check_subject(subject, Workload)
    if gpu is None and (instead := cards_instead(subject, device=device, gpu=gpu, memory=memory)):
        gpu = instead[0] if len(instead) == 1 else DEFAULT_GPU
    if gpu is None and memory is not None:
        raise UsageError(
            "memory is for a card that is not here (gpu). On a device that is "
            "here, a profile may use all of its memory."
        )
    place = None if gpu is not None else device_of(own_device(subject, device))
    if place is not None and place.type == "cpu" and snapshot is not None:
        raise UsageError(
            "A CPU has no caching allocator, so there is no snapshot to write. "
            "Profile on a GPU, or name one with --gpu."
        )
    described = describe(
        subject,
        accumulate=accumulate,
        parallel=parallel,
        world_size=world_size,
        **step_options,
    )
    is_rank = described.options.parallel is not None
    if is_rank and compared:
        refuse_rank(described, f"The chart for {compared[0]} is simulated and")
    with watched(f"profiling {described.name}", stages=progress) as watching:

        def begins(done: int) -> None:
            if watching.stage is not None:
                watching.stage(_STAGES[done], done, len(_STAGES))

        found = _profiled(
            described,
            batch_size,
            place=place,
            gpu=gpu,
            compared=compared,
            memory_bytes=None if memory is None else parse_bytes(memory),
            engine=engine_of(engine),
            asks_more=(advice or bool(compared)) and not is_rank,
            snapshot=None if snapshot is None else Path(snapshot),
            begins=begins,
        )
    return dataclasses.replace(found, seconds=time.perf_counter() - start)


def _profiled(
    described: TrainingStep,
    batch_size: int,
    *,
    place: torch.device | None,
    gpu: str | None,
    compared: Sequence[str],
    memory_bytes: int | None,
    engine: Engine,
    asks_more: bool,
    snapshot: Path | None,
    begins: Callable[[int], None],
) -> MemoryProfile:
    """Profile a step on the device or card; `begins` is called with each stage's number."""
    begins(0)
    cards = [find_gpu(name, total_bytes=memory_bytes) for name in compared]
    traces = TraceCache()
    if gpu is not None:
        card = find_gpu(gpu, total_bytes=memory_bytes)
        step = with_precision(described, SimulatedBackend(card))
        with Cards(engine) as opened:
            traces = opened.traces
            found = _profile_card(
                opened.open(gpu, memory_bytes, step),
                step,
                batch_size,
                traces=traces,
                keeps_history=snapshot is not None,
            )
        cards.insert(0, card)
    else:
        assert place is not None
        refuse_rank(described, "A device of this machine")
        found, step, counterpart = _profile_here(described, batch_size, place)
        if counterpart is not None:
            cards.insert(0, counterpart.gpu)
    if snapshot is not None:
        _write(found, snapshot)
    if not asks_more:
        return found.profile
    backends = [SimulatedBackend(card, traces=traces) for card in cards]
    steps = [(backend, with_precision(described, backend)) for backend in backends]
    # A measurement on a CPU does not say what a card would need.
    has_advice = len(cards) > len(compared)
    try:
        if has_advice:
            found = _with_growth(found, step, batch_size, backends[0], traces)
        begins(1)
        lines = card_lines(steps, batch_size)
        begins(2)
        advice = advise(found.profile, step, backends[0]) if has_advice else ()
    except UnsupportedError:
        # What was measured or rehearsed is valid without the simulated cards.
        if compared or found.profile.source is Source.SIMULATED:
            raise
        lines, advice = (), ()
    return dataclasses.replace(found.profile, cards=lines, advice=advice)


def _profile_card(
    card: Backend,
    step: TrainingStep,
    batch_size: int,
    *,
    traces: TraceCache,
    keeps_history: bool,
) -> Profiled:
    """Profile on a card that is not in this machine, with the backend's own method."""
    counterpart = card.simulated_counterpart()
    assert counterpart is not None
    context_bytes = counterpart.gpu.context_bytes
    if step.options.parallel is not None:
        # Whether it fits or not: there is no simulation of one rank of many.
        with card:
            return card.call(profile_current_gpu, step, batch_size, context_bytes)
    if card.source is not Source.SIMULATED:
        with contextlib.suppress(DoesNotFitError), card:
            return card.call(profile_current_gpu, step, batch_size, context_bytes)
    return profile_gpu(
        step, batch_size, counterpart.gpu, traces=traces, keeps_history=keeps_history
    )


def _with_growth(
    found: Profiled,
    step: TrainingStep,
    batch_size: int,
    card: SimulatedBackend,
    traces: TraceCache,
) -> Profiled:
    """Add what every sample brings to the peak, which only a simulation knows.

    It is added to the roles of which the simulation has the same bytes.
    """
    if found.profile.source is Source.SIMULATED:
        return found
    simulated = profile_gpu(step, batch_size, card.gpu, traces=traces).profile.peak
    peak = grown_like(found.profile.peak, simulated)
    return dataclasses.replace(found, profile=dataclasses.replace(found.profile, peak=peak))


def grown_like(peak: Peak, simulated: Peak) -> Peak:
    """Return a peak with the growth of a simulated one, in the roles that hold the same bytes.

    Args:
        peak: The peak that a device's record shows.
        simulated: The same step's, with what every sample adds.
    """
    # A record tells the workspaces that are kept from other temporary memory, and not those that
    # are taken for a call. So the two are compared as one.
    groups = [(role,) for role in Role if role not in _TEMPORARY] + [_TEMPORARY]
    growth: dict[Role, float | None] = {}
    for roles in groups:
        here, there = (
            [share for share in one.roles if share.role in roles] for one in (peak, simulated)
        )
        held, other = (sum(share.num_bytes for share in shares) for shares in (here, there))
        if not (here and there) or abs(other - held) > _SAME_SHARE * held:
            continue
        growth |= dict.fromkeys((share.role for share in here), 0.0)
        known = [share.bytes_per_sample for share in there]
        growth[here[0].role] = known[0] if len(roles) == 1 else sum(one or 0 for one in known)
    return dataclasses.replace(
        peak,
        roles=tuple(
            dataclasses.replace(share, bytes_per_sample=growth[share.role])
            if share.role in growth
            else share
            for share in peak.roles
        ),
    )


def _profile_here(
    step: TrainingStep, batch_size: int, place: torch.device
) -> tuple[Profiled, TrainingStep, SimulatedGpu | None]:
    """Profile a step on a device of this machine.

    On a CPU it runs in this process without a memory limit, because only Linux can set one.

    Returns:
        The profile, the step with its precision chosen, and the simulation of the GPU, if any.
    """
    if place.type == "cpu":
        cpu = UnlimitedCpu()
        step = with_precision(step, cpu)
        return profile_device(step, batch_size, cpu, place), step, None
    with open_backend(place) as backend:
        step = with_precision(step, backend)
        found = profile_device(step, batch_size, backend, place)
        return found, step, backend.simulated_counterpart()


def _write(found: Profiled, path: Path) -> None:
    assert found.snapshot is not None
    try:
        path.write_bytes(pickle.dumps(found.snapshot))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error

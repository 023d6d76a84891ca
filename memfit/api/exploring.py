"""`explore`: simulates what would fit after a single change of the training step."""

from __future__ import annotations

import dataclasses

from typing_extensions import Unpack

from memfit.api.asking import Asked, SearchKeywords
from memfit.api.cards import simulated
from memfit.api.progress import StageProgress, watched
from memfit.api.steps import Subject, check_accumulates, own_device
from memfit.backends import SimulatedGpu, open_backend, with_precision
from memfit.backends.traces import TraceCache
from memfit.errors import UsageError
from memfit.planning import PlanTarget, explore_on
from memfit.records import Exploration, Objective

__all__ = ["explore"]


def explore(
    subject: Subject,
    effective_batch_size: int,
    *,
    world_size: int = 1,
    objective: str | Objective = Objective.LARGEST,
    device: str | None = None,
    gpu: str | None = None,
    progress: StageProgress = "bar",
    **options: Unpack[SearchKeywords],
) -> Exploration:
    """Simulate what would fit after single changes of a training step.

    Args:
        subject: As in `plan`; it is not changed.
        effective_batch_size: As in `plan`.
        world_size: As in `plan`.
        objective: As in `plan`, without `"fastest"`.
        device: A GPU of this machine. The simulated card has its name and memory. Default: the
            workload's own GPU, or the first GPU.
        gpu: A card of the catalogue instead.
        progress: `"bar"`, `None`, or a function. It is called with the next change, the number of
            changes done, and the number of all changes.
        **options: As in `plan`. `memory` is the memory of the catalogue's card, or what the step
            may use of this machine's GPU. Every change is simulated, whatever the engine.

    Returns:
        The unchanged step, and the step with each change. The changes that affect training least
        come first.

    Raises:
        UsageError: An argument is not valid, or there is no GPU to simulate.
    """
    asked = Asked.of(subject, **options)
    check_accumulates(asked.step, "A plan")
    target = PlanTarget.of(
        effective_batch_size, asked.search, world_size=world_size, objective=objective
    )
    if target.objective is Objective.FASTEST:
        target = dataclasses.replace(target, objective=Objective.LARGEST)
    card = (
        _counterpart(own_device(asked.step.subject, device), asked.memory_bytes)
        if gpu is None
        else simulated(gpu, asked.memory_bytes, TraceCache())
    )
    with watched(f"exploring {asked.step.name}", stages=progress) as watching:
        return explore_on(card, with_precision(asked.step, card), target, progress=watching.stage)


def _counterpart(device: str | None, memory_bytes: int | None) -> SimulatedGpu:
    """Return the simulation of a GPU of this machine."""
    with open_backend(device, memory_bytes=memory_bytes) as backend:
        card = backend.simulated_counterpart()
    if card is None:
        raise UsageError(
            "Other changes are tried by simulation, and only GPUs can be "
            "simulated. Give gpu, a name that `memfit gpus` lists."
        )
    return card

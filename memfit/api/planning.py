"""`plan` and `survey_plans`: from a target batch size to micro-batches that fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from typing_extensions import Unpack

from memfit.api.cards import Cards, engine_for_several, engine_of, source_of
from memfit.api.probing import on_each_card, remarks_on
from memfit.api.progress import StageProgress, TrialProgress, Watching, watched
from memfit.api.steps import StepKeywords, cards_instead, describe, own_device
from memfit.backends import open_backend
from memfit.cards import ANY_GPU, COMMON_GPUS
from memfit.errors import UsageError
from memfit.planning import PlanTarget, plan_on
from memfit.records import Engine, Objective, Plan, PlanAnswer, PlanSurvey
from memfit.step.workload import TrainingStep, Workload
from memfit.units import parse_bytes

__all__ = ["plan", "survey_plans"]

_NO_SECONDS = (
    "What is fastest is measured, and a simulation has no seconds: leave the GPU's name out and "
    "plan on the device that is there, or plan for the largest micro-batch."
)


class PlanKeywords(StepKeywords, total=False):
    """The options of `plan` other than the device; they give its overloads their types.

    Args:
        world_size: As in `plan`.
        objective: As in `plan`.
        memory: As in `plan`.
        engine: As in `plan`.
        headroom: As in `plan`.
        multiple_of: As in `plan`.
        max_batch_size: As in `plan`.
        progress: As in `plan`.
    """

    world_size: int
    objective: str | Objective
    memory: str | float | None
    engine: str | Engine
    headroom: float
    multiple_of: int
    max_batch_size: int | None
    progress: TrialProgress


@overload
def plan(
    subject: str | Workload,
    effective_batch_size: int,
    *,
    device: str,
    gpu: None = None,
    **options: Unpack[PlanKeywords],
) -> Plan: ...


@overload
def plan(
    subject: str | Workload,
    effective_batch_size: int,
    *,
    device: None = None,
    gpu: str,
    **options: Unpack[PlanKeywords],
) -> Plan: ...


@overload
def plan(
    subject: str | Workload,
    effective_batch_size: int,
    *,
    device: str | None = None,
    gpu: str | None = None,
    **options: Unpack[PlanKeywords],
) -> Plan | PlanSurvey: ...


def plan(
    subject: str | Workload,
    effective_batch_size: int,
    *,
    world_size: int = 1,
    objective: str | Objective = Objective.LARGEST,
    device: str | None = None,
    gpu: str | None = None,
    memory: str | float | None = None,
    engine: str | Engine = Engine.AUTO,
    headroom: float = 0.05,
    multiple_of: int = 1,
    max_batch_size: int | None = None,
    progress: TrialProgress = "bar",
    **options: Unpack[StepKeywords],
) -> Plan | PlanSurvey:
    """Turn an effective batch size into micro-batches that fit and add up to it exactly.

    If one rank's whole share fits, the plan has one accumulation step. If half of the share fits in
    a step that accumulates, the plan has two. Otherwise the largest micro-batch that fits is
    searched. The plan's own micro-batch is always one of those that were tried.

    Args:
        subject: A timm model's name, or a `Workload` of the user's own objects.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: The number of ranks that share these samples, each on a device of this kind.
        objective: `"largest"` for the fewest steps, `"fastest"` for the most samples per second as
            measured, `"even"` for equal parts only.
        device: As in `probe`.
        gpu: As in `probe`.
        memory: As in `probe`.
        engine: As in `probe`.
        headroom: Share of the capacity to keep free, from 0 to below 1.
        multiple_of: Every micro-batch except the last of a step is a multiple of this.
        max_batch_size: The largest micro-batch to consider.
        progress: As in `probe`.
        **options: As in `probe`.

    Returns:
        The plan, which `Accumulator` can carry out. On a machine without a GPU, without `device`,
        `gpu` and `memory`: a `PlanSurvey` with a plan for each of the common cards.

    Raises:
        UsageError: An argument is not valid.
        DoesNotFitError: Not even the smallest micro-batch fits with the headroom.
        UnsupportedError: This system cannot run such a trial.
    """
    target = PlanTarget.of(
        effective_batch_size,
        world_size=world_size,
        objective=objective,
        headroom=headroom,
        multiple_of=multiple_of,
        max_batch_size=max_batch_size,
    )
    step = describe(subject, **options)
    memory_bytes = None if memory is None else parse_bytes(memory)
    instead = cards_instead(subject, device=device, gpu=gpu, memory=memory)
    if gpu is not None and device is not None:
        raise UsageError(f"Give a device ({device}) or a GPU to simulate ({gpu}), not both.")
    if (gpu is not None or instead) and target.objective is Objective.FASTEST:
        raise UsageError(_NO_SECONDS)
    with watched(f"planning for {step.name}", trials=progress) as watching:
        if len(instead) > 1:
            return _surveyed(
                step, instead, memory=None, engine=engine, target=target, watching=watching
            )
        for name in (gpu,) if gpu is not None else instead:
            with Cards(engine_of(engine)) as cards:
                card = cards.open(name, memory_bytes, step)
                return plan_on(card, step, target, progress=watching.trial)
        backend = open_backend(
            own_device(subject, device), memory_bytes=memory_bytes, headroom=headroom
        )
        return plan_on(backend, step, target, progress=watching.trial)


def survey_plans(
    subject: str | Workload,
    effective_batch_size: int,
    *,
    gpus: Sequence[str] | None = None,
    world_size: int = 1,
    objective: str | Objective = Objective.LARGEST,
    memory: str | float | None = None,
    engine: str | Engine = Engine.AUTO,
    headroom: float = 0.05,
    multiple_of: int = 1,
    max_batch_size: int | None = None,
    progress: StageProgress = "bar",
    **options: Unpack[StepKeywords],
) -> PlanSurvey:
    """Plan for several GPUs that are not in this machine.

    They are simulated from as few traces as possible, unless the engine is `"rehearse"`.

    Args:
        subject: A timm model's name, or a `Workload`, which is not changed.
        effective_batch_size: As in `plan`.
        gpus: As in `survey`.
        world_size: As in `plan`.
        objective: As in `plan`, without `"fastest"`.
        memory: The memory of each card, instead of the catalogue's value.
        engine: As in `probe`; `"auto"` simulates.
        headroom: As in `plan`.
        multiple_of: As in `plan`.
        max_batch_size: As in `plan`.
        progress: As in `survey`.
        **options: As in `probe`; with precision `"auto"`, each card uses its own.

    Returns:
        An answer for each card, in the order of `gpus`.

    Raises:
        UsageError: An argument is not valid.
        UnsupportedError: The step cannot be traced, because it needs real values.
    """
    target = PlanTarget.of(
        effective_batch_size,
        world_size=world_size,
        objective=objective,
        headroom=headroom,
        multiple_of=multiple_of,
        max_batch_size=max_batch_size,
    )
    if target.objective is Objective.FASTEST:
        raise UsageError(_NO_SECONDS)
    step = describe(subject, **options)
    names = tuple(gpus) if gpus else (COMMON_GPUS if memory is None else (ANY_GPU,))
    with watched(f"planning for {step.name}", stages=progress) as watching:
        return _surveyed(
            step, names, memory=memory, engine=engine, target=target, watching=watching
        )


def _surveyed(
    step: TrainingStep,
    names: Sequence[str],
    *,
    memory: str | float | None,
    engine: str | Engine,
    target: PlanTarget,
    watching: Watching,
) -> PlanSurvey:
    """Plan for several cards."""
    chosen = engine_for_several(engine)
    answers = on_each_card(
        names,
        memory,
        chosen,
        step,
        lambda card: plan_on(card, step, target, progress=watching.trial),
        progress=watching.stage,
    )
    return PlanSurvey(
        subject=step.name,
        effective_batch_size=target.effective_batch_size,
        world_size=target.world_size,
        answers=tuple(
            PlanAnswer(gpu=gpu, plan=found, reason=reason, source=source_of(chosen))
            for gpu, found, reason in answers
        ),
        source=source_of(chosen),
        remarks=remarks_on(names),
    )

"""`plan` and `survey_plans`: from a target batch size to micro-batches that fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from typing_extensions import Unpack

from memfit.api.cards import Cards, engine_for_several, engine_of, source_of
from memfit.api.probing import on_each_card
from memfit.api.steps import StepKeywords, describe, own_device
from memfit.backends import open_backend
from memfit.errors import UsageError
from memfit.planning import PlanTarget, plan_on
from memfit.records import Engine, Objective, Plan, PlanAnswer, PlanSurvey, Trial
from memfit.step.workload import Workload
from memfit.units import parse_bytes

__all__ = ["plan", "survey_plans"]

_NO_SECONDS = (
    "What is fastest is measured, and a simulation has no seconds: leave the GPU's name out and "
    "plan on the device that is there, or plan for the largest micro-batch."
)


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
    progress: Callable[[Trial], None] | None = None,
    **options: Unpack[StepKeywords],
) -> Plan:
    """Turn an effective batch size into micro-batches that fit, exactly.

    Where one rank's share fits whole, there is one step, and where half of it fits beside the
    gradients, two. Otherwise the largest micro-batch of a step that accumulates is looked for. The
    plan's own micro-batch is among the trials.

    Args:
        subject: A timm model's name, or a `Workload` of the user's own objects.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: Ranks that share them, each on such a device.
        objective: `"largest"` for the fewest steps, `"fastest"` for the most samples per second as
            measured, `"even"` for equal parts only.
        device: As in `probe`.
        gpu: As in `probe`.
        memory: As in `probe`.
        engine: As in `probe`.
        headroom: Share of the capacity to keep free, from 0 to below 1.
        multiple_of: What micro-batches are multiples of, the last of a step excepted.
        max_batch_size: The largest micro-batch of interest.
        progress: Called with each trial when it has ended.
        **options: As in `probe`.

    Returns:
        The plan, to look at or to give to `Accumulator`.

    Raises:
        UsageError: Something asked for cannot be.
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
    if gpu is None:
        backend = open_backend(
            own_device(subject, device), memory_bytes=memory_bytes, headroom=headroom
        )
        return plan_on(backend, step, target, progress=progress)
    if device is not None:
        raise UsageError(f"Give a device ({device}) or a GPU to simulate ({gpu}), not both.")
    if target.objective is Objective.FASTEST:
        raise UsageError(_NO_SECONDS)
    with Cards(engine_of(engine)) as cards:
        return plan_on(cards.open(gpu, memory_bytes, step), step, target, progress=progress)


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
    **options: Unpack[StepKeywords],
) -> PlanSurvey:
    """Plan for several GPUs that are not there.

    They are simulated, from as few traces as can be, unless the engine is `"rehearse"`.

    Args:
        subject: A timm model's name, or a `Workload`, which is not touched.
        effective_batch_size: As in `plan`.
        gpus: Names of the catalogue; by default a short list of common cards.
        world_size: As in `plan`.
        objective: As in `plan`, but for `"fastest"`.
        memory: What each card has, in place of the catalogue's figure.
        engine: As in `probe`; `"auto"` simulates.
        headroom: As in `plan`.
        multiple_of: As in `plan`.
        max_batch_size: As in `plan`.
        **options: As in `probe`; a precision of `"auto"` is each card's own.

    Returns:
        An answer for each card, in the order of `gpus`.

    Raises:
        UsageError: Something asked for cannot be.
        UnsupportedError: The step cannot be traced without values.
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
    chosen = engine_for_several(engine)
    answers = on_each_card(gpus, memory, chosen, step, lambda card: plan_on(card, step, target))
    return PlanSurvey(
        subject=step.name,
        effective_batch_size=target.effective_batch_size,
        world_size=target.world_size,
        answers=tuple(
            PlanAnswer(gpu=gpu, plan=found, reason=reason, source=source_of(chosen))
            for gpu, found, reason in answers
        ),
        source=source_of(chosen),
    )

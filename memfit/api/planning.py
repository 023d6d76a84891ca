"""`plan` and `survey_plans`: from a target batch size to micro-batches that fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import overload

from typing_extensions import Unpack

from memfit import partition
from memfit.api.asking import Asked, SearchKeywords
from memfit.api.cards import Cards
from memfit.api.progress import StageProgress, TrialProgress, Watching, watched
from memfit.api.steps import Subject, check_accumulates, chooses_blocks
from memfit.backends import Backend
from memfit.cards import find_gpu
from memfit.errors import UsageError
from memfit.planning import PlanTarget, plan_on, remarks_on
from memfit.planning import plan_together as together
from memfit.records import Objective, Parallel, Plan, PlanAnswer, PlanSurvey, Precision
from memfit.rehearsal.engines import engine_of

__all__ = ["plan", "plan_together", "survey_plans"]

_FEWEST_RANKS = 2
_NO_SECONDS = (
    "The fastest plan has to be measured, and a card that is not here has "
    "no real seconds. Plan on a device that is here (without a GPU's "
    "name), or plan for the largest micro-batch."
)


class PlanKeywords(SearchKeywords, total=False):
    """The options of `plan` other than the device; they give its overloads their types.

    Args:
        world_size: As in `plan`.
        parallel: As in `plan`.
        objective: As in `plan`.
        progress: As in `plan`.
    """

    world_size: int
    parallel: str | Parallel | None
    objective: str | Objective
    progress: TrialProgress


@overload
def plan(
    subject: Subject,
    effective_batch_size: int,
    *,
    device: str,
    gpu: None = None,
    **options: Unpack[PlanKeywords],
) -> Plan: ...


@overload
def plan(
    subject: Subject,
    effective_batch_size: int,
    *,
    device: None = None,
    gpu: str,
    **options: Unpack[PlanKeywords],
) -> Plan: ...


@overload
def plan(
    subject: Subject,
    effective_batch_size: int,
    *,
    device: str | None = None,
    gpu: str | None = None,
    **options: Unpack[PlanKeywords],
) -> Plan | PlanSurvey: ...


def plan(
    subject: Subject,
    effective_batch_size: int,
    *,
    world_size: int = 1,
    parallel: str | Parallel | None = None,
    objective: str | Objective = Objective.LARGEST,
    device: str | None = None,
    gpu: str | None = None,
    progress: TrialProgress = "bar",
    **options: Unpack[SearchKeywords],
) -> Plan | PlanSurvey:
    """Turn an effective batch size into micro-batches that fit and add up to it exactly.

    If one rank's whole share fits, the plan has one accumulation step. If half of the share fits in
    a step that accumulates, the plan has two. Otherwise the largest micro-batch that fits is
    searched. The plan's own micro-batch is always one of those that were tried.

    Args:
        subject: A timm model's name, a `Workload` of the user's own objects, a fastai `Learner`, a
            `LightningModule`, or a transformers `Trainer`.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: The number of ranks that share these samples, each on a device of this kind.
        parallel: How the ranks share the model, as in `probe`. Default: if there are several ranks,
            `"ddp"` on a card that is rehearsed. Elsewhere trials are of a process alone, and a
            remark says what is not counted.
        objective: `"largest"` for the fewest steps, `"fastest"` for the most samples per second as
            measured, `"even"` for equal parts only.
        device: As in `probe`.
        gpu: As in `probe`.
        progress: As in `probe`.
        **options: The search and the step, as in `probe`. `headroom` is kept free by every trial of
            the plan. Every micro-batch except the last of a step is a multiple of `multiple_of`.
            `max_batch_size` is the largest micro-batch to consider.

    Returns:
        The plan, which `Accumulator` can carry out. On a machine without a GPU, without `device`,
        `gpu` and `memory`: a `PlanSurvey` with a plan for each of the common cards.

    Raises:
        UsageError: An argument is not valid.
        DoesNotFitError: Not even the smallest micro-batch fits with the headroom.
        UnsupportedError: This system cannot run such a trial.
    """
    asked, target = _asked(
        subject,
        effective_batch_size,
        world_size=world_size,
        parallel=parallel,
        objective=objective,
        **options,
    )
    instead = asked.cards_instead(device, gpu)
    if (gpu is not None or instead) and target.objective is Objective.FASTEST:
        raise UsageError(_NO_SECONDS)
    with watched(f"planning for {asked.step.name}", trials=progress) as watching:
        if len(instead) > 1:
            return _surveyed(asked, instead, target, watching)
        return asked.on_one(
            _planning(asked, target, watching), device=device, gpu=instead[0] if instead else gpu
        )


def survey_plans(
    subject: Subject,
    effective_batch_size: int,
    *,
    gpus: Sequence[str] | None = None,
    world_size: int = 1,
    parallel: str | Parallel | None = None,
    objective: str | Objective = Objective.LARGEST,
    progress: StageProgress = "bar",
    **options: Unpack[SearchKeywords],
) -> PlanSurvey:
    """Plan for several GPUs that are not in this machine.

    They are simulated from as few traces as possible, unless the engine is `"rehearse"`.

    Args:
        subject: As in `plan`; it is not changed.
        effective_batch_size: As in `plan`.
        gpus: As in `survey`.
        world_size: As in `plan`.
        parallel: As in `plan`. If given, engine `"auto"` rehearses each card.
        objective: As in `plan`, without `"fastest"`.
        progress: As in `survey`.
        **options: As in `survey` and `plan`.

    Returns:
        An answer for each card, in the order of `gpus`.

    Raises:
        UsageError: An argument is not valid.
        UnsupportedError: The step cannot be traced, because it needs real values.
    """
    asked, target = _asked(
        subject,
        effective_batch_size,
        world_size=world_size,
        parallel=parallel,
        objective=objective,
        **options,
    )
    if target.objective is Objective.FASTEST:
        raise UsageError(_NO_SECONDS)
    with watched(f"planning for {asked.step.name}", stages=progress) as watching:
        return _surveyed(asked, asked.cards_named(gpus), target, watching)


def plan_together(
    subject: Subject,
    effective_batch_size: int,
    *,
    gpus: Sequence[str],
    parallel: str | Parallel | None = None,
    progress: TrialProgress = "bar",
    **options: Unpack[SearchKeywords],
) -> Plan:
    """Plan for ranks that have different cards: each takes the share that its card has room for.

    All ranks need the same number of micro-batches, or one fewer. `Accumulator` carries the plan
    out: it weights every sample alike, so gradients are those of the whole effective batch.

    Args:
        subject: As in `plan`; it is not changed.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        gpus: The card of each rank, in the order of the ranks.
        parallel: As in `plan`.
        progress: As in `probe`.
        **options: As in `plan`. `memory` is the memory of each card. With precision `"auto"`, all
            ranks use mixed precision of the type that every card has.

    Returns:
        The plan; `ranks` has the part of each rank, and `share_of(rank)` its samples.

    Raises:
        UsageError: An argument is not valid.
        DoesNotFitError: Not even the smallest micro-batch fits one of the cards.
        UnsupportedError: This system cannot run such a trial.
    """
    if isinstance(gpus, str) or len(gpus) < _FEWEST_RANKS:
        raise UsageError(f"gpus takes the card of each rank, at least two, not {gpus!r}.")
    asked, target = _asked(
        subject,
        effective_batch_size,
        world_size=len(gpus),
        parallel=parallel,
        objective=Objective.LARGEST,
        **options,
    )
    cards = {name: find_gpu(name, total_bytes=asked.memory_bytes) for name in gpus}
    step = asked.step
    if step.options.precision is Precision.AUTO:
        has_bf16 = all(card.has_bf16 for card in cards.values())
        chosen = Precision.AMP_BF16 if has_bf16 else Precision.AMP_FP16
        step = dataclasses.replace(
            step, options=dataclasses.replace(step.options, precision=chosen)
        )
    with (
        watched(f"planning for {step.name}", trials=progress) as watching,
        Cards(engine_of(asked.engine)) as opened,
    ):
        return together(
            gpus,
            lambda gpu: opened.open(gpu, asked.memory_bytes, step),
            step,
            target,
            progress=watching.trial,
        )


def _asked(
    subject: Subject,
    effective_batch_size: int,
    *,
    world_size: int,
    parallel: str | Parallel | None,
    objective: str | Objective,
    **options: Unpack[SearchKeywords],
) -> tuple[Asked, PlanTarget]:
    """Check the arguments of a plan."""
    share = partition.share_of(*partition.check_target(effective_batch_size, world_size))
    chooses = chooses_blocks(options)
    if chooses:
        del options["checkpoint"]
        if parallel is not None:
            raise UsageError(
                "checkpoint 'auto' chooses by a simulation, which has no ranks: leave parallel "
                "out, or name the blocks."
            )
    asked = Asked.of(
        subject,
        samples_per_step=share,
        parallel=parallel,
        # Without `parallel`, the backend decides whether trials are one rank of many.
        world_size=1 if parallel is None else world_size,
        **options,
    )
    check_accumulates(asked.step, "A plan")
    target = PlanTarget.of(
        effective_batch_size,
        asked.search,
        world_size=world_size,
        objective=objective,
        chooses_blocks=chooses,
    )
    return asked, target


def _planning(asked: Asked, target: PlanTarget, watching: Watching) -> Callable[[Backend], Plan]:
    return lambda card: plan_on(card, asked.step, target, progress=watching.trial)


def _surveyed(
    asked: Asked, gpus: Sequence[str], target: PlanTarget, watching: Watching
) -> PlanSurvey:
    """Plan for several cards."""
    source = asked.source_for_several
    answers = asked.on_each(gpus, _planning(asked, target, watching), progress=watching.stage)
    return PlanSurvey(
        subject=asked.step.name,
        effective_batch_size=target.effective_batch_size,
        world_size=target.world_size,
        answers=tuple(
            PlanAnswer(gpu=answer.gpu, plan=answer.found, reason=answer.reason, source=source)
            for answer in answers
        ),
        source=source,
        remarks=(*asked.remarks_on(gpus), *remarks_on(asked.step, target)),
    )

"""`memfit plan --emit`: a plan as lines for a trainer, and what is refused before any search."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memfit.errors import UsageError
from memfit.records import (
    Capacity,
    Objective,
    Plan,
    Precision,
    RankPart,
    Source,
    StepOptions,
)

if TYPE_CHECKING:
    from memfit.cli.subjects import Subject

__all__ = ["emitted", "refuse_unwritable"]


def emitted(plan: Plan, trainer: str) -> str:
    """Return a plan as lines for a trainer.

    Raises:
        UsageError: The trainer cannot carry the plan out.
    """
    from memfit.integrations import lines_for

    return lines_for(_built(plan, trainer), trainer)


def refuse_unwritable(
    subject: Subject,
    effective_batch_size: int,
    *,
    trainer: str | None,
    device: str | None,
    cards_together: Sequence[str],
    world_size: int,
    options: Mapping[str, Any],
) -> None:
    """Refuse what a trainer cannot carry out, whatever micro-batches are found.

    A plan with a single micro-batch is written for the trainer. What it refuses then, it refuses
    for every plan.

    Args:
        subject: What is trained.
        effective_batch_size: Samples in each optimizer step.
        trainer: The trainer's name; `None` if nothing is written.
        device: The device of this machine, if one was named.
        cards_together: The cards of ranks that train together; empty if all have the same card.
        world_size: The number of ranks.
        options: The options of the step, as the user gave them.

    Raises:
        UsageError: The trainer cannot carry it out.
    """
    if trainer is None:
        return
    from memfit.api.steps import describe

    named = tuple(block for block in options["checkpoint"] if block != "auto")
    step = describe(subject, **{**options, "checkpoint": named})
    num_ranks = len(cards_together) or world_size
    share = effective_batch_size // max(1, num_ranks)
    if share < 1:
        return  # The planner has a sentence on this.
    device_name = device or "GPU"
    precision = step.options.precision
    if precision is Precision.AUTO:
        precision = Precision.FP32 if device_name.startswith("cpu") else Precision.AMP_BF16
    plan = _plan_of_one(
        step.name,
        device_name,
        dataclasses.replace(step.options, precision=precision),
        share=share,
        effective_batch_size=effective_batch_size,
        num_ranks=num_ranks,
    )
    if cards_together:
        plan = dataclasses.replace(plan, ranks=tuple(_part(plan, card) for card in cards_together))
    emitted(plan, trainer)


def _plan_of_one(
    subject: str,
    device: str,
    options: StepOptions,
    *,
    share: int,
    effective_batch_size: int,
    num_ranks: int,
) -> Plan:
    return Plan(
        subject=subject,
        device=device,
        source=Source.SIMULATED,
        options=options,
        capacity=Capacity(usable_bytes=0, total_bytes=0, origin=""),
        effective_batch_size=effective_batch_size,
        world_size=num_ranks,
        objective=Objective.LARGEST,
        micro_batch_sizes=(share,),
        multiple_of=1,
        headroom=0.0,
        max_micro_batch_size=share,
        edge_found=False,
        recommended_micro_batch_size=share,
        peak_reserved_bytes=None,
        samples_per_second=None,
        trials=(),
        seconds=0.0,
        torch_version="",
    )


def _part(plan: Plan, card: str) -> RankPart:
    return RankPart(
        device=card,
        source=plan.source,
        capacity=plan.capacity,
        micro_batch_sizes=plan.micro_batch_sizes,
        recommended_micro_batch_size=plan.recommended_micro_batch_size,
        peak_reserved_bytes=None,
        trials=(),
    )


def _built(plan: Plan, trainer: str) -> Plan:
    """Return the plan with all that a model's image size changes, for a model of timm.

    Raises:
        UsageError: The lines are for timm's own trainer, and the model is not timm's.
    """
    from memfit.step.timm_models import as_built, import_timm

    if not import_timm().is_model(plan.subject.partition(".")[0]):
        if trainer == "timm":
            raise UsageError(
                f"timm's train.py trains timm's models by their names, and {plan.subject} is not "
                "one of them: emit pytorch."
            )
        return plan
    return dataclasses.replace(plan, options=as_built(plan.subject, plan.options))

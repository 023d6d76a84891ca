"""A plan for trainers that take one micro-batch size and one number of steps.

They take equal parts only. So uneven plans are cut again into equal parts that are not much
smaller, and a comment says so. If there are no such parts, the plan is refused.
"""

from __future__ import annotations

import dataclasses
import textwrap

from memfit.errors import UsageError
from memfit.partition import equal_part
from memfit.records import Plan
from memfit.units import format_parts

__all__ = ["EqualParts", "comment", "equal_parts", "headline", "refuse_other_ranks"]

_WIDTH = 96
# Equal parts are at least the plan's micro-batch divided by this number.
_LEAST_SHARE = 2


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EqualParts:
    """The numbers for a trainer.

    Args:
        micro_batch_size: Samples in each micro-batch of each rank.
        accumulation_steps: Micro-batches in each optimizer step.
        comments: Comments to print with the numbers, in sentences.
    """

    micro_batch_size: int
    accumulation_steps: int
    comments: tuple[str, ...]

    @property
    def samples_per_rank(self) -> int:
        """Samples in each optimizer step of each rank."""
        return self.micro_batch_size * self.accumulation_steps


def equal_parts(plan: Plan, trainer: str) -> EqualParts:
    """Return equal parts for a trainer.

    Args:
        plan: The plan, of any parts.
        trainer: The trainer's name in errors and comments.

    Raises:
        UsageError: There are no equal parts near the plan's own.
    """
    if plan.ranks:
        raise UsageError(
            f"{trainer} gives each rank the same number of samples, and the cards of this plan "
            "take different ones: emit pytorch, or plan for equal ranks (world_size)."
        )
    if plan.is_even:
        return EqualParts(
            micro_batch_size=plan.micro_batch_size,
            accumulation_steps=plan.accumulation_steps,
            comments=(),
        )
    total, ranks = plan.effective_batch_size, plan.world_size
    if total % ranks:
        below = total // ranks * ranks
        raise UsageError(
            f"{trainer} gives each rank the same number of samples, and {total} "
            f"samples cannot be shared equally by {ranks} ranks. Plan for {below} "
            f"or {below + ranks}, or emit pytorch."
        )
    share = total // ranks
    part = equal_part(share, plan.micro_batch_size, multiple_of=plan.multiple_of)
    if part is None or part * _LEAST_SHARE < plan.micro_batch_size:
        steps = plan.accumulation_steps
        near = share // steps // plan.multiple_of * plan.multiple_of * steps * ranks
        instead = f"plan for {near}, or emit pytorch" if near else "emit pytorch"
        raise UsageError(
            f"{trainer} takes equal parts only, and {share} samples have no equal "
            f"parts near {plan.micro_batch_size}: {instead}."
        )
    planned = format_parts(plan.micro_batch_sizes)
    instead = f"{share // part} x {part} in place of the plan's {planned}"
    return EqualParts(
        micro_batch_size=part,
        accumulation_steps=share // part,
        comments=(f"{trainer} takes equal parts only: {instead}.",),
    )


def headline(plan: Plan, parts: EqualParts) -> str:
    """Return a comment with the effective batch of the numbers, and their source."""
    ranks = f" x {plan.world_size} ranks" if plan.world_size > 1 else ""
    return (
        f"{plan.effective_batch_size} = {parts.accumulation_steps} x {parts.micro_batch_size}"
        f"{ranks}, {plan.source.value} for {plan.device} in {plan.options.precision.value}."
    )


def comment(*sentences: str) -> str:
    """Return sentences as comments for Python and for a shell."""
    return "\n".join(
        line
        for sentence in sentences
        for line in textwrap.wrap(sentence, _WIDTH, initial_indent="# ", subsequent_indent="# ")
    )


def refuse_other_ranks(plan: Plan, ranks: int) -> None:
    """Refuse a trainer whose number of processes is not the plan's.

    Raises:
        UsageError: It is not, or the ranks have different cards.
    """
    if plan.ranks:
        raise UsageError(
            "The cards of this plan take different shares, and the Trainer gives each rank the "
            "same: use memfit.Accumulator, or plan for equal ranks (world_size)."
        )
    if ranks != plan.world_size:
        raise UsageError(
            f"The plan is for {plan.world_size} ranks, and the Trainer has {ranks}: plan with "
            f"world_size={ranks}."
        )

"""Plans: how an effective batch is cut into micro-batches, and what else would fit."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, ClassVar

from memfit.records.base import SCHEMA_VERSION, Record, Source, no_such_answer
from memfit.records.steps import StepOptions
from memfit.records.trials import Capacity, Trial

__all__ = ["Alternative", "Exploration", "Objective", "Plan", "PlanAnswer", "PlanSurvey"]


class Objective(str, enum.Enum):
    """What a plan aims at.

    `LARGEST`: the fewest accumulation steps. `FASTEST`: the most samples per second, as measured.
    `EVEN`: equal parts only, and of those the largest.
    """

    LARGEST = "largest"
    FASTEST = "fastest"
    EVEN = "even"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Record):
    """How one optimizer step over an effective batch is made of micro-batches.

    `memfit.Accumulator` carries it out, and `memfit.micro_batches` splits a batch by it.

    Args:
        subject: The model's name.
        device: The device's name.
        source: Measured on the device, or simulated.
        options: The training step, its precision chosen; `accumulate` says whether it accumulates.
        capacity: What the step may use, and who said so.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: Ranks that share them.
        objective: What the plan aims at.
        micro_batch_sizes: The first rank's micro-batches of one optimizer step, in samples. Where
            ranks do not share equally, the first ones take one sample more than the others.
        multiple_of: What micro-batches are multiples of, one of a step excepted.
        smallest_micro_batch_size: No micro-batch has fewer samples, where that can be.
        headroom: The share of the capacity that is kept free.
        max_micro_batch_size: The largest micro-batch of such a step that fits: the edge.
        edge_found: One sample more ran out; otherwise no more was asked for.
        recommended_micro_batch_size: The largest that keeps the headroom: the plan's limit.
        peak_reserved_bytes: Peak of the plan's own micro-batch, which was tried; `None` where it is
            not known.
        samples_per_second: What one rank trains, from measured trials; `None` where none was.
        trials: Every trial, in the order they ran.
        environment: What the trials ran with that training has to be given, as NAME=value.
        remarks: What there is to say about the parts, in sentences.
        exploration: What single changes of the step would make fit, where that was asked for.
        seconds: Wall time of the planning.
        torch_version: The torch that ran.
    """

    subject: str
    device: str
    source: Source
    options: StepOptions
    capacity: Capacity
    effective_batch_size: int
    world_size: int
    objective: Objective
    micro_batch_sizes: tuple[int, ...]
    multiple_of: int
    smallest_micro_batch_size: int = 2
    headroom: float
    max_micro_batch_size: int
    edge_found: bool
    recommended_micro_batch_size: int
    peak_reserved_bytes: int | None
    samples_per_second: float | None
    trials: tuple[Trial, ...]
    environment: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    exploration: Exploration | None = None
    seconds: float
    torch_version: str

    _derived: ClassVar[tuple[str, ...]] = (
        "micro_batch_size",
        "accumulation_steps",
        "is_even",
        "proved",
    )

    @property
    def proved(self) -> bool:
        """Whether the edge was seen: found, and by steps that ran rather than by a simulation."""
        return self.edge_found and self.source is not Source.SIMULATED

    @property
    def micro_batch_size(self) -> int:
        """Samples in the largest micro-batch."""
        return self.micro_batch_sizes[0]

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches in each optimizer step of the first rank."""
        return len(self.micro_batch_sizes)

    @property
    def is_even(self) -> bool:
        """Whether every micro-batch of every rank has the same size."""
        return self.micro_batch_sizes == (self.micro_batch_size,) * self.accumulation_steps and (
            self.effective_batch_size % self.world_size == 0
        )

    def share_of(self, rank: int) -> int:
        """Return the samples of one optimizer step that a rank takes.

        Args:
            rank: From 0 to below `world_size`.
        """
        share, rest = divmod(self.effective_batch_size, self.world_size)
        return share + (rank < rest)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanAnswer(Record):
    """What a GPU that is not there makes of an effective batch.

    Args:
        gpu: The card's name.
        plan: The plan; `None` where not even one sample fits.
        reason: Why there is no plan.
        source: Simulated or rehearsed.
    """

    gpu: str
    plan: Plan | None
    reason: str | None = None
    source: Source = Source.SIMULATED

    def to_dict(self) -> dict[str, Any]:
        """Return the plan, or what can be said of a card without one under the same keys."""
        if self.plan is not None:
            return self.plan.to_dict()
        return {
            "schema_version": SCHEMA_VERSION,
            "device": self.gpu,
            "source": self.source.value,
            "micro_batch_sizes": [],
            "micro_batch_size": None,
            "accumulation_steps": None,
            "reason": self.reason,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanSurvey(Record):
    """One effective batch on several GPUs that are not there.

    Args:
        subject: The model's name.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: Ranks that share them.
        answers: One for each card.
        source: Simulated or rehearsed.
        remarks: What there is to say about the choice of cards, in sentences.
    """

    subject: str
    effective_batch_size: int
    world_size: int
    answers: tuple[PlanAnswer, ...]
    source: Source = Source.SIMULATED
    remarks: tuple[str, ...] = ()

    if not TYPE_CHECKING:

        def __getattr__(self, name):  # noqa: ANN001, ANN204 - hidden from the types
            raise AttributeError(no_such_answer("PlanSurvey", name))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Alternative(Record):
    """A training step that differs in one thing, simulated.

    Args:
        change: What differs, in a few words; empty for the step as it is.
        costs: What the change costs, in a few words.
        options: The step's options.
        micro_batch_sizes: The first rank's micro-batches of one optimizer step; empty where not
            even one sample fits.
        recommended_micro_batch_size: The largest micro-batch that keeps the headroom; `None` where
            none fits.
        edge_found: Larger ones were looked for; otherwise no more was asked for.
        peak_reserved_bytes: Peak of the largest of the parts; `None` where none fits.
        reason: Why there are none.
    """

    change: str
    costs: str
    options: StepOptions
    micro_batch_sizes: tuple[int, ...] = ()
    recommended_micro_batch_size: int | None = None
    edge_found: bool = False
    peak_reserved_bytes: int | None = None
    reason: str | None = None

    _derived: ClassVar[tuple[str, ...]] = ("micro_batch_size", "accumulation_steps")

    @property
    def micro_batch_size(self) -> int | None:
        """Samples in the largest micro-batch; `None` where not even one fits."""
        return self.micro_batch_sizes[0] if self.micro_batch_sizes else None

    @property
    def accumulation_steps(self) -> int | None:
        """Micro-batches in each optimizer step; `None` where not even one sample fits."""
        return len(self.micro_batch_sizes) or None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exploration(Record):
    """What single changes of a training step would make fit.

    Args:
        subject: The model's name.
        device: The card's name.
        capacity: What the step may use.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: Ranks that share them.
        baseline: The step as it is.
        alternatives: The step with one change each, what changes training least first.
        source: Always simulated.
    """

    subject: str
    device: str
    capacity: Capacity
    effective_batch_size: int
    world_size: int
    baseline: Alternative
    alternatives: tuple[Alternative, ...]
    source: Source = Source.SIMULATED

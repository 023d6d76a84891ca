"""Plans: how an effective batch is cut into micro-batches, and what else would fit."""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Any, ClassVar

from memfit.records.base import SCHEMA_VERSION, Record, Source, no_such_answer
from memfit.records.steps import StepOptions
from memfit.records.trials import Capacity, Trial

__all__ = [
    "Alternative",
    "Exploration",
    "MicroBatched",
    "Objective",
    "Plan",
    "PlanAnswer",
    "PlanSurvey",
    "RankPart",
    "Recomputation",
]


class Objective(str, enum.Enum):
    """The aim of a plan.

    `LARGEST`: the fewest accumulation steps. `FASTEST`: the most samples per second, as measured.
    `EVEN`: the largest parts that are all equal.
    """

    LARGEST = "largest"
    FASTEST = "fastest"
    EVEN = "even"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recomputation(Record):
    """Which blocks of a model are computed again in backward, chosen so that a plan fits.

    Args:
        blocks: The names of the blocks.
        num_blocks: How many blocks the model has.
        forward_share: The operations that are done again, as a share of those of forward.
        forward_share_of_all: The same if every block were recomputed.
    """

    blocks: tuple[str, ...]
    num_blocks: int
    forward_share: float
    forward_share_of_all: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RankPart(Record):
    """One rank's part of a plan whose ranks have different cards.

    Args:
        device: The card's name.
        source: Rehearsed or simulated.
        capacity: The bytes that the step may use on this card.
        micro_batch_sizes: The rank's micro-batches of one optimizer step, in samples.
        recommended_micro_batch_size: The largest that keeps the headroom on this card.
        peak_reserved_bytes: The highest peak of the rank's own micro-batches, which were tried.
        trials: Every trial on this card.
    """

    device: str
    source: Source
    capacity: Capacity
    micro_batch_sizes: tuple[int, ...]
    recommended_micro_batch_size: int
    peak_reserved_bytes: int | None
    trials: tuple[Trial, ...]

    _derived: ClassVar[tuple[str, ...]] = ("share",)

    @property
    def share(self) -> int:
        """Samples of the rank in each optimizer step."""
        return sum(self.micro_batch_sizes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Record):
    """How one optimizer step over an effective batch is cut into micro-batches.

    `memfit.Accumulator` carries it out, and `memfit.micro_batches` splits a batch by it.

    Args:
        subject: The model's name.
        device: The device's name.
        source: Measured on the device, or simulated.
        options: The training step, with its precision chosen; `accumulate` says whether it
            accumulates.
        capacity: The bytes that the step may use, and where that figure comes from.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: The number of ranks that share these samples.
        objective: The aim of the plan.
        micro_batch_sizes: The first rank's micro-batches of one optimizer step, in samples. If the
            samples cannot be shared equally, the first ranks take one sample more than the others.
        multiple_of: Every micro-batch except one of a step is a multiple of this.
        smallest_micro_batch_size: No micro-batch has fewer samples, if that is possible.
        headroom: The share of the capacity that is kept free.
        max_micro_batch_size: The largest micro-batch of such a step that fits: the edge.
        edge_found: True: one sample more ran out of memory. False: larger sizes were not tried.
        recommended_micro_batch_size: The largest that keeps the headroom: the plan's limit.
        peak_reserved_bytes: The highest peak of the rank's own micro-batches, each of which was
            tried; `None` if it is not known.
        samples_per_second: The speed of one rank, from measured trials; `None` without them.
        trials: Every trial, in the order in which they ran.
        environment: Environment variables of the trials that training needs too, as NAME=value.
        remarks: Remarks about the micro-batches, in sentences.
        exploration: What would fit after single changes of the step, if that was asked for.
        recomputation: The blocks that were chosen to be recomputed, if that was asked for and
            is needed.
        ranks: Each rank's part, if the ranks have different cards. Then the fields above are the
            first rank's, and `device` names all cards. Empty if all ranks have the same card.
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
    recomputation: Recomputation | None = None
    ranks: tuple[RankPart, ...] = ()
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
        """Whether the edge was found by steps that really ran, not by a simulation."""
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
        if any(part.micro_batch_sizes != self.micro_batch_sizes for part in self.ranks):
            return False
        return self.micro_batch_sizes == (self.micro_batch_size,) * self.accumulation_steps and (
            self.effective_batch_size % self.world_size == 0
        )

    def share_of(self, rank: int) -> int:
        """Return the samples of one optimizer step that a rank takes.

        Args:
            rank: From 0 to below `world_size`.
        """
        if self.ranks:
            return self.ranks[rank].share
        share, rest = divmod(self.effective_batch_size, self.world_size)
        return share + (rank < rest)

    def micro_batch_size_of(self, rank: int) -> int:
        """Return the samples in the largest micro-batch of a rank.

        Args:
            rank: From 0 to below `world_size`.
        """
        return self.ranks[rank].micro_batch_sizes[0] if self.ranks else self.micro_batch_size


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PlanAnswer(Record):
    """The plan for an effective batch on a GPU that is not in the machine.

    Args:
        gpu: The card's name.
        plan: The plan; `None` if not even one sample fits.
        reason: Why there is no plan.
        source: Simulated or rehearsed.
    """

    gpu: str
    plan: Plan | None
    reason: str | None = None
    source: Source = Source.SIMULATED

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a dictionary; without a plan, the known facts under the same keys."""
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
    """One effective batch on several GPUs that are not in the machine.

    Args:
        subject: The model's name.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: The number of ranks that share these samples.
        answers: One for each card.
        source: Simulated or rehearsed.
        remarks: Remarks about the choice of cards, in sentences.
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


class MicroBatched(Record):
    """A record of micro-batches that may be none."""

    __slots__ = ()

    micro_batch_sizes: tuple[int, ...]

    _derived: ClassVar[tuple[str, ...]] = ("micro_batch_size", "accumulation_steps")

    @property
    def micro_batch_size(self) -> int | None:
        """Samples in the largest micro-batch; `None` if not even one sample fits."""
        return self.micro_batch_sizes[0] if self.micro_batch_sizes else None

    @property
    def accumulation_steps(self) -> int | None:
        """Micro-batches in each optimizer step; `None` if not even one sample fits."""
        return len(self.micro_batch_sizes) or None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Alternative(MicroBatched):
    """A training step that differs in one thing, simulated.

    Args:
        change: What differs, in a few words; empty for the unchanged step.
        costs: What the change costs, in a few words.
        options: The step's options.
        micro_batch_sizes: The first rank's micro-batches of one optimizer step; empty if not even
            one sample fits.
        recommended_micro_batch_size: The largest micro-batch that keeps the headroom; `None` if
            none fits.
        edge_found: True: larger sizes were tried too. False: larger sizes were not tried.
        peak_reserved_bytes: Peak of the largest micro-batch; `None` if none fits.
        reason: Why there are no micro-batches.
    """

    change: str
    costs: str
    options: StepOptions
    micro_batch_sizes: tuple[int, ...] = ()
    recommended_micro_batch_size: int | None = None
    edge_found: bool = False
    peak_reserved_bytes: int | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Exploration(Record):
    """What would fit after single changes of a training step.

    Args:
        subject: The model's name.
        device: The card's name.
        capacity: The bytes that the step may use.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: The number of ranks that share these samples.
        baseline: The unchanged step.
        alternatives: The step with one change each. The changes that affect training least come
            first.
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

    @property
    def gains(self) -> tuple[Alternative, ...]:
        """The alternatives with which more fits than with the unchanged step.

        If the unchanged step fits whole, these are the alternatives that need fewer bytes for it.
        """
        return tuple(each for each in self.alternatives if self._is_gain(each))

    @property
    def others(self) -> tuple[Alternative, ...]:
        """The alternatives with which no more fits, or which the model cannot have."""
        return tuple(each for each in self.alternatives if not self._is_gain(each))

    def _is_gain(self, alternative: Alternative) -> bool:
        now, then = self.baseline, alternative
        if not (now.micro_batch_sizes and then.micro_batch_sizes):
            return bool(then.micro_batch_sizes)
        before = now.recommended_micro_batch_size or 0, not now.edge_found
        after = then.recommended_micro_batch_size or 0, not then.edge_found
        if after != before or now.edge_found:
            return after > before
        return (then.peak_reserved_bytes or 0) < (now.peak_reserved_bytes or 0)

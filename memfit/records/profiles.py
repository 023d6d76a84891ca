"""What holds the memory of a training step: at its peak, and moment by moment."""

from __future__ import annotations

import dataclasses
import enum
from typing import ClassVar

from memfit.records.base import Record, Source
from memfit.records.steps import StepOptions
from memfit.records.trials import Capacity, Outcome

__all__ = [
    "CardLine",
    "Change",
    "MemoryBlock",
    "MemoryProfile",
    "ModuleShare",
    "Peak",
    "Phase",
    "RecordedStep",
    "Role",
    "RoleShare",
    "Timeline",
]


class Role(str, enum.Enum):
    """What memory is for.

    The first nine are of tensors and kernels. `SLACK` is what blocks hold beyond what was asked
    for, `FRAGMENTATION` what the allocator reserved and nobody holds, `CONTEXT` what a process
    takes of the device beside the allocator.
    """

    PARAMETERS = "parameters"
    BUFFERS = "buffers"
    GRADIENTS = "gradients"
    OPTIMIZER_STATE = "optimizer_state"
    ACTIVATIONS = "activations"
    AUTOCAST_COPIES = "autocast_copies"
    INPUTS = "inputs"
    TEMPORARIES = "temporaries"
    WORKSPACES = "workspaces"
    SLACK = "slack"
    FRAGMENTATION = "fragmentation"
    CONTEXT = "context"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBlock(Record):
    """One allocation of the step, or one that was there before it.

    Args:
        role: What it is for.
        module: Path of the module that it belongs to, such as `layer1.0.conv2`; in parentheses
            where it belongs to none, such as `(optimizer)`.
        operation: What allocated it, such as `aten.convolution.default`.
        source_line: The innermost line outside torch that led to it, as `file:line`; `None` where
            there is none.
        requested_bytes: What was asked for.
        held_bytes: What the allocator handed out, rounding and unsplit rests included.
        born: The moment it was allocated; `None` where it was there before.
        died: The moment it was freed; `None` where it outlived the step.
        bytes_per_sample: What `requested_bytes` grows by with every further sample; `None` where
            it is not known.
    """

    role: Role
    module: str
    operation: str
    source_line: str | None
    requested_bytes: int
    held_bytes: int
    born: int | None = None
    died: int | None = None
    bytes_per_sample: float | None = None

    def lives_at(self, moment: int) -> bool:
        """Whether it holds memory just after an event of the timeline."""
        return (self.born is None or self.born <= moment) and (
            self.died is None or self.died > moment
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Phase(Record):
    """A stretch of the step.

    Args:
        name: `forward`, `backward` or `optimizer`.
        begin: Its first moment; it lasts until the next one begins.
        micro_batch: Which micro-batch it is of, from 0; `None` for the optimizer.
    """

    name: str
    begin: int
    micro_batch: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timeline(Record):
    """Bytes over one step. A moment is an index: what holds just after that event.

    Args:
        allocated_bytes: Handed out to tensors and kernels, for every moment.
        reserved_bytes: Taken from the device, for every moment.
        phases: What the step was doing, in order.
    """

    allocated_bytes: tuple[int, ...]
    reserved_bytes: tuple[int, ...]
    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        """Refuse series that do not belong together."""
        if len(self.allocated_bytes) != len(self.reserved_bytes):
            raise ValueError(
                f"{len(self.allocated_bytes)} moments of allocated bytes and "
                f"{len(self.reserved_bytes)} of reserved ones"
            )

    def phase_at(self, moment: int) -> Phase | None:
        """Return what the step was doing at a moment; `None` before the first phase."""
        begun = [phase for phase in self.phases if phase.begin <= moment]
        return begun[-1] if begun else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoleShare(Record):
    """What one role holds at the peak.

    Args:
        role: The role.
        num_bytes: How much.
        bytes_per_sample: How much of it every sample of the micro-batch brings; `None` where that
            is not known or not proportional.
    """

    role: Role
    num_bytes: int
    bytes_per_sample: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModuleShare(Record):
    """What one module itself, without those inside it, holds at the peak.

    Args:
        module: Its path; in parentheses for what belongs to no module.
        role: What it holds it for.
        num_bytes: How much.
    """

    module: str
    role: Role
    num_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peak(Record):
    """The moment that decides what the step needs.

    It is the moment with the most allocated bytes among those with the most reserved bytes.

    Args:
        moment: Index into the timeline.
        phase: What the step was doing; `None` where it is not known.
        reserved_bytes: What the allocator had taken from the device.
        allocated_bytes: What it had handed out.
        context_bytes: What the process takes beside it; 0 where that is not part of the figures.
        roles: What the total is for, every role with bytes once; they sum to it.
        modules: The same by module and role; they sum to it too.
    """

    moment: int
    phase: str | None
    reserved_bytes: int
    allocated_bytes: int
    context_bytes: int
    roles: tuple[RoleShare, ...]
    modules: tuple[ModuleShare, ...]

    _derived: ClassVar[tuple[str, ...]] = ("total_bytes",)

    def __post_init__(self) -> None:
        """Refuse shares that do not sum to the total."""
        for shares in (self.roles, self.modules):
            held = sum(share.num_bytes for share in shares)
            if held != self.total_bytes:
                raise ValueError(f"shares of {held} bytes do not sum to {self.total_bytes}")

    @property
    def total_bytes(self) -> int:
        """What the device sees: reserved bytes and the context."""
        return self.reserved_bytes + self.context_bytes

    def bytes_of(self, role: Role) -> int:
        """Return what a role holds."""
        return sum(share.num_bytes for share in self.roles if share.role is role)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep(Record):
    """One step of a script of which only the allocations were recorded.

    Args:
        subject: The script's command.
        number: Which optimizer step; 0 where the script takes none.
        num_micro_batches: How often forward began in it.
        timeline: Bytes over the step.
        peak: The moment that decides.
        blocks: Every allocation of the timeline, those that were there before it first.
    """

    subject: str
    number: int
    num_micro_batches: int
    timeline: Timeline
    peak: Peak
    blocks: tuple[MemoryBlock, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CardLine(Record):
    """Batch size against memory on one card, simulated.

    Args:
        gpu: The card's name.
        precision: The arithmetic there.
        total_bytes: What it has.
        points: Batch sizes, and what the step takes of the card at each with all the room it
            wants, context included.
        max_batch_size: The largest batch size that fits; `None` where none does.
        max_batch_bytes: What that takes, context included.
    """

    gpu: str
    precision: str
    total_bytes: int
    points: tuple[tuple[int, int], ...]
    max_batch_size: int | None
    max_batch_bytes: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Change(Record):
    """A change to the step, simulated.

    Args:
        title: What to change, in a few words.
        how: The option or the line that does it.
        cost: What it costs, or changes besides; empty where nothing is known to.
        total_bytes: The peak with it, context included.
        freed_bytes: How much lower that is.
    """

    title: str
    how: str
    cost: str
    total_bytes: int
    freed_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryProfile(Record):
    """What holds the memory of one training step.

    The step is a later one: the optimizer's state is there. Where it does not fit, it is the step
    as it would be with all the room it needs, and `message` says what found none.

    Args:
        subject: The model's name.
        device: The device's name.
        source: Measured on the device, or simulated.
        options: The training step, its precision chosen.
        batch_size: Samples in each micro-batch.
        num_micro_batches: Micro-batches in the step.
        capacity: What the step may use.
        outcome: Whether it fits.
        message: What found no room, and how much is missing; `None` where it fits.
        timeline: Bytes over the step.
        peak: The moment that decides.
        blocks: Every allocation of the timeline, those that were there before it first.
        cards: Batch size against memory for each card that was asked for.
        advice: The changes that free most at the peak, the best first.
        seconds: Wall time of the profile.
        torch_version: The torch that ran.
    """

    subject: str
    device: str
    source: Source
    options: StepOptions
    batch_size: int
    num_micro_batches: int
    capacity: Capacity
    outcome: Outcome
    message: str | None
    timeline: Timeline
    peak: Peak
    blocks: tuple[MemoryBlock, ...]
    cards: tuple[CardLine, ...]
    advice: tuple[Change, ...]
    seconds: float
    torch_version: str

    _derived: ClassVar[tuple[str, ...]] = ("bytes_per_sample", "fixed_bytes")

    @property
    def bytes_per_sample(self) -> float | None:
        """What every sample brings to the peak; `None` where it is not known."""
        known = [
            share.bytes_per_sample
            for share in self.peak.roles
            if share.bytes_per_sample is not None
        ]
        return sum(known) if known else None

    @property
    def fixed_bytes(self) -> int | None:
        """What the peak has whatever the batch size, cached and rounded bytes left out."""
        if self.bytes_per_sample is None:
            return None
        return sum(
            share.num_bytes - round(share.bytes_per_sample * self.batch_size)
            for share in self.peak.roles
            if share.bytes_per_sample is not None
        )

    def blocks_at_peak(self) -> tuple[MemoryBlock, ...]:
        """Return the blocks that hold memory at the peak, the largest first."""
        live = [block for block in self.blocks if block.lives_at(self.peak.moment)]
        return tuple(sorted(live, key=lambda block: -block.held_bytes))

"""What uses the memory of a training step, at its peak and at every moment."""

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
    """The purpose of memory.

    The first nine are for tensors and kernels. `SLACK` is the part of blocks beyond the requested
    bytes. `FRAGMENTATION` is memory that the allocator reserved and that no block uses. `CONTEXT`
    is the memory of the device that a process uses outside the allocator.
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
    """One allocation of the step, or one from before the step.

    Args:
        role: The purpose of the memory.
        module: Path of the module that it belongs to, such as `layer1.0.conv2`; a name in
            parentheses if it belongs to no module, such as `(optimizer)`.
        operation: The operation that allocated it, such as `aten.convolution.default`.
        source_line: The innermost line outside torch that led to it, as `file:line`; `None` if
            there is no such line.
        requested_bytes: The bytes that were requested.
        held_bytes: The bytes that the allocator handed out, with rounding and unsplit remainders.
        born: The moment it was allocated; `None` if it was allocated before the step.
        died: The moment it was freed; `None` if it was not freed in the step.
        bytes_per_sample: How much `requested_bytes` grows with every additional sample; `None` if
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
        """Whether the block holds memory just after an event of the timeline."""
        return (self.born is None or self.born <= moment) and (
            self.died is None or self.died > moment
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Phase(Record):
    """A part of the step.

    Args:
        name: `forward`, `backward` or `optimizer`.
        begin: Its first moment; it lasts until the next phase begins.
        micro_batch: The number of its micro-batch, from 0; `None` for the optimizer.
    """

    name: str
    begin: int
    micro_batch: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Timeline(Record):
    """Bytes over one step. A moment is the index of an event: the state just after it.

    Args:
        allocated_bytes: Handed out to tensors and kernels, for every moment.
        reserved_bytes: Taken from the device, for every moment.
        phases: The phases of the step, in order.
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
        """Return the phase at a moment; `None` before the first phase."""
        begun = [phase for phase in self.phases if phase.begin <= moment]
        return begun[-1] if begun else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoleShare(Record):
    """The memory of one role at the peak.

    Args:
        role: The role.
        num_bytes: Its bytes.
        bytes_per_sample: The bytes that every sample of the micro-batch adds, which are simulated;
            `None` if this is not known or not proportional.
    """

    role: Role
    num_bytes: int
    bytes_per_sample: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModuleShare(Record):
    """The memory of one module at the peak, without the modules inside it.

    Args:
        module: Its path; a name in parentheses for memory that belongs to no module.
        role: The purpose of the memory.
        num_bytes: Its bytes.
    """

    module: str
    role: Role
    num_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Peak(Record):
    """The moment that decides how much memory the step needs.

    It is the moment with the most allocated bytes among those with the most reserved bytes.

    Args:
        moment: Index into the timeline.
        phase: The phase at that moment; `None` if it is not known.
        reserved_bytes: The bytes that the allocator had taken from the device.
        allocated_bytes: The bytes that the allocator had handed out.
        context_bytes: The bytes that the process uses outside the allocator; 0 if the figures do
            not include them.
        roles: The share of each role that has bytes. The shares add up to the total.
        modules: The share of each module and role. These shares add up to the total too.
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
        """Refuse shares that do not add up to the total."""
        for shares in (self.roles, self.modules):
            held = sum(share.num_bytes for share in shares)
            if held != self.total_bytes:
                raise ValueError(f"shares of {held} bytes do not sum to {self.total_bytes}")

    @property
    def total_bytes(self) -> int:
        """The bytes used on the device: reserved bytes and the context."""
        return self.reserved_bytes + self.context_bytes

    def bytes_of(self, role: Role) -> int:
        """Return the bytes of a role."""
        return sum(share.num_bytes for share in self.roles if share.role is role)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RecordedStep(Record):
    """One step of a script; only its allocations were recorded.

    Args:
        subject: The script's command.
        number: The number of the optimizer step; 0 if the script takes none.
        num_micro_batches: How often forward began in the step.
        timeline: Bytes over the step.
        peak: The moment that decides how much memory the step needs.
        blocks: Every allocation of the timeline. Those from before the step come first.
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
        precision: The precision on this card.
        total_bytes: The memory of the card.
        points: Batch sizes, each with the bytes that the step needs on the card if there is no
            limit, with the context.
        max_batch_size: The largest batch size that fits; `None` if none fits.
        max_batch_bytes: The bytes that this batch size needs, with the context.
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
        how: The option or the line of code that makes the change.
        cost: What the change costs, or what else it changes; empty if nothing is known.
        total_bytes: The peak after the change, with the context.
        freed_bytes: How much lower this peak is.
    """

    title: str
    how: str
    cost: str
    total_bytes: int
    freed_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MemoryProfile(Record):
    """What uses the memory of one training step.

    The step is not the first one, so the optimizer's state exists already. If the step does not
    fit, the profile shows it with as much memory as it needs, and `message` says what did not fit.

    Args:
        subject: The model's name.
        device: The device's name.
        source: Measured on the device, or simulated.
        options: The training step, with its precision chosen.
        batch_size: Samples in each micro-batch.
        num_micro_batches: Micro-batches in the step.
        capacity: The bytes that the step may use.
        outcome: Whether it fits.
        message: What did not fit, and how many bytes are missing; `None` if the step fits.
        timeline: Bytes over the step.
        peak: The moment that decides how much memory the step needs.
        blocks: Every allocation of the timeline. Those from before the step come first.
        cards: Memory by batch size for each card that was asked for.
        advice: The changes that free the most bytes at the peak, the best first.
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
    # A megabyte of numbers, which a Python shell would print.
    timeline: Timeline = dataclasses.field(repr=False)
    peak: Peak
    blocks: tuple[MemoryBlock, ...] = dataclasses.field(repr=False)
    cards: tuple[CardLine, ...]
    advice: tuple[Change, ...]
    seconds: float
    torch_version: str

    _derived: ClassVar[tuple[str, ...]] = (
        "peak_reserved_bytes",
        "bytes_per_sample",
        "fixed_bytes",
    )

    @property
    def peak_reserved_bytes(self) -> int:
        """The bytes that the allocator had taken at the peak, as `Trial` has them."""
        return self.peak.reserved_bytes

    @property
    def bytes_per_sample(self) -> float | None:
        """The bytes that every sample adds to the peak; `None` if this is not known."""
        known = [
            share.bytes_per_sample
            for share in self.peak.roles
            if share.bytes_per_sample is not None
        ]
        return sum(known) if known else None

    @property
    def fixed_bytes(self) -> int | None:
        """Bytes of the peak that do not depend on the batch size, without cache and rounding."""
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

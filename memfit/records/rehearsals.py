"""What was seen of a command that ran on a card that is not there."""

from __future__ import annotations

import dataclasses
import enum
import shlex
from typing import ClassVar

from memfit.records.base import Record, Source
from memfit.records.trials import Capacity, Trial

__all__ = [
    "CommandPlan",
    "CommandProbe",
    "DeviceRead",
    "HeldBytes",
    "ReadKind",
    "Rehearsal",
    "RehearsalEnd",
    "RehearsedPhase",
    "RehearsedProcess",
    "RehearsedStep",
    "Shortage",
]


class RehearsalEnd(str, enum.Enum):
    """How a rehearsal ended.

    `SETTLED`: the peak no longer rose, and the command was ended. `FINISHED`: it ended by itself.
    `OUT_OF_MEMORY`: it ended because memory ran out. `FAILED`: it ended for another reason, with an
    exit code of its own. `INTERRUPTED`: the user ended it.
    """

    SETTLED = "settled"
    FINISHED = "finished"
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class ReadKind(str, enum.Enum):
    """What the host took from the device.

    `SIZE`: how many entries a result has, such as a mask's true ones. `DECISION`: whether a tensor
    is true. `NUMBER`: one number, as `.item()` does. `TENSOR`: a copy of a tensor.
    """

    SIZE = "size"
    DECISION = "decision"
    NUMBER = "number"
    TENSOR = "tensor"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeldBytes(Record):
    """The peaks of one device over a stretch of a script, in PyTorch's words.

    Args:
        requested_bytes: What tensors and kernels asked for.
        allocated_bytes: What the caching allocator handed out.
        reserved_bytes: What it had taken from the device.
    """

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int

    def __or__(self, other: HeldBytes) -> HeldBytes:
        """Return the peaks over both stretches."""
        return HeldBytes(
            requested_bytes=max(self.requested_bytes, other.requested_bytes),
            allocated_bytes=max(self.allocated_bytes, other.allocated_bytes),
            reserved_bytes=max(self.reserved_bytes, other.reserved_bytes),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RehearsedStep(Record):
    """One optimizer step, with everything since the one before.

    Args:
        number: Which; the first is 1.
        optimizer: The optimizer's class.
        peak: What was held at most.
        num_alloc_retries: Times the allocator had to give back its cache and ask again, in this
            step.
    """

    number: int
    optimizer: str
    peak: HeldBytes
    num_alloc_retries: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RehearsedPhase(Record):
    """One kind of stretch of a script, wherever it came.

    Args:
        name: `setup` (before the first call of a model), `data` (between an optimizer's step and
            the next call of a model), `forward` (with the loss), `backward`, `optimizer`, or
            `evaluation` (a model called without gradients).
        peak: What was held at most in any of them.
    """

    name: str
    peak: HeldBytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRead(Record):
    """A line that reads from the device what no kernel had computed: zeros.

    Args:
        line: The line of the script, as `file:line`; `None` where there is none.
        library_line: The innermost line outside torch, where it is another.
        kind: What was read.
        phase: In which phase it was seen first.
        num_reads: How often.
        num_bytes: How much in all.
        changes_course: The script goes another way by what is read, so that what it holds may be
            different with real values.
    """

    line: str | None
    library_line: str | None
    kind: ReadKind
    phase: str
    num_reads: int
    num_bytes: int
    changes_course: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shortage(Record):
    """A request that found no room.

    Args:
        wanted_bytes: What the allocator asked the device for.
        free_bytes: What the device had left.
        line: The line of the script, as `file:line`; `None` where there is none.
        library_line: The innermost line outside torch.
        module: The module at work; in parentheses for what belongs to none; `None` where it is not
            known.
        phase: In which phase.
        step: In which optimizer step; the first is 1.
        ended_script: The script did not go on after it. It does where it catches the error, or
            where a library makes do with less: cuDNN has plans with smaller workspaces.
        num_times: How often it happened in this place.
    """

    wanted_bytes: int
    free_bytes: int
    line: str | None
    library_line: str | None
    module: str | None
    phase: str
    step: int
    ended_script: bool
    num_times: int = 1

    _derived: ClassVar[tuple[str, ...]] = ("missing_bytes",)

    @property
    def missing_bytes(self) -> int:
        """How much more the device should have had for this request."""
        return max(0, self.wanted_bytes - self.free_bytes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RehearsedProcess(Record):
    """One process on one device.

    Args:
        process: Its process id.
        rank: Its rank; `None` where there is only one.
        num_ranks: How many ranks there are.
        device_index: Which device, as the process counts them.
        torch_version: The torch that ran.
        peak: What it held at most.
        num_alloc_retries: Times the allocator had to give back its cache and ask again.
        num_steps: Optimizer steps that ran to their end.
        steps: The first of them, and those that needed more than any before.
        phases: The kinds of phases that were seen.
        reads: What it read from the device.
        shortages: Where memory ran out.
        has_settled: It was ended because its peak no longer rose.
        follows_modules: False where something was compiled: phases and modules are not known.
        message: The message of the error that ended it, in its own words; `None` without one.
    """

    process: int
    rank: int | None
    num_ranks: int | None
    device_index: int
    torch_version: str
    peak: HeldBytes
    num_alloc_retries: int
    num_steps: int
    steps: tuple[RehearsedStep, ...]
    phases: tuple[RehearsedPhase, ...]
    reads: tuple[DeviceRead, ...]
    shortages: tuple[Shortage, ...]
    has_settled: bool
    follows_modules: bool
    message: str | None

    def phase(self, name: str) -> RehearsedPhase | None:
        """Return what a kind of phase held, if there was one."""
        return next((phase for phase in self.phases if phase.name == name), None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal(Record):
    """A command on a card that is not there.

    Args:
        command: The command's words.
        device: The card's name.
        capacity: What the command's processes could use of each card.
        context_bytes: What each process takes of the card beside the allocator; the catalogue's.
        end: How it ended.
        exit_code: What the command itself ended with; negative for a signal.
        processes: Every process that used a device, by rank; none where none did.
        notes: What else there is to say, each a sentence.
        seconds: Wall time. It says nothing of the time on the card.
        source: Rehearsed; measured only where the command ran on a GPU that was there.
    """

    command: tuple[str, ...]
    device: str
    capacity: Capacity
    context_bytes: int
    end: RehearsalEnd
    exit_code: int
    processes: tuple[RehearsedProcess, ...]
    notes: tuple[str, ...]
    seconds: float
    source: Source = Source.REHEARSED

    _derived: ClassVar[tuple[str, ...]] = ("fits", "is_trusted", "peak", "total_bytes", "message")

    @property
    def subject(self) -> str:
        """The command as it is typed."""
        return shlex.join(self.command)

    @property
    def fits(self) -> bool:
        """Whether memory sufficed until the rehearsal ended."""
        return self.end is not RehearsalEnd.OUT_OF_MEMORY

    @property
    def largest(self) -> RehearsedProcess | None:
        """The process that held most; `None` where none used a device."""
        return max(self.processes, key=lambda process: process.peak.reserved_bytes, default=None)

    @property
    def peak(self) -> HeldBytes | None:
        """What the process that needs most held; `None` where none used a device."""
        return None if self.largest is None else self.largest.peak

    @property
    def total_bytes(self) -> int | None:
        """The same as the card sees it: reserved bytes, and the context."""
        return None if self.peak is None else self.peak.reserved_bytes + self.context_bytes

    @property
    def is_trusted(self) -> bool:
        """False where a line went another way than it would with real values."""
        return not any(read.changes_course for process in self.processes for read in process.reads)

    @property
    def shortage(self) -> Shortage | None:
        """The request that ended the script; `None` where none did."""
        ends = (
            shortage
            for process in self.processes
            for shortage in process.shortages
            if shortage.ended_script
        )
        return next(ends, None) if self.end is RehearsalEnd.OUT_OF_MEMORY else None

    @property
    def message(self) -> str | None:
        """The message of the error that ended it, a shortage's before any other's."""
        told = [process.message for process in self.processes if process.message is not None]
        about_memory = [message for message in told if "out of memory" in message]
        return next(iter((*about_memory, *told)), None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CommandProbe(Record):
    """The largest batch size of a command that fits a card, with its proof.

    Args:
        command: The command's words, with `{}` where the batch size goes.
        device: The card's name.
        source: Rehearsed, or measured on the GPU that is there.
        capacity: What the command's processes could use of each card.
        max_batch_size: The largest batch size that fits: the edge.
        recommended_batch_size: Where to stand: no allocator retries, `headroom` kept free, a
            multiple of `multiple_of`. `None` where no batch size keeps all three.
        proved: `max_batch_size + 1` was tried and ran out; otherwise the search stopped at its
            ceiling.
        headroom: The share of the capacity that the recommendation keeps free.
        multiple_of: What the recommendation is a multiple of.
        trials: Every trial, in the order they ran; each is a run of the command.
        notes: What else there is to say, each a sentence.
        seconds: Wall time of the whole probe.
    """

    command: tuple[str, ...]
    device: str
    source: Source
    capacity: Capacity
    max_batch_size: int
    recommended_batch_size: int | None
    proved: bool
    headroom: float
    multiple_of: int
    trials: tuple[Trial, ...]
    notes: tuple[str, ...]
    seconds: float

    def trial_at(self, batch_size: int) -> Trial | None:
        """Return the last trial of a batch size, or `None` if it was not tried."""
        tried = [trial for trial in self.trials if trial.batch_size == batch_size]
        return tried[-1] if tried else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CommandPlan(Record):
    """An effective batch size as a command with a micro-batch and accumulation steps.

    Args:
        template: The command's words, with `{}` for the micro-batch and `{steps}`.
        command: The same with both filled in: it was tried, and fitted with the headroom.
        device: The card's name.
        source: Rehearsed, or measured on the GPU that is there.
        capacity: What the command's processes could use of each card.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: Ranks that share them.
        micro_batch_size: Samples in each micro-batch.
        accumulation_steps: Micro-batches before each optimizer step.
        headroom: The share of the capacity that is kept free.
        trials: Every trial, in the order they ran.
        seconds: Wall time of it all.
    """

    template: tuple[str, ...]
    command: tuple[str, ...]
    device: str
    source: Source
    capacity: Capacity
    effective_batch_size: int
    world_size: int
    micro_batch_size: int
    accumulation_steps: int
    headroom: float
    trials: tuple[Trial, ...]
    seconds: float

    def __post_init__(self) -> None:
        """Refuse parts that do not add up."""
        parts = self.micro_batch_size * self.accumulation_steps * self.world_size
        if parts != self.effective_batch_size:
            raise ValueError(f"the parts make {parts}, not {self.effective_batch_size}")

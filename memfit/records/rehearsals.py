"""What a rehearsal found out about a command, on a card that is not in the machine."""

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

    `SETTLED`: the peak no longer rose, and memfit ended the command. `FINISHED`: the command ended
    by itself. `OUT_OF_MEMORY`: it ended because memory ran out. `FAILED`: it ended for another
    reason, with its own exit code. `INTERRUPTED`: the user ended it.
    `TERMINATED`: SIGTERM or SIGHUP came for memfit, which ended the command.
    """

    SETTLED = "settled"
    FINISHED = "finished"
    OUT_OF_MEMORY = "out_of_memory"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    TERMINATED = "terminated"


class ReadKind(str, enum.Enum):
    """What the host read from the device.

    `SIZE`: how many entries a result has, such as a mask's true ones. `DECISION`: whether a tensor
    is true. `NUMBER`: one number, as `.item()` does. `TENSOR`: a copy of a tensor.
    """

    SIZE = "size"
    DECISION = "decision"
    NUMBER = "number"
    TENSOR = "tensor"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeldBytes(Record):
    """The peaks of one device over a part of a script, in PyTorch's terms.

    Args:
        requested_bytes: The bytes that tensors and kernels asked for.
        allocated_bytes: The bytes that the caching allocator handed out.
        reserved_bytes: The bytes that it had taken from the device.
    """

    requested_bytes: int
    allocated_bytes: int
    reserved_bytes: int

    def __or__(self, other: HeldBytes) -> HeldBytes:
        """Return the peaks over both parts."""
        return HeldBytes(
            requested_bytes=max(self.requested_bytes, other.requested_bytes),
            allocated_bytes=max(self.allocated_bytes, other.allocated_bytes),
            reserved_bytes=max(self.reserved_bytes, other.reserved_bytes),
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RehearsedStep(Record):
    """One optimizer step, with everything since the step before it.

    Args:
        number: The number of the step; the first is 1.
        optimizer: The optimizer's class.
        peak: The most bytes that were held.
        num_alloc_retries: How often the allocator had to free its cache and try again, in this
            step.
    """

    number: int
    optimizer: str
    peak: HeldBytes
    num_alloc_retries: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RehearsedPhase(Record):
    """One kind of phase of a script, wherever it ran.

    Args:
        name: `setup` (before the first call of a model), `data` (between an optimizer's step and
            the next call of a model), `forward` (with the loss), `backward`, `optimizer`, or
            `evaluation` (a model called without gradients).
        peak: The most bytes that were held in any of these phases.
    """

    name: str
    peak: HeldBytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRead(Record):
    """A line that reads values from the device. No kernel computed them, so they are zeros.

    Args:
        line: The line of the script, as `file:line`; `None` if there is none.
        library_line: The innermost line outside torch, if it is another line.
        kind: What was read.
        phase: The phase of the first read after the setup; `setup` if there was none.
        num_reads: The number of reads.
        num_bytes: The bytes of all reads.
        changes_course: The script decides by these values what it does next. So with real values it
            may need another amount of memory.
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
    """A request for memory that failed.

    Args:
        wanted_bytes: The bytes that the allocator asked the device for.
        free_bytes: The bytes that the device had left.
        line: The line of the script, as `file:line`; `None` if there is none.
        library_line: The innermost line outside torch.
        module: The running module; a name in parentheses if there was none; `None` if it is not
            known.
        phase: The phase of the request.
        step: The optimizer step of the request; the first is 1.
        ended_script: The script ended with this error. A script can continue if it catches the
            error, or if a library can work with less. For example, cuDNN has plans with smaller
            workspaces.
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
        """How many more free bytes this request needed."""
        return max(0, self.wanted_bytes - self.free_bytes)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RehearsedProcess(Record):
    """One process on one device.

    Args:
        process: Its process id.
        rank: Its rank; `None` if there is only one rank.
        num_ranks: The number of ranks.
        device_index: The device's index in the process.
        torch_version: The torch that ran.
        peak: The most bytes that the process held.
        num_alloc_retries: How often the allocator had to free its cache and try again.
        num_steps: Optimizer steps that ran to their end.
        steps: The first steps, and every step that needed more than all steps before it.
        phases: The kinds of phases that were seen.
        reads: What the process read from the device.
        shortages: Where memory ran out.
        has_settled: memfit ended the process because its peak no longer rose.
        follows_modules: False if something was compiled; then phases and modules are not known.
        message: The original message of the error that ended it; `None` without an error.
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
        """Return the phase of one kind; `None` if there was none."""
        return next((phase for phase in self.phases if phase.name == name), None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal(Record):
    """A command, rehearsed on a card that is not in the machine.

    Args:
        command: The command's words.
        device: The card's name.
        capacity: The bytes of each card that the command's processes could use.
        context_bytes: The bytes of the card that each process uses outside the allocator, from the
            catalogue.
        end: How the rehearsal ended.
        exit_code: The command's own exit code; negative for a signal.
        processes: Every process that used a device, by rank; empty if no process did.
        notes: More remarks, each a sentence.
        seconds: Wall time. The time on a real card would be different.
        source: Rehearsed; measured only if the command ran on a real GPU.
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
        """The command as typed in a shell."""
        return shlex.join(self.command)

    @property
    def fits(self) -> bool:
        """Whether memory was enough until the rehearsal ended."""
        return self.end is not RehearsalEnd.OUT_OF_MEMORY

    @property
    def largest(self) -> RehearsedProcess | None:
        """The process that held the most bytes; `None` if no process used a device."""
        return max(self.processes, key=lambda process: process.peak.reserved_bytes, default=None)

    @property
    def peak(self) -> HeldBytes | None:
        """The peak of the process that held the most; `None` if no process used a device."""
        return None if self.largest is None else self.largest.peak

    @property
    def total_bytes(self) -> int | None:
        """The bytes of that peak on the card: reserved bytes and the context."""
        return None if self.peak is None else self.peak.reserved_bytes + self.context_bytes

    @property
    def is_trusted(self) -> bool:
        """False if some line may do something else with real values."""
        return not any(read.changes_course for process in self.processes for read in process.reads)

    @property
    def shortage(self) -> Shortage | None:
        """The failed request that ended the script; `None` if there was none."""
        ends = (
            shortage
            for process in self.processes
            for shortage in process.shortages
            if shortage.ended_script
        )
        return next(ends, None) if self.end is RehearsalEnd.OUT_OF_MEMORY else None

    @property
    def message(self) -> str | None:
        """The message of the error that ended it; a shortage's message goes first."""
        told = [process.message for process in self.processes if process.message is not None]
        about_memory = [message for message in told if "out of memory" in message]
        return next(iter((*about_memory, *told)), None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CommandProbe(Record):
    """The largest batch size of a command that fits a card, with its proof.

    Args:
        command: The command's words, with `{}` in place of the batch size.
        device: The card's name.
        source: Rehearsed, or measured on this machine's GPU.
        capacity: The bytes of each card that the command's processes could use.
        max_batch_size: The largest batch size that fits: the edge.
        recommended_batch_size: The batch size to train with. It has no allocator retries, keeps
            `headroom` free, and is a multiple of `multiple_of`. `None` if no batch size does all
            three.
        proved: True: `max_batch_size + 1` was tried and ran out of memory. False: the search
            stopped at its upper limit.
        headroom: The share of the capacity that the recommendation keeps free.
        multiple_of: The recommendation is a multiple of this.
        trials: Every trial, in the order in which they ran; each is a run of the command.
        notes: More remarks, each a sentence.
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
        command: The same with both filled in. It was tried, and it fitted with the headroom.
        device: The card's name.
        source: Rehearsed, or measured on this machine's GPU.
        capacity: The bytes of each card that the command's processes could use.
        effective_batch_size: Samples in each optimizer step, over all ranks.
        world_size: The number of ranks that share these samples.
        micro_batch_size: Samples in each micro-batch.
        accumulation_steps: Micro-batches before each optimizer step.
        headroom: The share of the capacity that is kept free.
        trials: Every trial, in the order in which they ran.
        notes: More remarks, each a sentence.
        seconds: Wall time of the whole planning.
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
    notes: tuple[str, ...] = ()
    seconds: float

    def __post_init__(self) -> None:
        """Refuse parts that do not add up."""
        parts = self.micro_batch_size * self.accumulation_steps * self.world_size
        if parts != self.effective_batch_size:
            raise ValueError(f"the parts make {parts}, not {self.effective_batch_size}")

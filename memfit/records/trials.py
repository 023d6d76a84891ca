"""Trials on a device, and the batch sizes that follow from them."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import TYPE_CHECKING, Any, ClassVar

from memfit.records.base import SCHEMA_VERSION, Record, Source, no_such_answer
from memfit.records.steps import StepOptions

__all__ = [
    "Action",
    "Capacity",
    "DeviceProcess",
    "Event",
    "Outcome",
    "ProbeResult",
    "Survey",
    "SurveyAnswer",
    "Trial",
    "WorkspaceSource",
]


class Outcome(str, enum.Enum):
    """How a trial ended."""

    FITS = "fits"
    OUT_OF_MEMORY = "out_of_memory"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProcess(Record):
    """Another process that holds memory of the device.

    Args:
        pid: Its process id.
        name: Its program's name.
        used_bytes: The bytes that it holds on the device; `None` if the driver does not say.
    """

    pid: int
    name: str
    used_bytes: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Capacity(Record):
    """How many bytes this process may use on a device.

    Args:
        usable_bytes: The bytes that a training step of this process may use.
        total_bytes: All bytes of the device.
        origin: Where `usable_bytes` comes from, in a few words.
        other_processes: Other processes that hold memory of the device.
        cautious_bytes: What is usable if the process holds the most that was seen on similar cards.
            `None` where `usable_bytes` is no estimate.
    """

    usable_bytes: int
    total_bytes: int
    origin: str
    other_processes: tuple[DeviceProcess, ...] = ()
    cautious_bytes: int | None = None

    @property
    def safe_bytes(self) -> int:
        """The bytes that a recommendation counts on."""
        return self.usable_bytes if self.cautious_bytes is None else self.cautious_bytes


class WorkspaceSource(str, enum.Enum):
    """How the workspaces of a simulated step's convolutions are known.

    `CUDNN`: the installed cuDNN said them for the card's compute capability. `BOUND`: it could not
    be asked, and they are copies of the tensors in the layout in which kernels compute.
    """

    CUDNN = "cudnn"
    BOUND = "bound"


class Action(str, enum.Enum):
    """What an event does. The names are those of PyTorch's memory snapshots, plus three of our own.

    `USER_DEFINED` marks where a phase begins; the phase's name is the event's origin. `TRY_ALLOC`
    is an allocation that may fail, such as a convolution's workspace. If there is no memory for it,
    the caller chooses a plan that needs less. `ALLOC_IF_ROOM` is the same, but cached memory is
    given back before it fails.

    Source: `TraceEntry` in c10/cuda/CUDACachingAllocator.h and torch/cuda/_memory_viz.py.
    """

    ALLOC = "alloc"
    TRY_ALLOC = "try_alloc"
    ALLOC_IF_ROOM = "alloc_if_room"
    FREE_REQUESTED = "free_requested"
    FREE_COMPLETED = "free_completed"
    SEGMENT_ALLOC = "segment_alloc"
    SEGMENT_FREE = "segment_free"
    SEGMENT_MAP = "segment_map"
    SEGMENT_UNMAP = "segment_unmap"
    OOM = "oom"
    USER_DEFINED = "user_defined"
    EMPTY_CACHE = "empty_cache"

    @property
    def is_request(self) -> bool:
        """Whether it asks for a block."""
        return self in (Action.ALLOC, Action.TRY_ALLOC, Action.ALLOC_IF_ROOM)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event(Record):
    """One change of a device's memory. Tracing writes events, and replaying reads them.

    Args:
        action: What happened.
        id: The allocation: a number that is unique in a stream, or an address. An address can be
            used again after it was freed.
        num_bytes: The requested bytes (`ALLOC`), or the bytes of the segment.
        origin: The cause, such as an operation's name; empty if it is not known.
    """

    action: Action
    id: int
    num_bytes: int
    origin: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial(Record):
    """A trial of one batch size.

    Args:
        batch_size: Samples in each micro-batch.
        outcome: Whether the step ran.
        source: Measured on a device, or simulated.
        peak_requested_bytes: Peak of the bytes that tensors asked for; `None` if it is not known.
        peak_allocated_bytes: Peak of the bytes that the allocator handed out; `None` if it is not
            known.
        peak_reserved_bytes: Peak of the bytes that the process used of the device's capacity. On a
            GPU these are the caching allocator's reserved bytes. On a CPU they are resident bytes
            beyond the loaded process. If memory ran out, it is the peak until then. `None` if it is
            not known.
        num_alloc_retries: How often the allocator had to free its cache and try again.
        num_iterations: Optimizer steps that ran to their end.
        step_seconds: Seconds of the last iteration; `None` if no iteration ended.
        num_micro_batches: Micro-batches in one iteration.
        left_behind_bytes: Bytes that stayed allocated after cleaning; `None` if it is not known.
        peak_grows: The peak still rose in the last iteration.
        peak_varies: The step draws at random what it computes (LayerDrop), so its peak is random.
            The figures are for the most that it can compute, as far as its draws could be forced.
        is_approximate: The card was simulated with another vendor's kernels, as AMD's cards are
            with NVIDIA's. The outcome of a batch size near the edge may be another on the card.
        workspaces: How the workspaces of its convolutions are known, in a simulation; `None` if it
            has no convolutions or is no simulation.
        message: The first line of the error that ended the trial.
    """

    batch_size: int
    outcome: Outcome
    source: Source
    peak_requested_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    num_alloc_retries: int = 0
    num_iterations: int = 0
    step_seconds: float | None = None
    num_micro_batches: int = 1
    left_behind_bytes: int | None = None
    peak_grows: bool = False
    peak_varies: bool = False
    is_approximate: bool = False
    workspaces: WorkspaceSource | None = None
    message: str | None = None

    _derived: ClassVar[tuple[str, ...]] = ("samples_per_second",)

    def __post_init__(self) -> None:
        """Refuse values that no trial can have."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        if self.step_seconds is not None and not (
            self.step_seconds > 0 and math.isfinite(self.step_seconds)
        ):
            raise ValueError(f"step_seconds must be positive, not {self.step_seconds}")

    @property
    def fits(self) -> bool:
        """Whether the step ran."""
        return self.outcome is Outcome.FITS

    @property
    def samples_per_second(self) -> float | None:
        """Samples trained on per second, over all micro-batches of the iteration."""
        if self.step_seconds is None:
            return None
        return self.batch_size * self.num_micro_batches / self.step_seconds


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult(Record):
    """The largest batch size that fits a device, with its proof.

    Args:
        subject: The model's name.
        device: The device's name.
        source: Measured on the device, or simulated.
        options: The training step, with its precision chosen.
        capacity: The bytes that the step may use, and where that figure comes from.
        max_batch_size: The largest batch size that fits: the edge.
        recommended_batch_size: The batch size to train with. It has no allocator retries, keeps
            `headroom` free, and is a multiple of `multiple_of`. `None` if no batch size does all
            three.
        edge_found: True: `max_batch_size + 1` was tried and ran out of memory. False: the search
            stopped at its upper limit.
        headroom: The share of the capacity that the recommendation keeps free.
        multiple_of: The recommendation is a multiple of this.
        trials: Every trial, in the order in which they ran.
        environment: Environment variables of the trials, as NAME=value. The figures are valid only
            if the training script has them too.
        seconds: Wall time of the whole probe.
        torch_version: The torch that ran.
        predictions: The results of simulating the device for the batch sizes that were tried; empty
            if nothing was measured or nothing could be predicted.
        remarks: Remarks about the search, in sentences.
    """

    subject: str
    device: str
    source: Source
    options: StepOptions
    capacity: Capacity
    max_batch_size: int
    recommended_batch_size: int | None
    edge_found: bool
    headroom: float
    multiple_of: int
    trials: tuple[Trial, ...]
    environment: tuple[str, ...]
    seconds: float
    torch_version: str
    predictions: tuple[Trial, ...] = ()
    remarks: tuple[str, ...] = ()

    _derived: ClassVar[tuple[str, ...]] = ("capacity_bytes", "proved", "is_approximate")

    @property
    def capacity_bytes(self) -> int:
        """The bytes that the training step may use."""
        return self.capacity.usable_bytes

    @property
    def proved(self) -> bool:
        """Whether the edge was found by steps that really ran, not by a simulation."""
        return self.edge_found and self.source is not Source.SIMULATED

    @property
    def is_approximate(self) -> bool:
        """Whether the edge is near the card's and not exactly it; see `Trial.is_approximate`."""
        return any(trial.is_approximate for trial in self.trials)

    def trial_at(self, batch_size: int) -> Trial | None:
        """Return the last trial of a batch size, or `None` if it was not tried."""
        tried = [trial for trial in self.trials if trial.batch_size == batch_size]
        return tried[-1] if tried else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SurveyAnswer(Record):
    """The batch sizes of a training step on a GPU that is not in the machine.

    Args:
        gpu: The card's name.
        result: The batch sizes; `None` if not even one sample fits.
        reason: Why there is no result.
        source: Simulated or rehearsed.
    """

    gpu: str
    result: ProbeResult | None
    reason: str | None = None
    source: Source = Source.SIMULATED

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a dictionary; without one, the known facts under the same keys."""
        if self.result is not None:
            return self.result.to_dict()
        return {
            "schema_version": SCHEMA_VERSION,
            "device": self.gpu,
            "source": self.source.value,
            "max_batch_size": None,
            "recommended_batch_size": None,
            "reason": self.reason,
        }


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Survey(Record):
    """One training step on several GPUs that are not in the machine.

    Args:
        subject: The model's name.
        answers: One for each card.
        source: Simulated or rehearsed.
        remarks: Remarks about the choice of cards, in sentences.
    """

    subject: str
    answers: tuple[SurveyAnswer, ...]
    source: Source = Source.SIMULATED
    remarks: tuple[str, ...] = ()

    if not TYPE_CHECKING:

        def __getattr__(self, name):  # noqa: ANN001, ANN204 - hidden from the types
            raise AttributeError(no_such_answer("Survey", name))

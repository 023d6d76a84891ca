"""What was tried on a device, and the batch sizes that came of it."""

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
        used_bytes: What it holds on the device; `None` where the driver does not say.
    """

    pid: int
    name: str
    used_bytes: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Capacity(Record):
    """How many bytes this process may use on a device.

    Args:
        usable_bytes: What a training step of this process may take.
        total_bytes: What the device has in all.
        origin: Where `usable_bytes` comes from, in a few words.
        other_processes: Who else holds memory of the device.
    """

    usable_bytes: int
    total_bytes: int
    origin: str
    other_processes: tuple[DeviceProcess, ...] = ()


class Action(str, enum.Enum):
    """What an event does, in the words of PyTorch's memory snapshots, and two of our own.

    `USER_DEFINED` marks where a phase begins; its name is the event's origin. `TRY_ALLOC` is an
    allocation that its caller can do without, such as a convolution's workspace:
    where there is no room it takes another plan.

    Source: `TraceEntry` in c10/cuda/CUDACachingAllocator.h and torch/cuda/_memory_viz.py.
    """

    ALLOC = "alloc"
    TRY_ALLOC = "try_alloc"
    FREE_REQUESTED = "free_requested"
    FREE_COMPLETED = "free_completed"
    SEGMENT_ALLOC = "segment_alloc"
    SEGMENT_FREE = "segment_free"
    SEGMENT_MAP = "segment_map"
    SEGMENT_UNMAP = "segment_unmap"
    OOM = "oom"
    USER_DEFINED = "user_defined"
    EMPTY_CACHE = "empty_cache"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Event(Record):
    """One thing that happened to a device's memory: the hinge between tracing and replaying.

    Args:
        action: What happened.
        id: Which allocation; unique in a stream, or an address that is reused after its free.
        num_bytes: Bytes asked for (`ALLOC`), or of the segment.
        origin: What caused it, such as an operation's name; empty where it is not known.
    """

    action: Action
    id: int
    num_bytes: int
    origin: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial(Record):
    """One batch size, tried.

    Args:
        batch_size: Samples in each micro-batch.
        outcome: Whether the step ran.
        source: Measured on a device, or simulated.
        peak_requested_bytes: Peak of what tensors asked for; `None` where it is not known.
        peak_allocated_bytes: Peak of what the allocator handed out; `None` where it is not known.
        peak_reserved_bytes: Peak of what the process took of the device's capacity: the caching
            allocator's reserved bytes on a GPU, resident bytes beyond the loaded process on a CPU.
            After running out, the peak until then. `None` where it is not known.
        num_alloc_retries: Times the allocator had to give back its cache and ask again.
        num_iterations: Optimizer steps that ran to their end.
        step_seconds: Seconds of the last iteration; `None` where none ended.
        num_micro_batches: Micro-batches in one iteration.
        left_behind_bytes: What stayed allocated after cleaning; `None` where it is not known.
        peak_grows: The peak still rose when the last iteration ended.
        peak_varies: The step draws what it computes (LayerDrop), so its peak is random; the figures
            are those of the most that it can compute, as far as its draws could be forced.
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
    message: str | None = None

    _derived: ClassVar[tuple[str, ...]] = ("samples_per_second",)

    def __post_init__(self) -> None:
        """Refuse what no trial can be."""
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
        options: The training step, its precision chosen.
        capacity: What the step may use, and who said so.
        max_batch_size: The largest batch size that fits: the edge.
        recommended_batch_size: Where to stand: no allocator retries, `headroom` kept free, a
            multiple of `multiple_of`. `None` where no batch size keeps all three.
        edge_found: `max_batch_size + 1` was tried and ran out; otherwise the search stopped at its
            ceiling.
        headroom: The share of the capacity that the recommendation keeps free.
        multiple_of: What the recommendation is a multiple of.
        trials: Every trial, in the order they ran.
        environment: What the trials ran with that a training script has to be given for the
            figures to hold, as NAME=value.
        seconds: Wall time of the whole probe.
        torch_version: The torch that ran.
        predictions: What the simulation of the device gave for the batch sizes that were tried;
            empty where nothing was measured or nothing could be predicted.
        remarks: What there is to say about the search, in sentences.
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

    _derived: ClassVar[tuple[str, ...]] = ("capacity_bytes", "proved")

    @property
    def capacity_bytes(self) -> int:
        """What the training step may use, in bytes."""
        return self.capacity.usable_bytes

    @property
    def proved(self) -> bool:
        """Whether the edge was seen: found, and by steps that ran rather than by a simulation."""
        return self.edge_found and self.source is not Source.SIMULATED

    def trial_at(self, batch_size: int) -> Trial | None:
        """Return the last trial of a batch size, or `None` if it was not tried."""
        tried = [trial for trial in self.trials if trial.batch_size == batch_size]
        return tried[-1] if tried else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SurveyAnswer(Record):
    """What a GPU that is not there takes of a training step.

    Args:
        gpu: The card's name.
        result: The batch sizes; `None` where not even one sample fits.
        reason: Why there is no result.
        source: Simulated or rehearsed.
    """

    gpu: str
    result: ProbeResult | None
    reason: str | None = None
    source: Source = Source.SIMULATED

    def to_dict(self) -> dict[str, Any]:
        """Return the result, or what can be said of a card without one under the same keys."""
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
    """One training step on several GPUs that are not there.

    Args:
        subject: The model's name.
        answers: One for each card.
        source: Simulated or rehearsed.
        remarks: What there is to say about the choice of cards, in sentences.
    """

    subject: str
    answers: tuple[SurveyAnswer, ...]
    source: Source = Source.SIMULATED
    remarks: tuple[str, ...] = ()

    if not TYPE_CHECKING:

        def __getattr__(self, name):  # noqa: ANN001, ANN204 - hidden from the types
            raise AttributeError(no_such_answer("Survey", name))

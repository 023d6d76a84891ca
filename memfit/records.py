"""The records that travel between memfit's parts.

All are frozen, hold integers of bytes, and turn into plain dictionaries for JSON with `to_dict`.
Nothing here knows torch, runs a trial or formats a figure for people.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import Any, ClassVar

from memfit.errors import UsageError

__all__ = [
    "SCHEMA_VERSION",
    "Action",
    "BufferDrift",
    "Capacity",
    "DeviceProcess",
    "Equivalence",
    "Event",
    "GradientCheck",
    "LoopFault",
    "LoopWindow",
    "LossWeighting",
    "Mixer",
    "MixesIn",
    "Outcome",
    "ParameterDifference",
    "Precision",
    "ProbeResult",
    "Record",
    "Source",
    "StepOptions",
    "Survey",
    "SurveyAnswer",
    "Trial",
    "Verdict",
]

SCHEMA_VERSION = 1
"""Version of what `to_dict` gives; it rises when a key changes meaning or goes."""


class Outcome(str, enum.Enum):
    """How a trial ended."""

    FITS = "fits"
    OUT_OF_MEMORY = "out_of_memory"


class Source(str, enum.Enum):
    """Where a figure comes from: a device that was there, or a model of one."""

    MEASURED = "measured"
    SIMULATED = "simulated"


class Action(str, enum.Enum):
    """What an event does, in the words of PyTorch's memory snapshots, and two of our own.

    `TRY_ALLOC` is an allocation that its caller can do without, such as a convolution's workspace:
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
    EMPTY_CACHE = "empty_cache"


class Precision(str, enum.Enum):
    """The arithmetic of a training step.

    `FP32` and `BF16` train weights of that type; `AMP_BF16` and `AMP_FP16` keep fp32 weights under
    `torch.autocast`, the latter with a `GradScaler`. `AUTO` is chosen by the device.
    """

    FP32 = "fp32"
    AMP_BF16 = "amp-bf16"
    AMP_FP16 = "amp-fp16"
    BF16 = "bf16"
    AUTO = "auto"


class Record:
    """What every record can do."""

    __slots__ = ()

    _derived: ClassVar[tuple[str, ...]] = ()
    """Properties that `to_dict` gives beside the fields."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values for JSON, with a `schema_version`.

        Enums become their values, tuples become lists, and missing values stay `None`.
        """
        return {"schema_version": SCHEMA_VERSION, **_plain_fields(self)}


def _plain_fields(record: Record) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(record)]  # type: ignore[arg-type]
    return {name: _plain(getattr(record, name)) for name in (*names, *record._derived)}


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return _plain_fields(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions(Record):
    """What a training step is, besides its model and its batch size.

    Args:
        precision: The arithmetic; `AUTO` until a device has chosen.
        optimizer: A name that `timm.optim.create_optimizer_v2` knows; `None` for a workload that
            brings its own.
        image_size: Height and width in pixels; `None` for the model's own.
        num_classes: Size of the classifier; `None` for the model's own.
        channels_last: Weights and images in `torch.channels_last`.
        grad_checkpointing: Recompute activations in backward (`set_grad_checkpointing`).
        accumulate: Two micro-batches before each optimizer step instead of one.
        model_kwargs: Further arguments for `timm.create_model`, as pairs.
    """

    precision: Precision = Precision.AUTO
    optimizer: str | None = None
    image_size: tuple[int, int] | None = None
    num_classes: int | None = None
    channels_last: bool = False
    grad_checkpointing: bool = False
    accumulate: bool = False
    model_kwargs: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Refuse a classifier without classes."""
        if self.num_classes is not None and self.num_classes < 1:
            raise UsageError(f"num_classes must be at least 1, not {self.num_classes}.")


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
        proved: `max_batch_size + 1` was tried and ran out; otherwise the search stopped at its
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
    """

    subject: str
    device: str
    source: Source
    options: StepOptions
    capacity: Capacity
    max_batch_size: int
    recommended_batch_size: int | None
    proved: bool
    headroom: float
    multiple_of: int
    trials: tuple[Trial, ...]
    environment: tuple[str, ...]
    seconds: float
    torch_version: str
    predictions: tuple[Trial, ...] = ()

    _derived: ClassVar[tuple[str, ...]] = ("capacity_bytes",)

    @property
    def capacity_bytes(self) -> int:
        """What the training step may use, in bytes."""
        return self.capacity.usable_bytes

    def trial_at(self, batch_size: int) -> Trial | None:
        """Return the last trial of a batch size, or `None` if it was not tried."""
        tried = [trial for trial in self.trials if trial.batch_size == batch_size]
        return tried[-1] if tried else None


class Verdict(str, enum.Enum):
    """Whether accumulated gradients are the full batch's.

    `DETACHED`: those that there are equal, but a layer cuts parameters off that require a gradient.
    """

    EQUAL = "equal"
    DIFFERS = "differs"
    DETACHED = "detached"


class MixesIn(str, enum.Enum):
    """Where samples of one batch meet."""

    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"


class LossWeighting(str, enum.Enum):
    """What each micro-batch's loss has to be weighted by, as the loss itself shows.

    `SAMPLES`: a mean over samples, so n_i / N. `TARGETS`: a mean over valid targets, so t_i / T.
    `SUM`: a sum, so 1. `MEASURED`: anything else; the weights were read off the loss's gradients.
    """

    SAMPLES = "samples"
    TARGETS = "targets"
    SUM = "sum"
    MEASURED = "measured"


class LoopFault(str, enum.Enum):
    """What can be wrong with an accumulation loop."""

    DIVIDED_BY_CONFIGURED_STEPS = "divided_by_configured_steps"
    MEAN_OF_MEANS = "mean_of_means"
    MEAN_OF_TARGET_MEANS = "mean_of_target_means"
    NOT_DIVIDED = "not_divided"
    SCALED = "scaled"
    SKIPPED_MICRO_BATCH = "skipped_micro_batch"
    MISSING_LAST_WINDOW = "missing_last_window"
    CLIPPED_PER_MICRO_BATCH = "clipped_per_micro_batch"
    STEPPED_TOO_OFTEN = "stepped_too_often"
    GRADIENTS_CARRIED_OVER = "gradients_carried_over"
    UNEXPLAINED = "unexplained"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Mixer(Record):
    """A layer, or the loss, in which one sample's values reach another's.

    Args:
        name: Its path in the model, or `"loss"`.
        type_name: Its class, for people to recognise it; no verdict rests on it.
        mixes_in: Forward, backward, or the loss.
        moved: How far the other samples' outputs (gradients, in backward and the loss) moved when
            one sample changed, relative to their norm.
        stops_in_eval: It mixes no more in evaluation mode; `None` where that means nothing.
        frozen: It was put in evaluation mode before gradients were compared.
    """

    name: str
    type_name: str
    mixes_in: MixesIn
    moved: float
    stops_in_eval: bool | None = None
    frozen: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParameterDifference(Record):
    """One parameter's accumulated gradient a beside its reference b.

    Args:
        name: Its path in the model.
        relative_error: ||a - b|| / ||b||; for a gradient that vanishes, relative to a typical
            gradient of the model instead.
        bound: What rounding alone explains of `relative_error`.
        scale: <a, b> / <b, b>: 1 where nothing was gained or lost; `None` for a gradient that
            vanishes.
        scale_bound: What rounding alone explains of `abs(scale - 1)`.
        vanishes: The gradient is zero but for rounding.
    """

    name: str
    relative_error: float
    bound: float
    scale: float | None
    scale_bound: float
    vanishes: bool = False

    @property
    def differs(self) -> bool:
        """Whether rounding alone does not explain the difference."""
        # Negated, so that a gradient that is not a number differs.
        if not self.relative_error <= self.bound:
            return True
        return self.scale is not None and not abs(self.scale - 1) <= self.scale_bound


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GradientCheck(Record):
    """Gradients of one effective batch, cut in two ways, compared parameter by parameter.

    Args:
        precision: `"fp64"`, or the precision of training.
        device: Where it ran.
        reference: Micro-batches of the reference; a single one is the full batch.
        cut: Micro-batches of what was compared with it.
        unit_roundoff: Of the arithmetic in which gradients are written.
        num_summands: The number of summands in a gradient that the bounds allow for.
        num_parameters: Parameters compared.
        num_differing: Parameters that differ by more than rounding.
        worst: The parameters that differ most, measured in their bounds, worst first.
        worst_relative_error: The largest relative error of all parameters.
        message: Why the full batch is not the reference; `None` where it is.
    """

    precision: str
    device: str
    reference: tuple[int, ...]
    cut: tuple[int, ...]
    unit_roundoff: float
    num_summands: int
    num_parameters: int
    num_differing: int
    worst: tuple[ParameterDifference, ...]
    worst_relative_error: float
    message: str | None = None

    _derived: ClassVar[tuple[str, ...]] = ("passed",)

    @property
    def passed(self) -> bool:
        """Whether rounding alone explains every difference."""
        return self.num_differing == 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BufferDrift(Record):
    """A buffer that ends up elsewhere after k micro-batches than after the full batch.

    Args:
        name: Its path in the model.
        relative_change: Distance of the two, relative to the one after the full batch.
        full: Its value after the full batch, where it is a single number.
        accumulated: Its value after the micro-batches, where it is a single number.
    """

    name: str
    relative_change: float
    full: float | None = None
    accumulated: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoopWindow(Record):
    """What a user's accumulation loop made of one window of micro-batches.

    Args:
        cut: Samples in each micro-batch.
        weights: By how much each micro-batch counts in the loop's gradient, as measured.
        expected_weights: By how much it has to count.
        residual: The part of the loop's gradient that no weighting of the micro-batches explains.
        relative_error: Largest over the parameters, against the full batch's gradient. An overall
            factor is part of it, unless the loop clips once after accumulating.
        num_steps: Optimizer steps the loop took in this window; `None` where it takes none itself.
    """

    cut: tuple[int, ...]
    weights: tuple[float, ...]
    expected_weights: tuple[float, ...]
    residual: float
    relative_error: float | None
    num_steps: int | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Equivalence(Record):
    """Whether accumulated gradients equal the full batch's, and if not, why.

    Args:
        subject: The model's name.
        verdict: Equal, or not.
        micro_batch_size: Samples in each micro-batch.
        accumulation_steps: Micro-batches before each optimizer step.
        options: The training step, its precision chosen.
        device: The device of training.
        weighting: What the loss averages over.
        checks: Every comparison: fp64 first, then the precision of training.
        mixers: What mixes samples, in order of first appearance.
        buffers: Buffers that accumulation leaves elsewhere, furthest first.
        num_drifting_buffers: How many those are in all.
        unreached: Parameters that require a gradient and get none.
        detaching: Layers that cut gradients off.
        stateful: Layers whose output depends on how often they were called before.
        replayed: Layers whose random draws were replayed sample by sample.
        switched_off: Layers whose randomness was switched off because it cannot be replayed.
        num_moved_parameters: Parameters at zero that were moved off it, where they would have
            hidden other parameters' gradients.
        num_jittered_samples: Samples that were copies of others and were made different.
        loop: What the user's own loop made of each window; empty where none was given.
        loop_faults: What is wrong with it.
        alternatives: timm models of the same kind without the mixing layers; not checked.
        seconds: Wall time of it all.
        torch_version: The torch that ran.
    """

    subject: str
    verdict: Verdict
    micro_batch_size: int
    accumulation_steps: int
    options: StepOptions
    device: str
    weighting: LossWeighting
    checks: tuple[GradientCheck, ...]
    mixers: tuple[Mixer, ...] = ()
    buffers: tuple[BufferDrift, ...] = ()
    num_drifting_buffers: int = 0
    unreached: tuple[str, ...] = ()
    detaching: tuple[str, ...] = ()
    stateful: tuple[str, ...] = ()
    replayed: tuple[str, ...] = ()
    switched_off: tuple[str, ...] = ()
    num_moved_parameters: int = 0
    num_jittered_samples: int = 0
    loop: tuple[LoopWindow, ...] = ()
    loop_faults: tuple[LoopFault, ...] = ()
    alternatives: tuple[str, ...] = ()
    seconds: float
    torch_version: str

    _derived: ClassVar[tuple[str, ...]] = ("effective_batch_size",)

    @property
    def equal(self) -> bool:
        """Whether rounding alone explains every difference."""
        return self.verdict is Verdict.EQUAL

    @property
    def effective_batch_size(self) -> int:
        """Samples in each optimizer step."""
        return self.micro_batch_size * self.accumulation_steps

    def worst_relative_error(self, precision: str) -> float | None:
        """Return the largest relative error in a precision, or `None` if it was not checked."""
        errors = [c.worst_relative_error for c in self.checks if c.precision == precision]
        return max(errors, default=None)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SurveyAnswer(Record):
    """What a simulated GPU takes of a training step.

    Args:
        gpu: The card's name.
        result: The batch sizes; `None` where not even one sample fits.
        reason: Why there is no result.
    """

    gpu: str
    result: ProbeResult | None
    reason: str | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Survey(Record):
    """One training step on several GPUs that are not there.

    Args:
        subject: The model's name.
        answers: One for each card.
        source: Always simulated.
    """

    subject: str
    answers: tuple[SurveyAnswer, ...]
    source: Source = Source.SIMULATED

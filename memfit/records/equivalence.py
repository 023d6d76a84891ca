"""Whether accumulated gradients equal the full batch's."""

from __future__ import annotations

import dataclasses
import enum
from typing import ClassVar

from memfit.records.base import Record
from memfit.records.steps import StepOptions

__all__ = [
    "BufferDrift",
    "Equivalence",
    "GradientCheck",
    "GradientFault",
    "LoopFault",
    "LoopWindow",
    "LossTerm",
    "LossWeighting",
    "MixesIn",
    "MixingLayer",
    "ParameterDifference",
    "Verdict",
]


class Verdict(str, enum.Enum):
    """Whether accumulated gradients are the full batch's.

    `DETACHED`: all gradients are equal, but some parameters that require a gradient get none,
    because a layer stops it.
    """

    EQUAL = "equal"
    DIFFERS = "differs"
    DETACHED = "detached"


class MixesIn(str, enum.Enum):
    """Where samples of one batch affect each other."""

    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"


class LossWeighting(str, enum.Enum):
    """The weight that each micro-batch's loss needs, as measured from the loss.

    `SAMPLES`: the loss is a mean over samples, and the weight is n_i / N. `TARGETS`: a mean over
    valid targets; the weight is t_i / T. `SUM`: a sum; the weight is 1. `CLASSES`: a mean over
    weights of classes; the weight is the micro-batch's share of their sum. `SEVERAL`: several
    losses that average over different things. `MEASURED`: anything else; the weights were measured
    from the loss's gradients.
    """

    SAMPLES = "samples"
    TARGETS = "targets"
    SUM = "sum"
    CLASSES = "classes"
    SEVERAL = "several"
    MEASURED = "measured"


class GradientFault(str, enum.Enum):
    """Why accumulated gradients are not the full batch's.

    `MIXES_SAMPLES`: a layer or the loss mixes samples. `DEPENDS_ON_ORDER`: the full batch has
    another gradient if its samples are in another order. `CARRIES_STATE`: a forward pass changes
    state that affects the next pass. `ADDS_DIFFERENT_MEANS`: the loss is one number that adds means
    over different things, so no single weight of a micro-batch is right. `DETACHES`: a layer stops
    gradients in some passes. `DRAWS_NOT_REPLAYED`: some random draws belong to the batch as a
    whole. `DOES_NOT_REPEAT`: the same pass from the same state gives another gradient.
    `UNEXPLAINED`: none of these was found.
    """

    MIXES_SAMPLES = "mixes_samples"
    DEPENDS_ON_ORDER = "depends_on_order"
    CARRIES_STATE = "carries_state"
    ADDS_DIFFERENT_MEANS = "adds_different_means"
    DETACHES = "detaches"
    DRAWS_NOT_REPLAYED = "draws_not_replayed"
    DOES_NOT_REPEAT = "does_not_repeat"
    UNEXPLAINED = "unexplained"


class LoopFault(str, enum.Enum):
    """What can be wrong with an accumulation loop."""

    DIVIDED_BY_CONFIGURED_STEPS = "divided_by_configured_steps"
    DIVIDED_BY_WRONG_COUNT = "divided_by_wrong_count"
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
class MixingLayer(Record):
    """A layer, or the loss, in which one sample's values affect another sample.

    Args:
        name: The layer's path in the model, or `"loss"`.
        type_name: The layer's class, for people to read; no verdict depends on it.
        mixes_in: Forward, backward, or the loss.
        moved: The change of the other samples' outputs when one sample changed, relative to their
            norm. In backward and in the loss: the change of their gradients.
        stops_in_eval: The layer does not mix in evaluation mode; `None` if it has no such mode.
        frozen: The layer was put in evaluation mode before gradients were compared.
    """

    name: str
    type_name: str
    mixes_in: MixesIn
    moved: float
    stops_in_eval: bool | None = None
    frozen: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LossTerm(Record):
    """One of the losses that a step adds up, and what it averages over.

    Args:
        name: The key or position of the loss among those returned; `"loss"` if there is only one.
        weighting: The weight that each micro-batch's loss needs.
        counts: What the loss averages over, as an expression of the batch, if that has a name.
        unexplained: The share of the full batch's gradient that the weights do not explain.
        inside: This is a summand inside the number that the loss function returns.
    """

    name: str
    weighting: LossWeighting
    counts: str | None = None
    unexplained: float = 0.0
    inside: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ParameterDifference(Record):
    """One parameter's accumulated gradient a, compared with its reference b.

    Args:
        name: The parameter's path in the model.
        relative_error: ||a - b|| / ||b||; for a gradient that vanishes, relative to a typical
            gradient of the model instead.
        bound: The largest `relative_error` that rounding alone explains.
        scale: <a, b> / <b, b>: 1 if the gradients have the same size; `None` for a gradient that
            vanishes.
        scale_bound: The largest `abs(scale - 1)` that rounding alone explains.
        vanishes: The gradient is zero apart from rounding.
        in_noise: Rounding alone may move the gradient by more than a tenth (in fp32 by more than a
            hundredth), so the comparison says nothing about this parameter.
    """

    name: str
    relative_error: float
    bound: float
    scale: float | None
    scale_bound: float
    vanishes: bool = False
    in_noise: bool = False

    @property
    def differs(self) -> bool:
        """Whether rounding alone does not explain the difference."""
        # The test is negated, so that a gradient with NaN counts as different.
        if not self.relative_error <= self.bound:
            return True
        return self.scale is not None and not abs(self.scale - 1) <= self.scale_bound


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GradientCheck(Record):
    """Gradients of one effective batch, cut in two ways, compared parameter by parameter.

    Args:
        precision: `"fp64"`, or the precision of training.
        device: The device of the check.
        reference: Micro-batches of the reference; a single one is the full batch.
        cut: Micro-batches of the gradients that were compared with the reference.
        unit_roundoff: The unit roundoff of the type that gradients are written in.
        num_summands: The number of summands in a gradient that the bounds allow for.
        num_parameters: Parameters compared.
        num_differing: Parameters that differ by more than rounding.
        worst: The parameters that differ, and then the others, those with the largest error first.
            Parameters in noise come last.
        worst_relative_error: The largest relative error of all parameters that are not in noise.
        num_in_noise: Parameters in noise, for which this precision shows nothing.
        noise: The largest relative error of these; `None` if there are none.
        message: Why the full batch is not the reference; `None` if it is.
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
    num_in_noise: int = 0
    noise: float | None = None
    message: str | None = None

    _derived: ClassVar[tuple[str, ...]] = ("passed",)

    @property
    def passed(self) -> bool:
        """Whether rounding alone explains every difference."""
        return self.num_differing == 0


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BufferDrift(Record):
    """A buffer that has another value after k micro-batches than after the full batch.

    Args:
        name: The buffer's path in the model.
        relative_change: The distance between both values, relative to the full batch's value.
        full: Its value after the full batch, if it is a single number.
        accumulated: Its value after the micro-batches, if it is a single number.
    """

    name: str
    relative_change: float
    full: float | None = None
    accumulated: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoopWindow(Record):
    """The result of a user's accumulation loop for one window of micro-batches.

    Args:
        cut: Samples in each micro-batch.
        weights: The weight of each micro-batch in the loop's gradient, as measured.
        expected_weights: The correct weights.
        residual: The share of the loop's gradient that no weights of the micro-batches explain.
        relative_error: The largest relative error of all parameters, compared with the full batch's
            gradient. It includes an overall factor, unless the loop clips once after accumulating.
        num_steps: Optimizer steps that the loop took in this window; `None` if it does not step the
            optimizer itself.
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
        options: The training step, with its precision chosen.
        device: The device of training.
        weighting: What the loss averages over.
        terms: The same for each of the losses. For one loss that adds different means, for each of
            its summands.
        off_by_samples: How far the gradient is off if each micro-batch's loss has the weight
            n_i / N instead, relative to the full batch's; `None` if that is the right weight.
        checks: Every comparison: fp64 first, then the precision of training.
        faults: Why gradients differ, as found by experiments; empty if they are equal.
        order_error: How much the full batch's gradient changes when its samples are in another
            order; `None` if that was not tried.
        mixing_layers: The layers (or the loss) that mix samples, in order of first appearance.
        buffers: Buffers that have other values after accumulation, largest change first.
        num_drifting_buffers: The number of all such buffers.
        unreached: Parameters that require a gradient and get none.
        detaching: Layers that stop gradients.
        stateful: Layers whose output depends on how often they were called before.
        carried: Parameters, buffers and attributes that a forward pass changes, if that makes
            gradients differ.
        changes_batch: Forward or the loss changes the batch in place; every pass got its own copy.
        single_precision: Why float32 was used instead of float64; `None` if float64 was used.
        used_smaller_images: The comparison in float64 ran on smaller images than training, because
            layers that mix had decided the verdict.
        replayed: Layers whose random draws were replayed sample by sample.
        switched_off: Layers whose randomness was switched off because it cannot be replayed.
        held_fixed: Layers whose random draws were replaced by one value for all samples, because
            memfit cannot tell which draw belongs to which sample.
        draws_on_host: Python or NumPy drew random numbers. Every pass began with the same seed, so
            a number for the whole pass was the same in all of them.
        num_moved_parameters: Parameters at zero that were given other values, because at zero they
            hide other parameters' gradients.
        num_jittered_samples: Samples that were copies of others and were made different.
        loop: The result of the user's own loop for each window; empty if no loop was given.
        loop_faults: The faults of that loop.
        alternatives: timm models of the same kind without the mixing layers; not checked.
        seconds: Wall time of the whole verification.
        torch_version: The torch that ran.
    """

    subject: str
    verdict: Verdict
    micro_batch_size: int
    accumulation_steps: int
    options: StepOptions
    device: str
    weighting: LossWeighting
    terms: tuple[LossTerm, ...] = ()
    off_by_samples: float | None = None
    checks: tuple[GradientCheck, ...]
    faults: tuple[GradientFault, ...] = ()
    order_error: float | None = None
    mixing_layers: tuple[MixingLayer, ...] = ()
    buffers: tuple[BufferDrift, ...] = ()
    num_drifting_buffers: int = 0
    unreached: tuple[str, ...] = ()
    detaching: tuple[str, ...] = ()
    stateful: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    changes_batch: bool = False
    single_precision: str | None = None
    used_smaller_images: bool = False
    replayed: tuple[str, ...] = ()
    switched_off: tuple[str, ...] = ()
    held_fixed: tuple[str, ...] = ()
    draws_on_host: bool = False
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

    @property
    def mixers(self) -> tuple[MixingLayer, ...]:
        """The former name of `mixing_layers`."""
        return self.mixing_layers

    def worst_relative_error(self, precision: str) -> float | None:
        """Return the largest relative error in a precision, or `None` if it was not checked."""
        errors = [c.worst_relative_error for c in self.checks if c.precision == precision]
        return max(errors, default=None)

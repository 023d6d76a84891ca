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
    `SUM`: a sum, so 1. `CLASSES`: a mean over weights of classes, so their sum over the
    micro-batch. `SEVERAL`: several losses that average over different things. `MEASURED`: anything
    else; the weights were read off the loss's gradients.
    """

    SAMPLES = "samples"
    TARGETS = "targets"
    SUM = "sum"
    CLASSES = "classes"
    SEVERAL = "several"
    MEASURED = "measured"


class GradientFault(str, enum.Enum):
    """Why accumulated gradients are not the full batch's.

    `MIXES_SAMPLES`: samples meet in a layer or in the loss. `DEPENDS_ON_ORDER`: the full batch with
    its samples in another order has another gradient. `CARRIES_STATE`: what one forward pass leaves
    behind changes the next. `ADDS_DIFFERENT_MEANS`: the loss is one number that adds means over
    different things, so that no single weight of a micro-batch is right. `DETACHES`: a layer cuts
    gradients off in some passes. `DRAWS_NOT_REPLAYED`: there are random draws that belong to the
    batch as a whole. `DOES_NOT_REPEAT`: the same pass from the same state gives another gradient.
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
class LossTerm(Record):
    """One of the losses that a step adds up, and what it averages over.

    Args:
        name: Its key or place among the losses that are returned; `"loss"` where there is one.
        weighting: What each micro-batch's has to be weighted by.
        counts: What counts, as an expression of the batch, where that has a name.
        unexplained: The part of the full batch's gradient that the weights do not explain.
        inside: It is a summand of the one number that the loss returns, and not returned itself.
    """

    name: str
    weighting: LossWeighting
    counts: str | None = None
    unexplained: float = 0.0
    inside: bool = False


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
        unit_roundoff: Of the precision_policy in which gradients are written.
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
        terms: The same for each of the losses, and for the summands of one that adds different
            means.
        checks: Every comparison: fp64 first, then the precision of training.
        faults: What makes gradients differ, as far as experiments tell; empty where they are equal.
        order_error: How far the full batch's gradient moves when its samples are put in another
            order; `None` where that was not tried.
        mixing_layers: What mixes samples, in order of first appearance.
        buffers: Buffers that accumulation leaves elsewhere, furthest first.
        num_drifting_buffers: How many those are in all.
        unreached: Parameters that require a gradient and get none.
        detaching: Layers that cut gradients off.
        stateful: Layers whose output depends on how often they were called before.
        carried: Parameters, buffers and attributes that a forward pass changes, where that makes
            gradients differ.
        changes_batch: Forward or the loss changes the batch in place; every pass had a copy.
        single_precision: Why float32 stands in for float64; `None` where it does not.
        replayed: Layers whose random draws were replayed sample by sample.
        switched_off: Layers whose randomness was switched off because it cannot be replayed.
        held_fixed: Layers whose random draws were replaced by one value for all samples, because
            it cannot be told which draw is whose.
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
    terms: tuple[LossTerm, ...] = ()
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
    replayed: tuple[str, ...] = ()
    switched_off: tuple[str, ...] = ()
    held_fixed: tuple[str, ...] = ()
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

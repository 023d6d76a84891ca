"""Single changes of a training step that need less memory, and what fits after each.

There is one list of changes. `memfit plan --explore` plans with each of them. The advice of
`memfit profile` sorts them by the bytes that they free.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator

from memfit.backends import SimulatedGpu
from memfit.backends.simulated import SimulatedBackend
from memfit.errors import DoesNotFitError, UnsupportedError, UsageError
from memfit.planning.planner import PlanTarget, plan_on
from memfit.records import Alternative, Exploration, Precision
from memfit.step import timm_models
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload
from memfit.units import format_bytes

__all__ = ["ChangeKind", "StepChange", "changes_of", "explore_on"]

_SMALLER_IMAGE = (3, 4)
# Usual products of patches and strides, also with windows of 7. The first divisor is taken.
_IMAGE_UNITS = (32, 28, 16)
_SMALL_CLASSIFIER = 10
# Lion keeps one number for every parameter, and Adafactor one for every row and column.
_ONE_NUMBER = "lion"
_NEXT_TO_NOTHING = "adafactor"
_NO_HEADROOM = "no micro-batch leaves the headroom without allocator retries"
# timm's optimizers that keep one number for every parameter.
_KEEP_ONE_NUMBER = frozenset(("momentum", "sgd", "sgdp", "sgdw", "nesterov", "lion"))


class ChangeKind(enum.Enum):
    """The kind of a change."""

    LAYOUT = "layout"
    FUSED_ATTENTION = "fused attention"
    PRECISION = "precision"
    CHECKPOINTING = "checkpointing"
    OPTIMIZER = "optimizer"
    IMAGE_SIZE = "image size"
    WEIGHTS = "weights"
    CLASSIFIER = "classifier"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepChange:
    """A training step with one thing changed.

    Args:
        kind: The kind of the change.
        title: The change, in a few words.
        how: The option that makes the change.
        cost: What it costs, in a few words.
        step: The changed step.
        needs_fused_attention: Trace it while timm may use fused attention.
    """

    kind: ChangeKind
    title: str
    how: str
    cost: str
    step: TrainingStep
    needs_fused_attention: bool = False


def changes_of(step: TrainingStep, card: SimulatedGpu) -> Iterator[StepChange]:
    """Yield single changes that can save memory; those that affect training least come first.

    Args:
        step: The unchanged step, with its precision chosen.
        card: The card to train on, which decides which precisions exist.
    """
    options = step.options

    def changed(**fields: object) -> TrainingStep:
        return dataclasses.replace(step, options=dataclasses.replace(options, **fields))  # type: ignore[arg-type]

    if not options.channels_last:
        yield StepChange(
            kind=ChangeKind.LAYOUT,
            title="channels last",
            how="--channels-last",
            cost="its cost is not known. Convolutions in half precision become faster",
            step=changed(channels_last=True),
        )
    if isinstance(step.subject, str) and not timm_models.uses_fused_attention():
        yield StepChange(
            kind=ChangeKind.FUSED_ATTENTION,
            title="fused attention, which timm's settings turn off here",
            how="TIMM_FUSED_ATTN=1",
            cost="its cost is not known. Attention becomes faster",
            step=step,
            needs_fused_attention=True,
        )
    if options.precision is Precision.FP32:
        mixed = card.auto_precision
        yield StepChange(
            kind=ChangeKind.PRECISION,
            title=f"mixed precision ({mixed.value})",
            how=f"--precision {mixed.value}",
            cost="activations have half the bits; weights stay in fp32",
            step=changed(precision=mixed),
        )
    if not options.grad_checkpointing:
        yield StepChange(
            kind=ChangeKind.CHECKPOINTING,
            title="gradient checkpointing",
            how="--grad-checkpointing",
            cost="forward runs twice: about a third more time",
            step=changed(grad_checkpointing=True),
        )
    yield from _lighter_optimizer(step)
    yield from _smaller_image(step)
    if options.precision is not Precision.BF16 and card.gpu.has_bf16:
        yield StepChange(
            kind=ChangeKind.WEIGHTS,
            title="bf16 weights",
            how="--precision bf16",
            cost="weights keep 8 bits of precision: small updates are lost",
            step=changed(precision=Precision.BF16),
        )
    if isinstance(step.subject, str) and (options.num_classes or 0) != _SMALL_CLASSIFIER:
        yield StepChange(
            kind=ChangeKind.CLASSIFIER,
            title=f"{_SMALL_CLASSIFIER} classes, if your data has no more",
            how=f"--num-classes {_SMALL_CLASSIFIER}",
            cost="works only if the data has so few classes",
            step=changed(num_classes=_SMALL_CLASSIFIER),
        )


def _lighter_optimizer(step: TrainingStep) -> Iterator[StepChange]:
    """Yield the step with an optimizer that keeps less state, if there is one."""
    now = step.options.optimizer
    if now is None or now == _NEXT_TO_NOTHING:
        return
    lighter = _NEXT_TO_NOTHING if now in _KEEP_ONE_NUMBER else _ONE_NUMBER
    subject = step.subject
    if isinstance(subject, Workload):
        subject = dataclasses.replace(subject, optimizer=lighter)
    yield StepChange(
        kind=ChangeKind.OPTIMIZER,
        title=f"optimizer {lighter}",
        how=f"--optimizer {lighter}",
        cost="another optimizer, which needs another learning rate",
        step=TrainingStep(
            subject=subject, options=dataclasses.replace(step.options, optimizer=lighter)
        ),
    )


def _smaller_image(step: TrainingStep) -> Iterator[StepChange]:
    """Yield the step with images of about 3/4 of the side length, in a size the model takes."""
    if not isinstance(step.subject, str):
        return
    size = step.options.image_size or timm_models.image_size_of(step.subject)
    if size is None:
        return
    numerator, denominator = _SMALLER_IMAGE
    patches = timm_models.patches_of(step.subject, step.options)
    units = (u for u in (*_IMAGE_UNITS, *patches[:1]) if not any(u % patch for patch in patches))
    unit = next((u for u in units if all(side % u == 0 for side in size)), None)
    if unit is None:
        return
    height, width = (max(side * numerator // denominator // unit * unit, unit) for side in size)
    if (height, width) == size:
        return
    yield StepChange(
        kind=ChangeKind.IMAGE_SIZE,
        title=f"image {height}x{width}",
        how=f"--image-size {height}x{width}",
        cost="smaller images, so accuracy changes",
        step=dataclasses.replace(
            step, options=dataclasses.replace(step.options, image_size=(height, width))
        ),
    )


def explore_on(
    card: SimulatedGpu,
    step: TrainingStep,
    target: PlanTarget,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Exploration:
    """Plan with the unchanged step, and with each single change.

    Args:
        card: The card to simulate.
        step: The step to train, with its precision chosen.
        target: The effective batch and the limits of the plan.
        progress: Called with the next change, the number of changes done, and of all changes.
    """
    # The data decides the number of classes.
    changes = [c for c in changes_of(step, card) if c.kind is not ChangeKind.CLASSIFIER]

    def begins(what: str, done: int) -> None:
        if progress is not None:
            progress(what, done, len(changes) + 1)

    begins("the step as it is", 0)
    baseline = _planned(card, step, target, change="", costs="")
    alternatives = []
    for done, change in enumerate(changes, start=1):
        begins(change.title, done)
        alternatives.append(_with_change(card, change, target))
    return Exploration(
        subject=step.name,
        device=card.device_name,
        capacity=card.capacity(),
        effective_batch_size=target.effective_batch_size,
        world_size=target.world_size,
        baseline=baseline,
        alternatives=tuple(alternatives),
    )


def _with_change(card: SimulatedGpu, change: StepChange, target: PlanTarget) -> Alternative:
    if not change.needs_fused_attention:
        return _planned(card, change.step, target, change=change.title, costs=change.cost)
    # A cache of traces cannot tell this step from the unchanged one, so it has its own cache.
    with timm_models.fused_attention():
        own_cache = SimulatedBackend(card.gpu, memory_bytes=card.capacity().usable_bytes)
        return _planned(own_cache, change.step, target, change=change.title, costs=change.cost)


def _planned(
    card: SimulatedGpu, step: TrainingStep, target: PlanTarget, *, change: str, costs: str
) -> Alternative:
    reason = None
    try:
        plan = plan_on(card, step, target)
    except (UsageError, UnsupportedError) as error:
        reason = str(error)
    except DoesNotFitError as error:
        needed = error.needed_bytes
        reason = _NO_HEADROOM if needed is None else f"needs {format_bytes(needed)} at batch size 1"
    else:
        return Alternative(
            change=change,
            costs=costs,
            options=plan.options,
            micro_batch_sizes=plan.micro_batch_sizes,
            recommended_micro_batch_size=plan.recommended_micro_batch_size,
            edge_found=plan.edge_found,
            peak_reserved_bytes=plan.peak_reserved_bytes,
        )
    return Alternative(change=change, costs=costs, options=step.options, reason=reason)

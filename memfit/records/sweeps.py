"""Many models on many cards, and the choice among them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, ClassVar

from memfit.records.base import Record, Source
from memfit.records.plans import MicroBatched
from memfit.records.steps import Averaging, Evaluation, Precision, StepOptions

__all__ = ["Choice", "ChoiceRow", "Sweep", "SweepRow"]


def _typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row's fields as it was given them, from those that JSON gave."""
    options = dict(values["options"])
    for name in ("image_size", "model_kwargs", "frozen"):
        if options[name] is not None:
            options[name] = tuple(
                tuple(pair) if isinstance(pair, list) else pair for pair in options[name]
            )
    kinds: dict[str, type[enum.Enum]] = {
        "precision": Precision,
        "ema": Averaging,
        "evaluate": Evaluation,
    }
    for name, kind in kinds.items():
        if options[name] is not None:
            options[name] = kind(options[name])
    fields = {name: value for name, value in values.items() if name != "schema_version"}
    return {**fields, "source": Source(values["source"]), "options": StepOptions(**options)}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SweepRow(Record):
    """One training step on one card.

    Args:
        model: The model's name.
        family: The name of timm's module that defines the model; empty if it is not known.
        device: The card's name.
        source: Simulated or rehearsed.
        options: The training step. The precision is chosen, if the step could be tried.
        capacity_bytes: The bytes that the step may use; `None` if nothing was tried.
        max_batch_size: The largest batch size that fits; `None` if not even one sample fits.
        recommended_batch_size: The batch size to train with; `None` if there is none.
        edge_found: One sample more than `max_batch_size` ran out of memory.
        is_approximate: The card was simulated with another vendor's kernels, so the batch sizes are
            near, not exact.
        peak_bytes: The peak of reserved bytes at the recommended batch size, or at the largest one
            if none is recommended.
        bytes_per_sample: What one sample more adds to the bytes that tensors ask for at the peak;
            `None` if fewer than two batch sizes fit.
        num_parameters: The model's parameters; `None` if it could not be built.
        forward_flops: Floating point operations of matrix products and convolutions in one sample's
            forward pass. A multiplication and an addition are two. `None` if it is not known.
        reason: Why there is no batch size, in a sentence; `None` if there is one.
    """

    model: str
    family: str
    device: str
    source: Source
    options: StepOptions
    capacity_bytes: int | None = None
    max_batch_size: int | None = None
    recommended_batch_size: int | None = None
    edge_found: bool = False
    is_approximate: bool = False
    peak_bytes: int | None = None
    bytes_per_sample: int | None = None
    num_parameters: int | None = None
    forward_flops: int | None = None
    reason: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SweepRow:
        """Return the row of which `to_dict` gave these values."""
        return cls(**_typed(values))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep(Record):
    """Many training steps on several cards that are not in the machine.

    Args:
        rows: A row for every training step and card, in the order in which they were asked for.
        gpus: The names of the cards.
        num_steps: How many training steps were asked for.
        torch_version: The torch that traced or rehearsed.
        timm_version: The timm that built the models.
        is_complete: False: the sweep was interrupted, and `rows` has what was done until then.
        is_quick: Simulated workspaces of convolutions are bounds, and cuDNN was not asked for them.
    """

    rows: tuple[SweepRow, ...]
    gpus: tuple[str, ...]
    num_steps: int
    torch_version: str
    timm_version: str
    is_complete: bool = True
    is_quick: bool = False

    _derived: ClassVar[tuple[str, ...]] = ("source",)

    @property
    def source(self) -> Source:
        """Where the figures come from."""
        is_rehearsed = any(row.source is Source.REHEARSED for row in self.rows)
        return Source.REHEARSED if is_rehearsed else Source.SIMULATED


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRow(MicroBatched):
    """A model that could be fine-tuned on a card, with its plan.

    Args:
        model: The model's name, with the tag of the weights whose accuracy is given.
        device: The card's name.
        source: Simulated or rehearsed.
        options: The training step. The precision is chosen, if the step could be tried.
        top1_percent: The published accuracy of these weights on ImageNet, in percent; `None` if
            none is published.
        top1_image_size: The image side in pixels at which that accuracy was measured.
        micro_batch_sizes: The micro-batches of one optimizer step; empty if nothing fits.
        recommended_micro_batch_size: The largest micro-batch that keeps the headroom, up to the
            effective batch size.
        checkpointed_micro_batch_size: The same with gradient checkpointing; `None` if the model
            has no checkpointing, or if it was not tried because the whole batch fits.
        is_exact: Whether accumulation computes the full batch's gradients. A layer of batch
            normalisation makes it inexact. `None` if nothing is accumulated.
        peak_bytes: The peak of reserved bytes of the plan.
        num_parameters: The model's parameters.
        reason: Why there is no plan, or why it is not chosen, in a sentence.
    """

    model: str
    device: str
    source: Source
    options: StepOptions
    top1_percent: float | None = None
    top1_image_size: int | None = None
    micro_batch_sizes: tuple[int, ...] = ()
    recommended_micro_batch_size: int | None = None
    checkpointed_micro_batch_size: int | None = None
    is_exact: bool | None = None
    peak_bytes: int | None = None
    num_parameters: int | None = None
    reason: str | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ChoiceRow:
        """Return the row of which `to_dict` gave these values."""
        fields = {name: value for name, value in _typed(values).items() if name not in cls._derived}
        return cls(**{**fields, "micro_batch_sizes": tuple(fields["micro_batch_sizes"])})


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice(Record):
    """Models to fine-tune on a card, best first.

    Args:
        device: The card's name.
        effective_batch_size: Samples in each optimizer step.
        rows: The models, by published accuracy.
        num_tried: How many models were tried.
        num_known: How many models there are to try.
        accuracy_source: Where the accuracies come from, with the date.
        is_complete: False: the choice was interrupted.
    """

    device: str
    effective_batch_size: int
    rows: tuple[ChoiceRow, ...]
    num_tried: int
    num_known: int
    accuracy_source: str
    is_complete: bool = True

"""A training step's description."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from memfit.errors import UsageError
from memfit.records.base import Record

__all__ = ["Precision", "StepOptions"]


class Precision(str, enum.Enum):
    """The precision of a training step.

    `FP32` and `BF16` train weights of that type. `AMP_BF16` and `AMP_FP16` keep fp32 weights and
    use `torch.autocast`. `AMP_FP16` also uses a `GradScaler`. With `AUTO` the device chooses.
    """

    FP32 = "fp32"
    AMP_BF16 = "amp-bf16"
    AMP_FP16 = "amp-fp16"
    BF16 = "bf16"
    AUTO = "auto"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions(Record):
    """The options of a training step, without its model and its batch size.

    Args:
        precision: The precision; `AUTO` until a device has chosen.
        optimizer: A name that `timm.optim.create_optimizer_v2` knows; `None` for a workload that
            brings its own optimizer.
        image_size: Height and width in pixels; `None` for the model's own size.
        num_classes: Size of the classifier; `None` for the model's own size.
        channels_last: Weights and images in `torch.channels_last`.
        grad_checkpointing: Recompute activations in backward (`set_grad_checkpointing`).
        accumulate: Run two micro-batches before each optimizer step instead of one.
        model_kwargs: More arguments for `timm.create_model`, as pairs.
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

"""A training step's description."""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Iterable
from typing import Any

from memfit.errors import UsageError
from memfit.records.base import Record

__all__ = ["Averaging", "Evaluation", "Parallel", "Precision", "StepOptions"]

_FEWEST_RANKS = 2


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

    @classmethod
    def named(cls, given: object, *, known: Iterable[Precision] | None = None) -> Precision:
        """Return the precision of a name.

        Args:
            given: The name, or the precision itself.
            known: The precisions that may be chosen; by default all.

        Raises:
            UsageError: There is no such precision. The message has the nearest ones.
        """
        choices = [choice.value for choice in known or cls]
        if given in choices:
            return cls(given)
        near = [name for name in _near(str(given)) if name in choices]
        instead = f"; did you mean {' or '.join(near)}?" if near else "."
        raise UsageError(
            f"There is no precision {str(given)!r}{instead} Choose one of {', '.join(choices)}."
        )


_OTHER_NAMES = {
    "fp32": "float32 float f32 32 full single double float64 fp64 no none tf32 32-true fp32-true",
    "amp-fp16": "fp16 float16 half f16 16 amp mixed 16-mixed fp16-mixed mixed-fp16 amp-float16",
    "amp-bf16": "bfloat16 amp-bfloat16 amp mixed bf16-mixed mixed-bf16",
    "bf16": "bfloat16 bf16-true",
}
"""What torch, Lightning, Accelerate and transformers call the precisions. memfit trains no weights
in float16, so the nearest to `fp16` is `amp-fp16`."""


def _near(given: str) -> list[str]:
    """Return the precisions that a wrong name may mean."""
    name = given.lower().removeprefix("torch.").replace("_", "-").strip()
    alike = [known for known, others in _OTHER_NAMES.items() if name in (known, *others.split())]
    return alike or difflib.get_close_matches(name, [choice.value for choice in Precision], n=1)


class Averaging(str, enum.Enum):
    """Where a training loop keeps an exponential moving average (EMA) of the weights.

    `DEVICE`: a copy of parameters and buffers on the device that trains. `CPU`: in host memory, so
    the device holds nothing for it.
    """

    DEVICE = "device"
    CPU = "cpu"


class Evaluation(str, enum.Enum):
    """What a forward pass without gradients shares the device with.

    `ALONE`: only the model is there, as for inference. `IN_TRAINING`: the optimizer's state, and
    the average of the weights if there is one, as in the validation of a training run.
    """

    ALONE = "alone"
    IN_TRAINING = "in-training"


class Parallel(str, enum.Enum):
    """How the ranks of a training run share the model.

    `DDP`: each rank has the whole model, in a `DistributedDataParallel`. `DDP_BUCKET_VIEW`: the
    same with `gradient_as_bucket_view`. `FSDP2`: each rank has a shard, by `fully_shard` on each
    block and on the model.
    """

    DDP = "ddp"
    DDP_BUCKET_VIEW = "ddp-bucket-view"
    FSDP2 = "fsdp2"


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
        keeps_outputs: The loop keeps inputs, outputs and loss until the next ones replace them.
        ema: Where an average of the weights is kept; `None` if there is none.
        frozen: Patterns of parameter names that are not trained.
        prefetch: Batches that wait on the device besides the one that is trained on.
        fused: Use the optimizer's fused implementation.
        optimizer_in_backward: Take the optimizer's step for each parameter as soon as its gradient
            is there, and free the gradient.
        evaluate: Run a forward pass without gradients instead of training; `None` to train.
        no_grad: Evaluate under `torch.no_grad()` instead of `torch.inference_mode()`. In mixed
            precision autocast then keeps its copies of the weights until the pass ends.
        compile: Compile the model with `torch.compile`, for the batch size of each trial.
        checkpoint: Modules that are recomputed in backward, by their names or patterns of them.
        parallel: How the ranks share the model; `None` for a process that trains alone.
        world_size: The number of ranks. A trial is the first of them.
    """

    precision: Precision = Precision.AUTO
    optimizer: str | None = None
    image_size: tuple[int, int] | None = None
    num_classes: int | None = None
    channels_last: bool = False
    grad_checkpointing: bool = False
    accumulate: bool = False
    model_kwargs: tuple[tuple[str, Any], ...] = ()
    keeps_outputs: bool = False
    ema: Averaging | None = None
    frozen: tuple[str, ...] = ()
    prefetch: int = 0
    fused: bool = False
    optimizer_in_backward: bool = False
    evaluate: Evaluation | None = None
    no_grad: bool = False
    compile: bool = False
    checkpoint: tuple[str, ...] = ()
    parallel: Parallel | None = None
    world_size: int = 1

    def __post_init__(self) -> None:
        """Refuse a classifier without classes, and options that exclude each other."""
        # A record that was read from JSON has lists.
        object.__setattr__(self, "frozen", tuple(self.frozen))
        object.__setattr__(self, "checkpoint", tuple(self.checkpoint))
        if self.num_classes is not None and self.num_classes < 1:
            raise UsageError(f"num_classes must be at least 1, not {self.num_classes}.")
        if self.optimizer_in_backward and self.accumulate:
            raise UsageError(
                "optimizer_in_backward frees each gradient as soon as it is there, so none can be "
                "accumulated: leave one of the two out."
            )
        if self.optimizer_in_backward and self.precision is Precision.AMP_FP16:
            raise UsageError(
                "optimizer_in_backward has no gradients left that a GradScaler could check: train "
                "in amp-bf16, bf16 or fp32."
            )
        if self.checkpoint and self.grad_checkpointing:
            raise UsageError(
                "grad_checkpointing recomputes every block, and checkpoint names some: leave one "
                "of the two out."
            )
        if self.no_grad and self.evaluate is None:
            raise UsageError("no_grad says how an evaluation runs: give evaluate too.")
        if self.evaluate is not None and self.accumulate:
            raise UsageError(
                "An evaluation has no gradients to accumulate: leave evaluate or accumulate out."
            )
        self._check_alone()
        self._check_ranks()

    def _check_alone(self) -> None:
        """Refuse what an evaluation of nothing but the model does not have."""
        if self.evaluate is not Evaluation.ALONE:
            return
        for name in ("ema", "fused", "optimizer_in_backward"):
            if getattr(self, name):
                raise UsageError(
                    f"An evaluation alone holds nothing but the model: leave {name} out, or give "
                    "evaluate='in-training'."
                )

    def _check_ranks(self) -> None:
        """Refuse ranks that cannot train so."""
        if self.parallel is None:
            if self.world_size != 1:
                raise ValueError("ranks share a model in some way")
            return
        if self.world_size < _FEWEST_RANKS:
            raise UsageError(
                f"parallel={self.parallel.value!r} is for several ranks: give a world_size of at "
                f"least {_FEWEST_RANKS}, not {self.world_size}."
            )
        if self.evaluate is Evaluation.ALONE and self.parallel is not Parallel.FSDP2:
            raise UsageError(
                "An evaluation alone has no gradients that ranks could sum: leave parallel and "
                "world_size out, or give parallel='fsdp2' or evaluate='in-training'."
            )
        if self.compile:
            raise UsageError(
                "A compiled model is not tried with other ranks: leave compile or parallel and "
                "world_size out, or rehearse a script that does both."
            )
        if self.optimizer_in_backward:
            raise UsageError(
                "optimizer_in_backward steps before the ranks have met, so it does not go with "
                "parallel: leave one of the two out."
            )
        if self.parallel is Parallel.FSDP2 and self.channels_last:
            raise UsageError(
                "fully_shard (parallel='fsdp2') takes no weights in channels_last: leave "
                "channels_last out."
            )

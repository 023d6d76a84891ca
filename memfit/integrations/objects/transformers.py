"""A transformers `Trainer` as a workload.

The step is that of `Trainer.training_step`, with the trainer's own `compute_loss` and
`create_optimizer`. With accumulation, the trainer puts all micro-batches of an optimizer step on
the device before the first one runs (`get_batch_samples`), so a trial holds them too.

Source: huggingface/transformers, src/transformers/trainer.py (`training_step`, `compute_loss`,
    `get_batch_samples`). huggingface/accelerate, src/accelerate/accelerator.py (`prepare_model`):
    in mixed precision, the model's outputs are converted to float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, Final

import torch
from torch import nn

from memfit.errors import UsageError
from memfit.integrations.objects.step import (
    HeldSamples,
    TrainersStep,
    TrainersWorkload,
    drawn_batch,
    made_real,
    precision_of_weights,
    step_of,
)
from memfit.records import Precision

__all__ = ["workload_of_trainer"]

# What a step does not use, and what would travel to the trial's process.
_LEFT_BEHIND: Final = (
    "train_dataset",
    "eval_dataset",
    "data_collator",
    "processing_class",
    "optimizer",
    "lr_scheduler",
    "callback_handler",
    "model_wrapped",
    "model_init",
    "compute_metrics",
    "preprocess_logits_for_metrics",
    "hub_model_id",
)


def workload_of_trainer(trainer: Any, *, samples_per_step: int | None = None) -> TrainersWorkload:
    """Return the training step of a `Trainer`.

    Args:
        trainer: The trainer, which is not changed.
        samples_per_step: Samples that one process has in an optimizer step, if that is planned.

    Raises:
        UsageError: The trainer has no data to train on.
    """
    if trainer.train_dataset is None:
        raise UsageError(
            "The Trainer has no train_dataset: a step is tried on a batch of its data."
        )
    accelerator, arguments = trainer.accelerator, trainer.args
    loaders = list(accelerator._dataloaders)  # noqa: SLF001 - prepare() adds to it
    try:
        batch = drawn_batch(lambda: next(iter(trainer.get_train_dataloader())), trainer)
    finally:
        accelerator._dataloaders[:] = loaders  # noqa: SLF001 - as above
    num_steps = int(arguments.gradient_accumulation_steps)
    held = None
    if samples_per_step is not None:
        held = HeldSamples(in_all=samples_per_step)
    elif num_steps > 1:
        held = HeldSamples(num_micro_batches=num_steps)
    step = _TrainersOwnStep(trainer)
    return step_of(
        step,
        dict(batch),
        _optimizer_of(step, trainer),
        precision=_precision_of(trainer),
        accumulates=num_steps > 1,
        held_samples=held,
    )


def _precision_of(trainer: Any) -> Precision:
    if trainer.args.bf16:
        return Precision.AMP_BF16
    return Precision.AMP_FP16 if trainer.args.fp16 else precision_of_weights(trainer.model)


def _optimizer_of(step: _TrainersOwnStep, trainer: Any) -> Any:
    optimizer = trainer.optimizer
    if optimizer is None:
        return _OptimizerOf(step)
    # After a training it is Accelerate's wrapper.
    return getattr(optimizer, "optimizer", optimizer)


class _OptimizerOf:
    def __init__(self, step: _TrainersOwnStep) -> None:
        self._step = step

    def __call__(self, _parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return self._step.make_optimizer()


class _TrainersOwnStep(TrainersStep):
    def __init__(self, trainer: Any) -> None:
        super().__init__(trainer.model)
        self._trainer = copy.copy(trainer)
        vars(self._trainer).update(
            {name: None for name in _LEFT_BEHIND if name in vars(self._trainer)}
        )
        self._trainer.accelerator = _NoAccelerator()
        self._trainer.gather_function = None
        self._is_mixed = bool(trainer.args.bf16 or trainer.args.fp16)
        self._checkpointing = _checkpointing_of(trainer.args)

    def forward(self, batch: Any, held: Any = None) -> torch.Tensor:
        # All micro-batches of a step stay until those of the next step are there.
        self._kept = (batch, made_real(held))
        if torch.is_grad_enabled():
            self.model.train()
        self._checkpoint()
        model = _Float32Outputs(self.model) if self._is_mixed else self.model
        loss: torch.Tensor = self._trainer.compute_loss(model, dict(batch))
        return loss

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return a new optimizer over the model's parameters, as the trainer makes it."""
        trainer = copy.copy(self._trainer)
        trainer.model = self.model
        optimizer: torch.optim.Optimizer = trainer.create_optimizer()
        return optimizer

    def _checkpoint(self) -> None:
        if self._checkpointing is None:
            return
        method, keywords = self._checkpointing
        self._checkpointing = None
        getattr(self.model, method)(**keywords)


def _checkpointing_of(arguments: Any) -> tuple[str, dict[str, Any]] | None:
    """Return the method of the model that turns on checkpointing, and its arguments."""
    for kind in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(arguments, kind, False):
            return f"{kind}_enable", {f"{kind}_kwargs": getattr(arguments, f"{kind}_kwargs", None)}
    return None


class _Float32Outputs(nn.Module):
    """A model whose outputs are converted to float32, as Accelerate does in mixed precision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        from accelerate.utils import convert_outputs_to_fp32

        return convert_outputs_to_fp32(self.model.forward)(**inputs)


class _NoAccelerator:
    """What `compute_loss` asks an Accelerator for, in one process."""

    parallelism_config = None
    num_processes = 1

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        return model.model if isinstance(model, _Float32Outputs) else model

"""A fastai `Learner` as a workload.

The step is that of `Learner._do_one_batch`: a batch, its predictions and its loss stay on the
device until the next batch has its own, and gradients are filled with zeros instead of dropped.
Callbacks of the learner are not run, but mixed precision, `GradientClip` and frozen batch norm
(`BnFreeze`) are followed.

Source: fastai/fastai, fastai/learner.py (`_do_one_batch`), fastai/optimizer.py (`zero_grad`),
    fastai/callback/fp16.py (`MixedPrecision`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from memfit.errors import UnsupportedError, UsageError
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
from memfit.step.nesting import map_leaves

__all__ = [
    "FastaiOptimizer",
    "as_float32",
    "batch_of",
    "callback_of",
    "num_inputs_of",
    "precision_of",
    "refuse_mixing",
    "workload_of_learner",
]

_PRECISIONS = {"fp16": Precision.AMP_FP16, "bf16": Precision.AMP_BF16}


def workload_of_learner(learn: Any, *, samples_per_step: int | None = None) -> TrainersWorkload:
    """Return the training step of a `Learner`, in the phase (frozen or not) that it is in.

    Args:
        learn: The learner, which is not changed.
        samples_per_step: Samples that one process has in an optimizer step, if that is planned.
            fastai puts all of them on the device before the first micro-batch.

    Raises:
        UsageError: The learner has no data or no loss.
        UnsupportedError: A callback changes what a step computes.
    """
    if learn.loss_func is None or learn.dls is None:
        raise UsageError("The Learner has no loss or no data: make it with loss_func and dls.")
    refuse_mixing(learn)
    batch = batch_of(learn)
    step = _LearnersStep(learn, num_inputs_of(learn, lambda: batch))
    return step_of(
        step,
        tuple(batch),
        _OptimizerOf(step, learn),
        precision=precision_of(learn),
        held_samples=None if samples_per_step is None else HeldSamples(in_all=samples_per_step),
    )


def callback_of(learn: Any, name: str) -> Any:
    """Return the learner's callback of a class, or of a subclass of it; `None` if it has none."""
    for callback in learn.cbs:
        if any(kind.__name__ == name for kind in type(callback).__mro__):
            return callback
    return None


def precision_of(learn: Any) -> Precision:
    """Return the precision that a learner is set to."""
    mixed = callback_of(learn, "MixedPrecision")
    return precision_of_weights(learn.model) if mixed is None else _PRECISIONS[mixed.amp_mode.value]


def refuse_mixing(learn: Any) -> None:
    """Refuse callbacks that change what a learner's step computes.

    Raises:
        UnsupportedError: There is such a callback.
    """
    for name in ("MixHandler", "CutMix", "NonNativeMixedPrecision", "GradientAccumulation"):
        found = callback_of(learn, name)
        if found is not None:
            kind = type(found).__name__
            why = (
                "leave it out, because memfit accumulates by itself"
                if name == "GradientAccumulation"
                else "rehearse the script instead: memfit rehearse --gpu NAME -- python train.py"
            )
            raise UnsupportedError(f"{kind} changes what a step of the Learner computes; {why}.")


def batch_of(learn: Any) -> Any:
    """Return a training batch of a learner, and leave its loader as it was.

    The loader is fastai's own, or any other that makes batches, such as PyTorch's.
    """
    loader = learn.dls.train
    return drawn_batch(lambda: _drawn(loader), loader)


def num_inputs_of(learn: Any, batch: Callable[[], Any]) -> int:
    """Return how many of a batch's items are inputs of the model; the others are targets.

    Args:
        learn: The learner.
        batch: Returns a batch. It is asked where the learner's data does not say.
    """
    given = getattr(learn.dls, "n_inp", None)
    return max(1, len(batch()) - 1) if given is None else int(given)


def _drawn(loader: Any) -> Any:
    """Draw a batch; a loader of fastai's own keeps its generator where it is."""
    if not hasattr(loader, "one_batch"):
        return next(iter(loader))
    loader.rng = copy.copy(loader.rng)
    return loader.one_batch()


class _LearnersStep(TrainersStep):
    def __init__(self, learn: Any, num_inputs: int) -> None:
        super().__init__(learn.model)
        self._num_inputs = num_inputs
        self._loss = learn.loss_func
        self._is_mixed = callback_of(learn, "MixedPrecision") is not None
        self._freezes_norm = callback_of(learn, "BnFreeze") is not None

    def forward(self, batch: Any, held: Any = None) -> torch.Tensor:
        inputs, targets = batch[: self._num_inputs], batch[self._num_inputs :]
        # The two batches before this one are still there. In fastai they are part of cycles of
        # references, so they stay until Python's garbage collector runs.
        self._set_modes()
        predictions = self.model(*inputs)
        if self._is_mixed:
            predictions = map_leaves(as_float32, predictions)
        loss: torch.Tensor = self._loss(predictions, *targets)
        kept = predictions, (loss, loss.clone()), batch, made_real(held)
        self._kept = (*self._kept[-1:], kept)
        return loss

    def _set_modes(self) -> None:
        is_validation = not torch.is_grad_enabled()
        if self.model.training or is_validation:
            return
        self.model.train()
        if self._freezes_norm:
            for module in self.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - no other name
                    module.train(any(p.requires_grad for p in module.parameters(recurse=False)))


def as_float32(leaf: Any) -> Any:
    """Return a tensor of floating-point numbers in float32, and anything else as it is."""
    is_floating = isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
    return leaf.float() if is_floating else leaf


class FastaiOptimizer(torch.optim.Optimizer):
    """A fastai optimizer with the interface of torch's.

    Args:
        inner: The fastai optimizer.
        max_norm: The norm that gradients are clipped to; `None` for no clipping.
    """

    def __init__(self, inner: Any, *, max_norm: float | None = None) -> None:
        super().__init__([p for group in inner.param_lists for p in group], {})
        self.inner = inner
        self._max_norm = max_norm
        self.state = inner.state

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step as fastai does."""
        assert closure is None
        if self._max_norm is not None:
            nn.utils.clip_grad_norm_(self.param_groups[0]["params"], self._max_norm)
        self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Fill gradients with zeros. fastai does this for both values of `set_to_none`."""
        del set_to_none
        self.inner.zero_grad()


class _OptimizerOf:
    """Makes the optimizer of a learner, as `Learner.create_opt` does."""

    def __init__(self, step: _LearnersStep, learn: Any) -> None:
        self._step = step
        clip = callback_of(learn, "GradientClip")
        self._max_norm = None if clip is None else float(clip.max_norm)
        self._frozen_to = 0 if learn.opt is None else getattr(learn.opt, "frozen_idx", 0)
        self._learn = copy.copy(learn)
        # The model is the step's. The data would travel to the trial's process, and so would the
        # callbacks, of which each is an attribute too and has the learner with its data.
        own = {"model": None, "opt": None, "dls": None, "cbs": type(learn.cbs)(), "loss_func": None}
        vars(self._learn).update({name: own.get(name) for name in (*own, "xb", "yb", "pred")})
        for name, value in vars(learn).items():
            if any(value is callback for callback in learn.cbs):
                del vars(self._learn)[name]

    def __call__(self, _parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        learn = copy.copy(self._learn)
        learn.model = self._step.model
        learn.create_opt()
        if self._frozen_to:
            learn.opt.freeze_to(self._frozen_to)
        return FastaiOptimizer(learn.opt, max_norm=self._max_norm)

"""Exact accumulation in fastai: a callback that takes the steps of a `Learner`.

    learn.fit_one_cycle(5, cbs=memfit.fastai.Accumulate(plan))

fastai's own `GradientAccumulation` counts samples, and its steps overshoot. This callback runs each
batch of the loader as one optimizer step, in the plan's micro-batches. fastai's own step is
cancelled, so this module also does what other callbacks do in it: mixed precision, clipping, and
the events `before_step` and `after_step`.

Source: fastai/fastai, fastai/learner.py (`_do_one_batch`, `_with_events`), fastai/callback/fp16.py,
    fastai/callback/schedule.py (`ParamScheduler` has order 60 and needs `before_batch`).
"""

from __future__ import annotations

from typing import Any, Final

import torch
from fastai.callback.core import Callback, CancelBatchException, CancelStepException

from memfit.accumulation import Accumulator, Weight
from memfit.accumulation.arguments import read_plan
from memfit.errors import UnsupportedError, UsageError
from memfit.integrations.objects.fastai import (
    FastaiOptimizer,
    as_float32,
    batch_of,
    callback_of,
    num_inputs_of,
    precision_of,
    refuse_mixing,
)
from memfit.records import Plan, Precision
from memfit.step.nesting import map_leaves

__all__ = ["Accumulate"]

# Events of a step of fastai's that this callback's step does not have.
_MISSING: Final = ("after_pred", "after_loss", "before_backward", "after_backward")
_FOLLOWED: Final = ("MixedPrecision", "GradientClip")
# After `ParamScheduler` (60), and after `CastToTensor` (70).
_LAST: Final = 71


class Accumulate(Callback):  # type: ignore[misc]
    """Trains a `Learner` on each batch of its loader in the plan's micro-batches.

    Args:
        plan: The plan of `memfit.plan(learn, ...)`, or the most samples in a micro-batch. The
            loader's `bs` is the effective batch size of one process.
        weight: What the loss averages over, as for `memfit.Accumulator`.
        recover: Repeat a step that runs out of memory, in smaller micro-batches.
    """

    order, run_valid = _LAST, False

    def __init__(
        self, plan: Plan | int, *, weight: Weight = "samples", recover: bool = True
    ) -> None:
        read_plan(plan)
        self._plan = plan
        self._weight = weight
        self._recover = recover
        self._accumulator: Accumulator | None = None

    def before_fit(self) -> None:
        """Look at the learner, and make the accumulator.

        Raises:
            UsageError: The loader's batch size does not match the plan.
            UnsupportedError: A callback needs an event that a step does not have.
        """
        learn: Any = self.learn
        refuse_mixing(learn)
        _refuse_missing_events(learn)
        if isinstance(self._plan, Plan):
            loader = learn.dls.train
            _check_batch_size(getattr(loader, "bs", None) or loader.batch_size, self._plan)
        clip = callback_of(learn, "GradientClip")
        if clip is not None and clip.norm_type != 2:  # noqa: PLR2004 - the Euclidean norm
            raise UnsupportedError(
                f"memfit clips the Euclidean norm of gradients, and GradientClip has norm_type="
                f"{clip.norm_type}."
            )
        mixed = callback_of(learn, "MixedPrecision")
        on_gpu = next(learn.model.parameters()).device.type == "cuda"
        precision = Precision.FP32
        if mixed is not None and on_gpu:  # fastai has autocast for GPUs only
            precision = precision_of(learn)
        self._accumulator = Accumulator(
            learn.model,
            _SteppedWithEvents(learn),
            self._plan,
            loss=_Loss(learn, is_mixed=mixed is not None),
            weight=self._weight,
            num_inputs=num_inputs_of(learn, lambda: batch_of(learn)),
            clip_grad_norm=None if clip is None else float(clip.max_norm),
            scaler=learn.scaler if precision is Precision.AMP_FP16 else None,
            precision=precision,
            recover=self._recover,
        )

    def before_batch(self) -> None:
        """Take one optimizer step on the batch, and cancel fastai's own.

        Raises:
            CancelBatchException: Always, after the step.
        """
        learn: Any = self.learn
        assert self._accumulator is not None
        mixed = callback_of(learn, "MixedPrecision")
        if mixed is not None:
            # It entered autocast before this callback, and would leave it after the loss.
            mixed.after_loss()
        learn.loss_grad = self._accumulator.step((*learn.xb, *learn.yb))
        learn.loss = learn.loss_grad.clone()
        raise CancelBatchException

    def after_fit(self) -> None:
        """Let go of the model and the optimizer."""
        self._accumulator = None


class _SteppedWithEvents(FastaiOptimizer):
    """A learner's optimizer, which calls `before_step` and `after_step` as fastai does."""

    def __init__(self, learn: Any) -> None:
        super().__init__(learn.opt)
        self._learn = learn

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step as fastai does, with the events of a step."""
        assert closure is None
        try:
            self._call("before_step")
            self.inner.step()
        except CancelStepException:
            self._call("after_cancel_step")
        self._call("after_step")

    def _call(self, event: str) -> None:
        for callback in self._learn.cbs.sorted("order"):
            if not _is_followed(callback):
                callback(event)


class _Loss:
    """The loss of a learner, which a callback may change between batches."""

    def __init__(self, learn: Any, *, is_mixed: bool) -> None:
        self._learn = learn
        self._is_mixed = is_mixed

    def __call__(self, predictions: Any, *targets: Any) -> torch.Tensor:
        if self._is_mixed:
            predictions = map_leaves(as_float32, predictions)
        loss: torch.Tensor = self._learn.loss_func(predictions, *targets)
        return loss


def _is_followed(callback: Any) -> bool:
    """Whether this module does what a callback does in a step."""
    return any(kind.__name__ in _FOLLOWED for kind in type(callback).__mro__)


def _check_batch_size(batch_size: int, plan: Plan) -> None:
    """Refuse a loader whose batches are not those of the plan.

    Raises:
        UsageError: They are not.
    """
    if batch_size not in {plan.share_of(0), plan.share_of(plan.world_size - 1)}:
        raise UsageError(
            f"The plan is for {plan.share_of(0)} samples in each step of a process, and the "
            f"loader has bs={batch_size}: make the DataLoaders with bs={plan.share_of(0)}."
        )


def _refuse_missing_events(learn: Any) -> None:
    """Refuse callbacks that need an event that a step does not have.

    Raises:
        UnsupportedError: There is such a callback.
    """
    for callback in learn.cbs:
        if not getattr(callback, "run_train", True) or _is_followed(callback):
            continue
        missing = [event for event in _MISSING if hasattr(callback, event)]
        if missing:
            raise UnsupportedError(
                f"{type(callback).__name__} needs the event {missing[0]}, which a step in "
                "micro-batches does not have: leave the callback out, or use fastai's own "
                "GradientAccumulation."
            )
    recorder = getattr(learn, "recorder", None)
    if recorder is not None and recorder.train_metrics:
        raise UnsupportedError(
            "The Recorder's train_metrics need the predictions of a whole batch, which a step in "
            "micro-batches does not keep: leave train_metrics out."
        )

"""A fastai Learner accumulates exactly, and its schedule, clipping and callbacks still run."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from accumulation.parts import plan_of
from torch import nn

import memfit
from integrations import exact
from memfit.errors import UnsupportedError, UsageError
from memfit.records import Plan

pytestmark = pytest.mark.filterwarnings("default")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fastai warns while it is imported
    pytest.importorskip("fastai.basics", reason="it trains with fastai")

from fastai.callback.core import Callback  # noqa: E402 - skipped without fastai
from fastai.callback.fp16 import MixedPrecision  # noqa: E402 - as above
from fastai.callback.schedule import ParamScheduler, SchedLin  # noqa: E402 - as above
from fastai.callback.training import GradientAccumulation, GradientClip  # noqa: E402 - as above
from fastai.data.core import DataLoaders  # noqa: E402 - as above
from fastai.data.load import DataLoader  # noqa: E402 - as above
from fastai.learner import Learner  # noqa: E402 - as above
from fastai.optimizer import SGD  # noqa: E402 - as above

from memfit.fastai import Accumulate  # noqa: E402 - as above


class Recording(Callback):  # type: ignore[misc]
    """Keeps the gradients and the learning rate of each step, and the losses."""

    order = 50

    def __init__(self) -> None:
        self.steps: list[exact.Gradients] = []
        self.rates: list[float] = []
        self.seen_losses: list[float] = []

    def before_step(self) -> None:
        """Keep the gradients."""
        self.steps.append(exact.gradients(self.learn.model.parameters()))
        self.rates.append(self.learn.opt.hypers[-1]["lr"])

    def after_batch(self) -> None:
        """Keep the loss."""
        if self.learn.training:
            self.seen_losses.append(float(self.learn.loss.detach()))


def learner(batch_size: int = exact.SAMPLES, *, num_samples: int = 160, cbs: Any = ()) -> Any:
    """Return a learner whose loader yields a short last batch, in order."""
    loaders = [
        DataLoader(exact.data(num_samples), bs=batch_size, shuffle=False, drop_last=False)
        for _ in range(2)
    ]
    dls = DataLoaders(*loaders, device=torch.device("cpu"))
    learn = Learner(dls, exact.Small(), loss_func=nn.CrossEntropyLoss(), opt_func=SGD, wd=0.0)
    return learn.remove_cbs([cb for cb in learn.cbs if cb.name == "progress"]).add_cbs(cbs)


def fitted(*callbacks: Any, batch_size: int = exact.SAMPLES) -> tuple[Any, Recording]:
    seen = Recording()
    learn = learner(batch_size)
    schedule = ParamScheduler({"lr": SchedLin(0.2, 0.1)})
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[seen, schedule, *callbacks])
    return learn, seen


def plan() -> Plan:
    return plan_of(exact.SAMPLES, exact.MICRO, multiple_of=exact.MICRO)


@pytest.mark.parametrize("clips", [False, True])
def test_each_step_is_that_of_the_whole_batch(clips: bool) -> None:
    """The second batch is short. The schedule, the losses and the weights are fastai's own."""
    clip = [GradientClip(0.05)] if clips else []
    theirs, expected = fitted(*clip)
    ours, seen = fitted(*clip, Accumulate(plan()))
    assert ours.model.sizes[:5] == [40, 40, 16, 40, 24]
    assert exact.error(seen.steps, expected.steps) < 1e-6
    assert seen.rates == expected.rates
    assert seen.seen_losses == pytest.approx(expected.seen_losses, rel=1e-6)
    torch.testing.assert_close(ours.recorder.losses, theirs.recorder.losses)
    assert ours.recorder.values[0][1] == pytest.approx(theirs.recorder.values[0][1], rel=1e-5)
    assert [cb.name for cb in ours.cbs] == [cb.name for cb in theirs.cbs]


def test_loaders_of_pytorch_are_taken() -> None:
    """They have no batch of their own to give, no `bs` and no number of inputs."""
    loaders = [torch.utils.data.DataLoader(exact.data(160), batch_size=exact.SAMPLES)] * 2
    learn = learner()
    learn.dls = DataLoaders(*loaders, device=torch.device("cpu"))
    probed = memfit.probe(learn, gpu="rtx3060", engine="simulate", max_batch_size=8, progress=None)
    assert probed.max_batch_size == 8
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lr=0.1, cbs=Accumulate(plan()))
    assert learn.model.sizes[:5] == [40, 40, 16, 40, 24]


def test_mixed_precision_is_left_as_fastai_has_it() -> None:
    """fastai has autocast on GPUs only, and no region of it stays open after a batch."""
    mixed = MixedPrecision("bf16")
    ours, seen = fitted(mixed, Accumulate(plan()))
    _, expected = fitted()
    assert exact.error(seen.steps, expected.steps) < 1e-6
    assert not torch.is_autocast_enabled("cuda")
    assert not torch.is_autocast_enabled("cpu")
    assert ours.model.sizes[:3] == [40, 40, 16]


def test_fastais_own_accumulation_overshoots() -> None:
    """Batches of 40 towards 96 samples step at 120, and divide the sum by 96."""
    _, expected = fitted(batch_size=120)
    _, theirs = fitted(GradientAccumulation(n_acc=96), batch_size=40)
    assert len(theirs.steps) > 0
    ratio = theirs.steps[-1][0].norm() / expected.steps[0][0].norm()
    assert float(ratio) == pytest.approx(120 / 96, rel=1e-4)


class NeedsPredictions(Callback):  # type: ignore[misc]
    """Uses an event that a step in micro-batches does not have."""

    def after_pred(self) -> None:
        """Do nothing."""


def test_what_it_cannot_follow_is_refused_in_a_sentence() -> None:
    """The sentence names the callback, or the batch size."""
    with pytest.raises(UnsupportedError, match="NeedsPredictions needs the event after_pred"):
        fitted(NeedsPredictions(), Accumulate(plan()))
    with pytest.raises(UnsupportedError, match="GradientAccumulation changes what a step"):
        fitted(GradientAccumulation(64), Accumulate(plan()))
    with pytest.raises(UsageError, match=r"plan is for 96 samples .* the loader has bs=40"):
        fitted(Accumulate(plan()), batch_size=40)

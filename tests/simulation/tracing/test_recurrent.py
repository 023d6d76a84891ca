"""Recurrent layers: the bytes that cuDNN keeps, and the parts of their traced steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memfit.backends.traces import trace
from memfit.errors import NotSimulatedError
from memfit.records import Action, Precision, StepOptions
from memfit.simulation.tracing import recurrent
from memfit.simulation.tracing.recurrent import RECURRENT, Recurrence
from memfit.simulation.tracing.trace import StepTrace, TraceOptions
from memfit.simulation.tracing.workspace import Kernels
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload

STEPS, FEATURES, HIDDEN = 7, 12, 16


@pytest.mark.parametrize(
    ("name", "num_gates", "reserve", "workspace"),
    [("lstm", 4, 736_000_000, 17_730_560), ("gru", 3, 864_000_000, 13_169_920)],
)
def test_bytes_are_those_that_cudnn_asked_for(
    name: str, num_gates: int, reserve: int, workspace: int
) -> None:
    """The figures were printed in pytorch/pytorch#2895."""
    recurrence = Recurrence(
        mode=RECURRENT[name],
        steps=250,
        samples=100,
        hidden=320,
        layers=4,
        directions=1,
        weights=num_gates * 320 * (123 + 7 * 320),
        item_bytes=4,
    )
    assert recurrence.reserve_bytes == reserve
    assert recurrence.workspace.num_bytes == workspace


class Tagger(nn.Module):
    """A recurrent layer, and a classifier on its last output."""

    def __init__(self, kind: type[nn.RNNBase], **options: bool) -> None:
        super().__init__()
        self.layer = kind(FEATURES, HIDDEN, batch_first=True, **options)  # type: ignore[arg-type]
        width = HIDDEN * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 3)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        output, _ = self.layer(data)
        scores: torch.Tensor = self.head(output[:, -1])
        return scores


def traced(model: nn.Module, precision: Precision = Precision.FP32) -> StepTrace:
    batch = (torch.zeros(4, STEPS, FEATURES), torch.zeros(4, dtype=torch.long))
    return trace(
        TrainingStep(
            subject=Workload(model, batch, nn.CrossEntropyLoss(), "sgd"),
            options=StepOptions(precision=precision, optimizer=None),
        ),
        TraceOptions(compute_capability=(8, 0), kernels=Kernels(compute_capability=(8, 0))),
    )


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.AMP_FP16])
def test_the_whole_sequence_is_one_operation(kind: type[nn.RNNBase], precision: Precision) -> None:
    """It has one forward and one backward for any number of time steps."""
    events = traced(Tagger(kind, bidirectional=True), precision).schedule.later.events
    origins = {event.origin for event in events if event.action is Action.ALLOC}
    assert "aten._cudnn_rnn.default" in origins
    assert "aten._cudnn_rnn_backward.default" in origins
    assert not {origin for origin in origins if "tanh" in origin or "sigmoid" in origin}


class Embedded(Tagger):
    """A recurrent layer whose input autocast has cast."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM)
        self.embed = nn.Linear(FEATURES, FEATURES)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return super().forward(self.embed(data))


def test_takes_an_input_that_autocast_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses an input of another type than the weights, unless autocast is on."""
    monkeypatch.setattr(recurrent, "cudnn_version", lambda: 91300)
    events = traced(Embedded(), Precision.AMP_BF16).schedule.later.events
    assert any("_cudnn_rnn_backward" in event.origin for event in events)


def test_an_older_cudnn_has_no_recurrent_layer_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch runs it step by step then, and keeps much more."""
    monkeypatch.setattr(recurrent, "cudnn_version", lambda: 91002)
    with pytest.raises(NotSimulatedError, match="bfloat16 cannot be simulated: cuDNN has"):
        traced(Embedded(), Precision.AMP_BF16)
    # Autocast casts an input in fp32 to float16 for cuDNN.
    events = traced(Tagger(nn.LSTM), Precision.AMP_BF16).schedule.later.events
    assert any("_cudnn_rnn_backward" in event.origin for event in events)


def test_keeps_the_reserve_until_backward() -> None:
    """These are four gates and a cell's state, in the precision of autocast."""
    for precision, item in ((Precision.FP32, 4), (Precision.AMP_BF16, 2)):
        events = list(traced(Tagger(nn.LSTM), precision).schedule.later.at(32))
        kept = 5 * STEPS * 32 * HIDDEN * item
        reserve = next(i for i, event in enumerate(events) if event.num_bytes == kept)
        freed = next(
            i
            for i, event in enumerate(events)
            if event.action is Action.FREE_COMPLETED and event.id == events[reserve].id
        )
        backward = [i for i, event in enumerate(events) if "_cudnn_rnn_backward" in event.origin]
        assert reserve < backward[0] < freed


def test_every_weight_gets_a_gradient() -> None:
    """The first iteration leaves a momentum for each weight.

    If it differs from later iterations (torch 2.8), the momentum is there from the start.
    """
    model = Tagger(nn.GRU)
    schedule = traced(model).schedule
    setup = (event for event in schedule.setup.events if event.origin != "model")
    events = (*setup, *schedule.first.events)
    freed = {event.id for event in events if event.action is Action.FREE_COMPLETED}
    left = [e.num_bytes for e in events if e.action is Action.ALLOC and e.id not in freed]
    assert sorted(left) == sorted(4 * parameter.numel() for parameter in model.parameters())

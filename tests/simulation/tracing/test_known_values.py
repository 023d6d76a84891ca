"""Values of a batch in a trace: known ones are answered, and unknown ones are not guessed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from memfit._torch_private import dispatched
from memfit.backends.traces import trace
from memfit.errors import NotSimulatedError
from memfit.records import Action, Precision, StepOptions
from memfit.simulation.tracing.known_values import NOTHING, KnownValues
from memfit.simulation.tracing.trace import StepTrace, TraceOptions
from memfit.simulation.tracing.workspace import Kernels
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload

META = torch.device("meta")
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def traced(model: nn.Module, batch: object) -> StepTrace:
    workload = Workload(model, batch, lambda out: out.sum(), "sgd")
    step = TrainingStep(subject=workload, options=StepOptions(precision=Precision.FP32))
    capability = (8, 0)
    return trace(
        step,
        TraceOptions(compute_capability=capability, kernels=Kernels(compute_capability=capability)),
    )


def known(function: Callable[[torch.Tensor], object]) -> object:
    """Return the result of a function of a mask on the meta device."""
    values = KnownValues()

    def handle(func: object, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        result = values.answer(func, args, kwargs)
        if result is NOTHING:
            result = func(*args, **kwargs)  # type: ignore[operator]
            values.note(func, args, kwargs, result)
        return result

    with dispatched(handle):
        return function(MASK.to(META))


@pytest.mark.parametrize(
    "function",
    [
        lambda mask: bool(mask.all()),
        lambda mask: bool((mask == 0).any()),
        lambda mask: mask.sum(1).max().item(),
        lambda mask: mask[0, 2].item(),
        lambda mask: mask.cumsum(-1).float().mean().item(),
        lambda mask: mask.masked_fill(mask == 0, 7).sum().item(),
        lambda mask: mask.nonzero().shape,
        lambda mask: mask.unique().tolist(),
        lambda mask: torch.arange(3, device=mask.device).sum().item(),
        lambda mask: (mask * torch.ones_like(mask)).cpu().tolist(),
    ],
)
def test_a_question_about_a_batch_is_answered(function: Callable[[torch.Tensor], object]) -> None:
    """The answer is that of the same function on the CPU."""
    assert known(function) == function(MASK)


def test_writing_in_place_is_followed_through_views() -> None:
    """This works through a view of a view too."""

    def function(mask: torch.Tensor) -> object:
        copied = mask.clone()
        copied[0][1:3] = 5
        copied.add_(1)
        return copied.sum().item()

    assert known(function) == function(MASK)


def test_what_something_unknown_was_written_to_is_unknown() -> None:
    """A view of it is unknown too."""

    def function(mask: torch.Tensor) -> object:
        row = mask[0]
        mask.copy_(torch.randint(2, mask.shape, device=mask.device))
        return row.sum().item()

    with pytest.raises(RuntimeError, match="meta"):
        known(function)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (lambda x: x.isnan().any(), False),
        (lambda x: x.isinf().any(), False),
        (lambda x: torch.isfinite(x).all(), True),
        (lambda x: (x != x).any(), False),  # noqa: PLR0124
        (lambda x: (x.abs() == float("inf")).any(), False),
    ],
)
def test_training_is_finite(question: Callable[[torch.Tensor], torch.Tensor], answer: bool) -> None:
    """Unknown values are assumed to be finite."""
    assert known(lambda mask: bool(question(torch.randn(3, device=mask.device)))) is answer


class Attends(nn.Module):
    """Makes a large table only if a mask hides something."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, data: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if bool(mask.all()):
            return self.layer(data)  # type: ignore[no-any-return]
        table = torch.zeros(len(mask), 999, device=data.device)
        output: torch.Tensor = self.layer(data)
        return output * (table.sum() + 1)


@pytest.mark.parametrize("padded_row", [None, 0, 6])
def test_a_mask_decides_as_the_whole_batch_does(padded_row: int | None) -> None:
    """One padded sample of seven is enough, at any position."""
    mask = torch.ones(7, 4, dtype=torch.long)
    if padded_row is not None:
        mask[padded_row, 2:] = 0
    found = traced(Attends(), {"data": torch.zeros(7, 4), "mask": mask})
    assert found.depends_on_batch
    tables = [e.num_bytes for e in found.schedule.later.at(100) if e.action is Action.ALLOC]
    assert (4 * 999 * 100 in tables) == (padded_row is not None)


class Chooses(nn.Module):
    """Computes with the rows that a mask selects."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 500)

    def forward(self, data: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layer(data[mask])  # type: ignore[no-any-return]


def test_rows_that_a_mask_chooses_grow_as_in_the_batch() -> None:
    """A mask that selects three of eight samples selects three eighths of any batch."""
    mask = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1], dtype=torch.bool)
    found = traced(Chooses(), {"data": torch.zeros(8, 4), "mask": mask})
    outputs = [e.num_bytes for e in found.schedule.later.at(80) if "addmm" in e.origin]
    assert outputs == [4 * 500 * 30]


class Routes(nn.Module):
    """Selects rows by values that its weights compute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(data)
        return output[output.sum(1) > 0]


def test_what_weights_decide_is_refused() -> None:
    """The message has the module, and says what to do instead."""
    with pytest.raises(NotSimulatedError, match=r"Routes needs the values.*memfit rehearse"):
        traced(Routes(), torch.zeros(4, 4))


def test_what_an_optimizer_asks_does_not_depend_on_the_batch() -> None:
    """Adam asks how many steps it took. The step is not traced again for a larger batch."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    workload = Workload(model, torch.zeros(7, 4), lambda out: out.sum(), optimizer)
    step = TrainingStep(subject=workload, options=StepOptions(precision=Precision.FP32))
    kernels = Kernels(compute_capability=(8, 0))
    found = trace(step, TraceOptions(compute_capability=(8, 0), kernels=kernels))
    assert not found.depends_on_batch
    assert found.schedule.later.batch_size < 7

"""What a step keeps from one iteration to the next: buffers, optimizer state, and what it draws."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import nn
from traced_steps import options, requested_peak, step_of

from memfit.backends.traces import trace
from memfit.errors import NotSimulatedError, WorkloadError
from memfit.records import Action, Precision, StepOptions
from memfit.simulation.schedule import StepSchedule
from memfit.simulation.tracing.trace import StepTrace
from memfit.step.training_step import TrainingStep
from memfit.step.workload import Workload


class GrowsOnce(nn.Module):
    """Makes a buffer in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.table: torch.Tensor | None = None

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        if self.table is None:
            self.table = torch.zeros(1000, device=data.device)
        output: torch.Tensor = self.layer(data) + self.table[:8]
        return output


def test_what_the_first_iteration_leaves_is_made_there() -> None:
    """A buffer that is made in the first forward is counted once, in its place."""
    workload = Workload(GrowsOnce(), torch.zeros(2, 8), lambda out: out.sum(), "sgd")
    schedule = trace(step_of(workload), options()).schedule
    made, *freed = [event.id for event in schedule.first.events if event.num_bytes == 4000]
    assert not freed
    assert made not in [event.id for event in schedule.later.events]
    for stretch in (schedule.setup, schedule.later):
        assert 4000 not in [event.num_bytes for event in stretch.events]
    # It is made before the linear layer's output is there, and after the batch.
    requests = [event.num_bytes for event in schedule.first.events if event.action.is_request]
    assert requests.index(4000) < len(requests) - 1


class Keeps(nn.Module):
    """Keeps a copy of an activation: the last one, or all of them."""

    def __init__(self, *, keeps_all: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.keeps_all = keeps_all
        self.kept: list[torch.Tensor] = []

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(data)
        self.kept.append(output.detach().clone())
        if not self.keeps_all:
            del self.kept[:-1]
        return output


@pytest.mark.parametrize("keeps_all", [False, True])
def test_a_tensor_kept_from_one_iteration_to_the_next(keeps_all: bool) -> None:
    """The last one counts once in any number of replays; if all are kept, memory grows."""
    model = Keeps(keeps_all=keeps_all)
    schedule = trace(
        step_of(Workload(model, torch.zeros(2, 64), lambda out: out.sum(), "sgd")), options()
    ).schedule
    activation = 4 * 64 * 1000
    held = [requested_after(schedule, 1000, number) for number in (2, 5)]
    assert held[1] - held[0] == (3 * activation if keeps_all else 0)
    assert schedule.grows(1000, requested_peak(schedule, 1000)) == keeps_all


class KeepsRows(nn.Module):
    """Makes a table of the batch's size in its first forward, or adds the last batch's rows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(64, 64), kind
        self.kept: torch.Tensor | None = None

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer(data)
        if self.kind == "table":
            if self.kept is None:
                self.kept = torch.zeros(len(data), 1000, device=data.device)
            return output + self.kept.sum()
        before = torch.zeros_like(output) if self.kept is None else self.kept
        self.kept = output.detach().clone()
        if self.kind == "sum":
            return output + before
        return torch.cat([output, before]).relu()


@pytest.mark.parametrize(("kind", "width"), [("table", 1000), ("sum", 64), ("rows", 64)])
def test_what_is_kept_has_the_size_of_its_batch(kind: str, width: int) -> None:
    """It grows with the batch, though two batch sizes are traced, and it may be used again."""
    workload = Workload(KeepsRows(kind), torch.zeros(2, 64), lambda out: out.sum(), "sgd")
    schedule = trace(step_of(workload), options()).schedule
    held = [requested_after(schedule, size, 3) for size in (1000, 2000)]
    assert held[1] - held[0] == 4 * width * 1000
    peaks = [requested_peak(schedule, size) for size in (1000, 2000)]
    rows = {"table": 4 * 1000, "sum": 5 * 4 * 64, "rows": 7 * 4 * 64}[kind]
    assert peaks[1] - peaks[0] >= rows * 1000


def test_rows_that_are_kept_for_good_in_one_tensor() -> None:
    """No iteration is like another, so none stands for the others."""

    class Bank(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bank = nn.Linear(8, 8), torch.zeros(0, 8)

        def forward(self, data: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.layer(data)
            self.bank = torch.cat([self.bank.to(data.device), output.detach()])
            return output

    workload = Workload(Bank(), torch.zeros(2, 8), lambda out: out.sum(), "sgd")
    with pytest.raises(NotSimulatedError, match="or keep more in each iteration"):
        trace(step_of(workload), options())


def requested_after(schedule: StepSchedule, batch_size: int, num_iterations: int) -> int:
    """Return the bytes that are held after this many iterations."""
    held: dict[int, int] = {}
    for event in schedule.at(batch_size, num_iterations=num_iterations):
        if event.action is Action.ALLOC:
            assert event.id not in held, "an id that is live"
            held[event.id] = event.num_bytes
        elif event.action is Action.FREE_COMPLETED:
            held.pop(event.id, None)
    return sum(held.values())


OPTIMIZERS: dict[str, Any] = {
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, lr=1, momentum=0.9, fused=True),
    "capturable Adam": lambda parameters: torch.optim.Adam(parameters, capturable=True),
    "Adafactor": torch.optim.Adafactor,
    "RMSprop": torch.optim.RMSprop,
}
STATES = {"fused AdamW": 2, "fused SGD": 1, "capturable Adam": 2, "RMSprop": 1}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("is_made", [False, True])
def test_torchs_optimizers_are_traced(name: str, is_made: bool) -> None:
    """Their state is there from the second iteration on."""
    model = nn.Linear(300, 300, bias=False)
    make = OPTIMIZERS[name]
    optimizer = make(model.parameters()) if is_made else make
    workload = Workload(model, torch.zeros(2, 300), lambda out: out.sum(), optimizer)
    schedule = trace(step_of(workload), options()).schedule
    held = requested_after(schedule, 2, 2)
    # Adafactor keeps a row and a column of each weight.
    state = 4 * 600 if name == "Adafactor" else STATES[name] * 4 * 300 * 300
    assert 4 * 300 * 300 + state <= held < 4 * 300 * 300 + state + 1000


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    """It would run the step any number of times."""
    workload = Workload(
        nn.Linear(3, 3), torch.zeros(2, 3), lambda out: out.sum(), torch.optim.LBFGS
    )
    with pytest.raises(WorkloadError, match="LBFGS runs forward and backward again"):
        trace(step_of(workload), options())


@pytest.mark.parametrize("is_made", [False, True])
def test_an_optimizer_that_needs_second_derivatives_is_refused(is_made: bool) -> None:
    """The graph of the gradients is not kept."""
    model, name = nn.Linear(3, 3), "adahessian"
    optimizer = create_optimizer_v2(model, name, lr=1e-3) if is_made else name
    with pytest.raises(WorkloadError, match="Adahessian differentiates the gradients once more"):
        trace(
            step_of(Workload(model, torch.zeros(2, 3), lambda out: out.sum(), optimizer)), options()
        )


def test_a_timm_optimizer_that_needs_a_gpu_is_named() -> None:
    """Apex's optimizers can be made on a GPU only."""
    step = TrainingStep(
        subject="test_vit", options=StepOptions(precision=Precision.FP32, optimizer="fusedlamb")
    )
    with pytest.raises(NotSimulatedError, match=r"'fusedlamb' cannot be simulated.*APEX"):
        trace(step, options())


def test_a_losss_own_parameters_count() -> None:
    """They may be in a module or a closure, with the state of an optimizer that has stepped."""
    model, centres = nn.Linear(8, 8), nn.Linear(8, 5000, bias=False)
    optimizer = torch.optim.Adam([*model.parameters(), *centres.parameters()])
    centres(model(torch.zeros(2, 8))).sum().backward()
    optimizer.step()
    workload = Workload(model, torch.zeros(2, 8), lambda out: centres(out).sum(), optimizer)
    setup = trace(step_of(workload), options()).schedule.setup.events
    own = 4 * 8 * 5000
    assert [event.num_bytes for event in setup].count(own) == 3


class SkipsLayers(nn.Module):
    """Runs each of its layers with some probability."""

    def __init__(self, chance: float, generator: random.Random | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
        self.chance = chance
        self.generator = generator

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if (self.generator or random).random() < self.chance:
                data = torch.tanh(layer(data))
        return self.layers[0](data)  # type: ignore[no-any-return]


def skipping(chance: float, generator: random.Random | None = None) -> StepTrace:
    model = SkipsLayers(chance, generator)
    workload = Workload(model, torch.zeros(2, 8), lambda out: out.sum(), "sgd")
    return trace(step_of(workload), options())


def test_a_step_that_draws_its_depth_is_traced_at_its_deepest() -> None:
    """All layers run, whatever is drawn, and the trace says that draws decide."""
    whole = skipping(1.1)
    assert not whole.peak_varies
    for seed in range(3):
        random.seed(seed)
        found = skipping(0.3)
        assert found.peak_varies
        assert requested_peak(found.schedule, 100) == requested_peak(whole.schedule, 100)


class Alternates(nn.Module):
    """Keeps its parity in a hidden place, and computes more in every second pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.num_calls = 0

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        output: torch.Tensor = self.layer(data)
        return self.layer(output.sin()) if self.num_calls % 2 else output


def test_a_generator_of_the_models_own_is_forced_too() -> None:
    """Afterwards it draws as before."""
    generator = random.Random(6)  # noqa: S311 - as a model may have
    found = skipping(0.5, generator)
    assert found.peak_varies
    whole = skipping(1.1)
    assert requested_peak(found.schedule, 100) == requested_peak(whole.schedule, 100)
    assert "random" not in vars(generator)


def test_iterations_that_never_repeat_are_refused() -> None:
    """The sentence says what to do instead."""
    workload = Workload(Alternates(), torch.zeros(2, 8), lambda out: out.sum(), "sgd")
    with pytest.raises(NotSimulatedError, match=r"never repeat.*memfit rehearse"):
        trace(step_of(workload), options())

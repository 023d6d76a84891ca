"""When a step is done again, everything that forward or the loss changed is put back first."""

from __future__ import annotations

import collections
import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from accumulation.parts import out_of_memory
from memfit import Accumulator, WorkloadError


class Noted(torch.optim.SGD):
    """Keeps a copy of the gradients of each step."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.seen: list[torch.Tensor] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Note the gradients, and step."""
        held = [p.grad for group in self.param_groups for p in group["params"]]
        self.seen += [grad.clone() for grad in held if grad is not None]
        super().step(closure)


class InPlace(nn.Module):
    """Normalises its batch in place."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 3)."""
        scores: torch.Tensor = self.last(x.sub_(0.5).div_(2.0))
        return scores


class Teacher(nn.Module):
    """Moves a teacher towards itself in forward, and learns from the teacher."""

    def __init__(self, move: Callable[[nn.Parameter, nn.Parameter], None]) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(6, 3), nn.Linear(6, 3)
        self.teacher.requires_grad_(False)
        self.move = move

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 3)."""
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for slow, fast in pairs:
            self.move(slow, fast)
        scores: torch.Tensor = self.student(x) * (1 + self.teacher(x))
        return scores


@torch.no_grad()
def in_place(slow: nn.Parameter, fast: nn.Parameter) -> None:
    slow.mul_(0.9).add_(fast + 1, alpha=0.1)


def through_data(slow: nn.Parameter, fast: nn.Parameter) -> None:
    slow.data.mul_(0.9).add_(fast.data + 1, alpha=0.1)


def replaced(slow: nn.Parameter, fast: nn.Parameter) -> None:
    slow.data = slow.data * 0.9 + (fast.data + 1) * 0.1


class Momentum(Teacher):
    """A teacher that begins as a copy of its student, so the first step does not move it."""

    def __init__(self) -> None:
        super().__init__(lambda slow, fast: slow.data.lerp_(fast.data, 0.1))  # type: ignore[arg-type]
        self.teacher.load_state_dict(self.student.state_dict())


class Late(nn.Module):
    """Gives itself a parameter in its first pass, and moves it."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 3)."""
        if not hasattr(self, "late"):
            self.late = nn.Parameter(torch.ones(3), requires_grad=False)
        self.late.data += 0.1
        scores: torch.Tensor = self.last(x) * self.late
        return scores


class Codebook(nn.Module):
    """Replaces one of its parameters in each forward pass, as VQ-VAEs do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 3)
        self.codes = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 3)."""
        hidden = self.first(x)
        nearest = torch.cdist(hidden, self.codes).argmin(1)
        quantised = self.codes[nearest].detach()
        moved = self.codes.detach().index_add(0, nearest, 0.1 * hidden.detach())
        self.codes = nn.Parameter(moved)
        scores: torch.Tensor = self.last(hidden + quantised)
        return scores


class Keeping(nn.Module):
    """Keeps a queue, a list, a dictionary, an unregistered tensor, an array and a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)
        self.queue: collections.deque[torch.Tensor] = collections.deque(maxlen=3)
        self.seen: list[float] = []
        self.by_name = {"mean": torch.zeros(3)}
        self.centre = torch.zeros(3)
        self.array = np.zeros(3)
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 3), which depend on all that is kept."""
        scores: torch.Tensor = self.last(x) + torch.randn(3, generator=self.generator)
        mean = scores.detach().mean(0)
        past = torch.stack([*self.queue, mean]).mean(0)
        self.queue.append(mean)
        self.seen.append(float(mean.sum()))
        self.by_name["mean"] += mean
        self.centre.lerp_(mean, 0.5)
        self.array += mean.numpy()
        kept = past + self.by_name["mean"] + self.centre + torch.from_numpy(self.array).float()
        return scores * kept * len(self.seen)


class Adversary(nn.Module):
    """A loss that has a network, and an optimizer that trains it in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.1)

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return one number, after a step of the network against it."""
        self.optimizer.zero_grad()
        judged = self.net(outputs.detach()).sigmoid().mean()
        (-judged).backward()
        self.optimizer.step()
        loss: torch.Tensor = F.cross_entropy(outputs, targets) + self.net(outputs).mean()
        return loss


class Centred:
    """A loss that is an object but no module, and has a centre that moves."""

    def __init__(self) -> None:
        self.centre = torch.zeros(3)

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return one number."""
        self.centre = self.centre * 0.9 + outputs.detach().mean(0) * 0.1
        return F.cross_entropy(outputs - self.centre, targets)

    def method(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the same."""
        return self(outputs, targets)


class Banked:
    """A loss that is an object but no module, and keeps the last means in a list."""

    def __init__(self) -> None:
        self.bank: list[torch.Tensor] = []

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return one number."""
        self.bank.append(outputs.detach().mean(0))
        return F.cross_entropy(outputs - torch.stack(self.bank).mean(0), targets)


def with_bank() -> Callable[..., torch.Tensor]:
    bank: collections.deque[torch.Tensor] = collections.deque(maxlen=3)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        bank.append(outputs.detach().mean(0))
        return F.cross_entropy(outputs - torch.stack([*bank]).mean(0), targets)

    return loss


def with_centre(outputs: torch.Tensor, targets: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    loss = F.cross_entropy(outputs - centre, targets)
    centre.lerp_(outputs.detach().mean(0), 0.5)
    return loss


def around(loss: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda outputs, targets: 2 * loss(outputs, targets)


def plain() -> nn.Module:
    return nn.Linear(6, 3)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Callable[..., torch.Tensor]]]] = {
    "a batch in place": (InPlace, lambda: F.cross_entropy),
    "a teacher in place": (functools.partial(Teacher, in_place), lambda: F.cross_entropy),
    "a teacher through data": (functools.partial(Teacher, through_data), lambda: F.cross_entropy),
    "a teacher replaced": (functools.partial(Teacher, replaced), lambda: F.cross_entropy),
    "a teacher that begins as its student": (Momentum, lambda: F.cross_entropy),
    "a late parameter": (Late, lambda: F.cross_entropy),
    "a codebook": (Codebook, lambda: F.cross_entropy),
    "all that is kept": (Keeping, lambda: F.cross_entropy),
    "an adversary": (plain, Adversary),
    "an adversary in a function": (plain, lambda: around(Adversary())),
    "a method of an object": (plain, lambda: Centred().method),
    "a partial of an object": (plain, lambda: functools.partial(Centred().method)),
    "a partial with a tensor": (
        plain,
        lambda: functools.partial(with_centre, centre=torch.zeros(3)),
    ),
    "a bank in a function": (plain, with_bank),
    "a bank of an object": (plain, Banked),
}


def trained(
    name: str, micro: int, failing: set[int], *, num_steps: int = 3
) -> tuple[list[torch.Tensor], Accumulator]:
    """Return losses, gradients and parameters of some steps; some of their passes run out."""
    torch.manual_seed(0)
    make, make_loss = CASES[name]
    model = make()
    optimizer = Noted(model.parameters())
    calls = 0

    def run_out(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in failing:
            raise out_of_memory()

    model.register_forward_hook(run_out)
    accumulator = Accumulator(model, optimizer, micro, loss=make_loss())
    batch = (torch.randn(8, 6), torch.randint(3, (8,)))
    losses = [accumulator.step(copy.deepcopy(batch)) for _ in range(num_steps)]
    return [*losses, *optimizer.seen, *model.state_dict().values()], accumulator


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", CASES)
def test_a_first_step_that_runs_out_is_done_again_bit_for_bit(name: str) -> None:
    """The result is that of smaller micro-batches from the start, in all later steps too."""
    failed, accumulator = trained(name, 4, {2})
    assert accumulator.micro_batch_size == 2
    assert same(failed, trained(name, 2, set())[0])


@pytest.mark.parametrize("name", CASES)
def test_a_later_step_that_runs_out_is_done_again_bit_for_bit(name: str) -> None:
    """The first steps show what forward moves; every later step copies it."""
    failed, _ = trained(name, 8, {2})
    torch.manual_seed(0)
    make, make_loss = CASES[name]
    model, loss = make(), make_loss()
    optimizer = Noted(model.parameters())
    batch = (torch.randn(8, 6), torch.randint(3, (8,)))
    losses = [
        Accumulator(model, optimizer, micro, loss=loss).step(copy.deepcopy(batch))
        for micro in (8, 4, 4)
    ]
    assert same(failed, [*losses, *optimizer.seen, *model.state_dict().values()])


def test_only_what_moves_is_copied_after_the_first_steps() -> None:
    """A teacher's parameters are copied, and the student's are not."""
    _, accumulator = trained("a teacher through data", 4, set())
    assert accumulator._start is not None
    assert len(accumulator._start._known or ()) == 2
    _, accumulator = trained("a batch in place", 4, set())
    assert accumulator._start is not None
    assert not accumulator._start._known


def test_lazy_layers_are_refused() -> None:
    """Their parameters cannot be copied before the first batch."""
    model = nn.LazyLinear(3)
    accumulator = Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), 4, loss=F.cross_entropy
    )
    with pytest.raises(WorkloadError, match="Run one batch through the model"):
        accumulator.step((torch.randn(8, 6), torch.randint(3, (8,))))


class FailsOnce(torch.optim.SGD):
    """Runs out of memory in its first step, where an optimizer makes its state."""

    failures = 1

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Fail, or step."""
        if self.failures:
            self.failures -= 1
            raise out_of_memory()
        super().step(closure)


def test_a_scaler_survives_an_optimizer_that_fails() -> None:
    """The next step unscales and clips; no gradient is left, and the scale is the same."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = FailsOnce(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    accumulator = Accumulator(
        model, optimizer, 4, loss=F.cross_entropy, scaler=scaler, clip_grad_norm=0.5
    )
    batch = (torch.randn(8, 6), torch.randint(3, (8,)))
    with pytest.raises(torch.OutOfMemoryError):
        accumulator.step(batch)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert scaler.get_scale() == 64.0
    before = model.weight.detach().clone()
    accumulator.step(batch)
    assert not torch.equal(model.weight, before)

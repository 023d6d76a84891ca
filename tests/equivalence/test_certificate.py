"""Small steps drawn at random: verdicts are compared with gradients computed by hand."""

from __future__ import annotations

import collections
import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from equivalence.models import NUM_CLASSES, WIDTH, Rolled, Sorting, TimesSamples, check, mlp
from memfit.records import GradientFault, Verdict

CLASS_WEIGHTS = torch.linspace(0.3, 2.0, NUM_CLASSES)
_EQUAL, _CEILING = 1e-10, 1e-6


class Flipped(nn.Module):
    """Mixup of the first sample with the last, the second with the last but one, and so on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.flip(0)[:, :3], x[:, 3:]], dim=1)


class Permuted(nn.Module):
    """Mixup of random pairs, only in training mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.7 * x + 0.3 * x[torch.randperm(len(x))] if self.training else x


class Placed(nn.Module):
    """Weighs samples by their position in the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)[:, None]


class Noisy(nn.Module):
    """Adds noise that is drawn sample by sample."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.2 * torch.randn_like(x)


class Growing(nn.Module):
    """Keeps a number, a tensor, a queue, a buffer or a parameter between calls."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.number = kind, 0
        self.tensor = torch.ones(())
        self.queue: collections.deque[torch.Tensor] = collections.deque(maxlen=3)
        self.register_buffer("buffer", torch.ones(()))
        self.moved = nn.Parameter(torch.ones(()), requires_grad=False)
        self.buffer: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "number":
            self.number += 1
            return x * (1 + 0.1 * self.number)
        if self.kind == "tensor":
            self.tensor = self.tensor * 1.1
            return x * self.tensor
        if self.kind == "queue":
            self.queue.append(x.detach().mean())
            return x + torch.stack(tuple(self.queue)).sum() * (len(self.queue) > 1)
        kept = self.buffer if self.kind == "buffer" else self.moved
        with torch.no_grad():
            kept.mul_(1.1)
        return x * kept.clone()


class Divided(nn.Module):
    """Divides by the largest value of the batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.detach().abs().max()


class CountingInItsClass(nn.Module):
    """Counts its calls in an attribute of the class."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        type(self).calls += 1
        return x * (1 + 0.1 * self.calls)


class HostDrawn(nn.Module):
    """Multiplies by a number that Python draws."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (0.5 + random.random())  # noqa: S311 - of a layer


class InPlace(nn.Module):
    """Normalises its batch in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach().sub_(0.5).div_(1.5)


PIECES: dict[str, Callable[[], nn.Module]] = {
    "roll": Rolled,
    "flip": Flipped,
    "times samples": TimesSamples,
    "permutation": Permuted,
    "place": Placed,
    "noise": Noisy,
    "dropout": lambda: nn.Dropout(0.3),
    "number": lambda: Growing("number"),
    "tensor": lambda: Growing("tensor"),
    "queue": lambda: Growing("queue"),
    "buffer": lambda: Growing("buffer"),
    "parameter": lambda: Growing("parameter"),
    "divided": Divided,
    "class": CountingInItsClass,
    "sorting": Sorting,
    "drawn by Python": HostDrawn,
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "layer norm": lambda: nn.LayerNorm(WIDTH),
}


def _mean(o: torch.Tensor, y: torch.Tensor, _w: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(o, y.clamp(min=0))


def _sum(o: torch.Tensor, y: torch.Tensor, _w: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(o, y.clamp(min=0), reduction="sum")


def _ignoring(o: torch.Tensor, y: torch.Tensor, _w: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(o, y, ignore_index=-1)


def _by_class(o: torch.Tensor, y: torch.Tensor, _w: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(o, y, weight=CLASS_WEIGHTS.to(o.dtype), ignore_index=-1)


def _by_sample(o: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    losses = F.cross_entropy(o, y.clamp(min=0), reduction="none")
    return (losses * w).sum() / w.sum()


def _two(o: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"one": _ignoring(o, y, w), "other": o.square().mean()}


def _summed(o: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return _ignoring(o, y, w) + 2 * _by_sample(o, y, w)


def _looped(o: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    total = o.sum() * 0
    for output, target, weight in zip(o, y.clamp(min=0), w, strict=True):
        total = total + F.cross_entropy(output[None], target[None]) / len(o)
        total = total + weight * output.square().sum() / w.sum()
    return total


def _ranked(o: torch.Tensor, _y: torch.Tensor, _w: torch.Tensor) -> torch.Tensor:
    return F.softplus(o[:-1, 0] - o[1:, 0]).mean()


class Centred(nn.Module):
    """A loss that keeps a running mean of the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(NUM_CLASSES))
        self.mean: torch.Tensor

    def forward(self, o: torch.Tensor, y: torch.Tensor, _w: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(o - self.mean.to(o.dtype), y.clamp(min=0))
        self.mean = 0.9 * self.mean + 0.1 * o.detach().mean(0).to(self.mean.dtype)
        return loss


def _detected(o: torch.Tensor, y: torch.Tensor, _w: torch.Tensor) -> torch.Tensor:
    wanted = F.one_hot(y.clamp(min=0), NUM_CLASSES).to(o.dtype)
    total = F.binary_cross_entropy_with_logits(o, wanted, reduction="sum")
    return total / (y > 0).sum().clamp(min=1)


def _contrasted(o: torch.Tensor, _y: torch.Tensor, _w: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(o)
    return F.cross_entropy(3 * unit @ unit.T, torch.arange(len(o)))


def _size(y: torch.Tensor, _w: torch.Tensor) -> float:
    return len(y)


def _valid(y: torch.Tensor, _w: torch.Tensor) -> float:
    return float((y != -1).sum())


# The loss, and what each of the losses that it returns averages over; `None` for a sum.
LOSSES: dict[str, tuple[Callable[..., Any], tuple[Callable[..., float] | None, ...]]] = {
    "mean": (_mean, (_size,)),
    "sum": (_sum, (None,)),
    "ignoring": (_ignoring, (_valid,)),
    "by class": (_by_class, (lambda y, _w: float(CLASS_WEIGHTS[y[y >= 0]].double().sum()),)),
    "by sample": (_by_sample, (lambda _y, w: float(w.double().sum()),)),
    "two": (_two, (_valid, _size)),
    "summed": (_summed, (_size,)),
    "looped": (_looped, (_size,)),
    "ranked": (_ranked, (_size,)),
    "contrasted": (_contrasted, (_size,)),
    "centred": (Centred(), (_size,)),
    "detected": (_detected, (lambda y, _w: float((y > 0).sum().clamp(min=1)),)),
}
ORDERED = {"roll", "flip", "place", "ranked"}


def batch_of(batch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return vectors, classes of which some are ignored, and a weight for each sample."""
    y = torch.arange(batch_size) * 3 % NUM_CLASSES
    y[1::3] = -1
    return torch.randn(batch_size, WIDTH), y, torch.rand(batch_size) + 0.1


def by_hand(
    model: nn.Module, name: str, batch: Sequence[torch.Tensor], cut: Sequence[int]
) -> torch.Tensor:
    """Return the accumulated gradient in float64, with each loss times its share."""
    loss, counts = LOSSES[name]
    loss, model = copy.deepcopy(loss), copy.deepcopy(model).double()
    CountingInItsClass.calls = 0
    for module in model.modules():
        if isinstance(module, (nn.Dropout, Noisy)):
            module.forward = lambda x: x  # type: ignore[method-assign]
        if isinstance(module, Permuted):
            module.forward = lambda x: 0.7 * x + 0.3 * x.roll(1, 0)  # type: ignore[method-assign]
    x, y, w = batch[0].double(), batch[1], batch[2].double()
    start = 0
    for size in cut:
        part = slice(start, start + size)
        start += size
        random.seed(0)  # drawn for the batch as a whole: each part gets the same number
        returned = loss(model(x[part].clone()), y[part], w[part])
        losses = list(returned.values()) if isinstance(returned, dict) else [returned]
        for one, count in zip(losses, counts, strict=True):
            share = 1.0 if count is None else count(y[part], w[part]) / count(y, w)
            if share:
                (one * share).backward(retain_graph=True)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@settings(max_examples=15, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(sorted(PIECES)), max_size=2),
    in_place=st.booleans(),
    loss=st.sampled_from(sorted(LOSSES)),
    micro_batch_size=st.integers(3, 5),
    accumulation_steps=st.integers(2, 3),
)
def test_the_verdict_is_what_gradients_by_hand_say(
    pieces: list[str], in_place: bool, loss: str, micro_batch_size: int, accumulation_steps: int
) -> None:
    """It is never equal if they differ, and it is equal if nothing makes them differ."""
    model = mlp(*(PIECES[piece]() for piece in pieces))
    if in_place:
        model.insert(0, InPlace())
    torch.manual_seed(1)
    total = micro_batch_size * accumulation_steps
    batch = batch_of(total)
    whole = by_hand(model, loss, batch, (total,))
    apart = [
        float((by_hand(model, loss, batch, cut) - whole).norm() / whole.norm())
        for cut in (
            (micro_batch_size,) * accumulation_steps,
            (micro_batch_size + 1, *(micro_batch_size,) * (accumulation_steps - 2),
             micro_batch_size - 1),
        )

    ]  # fmt: skip
    result = check(
        model,
        LOSSES[loss][0],
        batch_of,
        micro_batch_size=micro_batch_size,
        accumulation_steps=accumulation_steps,
    )
    if max(apart[:1]) > _CEILING:
        assert result.verdict is Verdict.DIFFERS, (apart, result.checks)
        assert result.faults
        assert GradientFault.UNEXPLAINED not in result.faults
    if max(apart) < _EQUAL and not ORDERED & {loss, *pieces}:
        assert result.verdict is Verdict.EQUAL, (apart, result.faults, result.checks)
    if result.verdict is Verdict.EQUAL:
        error = result.worst_relative_error("fp64")
        assert error is not None
        assert error <= _CEILING

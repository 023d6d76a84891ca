"""Attributes that modules keep besides parameters and buffers are put back."""

from __future__ import annotations

import collections
import copy
import dataclasses
import random
import threading
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import memfit
from memfit.memory.restore import preserved, rewound


@dataclasses.dataclass(slots=True)
class Statistics:
    """Something a model records about what it has seen."""

    total: float = 0.0
    seen: list[int] = dataclasses.field(default_factory=list)


class Meter:
    """An object of the model that is no dataclass."""

    __slots__ = ("__dict__", "count")

    def __init__(self) -> None:
        self.count = 0
        self.sums = {"loss": 0.0}


class Keeper(nn.Module):
    """Keeps all kinds of attributes outside parameters and buffers, and changes them all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.losses: list[float] = [0.5]
        self.counts: dict[str, Any] = {"calls": 0, "inner": {"deep": [1, 2]}}
        self.ordered = collections.OrderedDict(a=1, b=2)
        self.by_name: collections.defaultdict[str, list[int]] = collections.defaultdict(list)
        self.recent: collections.deque[int] = collections.deque([1, 2, 3], maxlen=3)
        self.names = {"a"}
        self.queue = torch.zeros(8, 2)
        self.expanded = torch.zeros(1, 2).expand(3, 2)
        self.signed = torch.tensor([0.0, float("nan")])
        self.pair = (torch.zeros(2), [0])
        self.free = nn.Parameter(torch.ones(2))
        self.array = np.zeros(3)
        self.teacher = [nn.BatchNorm1d(4)]
        self.draws = torch.Generator().manual_seed(1)
        self.python_draws = random.Random(1)  # noqa: S311 - its state is what is tested
        self.numpy_draws = np.random.default_rng(1)
        self.statistics = Statistics()
        self.meter = Meter()
        self.space = types.SimpleNamespace(last=None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 2) for inputs of shape (samples, 4)."""
        with torch.no_grad():
            self.losses.append(1.0)
            self.counts["calls"] += 1
            self.counts["inner"]["deep"].append(3)
            self.ordered.move_to_end("a")
            self.by_name["x"].append(1)
            self.recent.append(4)
            self.names.add("b")
            self.queue[0] += 1
            self.expanded[:1] = 1
            self.signed.neg_()
            self.pair[0].add_(1)
            self.pair[1].append(1)
            self.free.add_(1)
            self.array += 1
            self.teacher[0](inputs.float())
            torch.rand(1, generator=self.draws)
            self.python_draws.random()
            self.numpy_draws.random()
            self.statistics.total += 1
            self.statistics.seen.append(1)
            self.meter.count += 1
            self.meter.sums["loss"] += 1
            self.space.last = torch.ones(1)
            self.lazily_made = torch.ones(3)
        scores: torch.Tensor = self.layer(inputs)
        return scores


def bits(value: Any) -> Any:
    """Return a value with its tensors as bytes, to be compared with ==."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.detach().numpy().tobytes())
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, nn.Module):
        return bits({**value.state_dict(), **kept(value)})
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, collections.deque)):
        return [type(value), *map(bits, value)]
    return value


def kept(model: nn.Module) -> dict[str, Any]:
    """Return the attributes that a model keeps, with generators as their states."""
    found: dict[str, Any] = {}
    for name, value in vars(model).items():
        if name in vars(nn.Module()):
            continue
        if isinstance(value, torch.Generator):
            found[name] = bits(value.get_state())
        elif isinstance(value, random.Random):
            found[name] = value.getstate()
        elif isinstance(value, np.random.Generator):
            found[name] = value.bit_generator.state
        elif isinstance(value, Meter):
            found[name] = (value.count, dict(value.sums))
        elif isinstance(value, collections.OrderedDict):
            found[name] = list(value.items())
        else:
            found[name] = bits(value)
    return copy.deepcopy(found)


def identities(model: nn.Module) -> dict[str, int]:
    """Return which objects a model keeps."""
    return {name: id(value) for name, value in vars(model).items()}


@pytest.mark.parametrize("bracket", [preserved, rewound])
def test_what_a_model_keeps_is_put_back(bracket: Any) -> None:
    """Containers, tensors, arrays, generators and objects get their old content in place."""
    model = Keeper()
    before, objects = kept(model), identities(model)
    with bracket(model):
        model(torch.randn(3, 4))
        assert kept(model).keys() > before.keys()
        changed = {name for name in before if kept(model)[name] != before[name]}
        assert changed == before.keys(), "the forward pass has to change all of it"
    assert kept(model) == before
    assert identities(model) == objects


def test_what_was_not_written_to_can_still_be_used_backward() -> None:
    """Only changed bits are written, so a graph that needs a kept tensor still works."""
    model = Keeper()
    weight = torch.ones(2, requires_grad=True)
    product = (model.pair[0] * weight).sum()
    with rewound(model):
        pass
    product.backward()


def test_attributes_that_hold_other_libraries_are_left_alone() -> None:
    """A lock or a random module is not copied, and its contents are not searched."""
    model = nn.Linear(1, 1)
    lock, library = threading.Lock(), random
    vars(model).update(lock=lock, library=library)
    with preserved(model), lock:
        vars(model).update(lock=None, library=None)
    assert vars(model)["lock"] is lock
    assert vars(model)["library"] is library


def test_verify_leaves_what_a_model_keeps() -> None:
    """Users are promised this for a verification."""
    model = Keeper()
    workload = memfit.Workload(
        model,
        (torch.randn(8, 4), torch.randint(2, (8,))),
        nn.functional.cross_entropy,
        torch.optim.SGD(model.parameters(), lr=0.1),
    )
    before = kept(model)
    memfit.verify(workload, micro_batch_size=2, accumulation_steps=2, device="cpu")
    assert kept(model) == before


def test_profile_on_a_cpu_leaves_what_a_model_keeps() -> None:
    """Users are promised this for a profile of their own objects."""
    model = Keeper()
    workload = memfit.Workload(
        model,
        (torch.randn(8, 4), torch.randint(2, (8,))),
        nn.functional.cross_entropy,
        torch.optim.SGD(model.parameters(), lr=0.1),
    )
    before = kept(model)
    memfit.profile(workload, 4, device="cpu")
    assert kept(model) == before

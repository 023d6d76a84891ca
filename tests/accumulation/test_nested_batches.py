"""Effective batches with more than tensors: each micro-batch has its share of every part."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from accumulation.parts import GradientRecorder, full_batch_gradients, plan_of, relative_error
from memfit import Accumulator, micro_batches
from memfit.errors import WorkloadError

BOUND = 1e-10


class Captions(nn.Module):
    """Embeds a text for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(4, 8), nn.Embedding(26, 8)

    def forward(self, image: torch.Tensor, caption: Any) -> torch.Tensor:
        """Return a number for each sample."""
        scores = []
        for one, text in zip(image, caption, strict=False):
            letters = torch.tensor([ord(letter) - 97 for letter in text])
            scores.append((self.image(one) * self.text(letters).mean(0)).sum())
        return torch.stack(scores)


class Detector(nn.Module):
    """Compares images of different sizes with boxes, and returns its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images: Any, targets: Any) -> dict[str, torch.Tensor]:
        """Return two losses, both means over the images."""
        assert isinstance(images, (list, tuple))
        apart = [
            (self.conv(image[None]).mean((2, 3)) - target["boxes"]).square().mean()
            for image, target in zip(images, targets, strict=True)
        ]
        return {"box": torch.stack(apart).mean(), "class": torch.stack(apart).sqrt().mean()}


class Graphs(nn.Module):
    """Sums messages along edges, and nodes over graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, edges: torch.Tensor, graph: torch.Tensor) -> torch.Tensor:
        """Return scores of each graph."""
        heard = torch.zeros_like(x).index_add(0, edges[1], self.first(x)[edges[0]])
        scores = torch.zeros(int(graph.max()) + 1, 4, dtype=x.dtype)
        return scores.index_add(0, graph, self.last(heard))


def graphs(count: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return graphs of five nodes with four edges each, and their classes."""
    edges = torch.randint(5, (2, count, 4)) + 5 * torch.arange(count)[:, None]
    graph = torch.arange(count).repeat_interleave(5)
    return (
        {"x": torch.randn(5 * count, 8).double(), "edges": edges.flatten(1), "graph": graph},
        torch.randint(4, (count,)),
    )


def cut_graphs(batch: Any, start: int, stop: int) -> Any:
    """Return some of the graphs, with their nodes numbered from 0."""
    held, classes = batch
    return (
        {
            "x": held["x"][5 * start : 5 * stop],
            "edges": held["edges"][:, 4 * start : 4 * stop] - 5 * start,
            "graph": held["graph"][5 * start : 5 * stop] - start,
        },
        classes[start:stop],
    )


def mean(outputs: torch.Tensor) -> torch.Tensor:
    return (outputs - 1).square().mean()


def added(losses: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(losses.values())).sum()


def called(model: nn.Module, batch: Any) -> Any:
    """Call a model with a whole batch, as one would without memfit."""
    return model(**batch) if isinstance(batch, (dict, collections.UserDict)) else model(*batch)


TEXTS = ["abc", "xyz", "qrs", "mno", "aaa", "zzz", "kkk", "ppp", "c"]


def images_of(count: int, boxes: int) -> list[Any]:
    images = [torch.randn(3, 8 + 2 * index, 8).double() for index in range(count)]
    return [images, [{"boxes": torch.rand(boxes, 4).double()} for _ in range(count)]]


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Any, dict[str, Any]]] = {
    "texts": (Captions, {"image": torch.randn(9, 4).double(), "caption": TEXTS}, mean, {}),
    "an array of objects": (
        Captions,
        {"image": torch.randn(9, 4).double(), "caption": np.array(TEXTS, dtype=object)},
        mean,
        {},
    ),
    "an encoding": (
        Captions,
        collections.UserDict(image=torch.randn(9, 4).double(), caption=tuple(TEXTS)),
        mean,
        {},
    ),
    "two boxes": (Detector, images_of(6, 2), added, {"num_inputs": 2}),
    "as many boxes as channels": (
        Detector,
        images_of(6, 3),
        added,
        {"num_inputs": 2, "batch_dims": {"batch[0]": 0}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_whole_batchs(name: str) -> None:
    """The samples may be in any kind of container."""
    torch.manual_seed(0)
    make, batch, loss, options = CASES[name]
    model = make().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = full_batch_gradients(model, optimizer, lambda: loss(called(model, batch)))
    value = loss(called(model, batch)).detach()
    seen = GradientRecorder(optimizer)
    losses = Accumulator(model, optimizer, 2, loss=loss, **options).step(batch)
    assert relative_error(seen.steps[0], expected) < BOUND
    assert torch.allclose(losses, value)


def test_a_function_cuts_graphs() -> None:
    """It cuts what no slice can, in a step and in a loop of the user."""
    torch.manual_seed(0)
    model, batch = Graphs().double(), graphs(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def whole() -> torch.Tensor:
        return F.cross_entropy(model(**batch[0]), batch[1])

    expected = full_batch_gradients(model, optimizer, whole)
    for micro in micro_batches(plan_of(7, 3), batch, cut=cut_graphs):
        held, classes = micro.batch
        (F.cross_entropy(model(**held), classes) * micro.weight).backward()
    by_hand = [parameter.grad for parameter in model.parameters()]
    assert relative_error(by_hand, expected) < BOUND
    seen = GradientRecorder(optimizer)
    Accumulator(model, optimizer, 3, loss=F.cross_entropy, cut=cut_graphs).step(batch)
    assert relative_error(seen.steps[0], expected) < BOUND


def test_a_list_of_samples_is_one_argument_of_model_and_loss() -> None:
    """Texts may be the only input, or the only target."""
    seen = []

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, texts: list[str]) -> torch.Tensor:
            return torch.tensor([float(len(text)) for text in texts]) * self.scale

    def loss(outputs: torch.Tensor, answers: list[str]) -> torch.Tensor:
        seen.append(answers)
        return outputs.mean()

    model = Reader()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Accumulator(model, optimizer, 4, loss=loss).step((TEXTS[:6], TEXTS[3:]))
    assert seen == [TEXTS[3:6], TEXTS[6:9]]


def test_what_cannot_be_cut_changes_nothing() -> None:
    """One sentence comes before the step, and no gradient is left."""
    model = Detector().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = Accumulator(model, optimizer, 2, loss=added, num_inputs=2)
    with pytest.raises(WorkloadError, match=r"as 6 samples \(batch\[0\]\) or as 3"):
        accumulator.step(images_of(6, 3))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_that_forward_changes_stays_as_it_was() -> None:
    """Each micro-batch is a copy for the model, so that a step can be done again."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores: torch.Tensor = self.last(x.sub_(1).mul_(2))
            return scores

    model = InPlace()
    x, y = torch.randn(6, 4), torch.randint(2, (6,))
    before = x.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Accumulator(model, optimizer, 3, loss=F.cross_entropy).step((x, y))
    assert torch.equal(x, before)

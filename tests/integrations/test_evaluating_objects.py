"""Evaluations of trainers' own objects: the step that the trainer evaluates with, and its mode."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import memfit
from integrations import zoo
from memfit.api.asking import Asked
from memfit.api.cards import Cards
from memfit.errors import UsageError
from memfit.planning import probe_on
from memfit.records import Engine, Evaluation

pytestmark = pytest.mark.filterwarnings("default")


def loader(num_samples: int = 8) -> Any:
    return DataLoader(zoo.images(num_samples), batch_size=4)


@pytest.fixture(scope="module")
def cards() -> Iterator[Cards]:
    """Return cards that are rehearsed in one process, because each start takes seconds."""
    with Cards(Engine.REHEARSE) as made:
        yield made


@pytest.mark.rehearses
@pytest.mark.needs("pytorch_lightning")
@pytest.mark.parametrize(
    ("method", "card", "options"),
    [
        ("validate", "rtx3060", {"precision": "bf16-mixed", "inference_mode": False}),
        ("predict", "a100-40gb", {}),
    ],
)
def test_the_named_batch_size_evaluates_and_one_more_sample_does_not(
    cards: Cards, method: str, card: str, options: dict[str, Any]
) -> None:
    """Lightning's own loops run on the same card, rehearsed, one with `no_grad`."""
    asked = Asked.of(
        zoo.lightning_module(),
        memory="1GiB",
        headroom=0.0,
        datamodule=loader(),
        trainer=zoo.lightning_trainer(**options),
        method=method,
    )
    step = asked.step
    found = probe_on(cards.open(card, asked.memory_bytes, step), step, asked.search)
    assert found.options.evaluate is Evaluation.ALONE
    assert found.options.no_grad is bool(options)
    sizes = found.max_batch_size, found.max_batch_size + 1
    with cards.open(card, asked.memory_bytes, step) as opened:
        evaluated = [
            opened.call(zoo.trains, step, "evaluation", size, {"method": method, **options})
            for size in sizes
        ]
    assert evaluated == [True, False]


class Modes(torch.nn.Module):
    """Notes in which mode it runs, and whether gradients are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.net = zoo.Net(4)
        self.seen: set[tuple[bool, bool]] = set()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, classes)."""
        self.seen.add((self.training, torch.is_grad_enabled()))
        scores: torch.Tensor = self.net(images)
        return scores


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fastai", marks=pytest.mark.needs("fastai")),
        pytest.param("transformers", marks=pytest.mark.needs("transformers", "accelerate")),
    ],
)
def test_an_evaluation_is_not_in_training_mode(name: str) -> None:
    """fastai and transformers call `eval` and `no_grad` before they evaluate."""
    net = Modes()
    if name == "fastai":
        made = zoo.learner(model=net)
    else:
        zoo.reset_accelerate()
        made = zoo.transformers_trainer(model=zoo.Wrapped(net))
    found = memfit.probe(
        made, device="cpu", memory="400MiB", max_batch_size=4, progress=None, evaluate=True
    )
    assert found.max_batch_size == 4
    trial = memfit.estimate(made, 4, gpu="rtx3060", engine="simulate", evaluate=True)
    training = memfit.estimate(made, 4, gpu="rtx3060", engine="simulate")
    assert found.options.no_grad
    assert (trial.peak_allocated_bytes or 0) < (training.peak_allocated_bytes or 0)
    assert net.seen <= {(False, False)}


@pytest.mark.needs("pytorch_lightning")
def test_what_lightning_does_not_evaluate_is_refused_in_a_sentence() -> None:
    """The sentence says what is missing."""
    module = zoo.lightning_module()
    beside: dict[str, Any] = {"gpu": "rtx3060", "engine": "simulate"}
    with pytest.raises(UsageError, match=r"method is one of 'fit', .*, not 'valdate'"):
        memfit.estimate(module, 4, method="valdate", datamodule=loader(), **beside)
    with pytest.raises(UsageError, match="Module has no test_step, so Lightning cannot test it"):
        memfit.estimate(module, 4, method="test", datamodule=loader(), **beside)
    with pytest.raises(UsageError, match="Module has no val_dataloader of its own"):
        memfit.estimate(module, 4, evaluate=True, **beside)
    with pytest.raises(UsageError, match="it does not predict then"):
        memfit.estimate(
            module, 4, method="predict", evaluate="in-training", datamodule=loader(), **beside
        )
    with pytest.raises(UsageError, match="method 'fit' trains, and evaluate does not"):
        memfit.estimate(module, 4, method="fit", evaluate=True, datamodule=loader(), **beside)
    with pytest.raises(UsageError, match="method= goes with a LightningModule, not with 'resnet1"):
        memfit.estimate("resnet18", 4, method="validate", **beside)
    with pytest.raises(UsageError, match="an evaluation has none"):
        memfit.plan(module, 64, method="validate", datamodule=loader(), gpu="rtx3060")
    trained = memfit.estimate(module, 64, datamodule=loader(), **beside)
    in_training = memfit.estimate(module, 64, evaluate="in-training", datamodule=loader(), **beside)
    alone = memfit.estimate(module, 64, method="validate", datamodule=loader(), **beside)
    held = [each.peak_allocated_bytes or 0 for each in (alone, in_training, trained)]
    assert held == sorted(held)
    assert held[0] < held[2]

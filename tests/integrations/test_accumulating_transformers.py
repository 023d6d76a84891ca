"""A transformers Trainer accumulates exactly, with every way in which its losses are scaled."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from accumulation.parts import plan_of
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it

from integrations import exact, zoo
from memfit.errors import UsageError, WorkloadError
from memfit.transformers import Accumulating

pytestmark = pytest.mark.filterwarnings("default")
transformers = pytest.importorskip("transformers", reason="it trains with transformers")

LENGTH = 7


class Trainer(Accumulating, transformers.Trainer):  # type: ignore[misc, name-defined]
    """What a user writes."""


class Tokens(nn.Module):
    """Scores every position of a text; its labels may be ignored."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = transformers.PretrainedConfig()
        self.embedding = nn.Embedding(11, 8)
        self.out = nn.Linear(8, 11)
        self.sizes: list[int] = []

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        scores: torch.Tensor = self.out(self.embedding(x))
        return scores

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        """Return the mean over valid labels."""
        scores = self.scores(x)
        if labels is None:
            return {"logits": scores}
        return {"loss": F.cross_entropy(scores.flatten(0, 1), labels.flatten()), "logits": scores}


class Counted(Tokens):
    """Divides by the number of items that transformers gives it."""

    def forward(self, x: torch.Tensor, labels: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return the sum over valid labels, divided by a number."""
        scores = self.scores(x)
        how = "mean" if kwargs.get("num_items_in_batch") is None else "sum"
        loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction=how)
        return {"loss": loss / kwargs.get("num_items_in_batch", 1), "logits": scores}


class Ignoring(Tokens):
    """Takes the number of items and does not use it, as some models of transformers do."""

    def forward(self, x: torch.Tensor, labels: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return the mean over valid labels."""
        return super().forward(x, labels)


def rows() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(11, (exact.SAMPLES, LENGTH), generator=generator)
    labels = texts.roll(1, 1)
    # The texts become shorter, so each micro-batch has another number of valid labels.
    lengths = torch.linspace(LENGTH, 1, exact.SAMPLES).round()[:, None]
    labels[torch.arange(LENGTH)[None] >= lengths] = -100
    return [{"x": x, "labels": y} for x, y in zip(texts, labels, strict=True)]


def trained(
    kind: type, model: nn.Module, *, batch_size: int = exact.SAMPLES, **options: Any
) -> list[exact.Gradients]:
    zoo.reset_accelerate()
    arguments = {name: options.pop(name) for name in list(options) if name not in BESIDE}
    trainer = kind(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=tempfile.gettempdir(),
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            use_cpu=True,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            logging_strategy="no",
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **{"max_grad_norm": 0.0, **arguments},
        ),
        train_dataset=rows(),
        **options,
    )
    with exact.recorded() as steps:
        trainer.train()
    return steps


BESIDE = ("plan", "compute_loss_func", "weight")


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    loss: torch.Tensor = F.cross_entropy(
        outputs["logits"].flatten(0, 1), labels.flatten(), reduction="sum"
    )
    return loss / float(num_items_in_batch)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (Tokens, {}),
        (Tokens, {"max_grad_norm": 0.01}),
        (Tokens, {"label_smoothing_factor": 0.1}),
        (Tokens, {"compute_loss_func": summed}),
        (Counted, {}),
        (Ignoring, {}),
    ],
    ids=["mean", "clipped", "smoothed", "function", "counted", "ignoring"],
)
def test_a_step_is_that_of_the_whole_batch(model: Any, options: dict[str, Any]) -> None:
    """Every part has another number of valid labels; 96 samples are 40 + 40 + 16."""
    whole = trained(transformers.Trainer, model(), **options)
    net = model()
    plan = plan_of(exact.SAMPLES, exact.MICRO, multiple_of=exact.MICRO)
    ours = trained(Trainer, net, plan=plan, **options)
    assert net.sizes[-3:] == [40, 40, 16]
    assert exact.error(ours, whole) < 1e-6


class Summed(Tokens):
    """Adds up the losses of all labels."""

    def forward(self, x: torch.Tensor, labels: Any = None) -> dict[str, Any]:
        """Return the sum over valid labels."""
        scores = self.scores(x)
        loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="sum")
        return {"loss": loss, "logits": scores}


def test_a_loss_that_is_a_sum_is_not_weighted_as_a_mean() -> None:
    """It is refused as `Accumulator` does, and with the weight of a sum it is exact."""
    plan = plan_of(exact.SAMPLES, exact.MICRO, multiple_of=exact.MICRO)
    with pytest.raises(WorkloadError, match=r"The loss is a sum, .*give weight='sum'"):
        trained(Trainer, Summed(), plan=plan)
    whole = trained(transformers.Trainer, Summed())
    assert exact.error(trained(Trainer, Summed(), plan=plan, weight="sum"), whole) < 1e-5


def test_transformers_own_accumulation_is_wrong_where_a_model_ignores_the_count() -> None:
    """It adds up means: the gradient of three micro-batches is three times too large."""
    whole = trained(transformers.Trainer, Ignoring())
    theirs = trained(transformers.Trainer, Ignoring(), batch_size=32, gradient_accumulation_steps=3)
    assert exact.error(theirs, whole) > 1


@pytest.mark.parametrize(
    ("plan", "arguments", "message"),
    [
        (
            plan_of(96, 40),
            {"gradient_accumulation_steps": 3},
            "gradient_accumulation_steps must be 1, not 3: give the whole batch",
        ),
        (plan_of(128, 40), {}, "plan is for 128 samples in each step, and the .* loader yields 96"),
        (plan_of(96, 40, world_size=2), {}, "plan is for 2 ranks, and the Trainer has 1"),
        (40, {}, r"Accumulating takes the Plan that memfit\.plan returns, not 40"),
    ],
)
def test_arguments_that_do_not_match_the_plan_are_refused(
    plan: Any, arguments: dict[str, Any], message: str
) -> None:
    """The sentence names the argument and its right value."""
    with pytest.raises(UsageError, match=message):
        trained(Trainer, Tokens(), plan=plan, **arguments)


class ChangesItsMind(Trainer):
    """Accumulates by itself, once it is made."""

    def get_train_dataloader(self) -> Any:
        """Return the loader."""
        self.args.gradient_accumulation_steps = 3
        return super().get_train_dataloader()


def test_accumulation_that_is_set_later_is_refused_too() -> None:
    """The trainer obeys it, so the gradients of several batches would be added."""
    with pytest.raises(UsageError, match="gradient_accumulation_steps must be 1, not 3"):
        trained(ChangesItsMind, Tokens(), plan=plan_of(96, 40))

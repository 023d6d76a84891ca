"""Objects that make no training step get one sentence that says what to give instead."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import memfit
from memfit.errors import UnknownModelError, UsageError, WorkloadError
from memfit.step import timm_models

BATCH = (torch.randn(2, 3), torch.randn(2, 1))


def workload(**parts: Any) -> memfit.Workload:
    model = nn.Linear(3, 1)
    given = {"model": model, "batch": BATCH, "loss": nn.MSELoss(), "optimizer": "sgd", **parts}
    return memfit.Workload(**given)


@pytest.mark.parametrize(
    ("subject", "says"),
    [
        (nn.Linear(3, 1), r"A Linear alone is not a whole training step\. Give memfit.Workload\("),
        (SimpleNamespace(), "name of a timm model or a memfit.Workload, not types.SimpleNamespace"),
        ([], "not list. A fastai Learner, a LightningModule and a transformers Trainer are taken"),
        (7, "or a memfit.Workload, not int"),
    ],
)
def test_what_is_no_training_step_is_pointed_to_one(subject: Any, says: str) -> None:
    """Every function does it before anything runs."""
    for ask in (
        lambda: memfit.probe(subject),
        lambda: memfit.plan(subject, 8),
        lambda: memfit.profile(subject, 8),
        lambda: memfit.verify(subject, micro_batch_size=2, accumulation_steps=2),
        lambda: memfit.estimate(subject, 8, gpu="t4"),
        lambda: memfit.explore(subject, 8, gpu="t4"),
    ):
        with pytest.raises(WorkloadError, match=says):
            ask()


def test_a_loader_is_no_batch() -> None:
    """The message says to give one of its batches."""
    loader = DataLoader(TensorDataset(*BATCH))
    with pytest.raises(
        WorkloadError, match=r"is a DataLoader, .* Give one of its batches: next\(iter"
    ):
        workload(batch=loader)


def test_an_optimizers_wrapper_is_named_with_its_module() -> None:
    """The message makes "not Optimizer" clear, and points to the optimizer inside."""

    class Optimizer:
        """Like a trainer's own optimizer."""

        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.opt = inner

    wrapped = Optimizer(torch.optim.SGD(nn.Linear(3, 1).parameters(), lr=0.1))
    with pytest.raises(WorkloadError, match=r"not .*mistakes.*Optimizer; .* its \.opt"):
        workload(optimizer=wrapped)


def test_a_loss_class_is_not_taken_for_a_loss() -> None:
    """An instance of the class is a loss."""
    with pytest.raises(WorkloadError, match=r"the class CrossEntropyLoss, .*CrossEntropyLoss\(\)"):
        workload(loss=nn.CrossEntropyLoss)
    with pytest.raises(WorkloadError, match="must be a function, not int"):
        workload(loss=3)


def test_a_model_that_is_not_timms_is_pointed_elsewhere() -> None:
    """A misspelt name of a timm model gets timm's nearest names."""
    with pytest.raises(UnknownModelError, match="memfit rehearse --gpu NAME"):
        timm_models.check_model_name("gpt2")
    with pytest.raises(UnknownModelError, match=r"did you mean resnet50[^.]*\?$"):
        timm_models.check_model_name("resnet5O")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"multiple_of": 2.5}, "multiple_of must be a whole number, not 2.5"),
        ({"max_batch_size": 8.5}, "max_batch_size must be a whole number, not 8.5"),
        (
            {"headroom": "5%"},
            "headroom must be at least 0 and below 1, not '5%'; did you mean 0.05?",
        ),
        ({"headroom": 5}, "not 5; did you mean 0.05?"),
        ({"memory": "16"}, "Did you mean '16GiB'"),
    ],
)
def test_numbers_that_are_none_are_refused(options: Any, says: str) -> None:
    """They are not used in calculations."""
    with pytest.raises(UsageError, match=says):
        memfit.probe("test_vit", gpu="t4", **options)
    if "memory" not in options:
        with pytest.raises(UsageError, match=says):
            memfit.plan("test_vit", 8, gpu="t4", **options)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("operator torchvision::nms does not exist"),
        AttributeError("partially initialized module 'torchvision' has no attribute 'extension'"),
    ],
)
def test_another_torchs_torchvision_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The import of timm can fail in several ways."""
    import builtins

    original = builtins.__import__

    def failing(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name == "timm":
            raise error
        return original(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", failing)
    monkeypatch.delitem(sys.modules, "timm.optim", raising=False)
    with pytest.raises(memfit.UnsupportedError, match="pip install --upgrade torch torchvision"):
        timm_models.import_timm()


def test_several_cards_are_for_surveys() -> None:
    """`gpu` takes one name, and `gpus` a list of names."""
    several: Any = ["t4", "rtx4090"]
    with pytest.raises(UsageError, match="by its name, such as 'rtx4090'"):
        memfit.probe("test_vit", gpu=several)
    with pytest.raises(UsageError, match=r"gpus takes a list of names: \['t4'\]"):
        memfit.survey("test_vit", gpus="t4")


def test_a_misspelt_option_gets_the_nearest_one() -> None:
    """Options of the place and of the search are known too."""
    misspelt: Any = {"gpus": "t4"}
    with pytest.raises(TypeError, match=r"no option 'gpus'; did you mean gpu\?"):
        memfit.probe("test_vit", **misspelt)

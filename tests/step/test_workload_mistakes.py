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


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (TensorDataset(*BATCH), r"holds samples\. Give a batch of its loader: next\(iter"),
        (iter([BATCH]), r"an iterator over batches\. Give one of them: next\(iterator\)"),
        ((part for part in BATCH), "is a generator, an iterator over batches"),
    ],
)
def test_what_makes_batches_is_no_batch(batch: Any, says: str) -> None:
    """A training loop's accumulator says the same."""
    with pytest.raises(WorkloadError, match=says):
        workload(batch=batch)
    model = nn.Linear(3, 1)
    accumulator = memfit.Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), 2, loss=nn.MSELoss()
    )
    with pytest.raises(WorkloadError, match=says):
        accumulator.step(batch)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"model": nn.Linear}, r"the class Linear, not an instance\. Give an instance, Linear\("),
        (
            {"model": "resnet18"},
            "not str. A timm model is given by its name in place of a Workload",
        ),
        ({"loss": "mse"}, "such as torch.nn.functional.cross_entropy, not str"),
        ({"loss": None}, "give lambda outputs: outputs.loss"),
    ],
)
def test_a_part_of_another_kind_is_named(parts: dict[str, Any], says: str) -> None:
    """The message says what to give."""
    with pytest.raises(WorkloadError, match=says):
        workload(**parts)


def test_a_class_is_no_training_step() -> None:
    """A model alone is none either."""
    with pytest.raises(WorkloadError, match="Linear is a class, not an instance"):
        memfit.probe(nn.Linear)
    with pytest.raises(UsageError, match=r"Linear is no name. memfit.survey takes a Workload"):
        memfit.sweep([nn.Linear(3, 1)], gpus=["t4"])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"gpus takes a list of names: \['t4'\]"):
        memfit.sweep("test_vit", gpus="t4")


def test_a_batch_without_targets_is_named() -> None:
    """Before, the loss's own TypeError came, from deep inside."""
    alone = workload(batch=torch.randn(2, 3), loss=torch.nn.functional.mse_loss)
    with pytest.raises(
        WorkloadError, match=r"mse_loss cannot take .* the batch's 0 targets"
    ) as why:
        memfit.probe(alone, gpu="t4", engine="simulate", max_batch_size=2)
    assert "A batch is (inputs, targets)" in str(why.value)
    two = workload(batch=(*BATCH, torch.randn(2, 1)))
    with pytest.raises(WorkloadError, match=r"MSELoss cannot take .* the batch's 2 targets"):
        memfit.verify(two, micro_batch_size=1, accumulation_steps=2)

    def broken(_outputs: Any, _targets: Any) -> Any:
        return len(3)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="has no len"):
        memfit.probe(workload(loss=broken), gpu="t4", engine="simulate", max_batch_size=2)


def test_a_model_that_cannot_take_the_batch_is_not_answered_about() -> None:
    """A simulation raises PyTorch's own error for sizes that do not fit together."""
    wrong = workload(batch=(torch.randn(2, 4), torch.randn(2, 1)))
    for evaluate in (None, "alone"):
        with pytest.raises(RuntimeError, match=r"cannot be multiplied|same reduction dim"):
            memfit.probe(wrong, gpu="t4", engine="simulate", max_batch_size=2, evaluate=evaluate)


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
    with pytest.raises(WorkloadError, match=r"must be a function of the outputs .* not int"):
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
        ({"num_classes": "10"}, "num_classes must be a whole number, not '10'"),
        ({"num_classes": 2.5}, "num_classes must be a whole number, not 2.5"),
        ({"image_size": (3, 96, 96)}, r"\(3, 96, 96\) is not an image size"),
        ({"image_size": 96.5}, "96.5 is not an image size"),
        ({"image_size": [96, "a"]}, "is not an image size"),
        ({"channels_last": "no"}, "channels_last is True or False, not 'no'"),
        ({"model_kwargs": "in_chans=1"}, "model_kwargs is a dictionary, such as"),
        ({"model_kwargs": ["in_chans"]}, "model_kwargs is a dictionary, such as"),
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


def test_an_option_of_other_functions_is_not_offered_again() -> None:
    """`verify` has no cards, and to offer `gpu` for `gpu` helps nobody."""
    other: Any = {"gpu": "t4"}
    with pytest.raises(TypeError, match=r"no option 'gpu'[.] memfit[.]verify computes"):
        memfit.verify("test_vit", micro_batch_size=2, accumulation_steps=2, **other)

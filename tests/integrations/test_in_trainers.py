"""The emitted code runs in each trainer, and trains with every option of the plan."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from accumulation.parts import plan_of
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it
from torch.utils.data import TensorDataset

from integrations.zoo import reset_accelerate
from memfit.errors import UsageError
from memfit.integrations import TRAINERS, lines_for
from memfit.records import Plan, Precision, StepOptions
from memfit.step.timm_models import as_built

pytestmark = pytest.mark.filterwarnings("default")

NUM_SAMPLES, EFFECTIVE, MICRO = 20, 8, 4
EVERYTHING: dict[str, Any] = {
    "optimizer": "adamw",
    "channels_last": True,
    "grad_checkpointing": True,
    "image_size": (8, 8),
    "num_classes": 3,
    "model_kwargs": (("drop_rate", 0.1),),
}


class Net(nn.Module):
    """A convolution and a classifier that record how they are trained."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 3)
        self.is_checkpointing = False
        self.sizes: list[int] = []
        self.layouts: set[bool] = set()
        self.dtypes: set[torch.dtype] = set()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Work as timm's models do."""
        self.is_checkpointing = enable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, 3) for images of shape (samples, 3, height, width)."""
        if self.training:
            self.sizes.append(len(x))
            self.layouts.add(x.is_contiguous(memory_format=torch.channels_last))
        features = self.stem(x)
        self.dtypes.add(features.dtype)
        scores: torch.Tensor = self.head(features.mean((2, 3)))
        return scores


def planned(device: str = "CPU (of this test)", **options: Any) -> Plan:
    """Return a plan for two micro-batches of four samples."""
    chosen = {"precision": Precision.FP32, **options}
    return dataclasses.replace(
        plan_of(EFFECTIVE, MICRO), device=device, options=StepOptions(accumulate=True, **chosen)
    )


def images() -> TensorDataset:
    return TensorDataset(torch.randn(NUM_SAMPLES, 3, 8, 8), torch.randint(3, (NUM_SAMPLES,)))


class Counting(torch.optim.SGD):
    """Counts its steps."""

    num_steps = 0

    def step(self, closure: Any = None) -> Any:
        """Count the step and do nothing else."""
        self.num_steps += 1
        return super().step(closure)


def run(text: str, **names: Any) -> dict[str, Any]:
    exec(compile(text, "emitted", "exec"), names)  # noqa: S102 - that is the test
    return names


def trained_as_planned(net: Net, options: dict[str, Any]) -> None:
    assert set(net.sizes) == {MICRO}
    assert net.is_checkpointing is bool(options.get("grad_checkpointing"))
    if options.get("channels_last"):
        assert net.stem.weight.is_contiguous(memory_format=torch.channels_last)
        assert net.layouts == {True}


@pytest.mark.needs("accelerate")
@pytest.mark.parametrize("options", [{}, EVERYTHING, {"precision": Precision.AMP_BF16}])
def test_accelerate(options: dict[str, Any]) -> None:
    """Each step has a window of two batches, in the plan's precision and layout."""
    reset_accelerate()
    net = Net()
    optimizer = Counting(net.parameters(), lr=0.1)
    text = lines_for(planned(**options), "accelerate")
    run(text, model=net, optimizer=optimizer, loss_fn=F.cross_entropy, dataset=images())
    trained_as_planned(net, options)
    # Five batches make two windows, and a third with the one batch left at the loader's end.
    assert optimizer.num_steps == 3
    if options.get("precision") is Precision.AMP_BF16:
        assert torch.bfloat16 in net.dtypes


@pytest.mark.needs("pytorch_lightning")
@pytest.mark.parametrize("options", [{}, EVERYTHING, {"precision": Precision.AMP_BF16}])
def test_lightning(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The trainer accumulates and converts as the plan says."""
    import pytorch_lightning as pl

    monkeypatch.chdir(tmp_path)
    net = Net()
    optimizer = Counting(net.parameters(), lr=0.1)

    class Module(pl.LightningModule):  # type: ignore[misc]
        """A user's module."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, _index: int) -> Any:
            """Return the loss of a batch of images and classes."""
            x, y = batch
            if options.get("channels_last"):
                x = x.to(memory_format=torch.channels_last)
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            """Return the optimizer that counts."""
            return optimizer

    text = lines_for(planned(**options), "lightning")
    assert ("put the images into the same layout" in text) is bool(options.get("channels_last"))
    quiet = text.replace("Trainer(", "Trainer(max_epochs=1, logger=False, barebones=True, ")
    run(quiet, module=Module(), dataset=images())
    trained_as_planned(net, options)
    assert optimizer.num_steps == 3
    if options.get("precision") is Precision.AMP_BF16:
        assert torch.bfloat16 in net.dtypes


@pytest.mark.needs("fastai")
@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_fastai(options: dict[str, Any]) -> None:
    """One step takes eight samples with the plan's optimizer; fit leaves nothing behind."""
    net = Net()
    data = images()
    text = lines_for(planned(**options), "fastai")
    names = run(text, train=data, valid=data, model=net, loss_fn=nn.CrossEntropyLoss())
    learn = names["learn"]
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lr=0.1)
    trained_as_planned(net, options)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in net.parameters())
    if "optimizer" in options:
        assert isinstance(learn.opt.opt, torch.optim.AdamW)


@pytest.mark.needs("transformers", "accelerate")
@pytest.mark.parametrize("options", [{}, EVERYTHING, {"precision": Precision.AMP_BF16}])
def test_transformers(options: dict[str, Any], tmp_path: Path) -> None:
    """It takes the arguments, and a Trainer trains with them."""
    import transformers

    reset_accelerate()
    net = Net()

    class Wrapped(nn.Module):
        """Works like transformers' models: keywords in, loss and scores out."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            """Return the loss of images of shape (samples, 3, height, width) and the scores."""
            if options.get("channels_last"):
                x = x.to(memory_format=torch.channels_last)
            scores = self.net(x)
            return {"loss": F.cross_entropy(scores, labels), "logits": scores}

    model = Wrapped()
    text = lines_for(planned(**options), "transformers")
    assert "inputs of all 2 micro-batches" in text
    arguments = run(text.replace('"OUTPUT"', repr(str(tmp_path))), model=model)["arguments"]
    assert (arguments.use_cpu, arguments.max_grad_norm) == (True, 1.0)
    quiet = {"num_train_epochs": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    for name, value in quiet.items():
        setattr(arguments, name, value)
    data = [{"x": image, "labels": label} for image, label in zip(*images().tensors, strict=True)][
        : 2 * EFFECTIVE
    ]
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    trained_as_planned(net, options)
    assert trainer.state.global_step == 2


def test_timm_takes_every_flag() -> None:
    """What train.py passes by itself is not given again as a model's argument."""
    given = {
        "drop_path_rate": 0.1,
        "drop_rate": 0.2,
        "in_chans": 1,
        "global_pool": "avg",
        "num_classes": 7,
        "act_layer": "gelu",
    }
    text = lines_for(planned(model_kwargs=tuple(given.items())), "timm")
    assert (
        "--drop-path 0.1 --drop 0.2 --gp avg --in-chans 1 --num-classes 7 "
        "--model-kwargs act_layer=gelu"
    ) in text
    with pytest.raises(UsageError, match="sets the model's argument scriptable itself"):
        lines_for(planned(model_kwargs=(("scriptable", True),)), "timm")
    assert "--device cpu" in text
    assert "--device" not in lines_for(planned(device="NVIDIA L4"), "timm")


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": (96, 96)},
        {"image_size": (96, 64)},
        {"model_kwargs": (("img_size", 96), ("num_classes", 5), ("in_chans", 1))},
    ],
)
@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_timm_builds_the_model_for_the_images_that_it_loads(
    model: str, options: dict[str, Any]
) -> None:
    """--input-size is the loader's only. A model of a fixed size needs an argument besides."""
    import timm
    from timm.utils import ParseKwargs

    if model == "test_resnet" and "model_kwargs" in options:
        options = {"model_kwargs": (("num_classes", 5), ("in_chans", 1))}
    plan = planned(**options)
    plan = dataclasses.replace(plan, subject=model, options=as_built(model, plan.options))
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--input-size", nargs=3, type=int, default=[1, 160, 160])
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--in-chans", type=int)
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    read, _ = parser.parse_known_args(shlex.split(lines_for(plan, "timm"), comments=True))
    # The call of train.py.
    made = timm.create_model(
        model,
        num_classes=read.num_classes,
        in_chans=read.in_chans or read.input_size[0],
        **read.model_kwargs,
    )
    assert made(torch.randn(1, *read.input_size)).shape[0] == 1


@pytest.mark.parametrize(
    ("trainer", "precision"),
    [
        ("accelerate", Precision.AMP_FP16),
        ("lightning", Precision.AMP_FP16),
        ("transformers", Precision.AMP_FP16),
        ("fastai", Precision.AMP_FP16),
        ("fastai", Precision.AMP_BF16),
    ],
)
def test_what_a_trainer_lacks_on_a_cpu_is_refused(trainer: str, precision: Precision) -> None:
    """The trainer would use another precision, or end with its own error."""
    with pytest.raises(UsageError, match=f"has no {precision.value} on a CPU"):
        lines_for(planned(precision=precision), trainer)
    assert lines_for(planned(device="NVIDIA L4", precision=precision), trainer)


def test_fastai_trains_no_weights_in_bf16() -> None:
    """fastai's own bookkeeping fails on such losses, on any device."""
    with pytest.raises(UsageError, match="Plan with precision amp-bf16"):
        lines_for(planned(device="NVIDIA L4", precision=Precision.BF16), "fastai")


def test_every_option_is_said_or_set() -> None:
    """This holds for each trainer and each option."""
    plan = planned(device="NVIDIA L4", **EVERYTHING)
    for trainer in TRAINERS:
        text = lines_for(plan, trainer)
        said = " ".join(line.removeprefix("# ") for line in text.splitlines())
        for sign in ("adamw", "checkpointing", "8", "3", "drop", "channels"):
            assert sign in said, (trainer, sign)

"""Tiny objects of each trainer, and functions that train with them for a few steps."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import tempfile
import warnings
from typing import Any

import torch
from accumulation.parts import plan_of
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it
from torch.utils.data import DataLoader, TensorDataset

from memfit.records import Precision, StepOptions

IMAGE_SIZE, NUM_CLASSES = 64, 5
LIGHTNING = {"fp32": "32-true", "amp-bf16": "bf16-mixed", "amp-fp16": "16-mixed"}
TIMM_MODEL, TIMM_SIZE = "test_resnet", 160


class Net(nn.Module):
    """A few convolutions, whose activations are most of a step's memory."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
        )
        # Enough weights that their gradients and the optimizer's state matter.
        self.head = nn.Sequential(nn.Linear(width, 2048), nn.ReLU(), nn.Linear(2048, 2048))
        self.out = nn.Linear(2048, NUM_CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return scores of shape (samples, classes) for images of shape (samples, 3, H, W)."""
        scores: torch.Tensor = self.out(self.head(self.body(images).mean((2, 3))))
        return scores


def images(num_samples: int) -> TensorDataset:
    """Return a data set of images and classes."""
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(num_samples, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        torch.randint(NUM_CLASSES, (num_samples,), generator=generator),
    )


def learner(
    batch_size: int = 4, *, num_batches: int = 4, device: str = "cpu", **options: Any
) -> Any:
    """Return a fastai Learner."""
    from fastai.callback import fp16  # noqa: F401 - adds to_bf16
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    data = images(batch_size * num_batches)
    dls = DataLoaders.from_dsets(data, data, bs=batch_size, device=torch.device(device))
    torch.manual_seed(0)
    model = options.pop("model", None) or Net()
    learn = Learner(dls, model.to(device), loss_func=nn.CrossEntropyLoss(), **options)
    learn.remove_cbs([cb for cb in learn.cbs if type(cb).__name__ == "ProgressCallback"])
    return learn


def in_precision(learn: Any, precision: str) -> Any:
    """Return a learner that trains in a precision."""
    if precision == "fp32":
        return learn
    return learn.to_bf16() if precision == "amp-bf16" else learn.to_fp16()


def train_fastai(batch_size: int, *, precision: str = "fp32") -> None:
    """Fit a learner on the GPU, without validation."""
    learn = in_precision(learner(batch_size, device="cuda"), precision)
    learn._do_epoch_validate = lambda *_: None
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, lr=0.1)


def lightning_module(**options: Any) -> Any:
    """Return a LightningModule."""
    import pytorch_lightning as pl

    class Module(pl.LightningModule):  # type: ignore[misc]
        """A user's module, which logs and has a schedule."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = options.get("model") or Net()

        def training_step(self, batch: Any, _index: int) -> Any:
            """Return the loss of a batch of images and classes."""
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            self.log("loss", loss)
            return loss

        def validation_step(self, batch: Any, _index: int) -> Any:
            """Return the loss of a batch, and log it."""
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            self.log("val_loss", loss)
            return loss

        def predict_step(self, batch: Any, _index: int) -> Any:
            """Return the probabilities of each class."""
            return self.net(batch[0]).softmax(1)

        def configure_optimizers(self) -> Any:
            """Return an optimizer, and a schedule that asks the trainer for its steps."""
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            steps = int(self.trainer.estimated_stepping_batches)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + 1)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    return Module()


def lightning_trainer(accelerator: str = "cpu", **options: Any) -> Any:
    """Return a quiet Trainer."""
    import pytorch_lightning as pl

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(
        accelerator=accelerator,
        devices=1,
        **{"max_epochs": 1, "enable_model_summary": False, **quiet, **options},
    )


def train_lightning(batch_size: int, *, precision: str = "fp32") -> None:
    """Fit a module on the GPU."""
    trainer = lightning_trainer("gpu", max_steps=4, precision=LIGHTNING[precision])
    trainer.fit(lightning_module(), DataLoader(images(4 * batch_size), batch_size=batch_size))


def evaluate_lightning(batch_size: int, *, method: str, **trainers: Any) -> None:
    """Validate a module, or let it predict, on the GPU."""
    trainer = lightning_trainer("gpu", **trainers)
    run = getattr(trainer, method)
    run(lightning_module(), DataLoader(images(3 * batch_size), batch_size=batch_size))


class Wrapped(nn.Module):
    """Works like transformers' models: keywords in, loss and scores out."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = net or Net()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss of images of shape (samples, 3, H, W) and the scores."""
        scores = self.net(x)
        return {"loss": F.cross_entropy(scores, labels), "logits": scores}


def transformers_trainer(
    batch_size: int = 4,
    *,
    num_samples: int | None = None,
    device: str = "cpu",
    kind: Any = None,
    model: nn.Module | None = None,
    **arguments: Any,
) -> Any:
    """Return a transformers Trainer."""
    import transformers

    data = images(num_samples or 4 * batch_size)
    rows = [{"x": x, "labels": y} for x, y in zip(*data.tensors, strict=True)]
    quiet: dict[str, Any] = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    options = transformers.TrainingArguments(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        use_cpu=device == "cpu",
        logging_strategy="no",
        **quiet,
        **arguments,
    )
    return (kind or transformers.Trainer)(
        model=model or Wrapped(), args=options, train_dataset=rows
    )


def train_transformers(batch_size: int, *, precision: str = "fp32", **arguments: Any) -> None:
    """Train with a Trainer on the GPU."""
    kinds: dict[str, Any] = {kind: precision == f"amp-{kind}" for kind in ("bf16", "fp16")}
    transformers_trainer(batch_size, device="cuda", **kinds, **arguments).train()


class Fp32Loss(nn.CrossEntropyLoss):
    """Converts its scores first, as a model that Accelerate has prepared does."""

    def forward(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of scores in any precision."""
        return super().forward(scores.float(), targets)


def train_accelerate(batch_size: int, *, precision: str = "fp32") -> None:
    """Accumulate two micro-batches in each step, with objects that Accelerate prepared."""
    import accelerate

    from memfit.accelerate import Accumulator

    options = StepOptions(accumulate=True, precision=Precision(precision))
    accelerator = accelerate.Accelerator(
        mixed_precision=precision.removeprefix("amp-").replace("fp32", "no")
    )
    net = Net()
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters()))
    accumulator = Accumulator(
        accelerator,
        model,
        optimizer,
        dataclasses.replace(plan_of(2 * batch_size, batch_size), options=options),
        loss=nn.CrossEntropyLoss(),
        recover=False,
    )
    for batch in DataLoader(images(6 * batch_size), batch_size=2 * batch_size):
        accumulator.step(batch)


def train_timm(batch_size: int, *, precision: str = "fp32") -> None:
    """Train as train.py does: its loader, its scaler and its order of calls."""
    import timm
    from timm.data.loader import PrefetchLoader
    from timm.optim import create_optimizer_v2

    model = timm.create_model(TIMM_MODEL, num_classes=NUM_CLASSES).cuda()
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, momentum=0.9)
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=precision == "amp-bf16")
    # One image many times, because so many would take seconds to draw.
    pixel = torch.zeros(1, 3, TIMM_SIZE, TIMM_SIZE, dtype=torch.uint8)
    num_samples = 3 * batch_size
    pixels = TensorDataset(pixel.expand(num_samples, -1, -1, -1), torch.zeros(num_samples).long())
    loader = PrefetchLoader(DataLoader(pixels, batch_size=batch_size), device=torch.device("cuda"))
    for images_, targets in loader:
        with autocast:
            outputs = model(images_)
            loss = F.cross_entropy(outputs, targets)
        loss.backward()
        optimizer.step()
        loss.item()
        optimizer.zero_grad()


def trains(_backend: Any, *arguments: Any) -> bool:
    """Whether a trainer trains with a batch size on this process's GPU, or runs out of memory."""
    # A step may come first.
    name, batch_size, options = arguments[-3:]
    reset_accelerate()
    train: Any = {
        "fastai": train_fastai,
        "lightning": train_lightning,
        "transformers": train_transformers,
        "evaluation": evaluate_lightning,
        "accelerate": train_accelerate,
        "timm": train_timm,
    }[name]
    try:
        with warnings.catch_warnings(), open_output():
            warnings.simplefilter("ignore")
            train(batch_size, **options)
    except torch.OutOfMemoryError:
        return False
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return True


def open_output() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which trainers print nothing."""
    return contextlib.redirect_stdout(tempfile.TemporaryFile("w"))


def reset_accelerate() -> None:
    """Forget the state that Accelerate shares between its objects."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()

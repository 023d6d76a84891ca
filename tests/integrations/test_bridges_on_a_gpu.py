"""Float16 with a gradient scaler in trainers, on a real GPU. A rehearsal computes no numbers."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

import pytest
import torch
from accumulation.parts import plan_of
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it
from torch.utils.data import DataLoader

from integrations import exact, zoo
from memfit.records import Plan, Precision, StepOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.computes,
    pytest.mark.filterwarnings("default"),
]

CLOSE = 5e-3
"""Float16 has 11 bits; the parts' gradients are rounded one by one."""


def plan() -> Plan:
    parts = plan_of(exact.SAMPLES, exact.MICRO, multiple_of=exact.MICRO)
    options = StepOptions(precision=Precision.AMP_FP16, accumulate=True)
    return dataclasses.replace(parts, options=options)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_accelerate_unscales_and_clips_once_a_step(clip: float | None) -> None:
    """The gradients that the optimizer sees are those of the whole batch."""
    accelerate = pytest.importorskip("accelerate")
    from memfit.accelerate import Accumulator

    def trained(parts: Plan | int) -> tuple[list[exact.Gradients], list[int]]:
        zoo.reset_accelerate()
        accelerator = accelerate.Accelerator(mixed_precision="fp16")
        model = exact.Small()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        ready, stepper = accelerator.prepare(model, optimizer)
        accumulator = Accumulator(
            accelerator, ready, stepper, parts, loss=F.cross_entropy, clip_grad_norm=clip
        )
        x, y = (tensor.cuda() for tensor in exact.data().tensors)
        with exact.recorded() as steps:
            accumulator.step((x, y))
            accumulator.step((x, y))
        return steps, model.sizes

    whole, _ = trained(exact.SAMPLES)
    ours, sizes = trained(plan())
    assert sizes == [40, 40, 16] * 2
    assert exact.error(ours, whole) < CLOSE
    if clip is not None:
        assert float(exact.flat(ours[0]).norm()) == pytest.approx(clip, rel=1e-3)


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.05}])
def test_lightning_unscales_and_clips_once_a_step(options: dict[str, Any]) -> None:
    """A `16-mixed` Trainer has its own scaler."""
    lightning = pytest.importorskip("pytorch_lightning")
    from memfit.lightning import accumulating

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = exact.Small()

        def training_step(self, batch: Any, _index: int) -> Any:
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    def fitted(module: Any) -> list[exact.Gradients]:
        loader = DataLoader(exact.data(2 * exact.SAMPLES), batch_size=exact.SAMPLES)
        with exact.recorded() as steps:
            trainer = zoo.lightning_trainer("gpu", precision="16-mixed", **options)
            trainer.fit(module, loader)
        return steps

    whole = fitted(Module())
    module = Module()
    with accumulating(module, plan()):
        ours = fitted(module)
    assert module.net.sizes == [40, 40, 16] * 2
    assert exact.error(ours, whole) < CLOSE


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_transformers_unscales_and_clips_once_a_step(max_grad_norm: float) -> None:
    """With `fp16=True`, each part of the batch goes through the Trainer's own step."""
    transformers = pytest.importorskip("transformers")
    from memfit.transformers import Accumulating

    class Trainer(Accumulating, transformers.Trainer):  # type: ignore[misc, name-defined]
        pass

    class Scored(exact.Small):
        def forward(self, x: torch.Tensor, labels: Any = None) -> Any:
            scores = super().forward(x)
            return {"loss": F.cross_entropy(scores, labels), "logits": scores}

    def trained(kind: Any, model: Any, **given: Any) -> list[exact.Gradients]:
        zoo.reset_accelerate()
        arguments = transformers.TrainingArguments(
            output_dir=tempfile.gettempdir(),
            per_device_train_batch_size=exact.SAMPLES,
            num_train_epochs=1,
            fp16=True,
            optim="sgd",
            max_grad_norm=max_grad_norm,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        rows = [
            {"x": x, "labels": y}
            for x, y in zip(*exact.data(2 * exact.SAMPLES).tensors, strict=True)
        ]
        trainer = kind(model=model, args=arguments, train_dataset=rows, **given)
        with exact.recorded() as steps:
            trainer.train()
        return steps

    whole = trained(transformers.Trainer, Scored())
    model = Scored()
    ours = trained(Trainer, model, plan=plan())
    assert model.sizes[-3:] == [40, 40, 16]
    assert exact.error(ours, whole) < CLOSE

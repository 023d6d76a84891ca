"""A LightningModule accumulates exactly, and everything else stays Lightning's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accumulation.parts import plan_of
from torch.nn import functional as F  # noqa: N812 - as all of PyTorch's documentation has it
from torch.utils.data import DataLoader

from integrations import exact, zoo
from memfit.errors import UnsupportedError, UsageError, WorkloadError
from memfit.lightning import accumulating, plan_before_fit
from memfit.records import Plan

pytestmark = pytest.mark.filterwarnings("default")
pl = pytest.importorskip("pytorch_lightning", reason="it trains with Lightning")


class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
    """A user's module, with a schedule, and a loss in a dictionary where asked for."""

    def __init__(self, *, in_dictionary: bool = False) -> None:
        super().__init__()
        self.net = exact.Small()
        self.in_dictionary = in_dictionary
        self.rates: list[float] = []
        self.losses: list[float] = []

    def training_step(self, batch: Any, _index: int) -> Any:
        """Return the loss of a batch."""
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return {"loss": loss, "scores": 1} if self.in_dictionary else loss

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        """Keep the loss and the learning rate of a step."""
        self.losses.append(float(outputs["loss"]))
        self.rates.append(self.optimizers().param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        """Return an optimizer and a schedule that steps after each step."""
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def fitted(
    module: Module, *, num_samples: int = 160, batch_size: int = exact.SAMPLES, **options: Any
) -> list[exact.Gradients]:
    loader = DataLoader(exact.data(num_samples), batch_size=batch_size)
    with exact.recorded() as steps:
        zoo.lightning_trainer(**options).fit(module, loader)
    return steps


def plan(**options: Any) -> Plan:
    return plan_of(exact.SAMPLES, exact.MICRO, multiple_of=exact.MICRO, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.05}, {"precision": "bf16-mixed"}],
    ids=["plain", "clipped", "mixed"],
)
def test_each_step_is_that_of_the_whole_batch(options: dict[str, Any]) -> None:
    """The second batch is short. Clipping, schedule and precision are those of the Trainer."""
    whole = Module()
    expected = fitted(whole, **options)
    module = Module(in_dictionary=True)
    before = set(vars(module))
    with accumulating(module, plan()) as same:
        assert same is module
        steps = fitted(module, **options)
    assert module.net.sizes == [40, 40, 16, 40, 24]
    # In bf16 the parts' gradients are rounded one by one.
    assert exact.error(steps, expected) < (0.02 if "precision" in options else 1e-6)
    assert module.rates == whole.rates
    assert module.losses == pytest.approx(
        whole.losses, rel=1e-2 if "precision" in options else 1e-6
    )
    assert set(vars(module)) - before <= {"_hparams"}  # Lightning sets it when it is read
    assert module.automatic_optimization


def test_lightnings_own_accumulation_divides_a_short_last_window_wrongly() -> None:
    """160 samples in batches of 40: three make a window, and the last one alone is divided by 3."""
    expected = exact.plain([120, 40], rate=0.1)
    theirs = fitted(Module(), batch_size=40, accumulate_grad_batches=3)
    assert len(theirs) == 2
    assert exact.error(theirs[:1], expected[:1]) < 1e-6
    assert exact.error(theirs[1:], expected[1:]) > 0.5


def test_what_does_not_go_together_is_refused_in_a_sentence() -> None:
    """The sentence names the setting. The module is put back after an error too."""
    module = Module()
    with (
        pytest.raises(UsageError, match=r"accumulating takes the Plan .* returns, not 40"),
        accumulating(module, 40),  # type: ignore[arg-type]
    ):
        pass
    with (
        pytest.raises(UsageError, match="accumulate_grad_batches must be 1, not 2"),
        accumulating(module, plan()),
    ):
        fitted(module, accumulate_grad_batches=2)
    module.automatic_optimization = False
    with (
        pytest.raises(UnsupportedError, match="steps its optimizers itself"),
        accumulating(module, plan()),
    ):
        pass
    module.automatic_optimization = True
    module.training_step = lambda *_: None  # type: ignore[method-assign]
    with (
        pytest.raises(WorkloadError, match="must return the loss of each micro-batch"),
        accumulating(module, plan()),
    ):
        fitted(module)
    del module.training_step
    assert not {"training_step", "optimizer_zero_grad"} & set(vars(module))


class Data(pl.LightningDataModule):  # type: ignore[misc, name-defined]
    """A user's data module."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 4

    def train_dataloader(self) -> Any:
        """Return a loader of the module's batch size."""
        return DataLoader(exact.data(192), batch_size=self.batch_size)


def test_a_callback_plans_before_fit_and_puts_the_sizes_back() -> None:
    """96 samples in micro-batches of at most 40 are 3 x 32 for Lightning."""
    planning = plan_before_fit(96, gpu="rtx3060", engine="simulate", max_batch_size=40)
    data, module = Data(), Module()
    trainer = zoo.lightning_trainer(callbacks=[planning])
    with exact.recorded() as steps:
        trainer.fit(module, datamodule=data)
    assert module.net.sizes == [32] * 6
    del steps[:-2]  # those of the plan's own trials, whose tensors have no values
    expected = exact.plain([96, 96])
    assert exact.error(steps[:1], expected[:1]) < 1e-6
    # The second step begins with weights that the first has rounded differently.
    assert exact.error(steps[1:], expected[1:]) < 1e-5
    assert planning.plan.effective_batch_size == 96
    assert (data.batch_size, trainer.accumulate_grad_batches) == (4, 1)


def test_a_plan_needs_a_data_module_with_a_batch_size() -> None:
    """The sentence says what to give."""
    data = Data()
    del data.batch_size
    trainer = zoo.lightning_trainer(callbacks=[plan_before_fit(96, gpu="rtx3060")])
    with pytest.raises(UsageError, match="Data has no attribute 'batch_size': give trainer"):
        trainer.fit(Module(), datamodule=data)
    trainer = zoo.lightning_trainer(callbacks=[plan_before_fit(96, gpu="rtx3060")])
    with pytest.raises(UsageError, match="There is no LightningDataModule: give trainer"):
        trainer.fit(Module(), DataLoader(exact.data(), 4))

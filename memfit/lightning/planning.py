"""A plan before `fit`, carried out by Lightning's own accumulation."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from typing_extensions import Unpack

from memfit.api import plan as plan_for
from memfit.api.asking import SearchKeywords
from memfit.errors import UsageError
from memfit.integrations.equal import equal_parts
from memfit.records import Plan

__all__ = ["plan_before_fit"]


def plan_before_fit(
    effective_batch_size: int,
    *,
    batch_size_name: str = "batch_size",
    gpu: str | None = None,
    **options: Unpack[SearchKeywords],
) -> Any:
    """Return a callback that plans before `fit`, and sets what Lightning's own accumulation needs.

    These are the attribute `batch_size` of the data module, and the trainer's
    `accumulate_grad_batches`. Both are put back after `fit`. The callback's attribute `plan` is the
    plan.

    Args:
        effective_batch_size: Samples in each optimizer step, over all ranks.
        batch_size_name: The attribute of the `LightningDataModule` that holds its batch size.
        gpu: A card to plan for instead of the trainer's own device.
        **options: As for `memfit.plan`.

    Raises:
        UsageError: When `fit` begins: there is no such attribute, or the trainer accumulates.
        DoesNotFitError: When `fit` begins: not even one sample fits.
    """
    # A Trainer takes callbacks of its own package only.
    name = "lightning.pytorch" if "lightning.pytorch" in sys.modules else "pytorch_lightning"
    package = importlib.import_module(name)

    class PlanBeforeFit(package.Callback):  # type: ignore[name-defined, misc]
        """Plans before `fit`."""

        def __init__(self) -> None:
            self.plan: Plan | None = None
            self._before: int | None = None

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            """Plan on the first rank, and set the sizes on all ranks."""
            if stage != "fit":
                return
            data = _data_module(trainer, batch_size_name)
            plan = None
            if trainer.is_global_zero:
                device = None if gpu is not None else trainer.strategy.root_device
                if device is not None:
                    pl_module.to(device)  # the trainer does so a little later
                plan = plan_for(
                    pl_module,
                    effective_batch_size,
                    world_size=trainer.world_size,
                    device=None if device is None else str(device),
                    gpu=gpu,
                    **{**options, "datamodule": data, "trainer": trainer},
                )
            self.plan = trainer.strategy.broadcast(plan)
            assert isinstance(self.plan, Plan)
            parts = equal_parts(self.plan, "Lightning")
            self._before = getattr(data, batch_size_name)
            setattr(data, batch_size_name, parts.micro_batch_size)
            trainer.accumulate_grad_batches = parts.accumulation_steps

        def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
            """Put the sizes back."""
            del pl_module, stage
            self._put_back(trainer)

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            """Put the sizes back."""
            del pl_module, exception
            self._put_back(trainer)

        def _put_back(self, trainer: Any) -> None:
            if self._before is not None:
                setattr(trainer.datamodule, batch_size_name, self._before)
                trainer.accumulate_grad_batches = 1
                self._before = None

    return PlanBeforeFit()


def _data_module(trainer: Any, batch_size_name: str) -> Any:
    """Return the data module of a trainer that does not accumulate yet.

    Raises:
        UsageError: There is none with such an attribute, or the trainer accumulates.
    """
    if trainer.accumulate_grad_batches != 1:
        raise UsageError(
            "The plan says how many batches are accumulated, so accumulate_grad_batches must be 1, "
            f"not {trainer.accumulate_grad_batches}."
        )
    data = trainer.datamodule
    if data is None or not hasattr(data, batch_size_name):
        what = "There is no LightningDataModule" if data is None else type(data).__name__
        missing = "" if data is None else f" has no attribute {batch_size_name!r}"
        raise UsageError(
            f"{what}{missing}: give trainer.fit a data module whose train_dataloader uses "
            f"self.{batch_size_name}."
        )
    return data

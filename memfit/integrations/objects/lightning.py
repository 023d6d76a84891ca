"""A `LightningModule` as a workload.

The step is the module's own `training_step`. Lightning keeps the gradients of the last step until
the next forward pass has ended, so a trial does too. An evaluation is the module's own
`validation_step`, `test_step` or `predict_step`, on the loader that Lightning takes for it.

Source: Lightning-AI/pytorch-lightning, src/lightning/pytorch/loops/optimization/automatic.py
    (`Closure.closure`: forward, zero_grad, backward), src/lightning/pytorch/loops/
    evaluation_loop.py and prediction_loop.py.
"""

from __future__ import annotations

import contextlib
import copy
import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from memfit.errors import UnsupportedError, UsageError, WorkloadError
from memfit.integrations.objects.step import (
    TrainersStep,
    TrainersWorkload,
    drawn_batch,
    replaced,
    step_of,
)
from memfit.records import Precision

__all__ = ["Method", "workload_of_module"]


class Method(str, enum.Enum):
    """What a trainer does with a module, named as in Lightning's `Tuner`."""

    FIT = "fit"
    VALIDATE = "validate"
    TEST = "test"
    PREDICT = "predict"

    @classmethod
    def named(cls, name: str | Method | None, *, evaluate: object = None) -> Method:
        """Return the method with a name.

        Args:
            name: The name; `None` for `VALIDATE` in an evaluation, and `FIT` otherwise.
            evaluate: The option `evaluate` of the step.

        Raises:
            UsageError: There is no such method, or it is not an evaluation of this kind.
        """
        evaluates = evaluate not in (None, False)
        if name is None:
            return cls.VALIDATE if evaluates else cls.FIT
        try:
            found = cls(name)
        except ValueError:
            known = ", ".join(repr(method.value) for method in cls)
            raise UsageError(f"method is one of {known}, not {name!r}.") from None
        if found is cls.FIT and evaluates:
            raise UsageError(
                "method 'fit' trains, and evaluate does not: leave one of the two out, or give "
                "method 'validate', 'test' or 'predict'."
            )
        if evaluate == "in-training" and found is not cls.VALIDATE:
            raise UsageError(
                f"Lightning validates during training, but it does not {found.value} then: give "
                "method 'validate' with evaluate 'in-training', or leave evaluate out."
            )
        return found

    @property
    def step(self) -> str:
        """The name of the module's step."""
        steps = {Method.FIT: "training_step", Method.VALIDATE: "validation_step"}
        return steps.get(self, f"{self.value}_step")

    @property
    def loader(self) -> str:
        """The name of what makes the loader, in a module and in a data module."""
        loaders = {Method.FIT: "train", Method.VALIDATE: "val"}
        return f"{loaders.get(self, self.value)}_dataloader"


_PRECISIONS = {
    "32-true": Precision.FP32,
    "bf16-mixed": Precision.AMP_BF16,
    "16-mixed": Precision.AMP_FP16,
    "bf16-true": Precision.BF16,
}


def workload_of_module(
    module: Any, *, datamodule: Any = None, trainer: Any = None, method: Method = Method.FIT
) -> TrainersWorkload:
    """Return a step of a `LightningModule`.

    Args:
        module: The module, which is not changed.
        datamodule: A `LightningDataModule` or a loader; `None` for the module's own loader.
        trainer: The `Trainer` that it is trained with, for its precision; `None` for Lightning's
            defaults.
        method: Whether it is trained, validated, tested, or asked for predictions.

    Raises:
        UsageError: There is no data, no such step, or a wrong argument.
        UnsupportedError: The module or the trainer does something that a trial cannot do.
    """
    if method is Method.FIT and not module.automatic_optimization:
        raise UnsupportedError(
            f"{type(module).__name__} steps its optimizers itself (automatic_optimization is "
            "False), so memfit does not see the step. Rehearse the script instead: memfit rehearse "
            "--gpu NAME -- python train.py."
        )
    if trainer is not None and not hasattr(trainer, "accumulate_grad_batches"):
        raise UsageError(f"trainer= must be a Lightning Trainer, not {type(trainer).__name__}.")
    _check_has_step(module, method)
    precision = _precision_of(trainer)
    batch = drawn_batch(lambda: next(iter(_loader(module, datamodule, method))))
    step = _ModulesStep(module, _StandInTrainer(trainer, method), method)
    loop = getattr(trainer, "validate_loop", None)
    return step_of(
        step,
        batch,
        _OptimizerOf(step),
        precision=precision,
        evaluates_in_no_grad=not getattr(loop, "inference_mode", True),
    )


def _precision_of(trainer: Any) -> Precision:
    """Return the precision that a Lightning trainer is set to.

    Raises:
        UnsupportedError: memfit has no such precision.
    """
    name = "32-true" if trainer is None else str(trainer.precision)
    if name not in _PRECISIONS:
        raise UnsupportedError(
            f"memfit has no trials in Lightning's precision {name!r}; it has "
            f"{', '.join(_PRECISIONS)}. Rehearse the script instead: memfit rehearse --gpu NAME -- "
            "python train.py."
        )
    return _PRECISIONS[name]


def _check_has_step(module: Any, method: Method) -> None:
    """Refuse an evaluation for which the module has no step of its own.

    Raises:
        UsageError: It has none.
    """
    own = getattr(type(module), method.step, None)
    inherited = next(
        vars(kind).get(method.step)
        for kind in reversed(type(module).__mro__)
        if method.step in vars(kind)
    )
    # Lightning's own predict_step calls the module.
    if own is inherited and method is not Method.PREDICT:
        raise UsageError(
            f"{type(module).__name__} has no {method.step}, so Lightning cannot {method.value} it."
        )


def _loader(module: Any, datamodule: Any, method: Method) -> Any:
    """Return the loader that Lightning takes batches from.

    Raises:
        UsageError: There is none, or there are several.
    """
    if datamodule is None:
        try:
            loader = getattr(module, method.loader)()
        except Exception as error:
            raise UsageError(
                f"{type(module).__name__} has no {method.loader} of its own: give datamodule=, a "
                "LightningDataModule or a loader."
            ) from error
    elif hasattr(datamodule, method.loader):
        # `setup` sets attributes. They are set on a copy.
        data = copy.copy(datamodule)
        data.prepare_data()
        data.setup(method.value)
        try:
            loader = getattr(data, method.loader)()
        except Exception as error:
            if type(error).__name__ != "MisconfigurationException":
                raise
            raise UsageError(
                f"{type(datamodule).__name__} has no {method.loader}, which Lightning needs to "
                f"{method.value} a module."
            ) from error
    else:
        loader = datamodule
    if isinstance(loader, (list, tuple)) and len(loader) == 1:
        loader = loader[0]
    if not hasattr(loader, "__iter__") or isinstance(loader, (Mapping, list, tuple)):
        raise UsageError(
            f"datamodule= must be a LightningDataModule or one loader, not {type(loader).__name__}."
        )
    return loader


class _StandInTrainer:
    """What a module may ask its trainer for in a trial.

    Args:
        trainer: The real trainer; `None` for Lightning's defaults.
        method: What the trainer does with the module.
    """

    def __init__(self, trainer: Any, method: Method) -> None:
        self.max_epochs = getattr(trainer, "max_epochs", None) or 1
        self.max_steps = getattr(trainer, "max_steps", -1)
        self.accumulate_grad_batches = getattr(trainer, "accumulate_grad_batches", 1)
        self.precision = getattr(trainer, "precision", "32-true")
        self.world_size = getattr(trainer, "world_size", 1)
        self.num_devices = getattr(trainer, "num_devices", 1)
        self.global_rank = self.local_rank = self.node_rank = 0
        # Schedules need a number of steps; a trial's memory does not depend on it.
        self.estimated_stepping_batches = self.max_steps if self.max_steps > 0 else 1000
        self.num_training_batches = 1000
        self.current_epoch = self.global_step = 0
        self.training, self.sanity_checking = method is Method.FIT, False
        self.validating, self.testing = method is Method.VALIDATE, method is Method.TEST
        self.predicting, self.evaluating = method is Method.PREDICT, self.validating or self.testing
        self.is_global_zero = True
        self.callbacks: list[Any] = []
        self.loggers: list[Any] = []
        self.logger = None


def _logs_nothing(*_values: Any, **_options: Any) -> None:
    """Stand in for `log` and `log_dict`."""


@contextlib.contextmanager
def _attached(module: Any, trainer: _StandInTrainer) -> Iterator[None]:
    """Give a module the trainer's stand-in for the time of the block. Nothing is logged."""
    # The setter of `trainer` takes Lightning's own trainer only.
    with replaced(module, _trainer=trainer, log=_logs_nothing, log_dict=_logs_nothing):
        yield


def _optimizer_in(configured: Any, name: str) -> torch.optim.Optimizer:
    """Return the one optimizer in what `configure_optimizers` returned.

    Raises:
        UnsupportedError: There are none, or several.
    """
    found = configured
    if isinstance(found, (list, tuple)) and len(found) == 2 and isinstance(found[0], (list, tuple)):  # noqa: PLR2004 - optimizers and schedulers
        found = found[0]
    if isinstance(found, (list, tuple)) and len(found) == 1:
        found = found[0]
    if isinstance(found, Mapping):
        found = found["optimizer"]
    if not isinstance(found, torch.optim.Optimizer):
        raise UnsupportedError(
            f"{name}.configure_optimizers returned {type(found).__name__}, but a trial needs one "
            "torch optimizer. Rehearse the script instead: memfit rehearse --gpu NAME -- python "
            "train.py."
        )
    return found


class _OptimizerOf:
    def __init__(self, step: _ModulesStep) -> None:
        self._step = step

    def __call__(self, _parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return self._step.make_optimizer()


class _ModulesStep(TrainersStep):
    def __init__(self, module: Any, trainer: _StandInTrainer, method: Method) -> None:
        super().__init__(module)
        self._trainer = trainer
        self._method = method
        self._begins_step = False  # without an optimizer there are no steps

    def forward(self, batch: Any, held: Any = None) -> torch.Tensor:
        del held
        module: Any = self.model
        with _attached(module, self._trainer):
            batch = module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0)
            loss = getattr(module, self._method.step)(batch, 0)
        if self._method is not Method.FIT:
            output: torch.Tensor = loss
            return output
        if isinstance(loss, Mapping):
            loss = loss.get("loss")
        if not isinstance(loss, torch.Tensor):
            raise WorkloadError(
                f"{type(module).__name__}.training_step must return the loss, or a dictionary with "
                f"'loss', not {type(loss).__name__}."
            )
        if self._begins_step:
            self._begins_step = False
            module.zero_grad()
        return loss

    def make_optimizer(self) -> torch.optim.Optimizer:
        """Return the module's own optimizer, which leaves gradients where they are."""
        module: Any = self.model
        self._begins_step = True
        with _attached(module, self._trainer):
            optimizer = _optimizer_in(module.configure_optimizers(), type(module).__name__)
        optimizer.zero_grad = self._keep_gradients  # type: ignore[method-assign]
        return optimizer

    def _keep_gradients(self, set_to_none: bool = True) -> None:
        """Stand in for `zero_grad`: the next forward pass drops the gradients."""
        del set_to_none
        self._begins_step = True

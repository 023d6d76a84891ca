"""Turns a trainer's own object into a `Workload`.

A fastai `Learner`, a `LightningModule` and a transformers `Trainer` are recognised by the names of
their classes. So memfit imports no trainer by itself.
"""

from __future__ import annotations

from typing import Any, Union

from memfit.errors import UsageError
from memfit.step.workload import Workload

__all__ = ["Subject", "is_of", "subject_of"]

Subject = Union[str, Workload, Any]  # noqa: UP007 - an alias, at runtime
"""A timm model's name, a workload, or a trainer's own object."""


def is_of(value: object, package: str, name: str) -> bool:
    """Whether an object's class is, or inherits, a class of a package.

    Args:
        value: Any object.
        package: The package's name, the part before the first dot.
        name: The class's name.
    """
    return any(
        kind.__name__ == name and kind.__module__.partition(".")[0] == package
        for kind in type(value).__mro__
    )


def subject_of(
    subject: Subject,
    *,
    datamodule: Any = None,
    trainer: Any = None,
    method: str | None = None,
    evaluate: object = None,
    samples_per_step: int | None = None,
) -> Any:
    """Return a trainer's own object as a workload, and anything else as it is.

    Args:
        subject: A timm model's name, a workload, a trainer's own object, or something else.
        datamodule: For a `LightningModule`: its data, a `LightningDataModule` or a loader.
        trainer: For a `LightningModule`: its `Trainer`.
        method: For a `LightningModule`: what its `Trainer` does, such as `"validate"`.
        evaluate: The option `evaluate` of the step.
        samples_per_step: Samples that one process has in an optimizer step, if that is planned.

    Raises:
        UsageError: `datamodule`, `trainer` or `method` is given beside something else.
    """
    if is_of(subject, "lightning", "LightningModule") or is_of(
        subject, "pytorch_lightning", "LightningModule"
    ):
        from memfit.integrations.objects.lightning import Method, workload_of_module

        return workload_of_module(
            subject,
            datamodule=datamodule,
            trainer=trainer,
            method=Method.named(method, evaluate=evaluate),
        )
    for name, given in (("datamodule", datamodule), ("trainer", trainer), ("method", method)):
        if given is not None:
            raise UsageError(f"{name}= goes with a LightningModule, not with {_kind(subject)}.")
    if is_of(subject, "fastai", "Learner"):
        from memfit.integrations.objects.fastai import workload_of_learner

        return workload_of_learner(subject, samples_per_step=samples_per_step)
    if is_of(subject, "transformers", "Trainer"):
        from memfit.integrations.objects.transformers import workload_of_trainer

        return workload_of_trainer(subject, samples_per_step=samples_per_step)
    return subject


def _kind(subject: object) -> str:
    return repr(subject) if isinstance(subject, str) else f"a {type(subject).__name__}"

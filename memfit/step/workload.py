"""A user's own objects as a training step: `Workload`.

`memfit.step.training_step` describes a step with its options and builds it on a device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memfit.errors import DataEndedError, WorkloadError
from memfit.records import Precision
from memfit.step import refusals
from memfit.step.batch_rules import BatchRules
from memfit.step.batches import Layout
from memfit.step.calling import split_batch
from memfit.step.made_batches import check_made
from memfit.step.meta_copy import without_values
from memfit.step.optimizers import check_steps_alone, check_steps_model

__all__ = ["OptimizerFactory", "Workload"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

_FEW = 2


@dataclasses.dataclass(frozen=True, repr=False)
class Workload:
    """A training step made of the user's own objects.

    Args:
        model: Any module, in training mode.
        batch: An example batch `(inputs, targets)` of any nesting, whose tensors have the shape
            (samples, ...); or a function of the batch size that returns one. Inputs in a tuple
            or list are passed one by one, a dictionary by its keys; if `forward` takes one argument
            instead, it gets the whole. A batch that is one dictionary or tensor has no targets.
        loss: A function `loss(outputs, targets)` that returns one number, or several numbers (a
            tuple, list or dictionary) that are added. Targets that are a tuple or list are passed
            one by one. Without targets, the call is `loss(outputs)`.
        optimizer: An optimizer over the model's parameters, a function that makes one from them,
            or the name of one that timm knows.
        num_inputs: How many leading elements of a flat batch such as `(x1, x2, y)` are inputs.
        batch_dims: For some parts of the batch, the dimension that counts the samples, if it is not
            the first one. It is `None` for a part that belongs to all samples, and 0 for a list
            whose entries are the samples. Keys are written as in error messages:
            `"batch[0]['mask']"`.
        cut: A function `cut(batch, start, stop)` that returns the samples from `start` up to, but
            not including, `stop`. It is needed if slices do not give them.
        count: A function that returns the number of samples in a batch. It is needed beside `cut`
            if neither the batch nor its targets have a single length.
        keeps_outputs: The training loop holds a batch, its outputs and its loss in variables until
            the next iteration replaces them, as a plain loop does at module level.

    Raises:
        WorkloadError: One of the parts has the wrong type, or cannot be trained.
    """

    model: nn.Module
    batch: Any
    loss: Callable[..., torch.Tensor]
    optimizer: Optimizer | OptimizerFactory | str
    num_inputs: int = dataclasses.field(default=1, kw_only=True)
    batch_dims: Mapping[str | int, int | None] = dataclasses.field(
        default_factory=dict, kw_only=True
    )
    cut: Callable[[Any, int, int], Any] | None = dataclasses.field(default=None, kw_only=True)
    count: Callable[[Any], int] | None = dataclasses.field(default=None, kw_only=True)
    keeps_outputs: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse parts that cannot make a training step."""
        refusals.check_model(self.model)
        refusals.check_loss(self.loss)
        refusals.check_optimizer(self.optimizer)
        if self.cut is None:
            refusals.check_batch(self.batch)
        if self.num_inputs < 1:
            raise WorkloadError(f"num_inputs must be at least 1, not {self.num_inputs}.")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise WorkloadError(
                f"{_kind(self.model)} has no parameter that requires a gradient, so "
                "there is nothing to train."
            )
        if not any(module.training for module in self.model.modules()):
            raise WorkloadError(
                f"{_kind(self.model)} is in evaluation mode. Call model.train() first, "
                "as your training loop does."
            )
        if isinstance(self.optimizer, Optimizer):
            check_steps_alone(self.optimizer)
            check_steps_model(self.optimizer, self.model)
        if not callable(self.batch):
            self._example_layout.certain()
        else:
            _ = self.rules  # making the rules checks them

    def __repr__(self) -> str:
        """Name the parts. A model and a batch in full would fill pages."""
        made = callable(self.batch)
        batch = "batch=a function" if made else f"batch of {self.example_batch_size}"
        loss, optimizer = _name_of(self.loss), _name_of(self.optimizer)
        return f"Workload({self.name}, {batch}, loss={loss}, optimizer={optimizer})"

    @functools.cached_property
    def rules(self) -> BatchRules:
        """What the user says about the batch."""
        return BatchRules(
            dims=self.batch_dims, cut=self.cut, count=self.count, num_inputs=self.num_inputs
        )

    @functools.cached_property
    def _example_layout(self) -> Layout:
        return Layout.of(self.batch, self.rules)

    @property
    def name(self) -> str:
        """The name in reports."""
        return type(self.model).__name__

    # A trainer's own object says more about its step. A user's workload leaves both to the options.
    own_precision = Precision.AUTO
    accumulates = False

    @property
    def example_batch_size(self) -> int | None:
        """The number of samples in the example batch; `None` if a function makes batches."""
        return None if callable(self.batch) else self._example_layout.num_samples

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        return next(self.model.parameters()).device

    def batch_of(self, batch_size: int) -> Any:
        """Return a batch of a given size.

        Args:
            batch_size: The number of samples wanted, at least 1.

        Returns:
            Tensors of shape (batch_size, ...) in the nesting of `batch`.

        Raises:
            WorkloadError: The function that makes batches returned a batch of another size.
        """
        if not callable(self.batch):
            return self._example_layout.resized(self.batch, batch_size)
        try:
            batch = self.batch(batch_size)
        except StopIteration:
            raise DataEndedError(
                f"The batch function had no batch of {batch_size} samples "
                "(StopIteration). If the data has no more samples, give "
                "max_batch_size, or repeat the samples."
            ) from None
        check_made(self.batch, batch, batch_size, self.rules)
        return batch

    def layout_of(self, batch_size: int) -> Layout:
        """Find out how the batches of `batch_of` are cut.

        Args:
            batch_size: The number of samples in the batch that is cut.

        Raises:
            WorkloadError: It cannot be told where the samples are.
        """
        if not callable(self.batch):
            layout = self._example_layout
            return layout.again(layout.resized(self.batch, batch_size))
        # The parts that differ between two batches in the same way as their sizes hold samples.
        other = None
        with contextlib.suppress(WorkloadError):
            other = (self.batch_of(batch_size + 1), batch_size + 1)
        return Layout.of(self.batch_of(batch_size), self.rules, num_samples=batch_size, other=other)

    def without_values(self) -> Workload:
        """Return a copy of the workload with all its tensors on the meta device."""
        parts = (self.model, self.loss, self.optimizer)
        model, loss, optimizer = without_values(parts, optimizer=self.optimizer)
        return dataclasses.replace(self, model=model, loss=loss, optimizer=optimizer)

    def split(self, batch: Any) -> tuple[Any, tuple[Any, ...]]:
        """Split a batch into the model's inputs and the loss's targets.

        Args:
            batch: A batch with the nesting of the workload's batch.

        Returns:
            The inputs, and the targets one by one.
        """
        return split_batch(batch, num_inputs=self.num_inputs, is_one_each=self._is_one_each)

    def _is_one_each(self, index: int) -> bool:
        """Whether an element of the batch is a list of one entry for each sample."""
        layout = self._list_layout if callable(self.batch) else self._example_layout
        return layout is not None and layout.is_one_each(index)

    @functools.cached_property
    def _list_layout(self) -> Layout | None:
        try:
            return self.layout_of(_FEW)
        except WorkloadError:
            return None


def _name_of(value: object) -> str:
    """Return the name of a function or a class, a text itself, or the name of an object's class."""
    name = value if isinstance(value, str) else getattr(value, "__name__", None)
    return name if isinstance(name, str) else _kind(value)


def _kind(value: object) -> str:
    return type(value).__name__

"""Describes what is trained: a timm model by its name, or a user's own objects.

A `TrainingStep` is a description and holds no device memory. `TrainingStep.prepare` builds it on a
device. `memfit.step.runner` runs its iterations. The backends measure them.
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

from memfit._torch_private import pytree
from memfit.errors import DataEndedError, UsageError, WorkloadError
from memfit.records import Precision, StepOptions
from memfit.step import batches, refusals, timm_models
from memfit.step.batch_rules import BatchRules
from memfit.step.batches import Layout
from memfit.step.closures import check_steps_alone
from memfit.step.made_batches import check_made
from memfit.step.meta_copy import without_values
from memfit.step.runner import PrecisionPolicy, PreparedStep, split_batch

__all__ = [
    "OptimizerFactory",
    "StepParts",
    "TrainingStep",
    "Workload",
]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]

_NUM_ACCUMULATED_MICRO_BATCHES = 2
_FEW = 2


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step made of the user's own objects.

    Args:
        model: Any module, in training mode.
        batch: An example batch `(inputs, targets)` of any nesting, whose tensors have the shape
            (samples, ...); or a function of the batch size that returns one. Inputs that are a
            tuple or list are passed to the model one by one, a dictionary by its keys. A batch that
            is one dictionary or one tensor has no targets.
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

    def __post_init__(self) -> None:
        """Refuse parts that cannot make a training step."""
        if not isinstance(self.model, nn.Module):
            raise WorkloadError(f"The model must be an nn.Module, not {_kind(self.model)}.")
        refusals.check_loss(self.loss)
        refusals.check_optimizer(self.optimizer)
        refusals.check_batch(self.batch)
        if self.num_inputs < 1:
            raise WorkloadError(f"num_inputs must be at least 1, not {self.num_inputs}.")
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise WorkloadError(
                f"{_kind(self.model)} has no parameter that requires a gradient: there is nothing "
                "to train."
            )
        if not any(module.training for module in self.model.modules()):
            raise WorkloadError(
                f"{_kind(self.model)} is in evaluation mode: call model.train() first, as the "
                "training loop will."
            )
        if isinstance(self.optimizer, Optimizer):
            check_steps_alone(self.optimizer)
            own = {id(parameter) for parameter in self.model.parameters()}
            held = (p for group in self.optimizer.param_groups for p in group["params"])
            if not any(id(parameter) in own for parameter in held):
                raise WorkloadError("The optimizer holds no parameter of the model.")
        if not callable(self.batch):
            self._example_layout.certain()
        else:
            _ = self.rules  # making the rules checks them

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
                f"The batch function had no batch of {batch_size} samples (StopIteration): where "
                "the data has no more, give max_batch_size, or repeat its samples."
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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """The parts of a training step, on its device.

    Args:
        model: The model, converted as the options say.
        batch_of: A function from a batch size to a batch that is not on the device yet.
        layout_of: A function from a batch size to the layout of such a batch. The layout is the
            same
            before and after `place`.
        place: A function that puts a batch on the device, in the type and layout that the model
            takes.
        split: A function from a batch to the model's inputs and the loss's targets.
        loss: A function from outputs and targets to one number.
        optimizer: An optimizer, a function that makes one, or the name of one that timm knows.
    """

    model: nn.Module
    batch_of: Callable[[int], Any]
    layout_of: Callable[[int], Layout]
    place: Callable[[Any], Any]
    split: Callable[[Any], tuple[Any, tuple[Any, ...]]]
    loss: Callable[..., torch.Tensor]
    optimizer: Optimizer | OptimizerFactory | str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStep:
    """The description of one training step: what it trains and how.

    Args:
        subject: A timm model's name, or the user's own workload.
        options: The options of the step. The precision is chosen.

    Raises:
        UnknownModelError: timm has no model of that name.
        UsageError: The subject cannot take one of the options.
    """

    subject: str | Workload
    options: StepOptions

    def __post_init__(self) -> None:
        """Refuse now what would otherwise fail later, in a trial."""
        if isinstance(self.subject, Workload):
            for option in ("image_size", "num_classes", "model_kwargs"):
                if getattr(self.options, option):
                    raise UsageError(
                        f"{option} is for timm models by name; {self.subject.name} is trained as "
                        "it is."
                    )
        else:
            timm_models.check_model_name(self.subject)
        if self.options.optimizer is not None:
            timm_models.check_optimizer_name(self.options.optimizer)

    @property
    def name(self) -> str:
        """The name in reports."""
        return self.subject if isinstance(self.subject, str) else self.subject.name

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches in one iteration."""
        return _NUM_ACCUMULATED_MICRO_BATCHES if self.options.accumulate else 1

    @property
    def live_modules(self) -> tuple[nn.Module, ...]:
        """The user's own modules that the step changes. For a model by name there are none."""
        if isinstance(self.subject, str):
            return ()
        parts = (self.subject.model, self.subject.loss)
        return tuple(part for part in parts if isinstance(part, nn.Module))

    @property
    def live_optimizer(self) -> Optimizer | None:
        """The user's own optimizer that the step changes, if there is one."""
        if isinstance(self.subject, Workload) and isinstance(self.subject.optimizer, Optimizer):
            return self.subject.optimizer
        return None

    @property
    def live_tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors of the user's own objects: weights, buffers, gradients, optimizer state."""
        weights = [parameter for module in self.live_modules for parameter in module.parameters()]
        buffers = [buffer for module in self.live_modules for buffer in module.buffers()]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        optimizer = self.live_optimizer
        states = [] if optimizer is None else pytree.tree_leaves([*optimizer.state.values()])
        held = (state for state in states if isinstance(state, torch.Tensor))
        return (*weights, *buffers, *gradients, *held)

    def prepare(
        self, device: torch.device, *, precision_policy: PrecisionPolicy | None = None
    ) -> PreparedStep:
        """Build the step on a device.

        If the options say so, a user's model is converted in place. So call this inside
        `memfit.memory.restore.preserved`, which undoes it, or in a process of its own, where it
        does not matter. On the meta device, a copy without weights is used, and the user's model is
        not changed.

        Args:
            device: The device to train on.
            precision_policy: Replaces torch's autocast and GradScaler on the meta device.

        Returns:
            A step that can iterate.

        Raises:
            UsageError: The model cannot be built, or does not work with one of the options.
        """
        described = self
        if isinstance(self.subject, Workload) and device.type == "meta":
            described = dataclasses.replace(self, subject=self.subject.without_values())
        parts = described.parts(device)
        return PreparedStep(
            model=parts.model,
            make_batch=lambda batch_size: parts.split(parts.place(parts.batch_of(batch_size))),
            loss=parts.loss,
            make_optimizer=_optimizer_maker(parts.model, parts.optimizer),
            device=device,
            precision=self.options.precision,
            num_micro_batches=self.num_micro_batches,
            precision_policy=precision_policy,
        )

    def parts(self, device: torch.device) -> StepParts:
        """Build the parts of the step.

        A user's model is converted in place, as in `prepare`.

        Args:
            device: The device to train on.

        Returns:
            The parts. The model is on the device.

        Raises:
            UsageError: The model cannot be built, or does not work with one of the options.
        """
        options = self.options
        if isinstance(self.subject, str):
            model, batch_of, loss = timm_models.timm_parts(self.subject, options, device)
            optimizer: Optimizer | OptimizerFactory | str = options.optimizer or "adamw"
            split = timm_models.split_images
        else:
            model, batch_of, loss = self.subject.model, self.subject.batch_of, self.subject.loss
            optimizer = self.subject.optimizer
            split = self.subject.split
        return StepParts(
            model=model,
            batch_of=batch_of,
            layout_of=(
                self.subject.layout_of
                if isinstance(self.subject, Workload)
                else lambda batch_size: Layout.of(batch_of(batch_size), num_samples=batch_size)
            ),
            place=self.convert(model, device),
            split=split,
            loss=loss,
            optimizer=optimizer,
        )

    @property
    def batch_norm_free_variants(self) -> tuple[str, ...]:
        """Names of similar timm models that, by their names, have no batch normalisation."""
        if not isinstance(self.subject, str):
            return ()
        base = self.subject.partition(".")[0]
        wanted = [f"{base}{norm}" for norm in ("_gn", "_sgn", "_ln", "_evos")] + [f"nf_{base}"]
        if base.startswith("resnet"):
            wanted.append(f"resnetv2_{base.removeprefix('resnet')}x1_bit")
        return tuple(name for name in wanted if timm_models.import_timm().is_model(name))

    def convert(self, model: nn.Module, device: torch.device) -> Callable[[Any], Any]:
        """Convert a model in place, as the options say.

        Args:
            model: The model that is trained.
            device: The device to train on.

        Returns:
            A function that puts a batch on the device, in the type and layout that the converted
            model takes.

        Raises:
            UsageError: An option does not work with the model.
        """
        options = self.options
        dtype = torch.bfloat16 if options.precision is Precision.BF16 else None
        memory_format = torch.channels_last if options.channels_last else None
        _convert(model, self.name, options, device)

        def place(batch: Any) -> Any:
            return batches.to_device(batch, device, dtype=dtype, memory_format=memory_format)

        return place


def _kind(value: object) -> str:
    return type(value).__name__


def _optimizer_maker(
    model: nn.Module, optimizer: Optimizer | OptimizerFactory | str
) -> Callable[[], Optimizer]:
    if isinstance(optimizer, Optimizer):
        return lambda: optimizer
    if isinstance(optimizer, str):
        return functools.partial(timm_models.make_optimizer, model, optimizer)
    return lambda: _made(optimizer, model)


def _made(factory: OptimizerFactory, model: nn.Module) -> Optimizer:
    optimizer = factory(model.parameters())
    if not isinstance(optimizer, Optimizer):
        raise WorkloadError(
            f"The optimizer function returned {_kind(optimizer)}, which is no torch optimizer."
        )
    check_steps_alone(optimizer)
    return optimizer


def _convert(model: nn.Module, name: str, options: StepOptions, device: torch.device) -> None:
    model.to(device)
    if options.precision is Precision.BF16:
        model.to(torch.bfloat16)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)
    if options.grad_checkpointing:
        enable = getattr(model, "set_grad_checkpointing", None)
        try:
            if enable is None:
                raise AssertionError  # timm raises the same if a model cannot do it
            enable(True)
        except AssertionError:
            raise UsageError(
                f"{name} has no gradient checkpointing (no working set_grad_checkpointing)."
            ) from None

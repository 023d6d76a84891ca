"""Describes a training step with its options, and builds it on a device.

What is trained is a timm model by its name, or a user's `Workload`. A `TrainingStep` is a
description and holds no device memory. `memfit.step.runner` runs its iterations. The backends
measure them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memfit._torch_private import pytree
from memfit.errors import UsageError, WorkloadError
from memfit.records import Parallel, Precision, StepOptions
from memfit.step import batches, timm_models
from memfit.step.batches import Layout
from memfit.step.checkpointing import checkpoint, matched_blocks
from memfit.step.compiling import check_can_compile, check_not_compiled
from memfit.step.loop_habits import freeze
from memfit.step.optimizers import check_steps_alone
from memfit.step.ranks import join_ranks, shard
from memfit.step.runner import PrecisionPolicy, PreparedStep
from memfit.step.workload import OptimizerFactory, Workload

__all__ = ["StepParts", "TrainingStep"]

_NUM_ACCUMULATED_MICRO_BATCHES = 2


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
            if self.options.compile:
                check_not_compiled(self.subject.model, self.name)
        else:
            timm_models.check_model_name(self.subject)
        if self.options.optimizer is not None:
            timm_models.check_optimizer_name(self.options.optimizer)
        elif self.options.fused:
            raise UsageError(
                f"{self.name} brings its own optimizer: give that one fused=True, or give the "
                "workload the optimizer's name."
            )
        if self.options.parallel is Parallel.FSDP2 and self.live_optimizer is not None:
            raise UsageError(
                f"The optimizer of {self.name} holds whole parameters, and fully_shard makes "
                "shards of them: give the workload a function that makes the optimizer, or its "
                "name."
            )

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
    def sums_samples(self) -> bool:
        """Whether the user's loss says that it adds samples up (`reduction="sum"`)."""
        loss = self.subject.loss if isinstance(self.subject, Workload) else None
        given = loss.keywords if isinstance(loss, functools.partial) else {}
        return given.get("reduction", getattr(loss, "reduction", None)) == "sum"

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
            UnsupportedError: The model has to be compiled, and that cannot be done here.
        """
        if self.options.compile:
            check_can_compile(device)
        if self.options.parallel is not None and device.type != "cuda":
            raise ValueError(f"ranks are rehearsed on a card, not on {device}")
        described = self
        options = self.options
        if isinstance(self.subject, Workload) and self.subject.keeps_outputs:
            options = dataclasses.replace(options, keeps_outputs=True)
        if isinstance(self.subject, Workload) and device.type == "meta":
            described = dataclasses.replace(self, subject=self.subject.without_values())
        parts = described.parts(device)
        return PreparedStep(
            model=parts.model,
            make_batch=lambda batch_size: parts.split(parts.place(parts.batch_of(batch_size))),
            loss=parts.loss,
            make_optimizer=_optimizer_maker(parts.model, parts.optimizer, fused=self.options.fused),
            device=device,
            options=options,
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
            if device.type == "cuda" and _is_in_host_memory(self.subject.batch):
                # Each iteration copies it to the device, so it need not be made for each.
                batch_of = functools.lru_cache(maxsize=1)(batch_of)
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

    def smaller_images(self, model: nn.Module, batch: Any) -> Any | None:
        """Return a batch with smaller images, for experiments that need no large ones.

        Args:
            model: The model of the step.
            batch: A batch of the step.

        Returns:
            The batch; `None` if the model takes one size only, or if the images are small already.
        """
        if not isinstance(self.subject, str):
            return None
        return timm_models.smaller_images(model, batch)

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


def _is_in_host_memory(batch: Any) -> bool:
    """Whether a batch is nothing but tensors there."""
    return all(
        isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu"
        for leaf in pytree.tree_leaves(batch)
    )


def _optimizer_maker(
    model: nn.Module, optimizer: Optimizer | OptimizerFactory | str, *, fused: bool
) -> Callable[[], Optimizer]:
    if isinstance(optimizer, Optimizer):
        return lambda: optimizer
    if isinstance(optimizer, str):
        return lambda: _named(optimizer, model, fused=fused)
    return lambda: _made(optimizer, model)


def _named(name: str, model: nn.Module, *, fused: bool) -> Optimizer:
    made = timm_models.make_optimizer(model, name, fused=fused)
    check_steps_alone(made)
    return made


def _made(factory: OptimizerFactory, model: nn.Module) -> Optimizer:
    optimizer = factory(model.parameters())
    if not isinstance(optimizer, Optimizer):
        raise WorkloadError(
            f"The optimizer function returned {type(optimizer).__name__}, which is no torch "
            "optimizer."
        )
    check_steps_alone(optimizer)
    return optimizer


def _convert(model: nn.Module, name: str, options: StepOptions, device: torch.device) -> None:
    if options.parallel is not None:
        join_ranks(options.world_size, device)
    # In one move, so that a model that fits in bf16 only is never there in fp32.
    model.to(
        device=None if options.parallel is Parallel.FSDP2 else device,
        dtype=torch.bfloat16 if options.precision is Precision.BF16 else None,
    )
    freeze(model, options.frozen, name=name)
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
    checkpoint(model, matched_blocks(model, options.checkpoint, name=name))
    if options.parallel is Parallel.FSDP2:
        shard(model, options.world_size, device)
        model.to(device)

"""A trainer's training step as a workload: one module that takes a batch and returns the loss.

Each trainer has a subclass of `TrainersStep`, which computes what the trainer computes before
backward, and keeps what the trainer keeps on the device.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from memfit.errors import WorkloadError
from memfit.memory.restore import save_random_states
from memfit.records import Precision
from memfit.step.batches import BatchRules, Layout, private_copy, to_device
from memfit.step.nesting import leaves_of, map_leaves
from memfit.step.workload import Workload

__all__ = [
    "HeldSamples",
    "TrainersStep",
    "TrainersWorkload",
    "as_it_is",
    "drawn_batch",
    "made_real",
    "precision_of_weights",
    "replaced",
    "step_of",
]

_CPU = torch.device("cpu")


class TrainersStep(nn.Module, abc.ABC):
    """What a trainer computes before backward.

    Args:
        model: The trainer's model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._kept: tuple[Any, ...] = ()

    @abc.abstractmethod
    def forward(self, batch: Any, held: Any = None) -> torch.Tensor:
        """Return the loss of a batch.

        Args:
            batch: What the trainer's loader yields.
            held: Other samples that the trainer has on the device at the same time.
        """

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients and everything else that the trainer keeps from one step to the next.

        Trials call this at their beginning and at their end. Between steps, the optimizer clears
        the gradients.
        """
        self._kept = ()
        super().zero_grad(set_to_none)


@contextlib.contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Replace attributes of an object for the time of the block, without its own `__setattr__`."""
    own = vars(owner)
    before = {name: own[name] for name in attributes if name in own}
    own.update(attributes)
    try:
        yield
    finally:
        for name in attributes:
            own.pop(name, None)
        own.update(before)


@dataclasses.dataclass(frozen=True)
class TrainersWorkload(Workload):
    """The training step of a trainer's own object.

    Args:
        own_precision: The precision that the trainer is set to.
        accumulates: The step always accumulates.
        evaluates_in_no_grad: The trainer evaluates under `no_grad`, not in inference mode.
    """

    own_precision: Precision = dataclasses.field(default=Precision.FP32, kw_only=True)
    accumulates: bool = dataclasses.field(default=False, kw_only=True)
    evaluates_in_no_grad: bool = dataclasses.field(default=True, kw_only=True)

    @property
    def name(self) -> str:
        """The name of the trainer's model in reports."""
        assert isinstance(self.model, TrainersStep)
        return type(self.model.model).__name__

    def split(self, batch: Any) -> tuple[Any, tuple[Any, ...]]:
        """Return the arguments of the trainer's step. The targets are among them."""
        return (dict(batch) if isinstance(self.batch, _Batches) else {"batch": batch}), ()


def step_of(
    step: TrainersStep,
    example: Any,
    optimizer: Any,
    *,
    precision: Precision,
    accumulates: bool = False,
    evaluates_in_no_grad: bool = True,
    held_samples: HeldSamples | None = None,
) -> TrainersWorkload:
    """Return the workload of a trainer's step.

    Args:
        step: What the trainer computes before backward.
        example: A batch of the trainer's loader, on any device.
        optimizer: The trainer's optimizer, or a function that makes one.
        precision: The precision that the trainer is set to.
        accumulates: The step always accumulates.
        evaluates_in_no_grad: The trainer evaluates under `no_grad`, not in inference mode.
        held_samples: The samples that the trainer has on the device beside a micro-batch.

    Raises:
        WorkloadError: It is not clear where the batch has its samples.
    """
    batch = map_leaves(_plain, to_device(example, _CPU))
    return TrainersWorkload(
        model=step,
        batch=batch if held_samples is None else _Batches(batch, held_samples),
        loss=as_it_is,
        optimizer=optimizer,
        own_precision=precision,
        accumulates=accumulates,
        evaluates_in_no_grad=evaluates_in_no_grad,
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HeldSamples:
    """How many samples a trainer has on the device beside a micro-batch.

    Args:
        in_all: The samples of a whole optimizer step, micro-batch included; `None` if they are a
            multiple of the micro-batch.
        num_micro_batches: The micro-batches that are on the device together.
    """

    in_all: int | None = None
    num_micro_batches: int = 1

    def beside(self, batch_size: int) -> int:
        """Return the samples beside a micro-batch of a given size."""
        in_all = batch_size * self.num_micro_batches if self.in_all is None else self.in_all
        return max(in_all - batch_size, 0)


class _Batches:
    """Makes batches of any size, with the other samples that are on the device.

    The other samples are one sample seen many times, so that they take no host memory.
    """

    def __init__(self, example: Any, held: HeldSamples) -> None:
        self._example = example
        self._layout = Layout.of(example, BatchRules())
        self._layout.certain()
        self._held = held

    def __call__(self, batch_size: int) -> dict[str, Any]:
        made = {"batch": self._layout.resized(self._example, batch_size)}
        beside = self._held.beside(batch_size)
        if beside:
            one, two = (self._layout.resized(self._example, size) for size in (1, 2))
            made["held"] = _seen_often(one, two, beside)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Leave the batch on the CPU, also where a step travels to a process with a card."""
        return {**vars(self), "_example": pickle.dumps(self._example)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` returned."""
        vars(self).update(state)
        self._example = pickle.loads(state["_example"])  # noqa: S301 - our own bytes


def _seen_often(one: Any, two: Any, num_samples: int) -> list[torch.Tensor]:
    """Return the tensors of a batch of one sample, expanded where a batch of two is larger."""
    expanded = []
    for single, double in zip(leaves_of(one), leaves_of(two), strict=True):
        if isinstance(single, torch.Tensor):
            grows = zip(single.shape, double.shape, strict=True)
            shape = [size if size == other else num_samples for size, other in grows]
            expanded.append(single.expand(shape))
    return expanded


def made_real(held: Any) -> Any:
    """Give expanded tensors memory of their own. A copy to a GPU has done this already."""
    return None if held is None else map_leaves(torch.Tensor.contiguous, held)


def as_it_is(loss: torch.Tensor) -> torch.Tensor:
    """Return the loss that the step computed."""
    return loss


def _plain(leaf: Any) -> Any:
    """Return a tensor without its subclass, because fastai's images are subclasses of Tensor."""
    if isinstance(leaf, torch.Tensor) and type(leaf) is not torch.Tensor:
        return leaf.detach().as_subclass(torch.Tensor)
    return leaf


@contextlib.contextmanager
def _put_back(objects: tuple[Any, ...]) -> Iterator[None]:
    restore_random = save_random_states()
    before = [(one, dict(vars(one))) for one in objects]
    try:
        yield
    finally:
        for one, attributes in before:
            vars(one).clear()
            vars(one).update(attributes)
        restore_random()


def drawn_batch(draw: Callable[[], Any], *objects: Any) -> Any:
    """Return a batch, and leave the random states and the objects that make it as they were.

    Args:
        draw: A function that returns a batch.
        *objects: Objects whose attributes are put back.

    Raises:
        WorkloadError: There is no batch.
    """
    with _put_back(objects):
        try:
            return private_copy(draw())
        except StopIteration:
            raise WorkloadError(
                "The trainer's loader has no batch: its data has fewer samples than one batch."
            ) from None


def precision_of_weights(model: nn.Module) -> Precision:
    """Return the precision of a model that a trainer runs without autocast."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    if floating and all(parameter.dtype is torch.bfloat16 for parameter in floating):
        return Precision.BF16
    return Precision.FP32

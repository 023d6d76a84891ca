"""The phases of a training step: making the batch, forward, backward, the optimizer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.optim import Optimizer

from memfit._torch_private import pytree
from memfit.step.runner import PrecisionPolicy, PreparedStep

__all__ = ["BACKWARD", "FORWARD", "OPTIMIZER", "CurrentPhase", "Phases", "states_of"]

FORWARD: Final = "forward"
BACKWARD: Final = "backward"
OPTIMIZER: Final = "optimizer"


@dataclasses.dataclass(slots=True)
class CurrentPhase:
    """What a step is doing.

    Args:
        name: `forward`, `backward` or `optimizer`.
        index: The number of the phase since the beginning, from 1.
        is_making_batch: The batch is being made, before forward begins.
    """

    name: str
    index: int
    is_making_batch: bool = False


def states_of(optimizer: Optimizer) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield the tensors of an optimizer's state, each with its parameter.

    An optimizer that wraps another one, such as timm's Lookahead, may keep its state there.

    Args:
        optimizer: The optimizer.
    """
    wrapped = (value for value in vars(optimizer).values() if isinstance(value, Optimizer))
    for owner in (optimizer, *wrapped):
        for parameter, values in owner.state.items():
            for value in pytree.tree_leaves(values):
                if isinstance(value, torch.Tensor):
                    yield parameter, value


class Phases:
    """Follows a prepared step through its phases, by wrapping its batches and its precision policy.

    Args:
        begun: Called with a phase's name when it begins.
        batch_made: Called with every batch.
        loss_made: Called with the loss before every backward.
        gradients_ready: Called after every backward.
        stepped: Called with the optimizer after its step.
    """

    def __init__(
        self,
        *,
        begun: Callable[[str], None],
        batch_made: Callable[[Any], None] = lambda _batch: None,
        loss_made: Callable[[torch.Tensor], None] = lambda _loss: None,
        gradients_ready: Callable[[], None] = lambda: None,
        stepped: Callable[[Optimizer], None] = lambda _optimizer: None,
    ) -> None:
        self.current: CurrentPhase | None = None
        self._begun = begun
        self._batch_made = batch_made
        self.loss_made = loss_made
        self.gradients_ready = gradients_ready
        self.stepped = stepped
        self._num_phases = 0

    @contextlib.contextmanager
    def watched(self, prepared: PreparedStep) -> Iterator[None]:
        """Follow a step. At the end, the step is as it was before."""
        precision_policy, make_batch = prepared.precision_policy, prepared.make_batch

        def watched_batch(batch_size: int) -> tuple[Any, tuple[Any, ...]]:
            self.begin(FORWARD, is_making_batch=True)
            batch = make_batch(batch_size)
            self._batch_made(batch)
            return batch

        prepared.make_batch = watched_batch
        prepared.precision_policy = _WatchedPrecision(precision_policy, self)
        try:
            yield
        finally:
            prepared.precision_policy, prepared.make_batch = precision_policy, make_batch

    def begin(self, name: str, *, is_making_batch: bool = False) -> None:
        """Take note of a phase that begins."""
        self._num_phases += 1
        self.current = CurrentPhase(name, self._num_phases, is_making_batch)
        self._begun(name)


class _WatchedPrecision:
    """A precision policy that reports its phases and calls another policy for the work."""

    def __init__(self, precision_policy: PrecisionPolicy, phases: Phases) -> None:
        self._policy = precision_policy
        self._phases = phases

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        current = self._phases.current
        assert current is not None
        current.is_making_batch = False
        with self._policy.forward():
            yield

    def backward(self, loss: torch.Tensor) -> None:
        self._phases.loss_made(loss)
        self._phases.begin(BACKWARD)
        self._policy.backward(loss)
        self._phases.gradients_ready()

    def step(self, optimizer: Optimizer) -> None:
        self._phases.begin(OPTIMIZER)
        self._policy.step(optimizer)
        self._phases.stepped(optimizer)

"""What training loops add to a step: averages of the weights, frozen parameters, early updates."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memfit.errors import UsageError

__all__ = ["StepInBackward", "WeightAverage", "freeze"]

_DECAY = 0.9998
_NUM_NEAREST = 3


class WeightAverage:
    """A copy of a model's parameters and buffers that follows them slowly (EMA).

    Args:
        model: The model, on its device.

    Source: timm's `ModelEmaV3`, which interpolates in place, so that an update holds nothing more.
    """

    def __init__(self, model: nn.Module) -> None:
        # A tensor that is shared is copied once, as in a deep copy.
        self._followed = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._copies = [tensor.detach().clone() for tensor in self._followed.values()]

    @property
    def tensors(self) -> Sequence[torch.Tensor]:
        """The copies."""
        return self._copies

    @torch.no_grad()
    def update(self) -> None:
        """Move every copy a little towards its original."""
        for copy, tensor in zip(self._copies, self._followed.values(), strict=True):
            if copy.is_floating_point():
                copy.lerp_(tensor.detach().to(copy.dtype), 1 - _DECAY)
            else:
                copy.copy_(tensor)


class StepInBackward:
    """Takes the optimizer's step for each parameter as soon as its gradient is complete.

    The gradient is freed then, so the gradients of all parameters are never held at the same time.

    Args:
        optimizer: The optimizer of all parameters.

    Source: PyTorch's tutorial "How to save memory by fusing the optimizer step into the backward
        pass" (https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html),
        which gives each parameter an optimizer of its own. Here one optimizer gets one
        parameter at a time, which takes the same memory.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._stepping(group))
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _stepping(self, group: dict[str, Any]) -> Any:
        def step(parameter: torch.Tensor) -> None:
            optimizer, groups = self._optimizer, self._optimizer.param_groups
            optimizer.param_groups = [{**group, "params": [parameter]}]
            try:
                optimizer.step()
            finally:
                optimizer.param_groups = groups
            parameter.grad = None

        return step


def freeze(model: nn.Module, patterns: Sequence[str], *, name: str) -> None:
    """Stop training the parameters whose names match a pattern.

    Args:
        model: The model; its parameters are changed in place.
        patterns: Patterns as in a shell (`layer1.*`). A pattern must match the whole name.
        name: The model's name in errors.

    Raises:
        UsageError: A pattern matches nothing, or nothing is left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matched = [known for known in parameters if fnmatch.fnmatchcase(known, pattern)]
        if not matched:
            raise UsageError(
                f"No parameter of {name} matches {pattern!r}{_nearest(pattern, list(parameters))}"
            )
        for known in matched:
            parameters[known].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise UsageError(
            f"Nothing of {name} is left to train: {', '.join(map(repr, patterns))} froze every "
            "parameter."
        )


def _nearest(pattern: str, known: Sequence[str]) -> str:
    """Return the end of a sentence that names parameters like the pattern."""
    if any(fnmatch.fnmatchcase(name, f"{pattern}.*") for name in known):
        return f"; did you mean {pattern + '.*'!r}?"
    candidates = list(dict.fromkeys((*_modules(known), *known)))
    near = difflib.get_close_matches(
        pattern.rstrip(".*") or pattern, candidates, n=_NUM_NEAREST, cutoff=0.5
    )
    said = [repr(one if one in known else f"{one}.*") for one in near]
    if said:
        return f"; did you mean {' or '.join(said)}?"
    return f"; its parameters are named like {known[0]!r}."


def _modules(known: Sequence[str]) -> Iterator[str]:
    for name in known:
        parts = name.split(".")[:-1]
        yield from (".".join(parts[:end]) for end in range(1, len(parts) + 1))

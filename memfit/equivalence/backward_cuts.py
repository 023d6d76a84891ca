"""Finds layers whose backward pass depends on how many samples the batch has.

Such a layer may multiply gradients by the batch size. Its outputs are right, and no sample gets
another sample's gradient, so neither `mixing` nor `halves` sees it. Here the whole batch runs, and
then each half of it. If the gradients that reach a layer's outputs are the same in both, apart from
one factor, the gradients that leave the layer must have the same factor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from memfit._torch_private import pytree
from memfit.equivalence.blame import ValuePlace
from memfit.equivalence.gradients import CheckSetup, dense
from memfit.equivalence.halves import rows_of
from memfit.equivalence.mixing import is_inside, named_layers
from memfit.equivalence.state import same_start
from memfit.records import MixesIn, MixingLayer

__all__ = ["layers_that_scale_gradients"]


def layers_that_scale_gradients(setup: CheckSetup, *, close: float) -> tuple[MixingLayer, ...]:
    """Name the layers that pass on other gradients for a half of the batch than for the whole.

    Args:
        setup: A step and its batch, whose losses are single numbers.
        close: The largest change that counts as rounding, relative to a gradient.

    Returns:
        The innermost such layers.
    """
    size, half = setup.num_samples, setup.num_samples // 2
    whole = _run(setup, 0, size)
    found: dict[str, float] = {}
    for start, stop in ((0, half), (half, size)):
        part = _run(setup, start, stop)
        for layer, far in _changed(whole, part, (start, stop, size), close).items():
            found[layer] = max(found.get(layer, 0.0), far)
    innermost = {
        name: far
        for name, far in found.items()
        if not any(is_inside(other, name) for other in found)
    }
    return named_layers(setup.model, innermost, MixesIn.BACKWARD)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """The gradients of one pass, by place, and the calls of each layer."""

    gradients: dict[ValuePlace, torch.Tensor]
    calls: dict[str, int]


def _changed(
    whole: _Seen, part: _Seen, span: tuple[int, int, int], close: float
) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, num_calls in part.calls.items():
        for call in range(num_calls):
            came = _factors(whole, part, (name, call, "out"), span)
            left = _factors(whole, part, (name, call, "in"), span)
            if not came or not left or any(apart > close for _, apart in came):
                continue
            factors = [factor for factor, _ in came]
            if max(factors) - min(factors) > close * max(factors, key=abs):
                continue
            far = max(abs(factor / factors[0] - 1) + apart for factor, apart in left)
            if far > 10 * close:
                found[name] = max(found.get(name, 0.0), far)
    return found


def _factors(
    whole: _Seen, part: _Seen, place: tuple[str, int, str], span: tuple[int, int, int]
) -> list[tuple[float, float]]:
    """Return for each tensor the factor of its gradient, and the share that no factor explains."""
    start, stop, size = span
    factors = []
    for key, gradient in part.gradients.items():
        if key[:3] != place or key not in whole.gradients:
            continue
        rows = rows_of(whole.gradients[key], gradient, start, stop, size)
        square = 0.0 if rows is None else float(rows.square().sum())
        if rows is None or not square:
            return []
        factor = float((rows * gradient).sum()) / square
        apart = float(torch.linalg.vector_norm(gradient - factor * rows))
        norm = float(torch.linalg.vector_norm(gradient))
        factors.append((factor, apart / norm if norm else 1.0))
    return factors


def _run(setup: CheckSetup, start: int, stop: int) -> _Seen:
    seen = _Seen(gradients={}, calls={})
    parameters = tuple(setup.parameters().values())
    handles: list[Any] = []
    for name, module in setup.model.named_modules():
        handles.append(module.register_forward_pre_hook(_entered(name, seen), with_kwargs=True))
        handles.append(module.register_forward_hook(_left(name, seen)))
    draws = setup.draws
    is_whole = stop - start == setup.num_samples
    try:
        with (
            same_start(setup.holders, parameters),
            draws.recorded() if is_whole else draws.replayed(start, stop),
        ):
            losses: Sequence[torch.Tensor] = tuple(setup.losses_of(start, stop).values())
            torch.stack([loss for loss in losses if loss.requires_grad]).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.grad = None
    return seen


def _entered(name: str, seen: _Seen) -> Callable[..., Any]:
    def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = seen.calls[name] = seen.calls.get(name, 0) + 1
        return _watched((name, call - 1, "in"), (args, kwargs), seen)

    return hook


def _left(name: str, seen: _Seen) -> Callable[..., Any]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        return _watched((name, seen.calls[name] - 1, "out"), output, seen)

    return hook


def _watched(place: tuple[str, int, str], values: Any, seen: _Seen) -> Any:
    """Return views of values. The gradient of a view is what this one use of the value sends."""
    leaves, spec = pytree.tree_flatten(values)
    for index, leaf in enumerate(leaves):
        if not (isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.ndim):
            continue
        if leaf.is_complex() or leaf.is_leaf:
            continue
        view = leaves[index] = leaf.view_as(leaf)

        def note(gradient: torch.Tensor, key: ValuePlace = (*place, index)) -> None:
            seen.gradients[key] = dense(gradient.detach()).clone()

        view.register_hook(note)
    return pytree.tree_unflatten(leaves, spec)

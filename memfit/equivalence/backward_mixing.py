"""Finds the layers that mix the samples of a batch in the backward pass alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memfit._torch_private import pytree
from memfit.equivalence.exchange import Exchange
from memfit.equivalence.mixing import (
    MOVED,
    NUM_SAMPLES,
    is_inside,
    is_numbers,
    named_layers,
)
from memfit.equivalence.randomness import seed_all
from memfit.equivalence.samples import Samples
from memfit.equivalence.state import same_start
from memfit.records import MixesIn, MixingLayer
from memfit.step.calling import call_model

__all__ = ["mixing_gradients"]


def mixing_gradients(model: nn.Module, samples: Samples) -> tuple[MixingLayer, ...]:
    """Name the layers that mix samples in backward but not in forward.

    Backward runs from one sample's output. A layer mixes if it gets a gradient for that sample
    alone and passes a gradient on to another sample.

    Args:
        model: The model in float64, in the mode in which it trains.
        samples: Its samples: at least `NUM_SAMPLES` different ones.

    Returns:
        The layers that mix, in the order of the backward pass.
    """
    one = Exchange(model, samples.first(NUM_SAMPLES), NUM_SAMPLES - 1)
    longer = _gradients_seen(model, one.all_inputs, None)
    shapes = {key: gradient.shape for key, gradient in longer.items()}
    sent = _gradients_seen(model, one.inputs(), 0)
    found: dict[str, float] = {}
    for (name, way), gradient in sent.items():
        if way != "out":
            continue
        came = _foreign_share(one, gradient, shapes.get((name, way)))
        left = sent.get((name, "in"))
        gone = 0.0 if left is None else _foreign_share(one, left, shapes.get((name, "in")))
        if gone > MOVED >= came and not any(is_inside(other, name) for other in found):
            found[name] = gone
    return named_layers(model, found, MixesIn.BACKWARD)


def _foreign_share(one: Exchange, gradient: torch.Tensor, longer: torch.Size | None) -> float:
    own = one.own_rows(gradient, longer, 0)
    norm = float(torch.linalg.vector_norm(gradient))
    if own is None or norm == 0:
        return 0.0
    foreign = gradient.clone()
    one.own_rows(foreign, longer, 0).zero_()  # type: ignore[union-attr]
    return float(torch.linalg.vector_norm(foreign)) / norm


def _gradients_seen(
    model: nn.Module, inputs: Any, sample: int | None
) -> dict[tuple[str, str], torch.Tensor]:
    """Return the gradients into and out of each layer, from one sample's output or from all."""
    seen: dict[tuple[str, str], torch.Tensor] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            for way, tensors in (("in", args), ("out", output)):
                for leaf in pytree.tree_leaves(tensors):
                    if is_numbers(leaf) and leaf.requires_grad:
                        handles.append(leaf.register_hook(noter((name, way))))
                        break

        return hook

    def noter(key: tuple[str, str]) -> Callable[[torch.Tensor], None]:
        def note(gradient: torch.Tensor) -> None:
            seen.setdefault(key, gradient)

        return note

    layers = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with same_start((model,)), torch.enable_grad():
            seed_all()
            outputs = [
                leaf
                for leaf in pytree.tree_leaves(call_model(model, inputs))
                if is_numbers(leaf) and leaf.ndim > 0 and leaf.requires_grad
            ]
            parts = [leaf if sample is None else leaf[sample] for leaf in outputs]
            if parts:
                torch.autograd.backward(parts, [_ramp(part) for part in parts])
    finally:
        for handle in (*layers, *handles):
            handle.remove()
        model.zero_grad(set_to_none=True)
    return seen


def _ramp(tensor: torch.Tensor) -> torch.Tensor:
    ramp = torch.linspace(0.5, 1.5, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return ramp.view(tensor.shape)

"""Which layers mix the samples of a batch, found by changing one sample.

A batch runs through the model once as it is, and once more for each of two samples changed. Where a
layer's output moves for samples that were not changed, the layer mixes. Its output is then put back
for those samples before the next layer sees it, so that each layer is judged for itself and all
that mix are found in one pass. An element that moves with either of two samples belongs to both:
that confirms it without regard to how the layer lays out its samples.

No class name plays a part. What mixes in backward alone is `mixing_gradients`' business, and the
loss that of `memfit.equivalence.weighting`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memfit._torch_private import pytree, version_of
from memfit.equivalence.randomness import seed_all
from memfit.memory.restore import rewound
from memfit.records import MixesIn, MixingLayer
from memfit.step import batches
from memfit.step.runner import call_model

__all__ = ["NUM_SAMPLES", "changed_sample", "layer_name", "mixing_gradients", "mixing_layers"]

NUM_SAMPLES = 3
"""Samples that the experiments run on: two that change, and one that must not move."""

# Elements of a sample that did not change are the same bit for bit in layers that do not mix.
_MOVED = 1e-9

_Key = tuple[str, int, str, int]  # layer, call of it, what of it, which tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Suspect:
    """A layer whose other samples moved when one changed."""

    layer: str
    moved: float
    difference: torch.Tensor


def layer_name(name: str) -> str:
    """Return what reports call the layer at a path."""
    return name or "the model itself"


def mixing_layers(model: nn.Module, inputs: Any) -> tuple[MixingLayer, ...]:
    """Name the layers whose outputs mix samples, in order of first appearance.

    Args:
        model: The model in float64, in the mode in which it trains.
        inputs: What it takes: different samples, tensors of shape (NUM_SAMPLES + 1, ...).

    Returns:
        The layers that mix, each with how far it moved the other samples.
    """
    longer = _shapes(model, inputs)
    inputs = batches.take(inputs, 0, NUM_SAMPLES)
    before: dict[_Key, torch.Tensor] = {}

    def note(_maker: str, key: _Key, leaf: torch.Tensor) -> torch.Tensor:
        before[key] = leaf.detach().clone()
        return leaf

    _MixingSearch(note).run(model, inputs)
    first = _suspects(model, changed_sample(inputs, 0), 0, before, longer)
    if not first:
        return ()
    second = _suspects(model, changed_sample(inputs, 1), 1, before, longer)
    found: dict[str, float] = {}
    for key, suspect in first.items():
        other = second.get(key)
        if other is None:
            continue
        shared = torch.minimum(suspect.difference.abs(), other.difference.abs())
        if float(shared.max()) <= _MOVED * _rms(before[key]):
            continue
        moved = max(suspect.moved, other.moved)
        found[suspect.layer] = max(found.get(suspect.layer, 0.0), moved)
    modules = dict(model.named_modules())
    return tuple(
        MixingLayer(
            name=layer_name(name),
            type_name=type(modules[name]).__name__,
            mixes_in=MixesIn.FORWARD,
            moved=moved,
        )
        for name, moved in found.items()
    )


def changed_sample(inputs: Any, sample: int) -> Any:
    """Return a batch in which one sample is another one.

    Numbers become other numbers of the same spread; integers, which may be indices, become those of
    another sample in another order.

    Args:
        inputs: Tensors of shape (samples, ...) in any nesting.
        sample: Which one to change.

    Returns:
        The same nesting with new tensors.
    """
    generator = torch.Generator().manual_seed(sample + 1)

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
            return leaf
        changed = leaf.clone()
        row = leaf[sample]
        if leaf.is_floating_point() or leaf.is_complex():
            spread = leaf.std() if leaf.numel() > 1 else leaf.abs().max()
            noise = torch.randn(row.shape, generator=generator, dtype=torch.float64)
            changed[sample] = leaf.mean() + (spread + 1e-3) * noise.to(leaf.device, leaf.dtype)
        elif leaf.dtype is not torch.bool:
            other = leaf[(sample + 1) % len(leaf)].flatten()
            order = torch.randperm(other.numel(), generator=generator).to(leaf.device)
            changed[sample] = other[order].view(row.shape)
        return changed

    return pytree.tree_map(change, inputs)


def _rms(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) / math.sqrt(max(1, tensor.numel()))


class _MixingSearch:
    """One run of a model in which a visitor sees every value that layers pass on.

    Args:
        visit: Called with the layer that made a value, the value's place, and the value, which it
            may replace. What comes out of a layer, that layer made; what goes into one, the layer
            around it, which computed it between the layers in it.
    """

    def __init__(self, visit: Callable[[str, _Key, torch.Tensor], torch.Tensor]) -> None:
        self._visit = visit
        self._calls: dict[str, int] = {}
        self._around: list[str] = []
        self._last: list[tuple[torch.Tensor, int]] = []

    def run(self, model: nn.Module, inputs: Any) -> None:
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entered(name), with_kwargs=True))
            handles.append(module.register_forward_hook(self._left(name)))
        try:
            with rewound(model), torch.no_grad():
                seed_all()
                call_model(model, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _entered(self, name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            call = self._calls[name] = self._calls.get(name, -1) + 1
            maker = self._around[-1] if self._around else None
            self._around.append(name)
            if maker is None:
                return None
            return self._visited(maker, (name, call, "in"), (args, kwargs))

        return hook

    def _left(self, name: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            self._around.pop()
            return self._visited(name, (name, self._calls[name], "out"), output)

        return hook

    def _visited(self, maker: str, key: tuple[str, int, str], values: Any) -> Any:
        leaves, spec = pytree.tree_flatten(values)
        seen = [
            self._visit(maker, (*key, index), leaf)
            if _is_numbers(leaf) and not self._was_last(leaf)
            else leaf
            for index, leaf in enumerate(leaves)
        ]
        self._last = [(leaf, version_of(leaf)) for leaf in seen if _is_numbers(leaf)]
        return pytree.tree_unflatten(seen, spec)

    def _was_last(self, leaf: torch.Tensor) -> bool:
        """Whether a value is what a layer just returned, going on unchanged: it was seen then."""
        return any(leaf is tensor and version_of(leaf) == version for tensor, version in self._last)


def _is_numbers(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def _shapes(model: nn.Module, inputs: Any) -> dict[_Key, torch.Size]:
    shapes: dict[_Key, torch.Size] = {}

    def note(_maker: str, key: _Key, leaf: torch.Tensor) -> torch.Tensor:
        shapes[key] = leaf.shape
        return leaf

    _MixingSearch(note).run(model, inputs)
    return shapes


def _suspects(
    model: nn.Module,
    inputs: Any,
    sample: int,
    before: dict[_Key, torch.Tensor],
    longer: dict[_Key, torch.Size],
) -> dict[_Key, _Suspect]:
    found: dict[_Key, _Suspect] = {}

    def compare(maker: str, key: _Key, leaf: torch.Tensor) -> torch.Tensor:
        old = before.get(key)
        if old is None or old.shape != leaf.shape:
            return leaf  # which layers run depends on the data: nothing to compare with
        others = old.clone()
        own = _own_rows(others, longer.get(key), sample)
        if own is not None:
            own.copy_(_own_rows(leaf, longer.get(key), sample))  # type: ignore[arg-type]
        foreign = float(torch.linalg.vector_norm(leaf.detach() - others))
        norm = float(torch.linalg.vector_norm(old)) or 1.0
        if not foreign > _MOVED * norm:
            return leaf
        found[key] = _Suspect(maker, foreign / norm, leaf.detach() - old)
        return others

    _MixingSearch(compare).run(model, inputs)
    return found


def _own_rows(tensor: torch.Tensor, longer: torch.Size | None, sample: int) -> torch.Tensor | None:
    """Return the part of a layer's output that is one sample's, if it has samples at all."""
    if longer is None or len(longer) != tensor.ndim:
        return None
    for dim, (size, more) in enumerate(zip(tensor.shape, longer, strict=True)):
        if size != more and size * (NUM_SAMPLES + 1) == more * NUM_SAMPLES:
            per_sample = size // NUM_SAMPLES
            return tensor.narrow(dim, sample * per_sample, per_sample)
    return None


def mixing_gradients(model: nn.Module, inputs: Any) -> tuple[MixingLayer, ...]:
    """Name the layers that mix samples in backward and not in forward.

    The gradient of one sample's output is sent back; a layer that is given a gradient for that
    sample alone and passes one on to another sample mixes.

    Args:
        model: The model in float64, in the mode in which it trains.
        inputs: What it takes: different samples, tensors of shape (NUM_SAMPLES + 1, ...).

    Returns:
        The layers that mix, in the order in which backward meets them.
    """
    longer = _gradients_seen(model, inputs, None)
    shapes = {key: gradient.shape for key, gradient in longer.items()}
    sent = _gradients_seen(model, batches.take(inputs, 0, NUM_SAMPLES), 0)
    modules = dict(model.named_modules())
    found: dict[str, MixingLayer] = {}
    for (name, way), gradient in sent.items():
        if way != "out":
            continue
        came = _foreign_share(gradient, shapes.get((name, way)))
        left = sent.get((name, "in"))
        gone = 0.0 if left is None else _foreign_share(left, shapes.get((name, "in")))
        inner = any(
            other != name and other.startswith(f"{name}." if name else "") for other in found
        )
        if gone > _MOVED >= came and not inner:
            found[name] = MixingLayer(
                name=layer_name(name),
                type_name=type(modules[name]).__name__,
                mixes_in=MixesIn.BACKWARD,
                moved=gone,
            )
    return tuple(found.values())


def _foreign_share(gradient: torch.Tensor, longer: torch.Size | None) -> float:
    own = _own_rows(gradient, longer, 0)
    norm = float(torch.linalg.vector_norm(gradient))
    if own is None or norm == 0:
        return 0.0
    foreign = gradient.clone()
    _own_rows(foreign, longer, 0).zero_()  # type: ignore[union-attr]
    return float(torch.linalg.vector_norm(foreign)) / norm


def _gradients_seen(
    model: nn.Module, inputs: Any, sample: int | None
) -> dict[tuple[str, str], torch.Tensor]:
    """Return the gradients that went into and out of each layer, of one sample's output or all."""
    seen: dict[tuple[str, str], torch.Tensor] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            for way, tensors in (("in", args), ("out", output)):
                for leaf in pytree.tree_leaves(tensors):
                    if _is_numbers(leaf) and leaf.requires_grad:
                        handles.append(leaf.register_hook(noter((name, way))))
                        break

        return hook

    def noter(key: tuple[str, str]) -> Callable[[torch.Tensor], None]:
        def note(gradient: torch.Tensor) -> None:
            seen.setdefault(key, gradient)

        return note

    layers = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with rewound(model), torch.enable_grad():
            seed_all()
            outputs = [
                leaf
                for leaf in pytree.tree_leaves(call_model(model, inputs))
                if _is_numbers(leaf) and leaf.ndim > 0 and leaf.requires_grad
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

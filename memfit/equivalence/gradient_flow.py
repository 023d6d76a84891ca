"""Finds layers that stop gradients, and layers that change when they are called again."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from memfit._torch_private import pytree
from memfit.equivalence.mixing import layer_name, with_values
from memfit.equivalence.randomness import seed_all
from memfit.equivalence.samples import Samples
from memfit.equivalence.state import same_start
from memfit.step.calling import call_model

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DetachWatch", "cut_off", "stateful_layers"]


def cut_off(model: nn.Module, unreached: Collection[str]) -> tuple[str, ...]:
    """Name the outermost layers in which no trained parameter gets a gradient.

    Args:
        model: The model.
        unreached: Paths of parameters that forward uses and that get no gradient.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        own = [
            f"{path}.{name}" if path else name
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if own and not inside and all(name in unreached for name in own):
            found.append(path)
    lone = (name for name in unreached if not any(name.startswith(f"{one}.") for one in found))
    return (*found, *lone)


class DetachWatch:
    """Finds layers that stop gradients, in every forward pass of the block.

    A layer stops gradients if its inputs require a gradient and its outputs do not. A container
    stops them if one layer in it returned a value that requires a gradient, and a later layer is
    given a value that does not.

    Args:
        model: The model to watch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._flowing: list[bool] = []
        self.layers: dict[str, None] = {}
        self.suspects: dict[str, None] = {}

    def __enter__(self) -> Self:
        """Start to watch."""
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entered(name)))
            self._handles.append(module.register_forward_hook(self._left(name)))
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _entered(self, name: str) -> Any:
        def enter(_module: nn.Module, args: Any) -> None:
            if not name:
                self._flowing.clear()
            given = _flows(args)
            if self._flowing and self._flowing[-1] and given is False:
                self.suspects[layer_name(name.rpartition(".")[0])] = None
            self._flowing.append(False)

        return enter

    def _left(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            inside = self._flowing.pop() if self._flowing else False
            going_in, going_out = _flows(args), _flows(output)
            trains = any(parameter.requires_grad for parameter in module.parameters())
            if (going_in or inside or trains) and going_out is False and torch.is_grad_enabled():
                inner = any(layer.startswith(f"{name}." if name else "") for layer in self.layers)
                if (going_in or inside) and not inner:
                    self.layers[layer_name(name)] = None
            if self._flowing:
                self._flowing[-1] = self._flowing[-1] or bool(going_out)

        return leave


def _flows(values: Any) -> bool | None:
    """Whether any tensor requires a gradient; `None` if no tensor is floating-point."""
    numbers = [
        leaf
        for leaf in pytree.tree_leaves(values)
        if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    ]
    return any(leaf.requires_grad for leaf in numbers) if numbers else None


def stateful_layers(model: nn.Module, samples: Samples) -> tuple[str, ...]:
    """Name the layers that return a different result when called again with the same input.

    Args:
        model: The model, in the mode in which it trains.
        samples: Some samples that it takes.

    Returns:
        The paths of the innermost such layers, in order of first appearance.
    """
    first: dict[tuple[str, int], list[torch.Tensor]] = {}
    found: dict[str, None] = {}
    calls: dict[str, int] = {}

    def hook_of(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            call = calls[name] = calls.get(name, -1) + 1
            leaves, spec = pytree.tree_flatten(output)
            before = first.get((name, call))
            if before is None:
                first[name, call] = [leaf.detach().clone() for leaf in leaves if _is_tensor(leaf)]
                return output
            old = iter(before)
            put_back = [next(old, leaf) if _is_tensor(leaf) else leaf for leaf in leaves]
            if all(map(_same, put_back, leaves)):
                return output
            found[layer_name(name)] = None
            return pytree.tree_unflatten([*map(with_values, leaves, put_back)], spec)

        return hook

    handles = [
        module.register_forward_hook(hook_of(name)) for name, module in model.named_modules()
    ]
    try:
        with same_start((model,)):
            for _ in range(2):
                calls.clear()
                seed_all()
                call_model(model, samples.of(0, samples.num_samples)[0])
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found)


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor)


def _same(old: Any, new: Any) -> bool:
    if not _is_tensor(old):
        return True
    return (
        old.shape == new.shape
        and old.dtype == new.dtype
        and torch.allclose(old, new, rtol=1e-9, atol=0, equal_nan=True)
    )

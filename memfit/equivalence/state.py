"""The state from which passes begin, and the changes that a forward pass makes to it.

Two passes can be compared only if both begin from the same state. The state consists of parameters
(forward may change a teacher's), buffers, attributes of every kind (queues, counters), random
states, and objects that the loss function uses. `memfit.memory` restores the values.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from memfit.equivalence.widening import as_they_are
from memfit.memory.attributes import save_contents
from memfit.memory.restore import save_random_states

__all__ = ["changed_state", "held_by", "same_start"]

_KEPT = (nn.Module, torch.Tensor, list, dict, deque, set)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


@contextlib.contextmanager
def same_start(
    objects: Sequence[object], parameters: Iterable[torch.Tensor] = ()
) -> Iterator[Callable[[], None]]:
    """Restore everything that a pass changes, at the end of the block.

    Args:
        objects: The model, and the objects that the loss uses.
        parameters: The parameters whose gradients a pass accumulates.

    Yields:
        A function that restores everything except gradients at once, for use within a pass.
    """
    parameters = tuple(parameters)
    with as_they_are():
        put_back = save_contents(cast("Sequence[nn.Module]", objects))
        put_random_back = save_random_states()

    def restore() -> None:
        gradients = [(parameter, parameter.grad) for parameter in parameters]
        with as_they_are():
            put_back()
            put_random_back()
        for parameter, gradient in gradients:
            parameter.grad = gradient

    try:
        yield restore
    finally:
        with as_they_are():
            put_back()
            put_random_back()


def held_by(loss: Callable[..., Any], model: nn.Module) -> tuple[object, ...]:
    """Return the objects in which a loss or a user's own layers can keep state between calls.

    Args:
        loss: A module, a function, a method or a partial of one.
        model: The model.
    """
    functions: list[Any] = [loss]
    for kind in dict.fromkeys(map(type, model.modules())):
        forward = getattr(kind, "forward", None)
        if forward is not None and not kind.__module__.startswith("torch."):
            functions.append(forward)
    found: dict[int, object] = {}
    while functions:
        function = functions.pop()
        if isinstance(function, functools.partial):
            functions.append(function.func)
            held: list[Any] = [*function.args, *function.keywords.values()]
        elif isinstance(function, types.MethodType):
            functions.append(function.__func__)
            found[id(function.__self__)] = function.__self__
            held = []
        elif isinstance(function, types.FunctionType):
            held = _of_function(function)
        else:
            found[id(function)] = function
            held = []
        for value in held:
            if isinstance(value, _KEPT):
                found[id(value)] = value
            elif isinstance(value, types.FunctionType) and value is not function:
                held_too = (one for one in _of_function(value) if isinstance(one, _KEPT))
                found |= {id(one): one for one in held_too}
    return tuple(found.values())


def _of_function(function: types.FunctionType) -> list[Any]:
    """Return the objects in a function's closure, its defaults and its global names."""
    held = list(function.__defaults__ or ())
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # the name has no value yet
            held.append(cell.cell_contents)
    names = function.__globals__
    held += [names[name] for name in function.__code__.co_names if name in names]
    return held


def changed_state(
    model: nn.Module, loss: Callable[..., Any], run: Callable[[], object]
) -> tuple[str, ...]:
    """Name the parameters, buffers and attributes of model and loss that a pass changes.

    Args:
        model: The model.
        loss: A function of outputs and targets; it returns one number, or several.
        run: A function that runs the pass.
    """

    def state() -> Iterator[tuple[str, Any]]:
        yield from _named_state(model)
        for held in held_by(loss, model):
            if isinstance(held, nn.Module) and held is not model:
                yield from ((f"loss.{name}", value) for name, value in _named_state(held))
            elif isinstance(held, _KEPT) and held is not model:
                yield f"a {type(held).__name__} that the loss or a layer keeps", held

    before = {name: _copied(value) for name, value in state()}
    run()
    return tuple(
        name for name, value in state() if name not in before or not _same(before[name], value)
    )


def _named_state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE and isinstance(
                value, (torch.Tensor, list, dict, deque, set, bool, int, float, str)
            ):
                yield f"{path}.{name}" if path else name, value


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_copied(inner) for inner in value]
    return set(value) if isinstance(value, set) else value


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, torch.Tensor):
        return isinstance(new, torch.Tensor) and torch.equal(old, new.detach())
    if isinstance(old, dict):
        return (
            isinstance(new, dict)
            and list(old) == list(new)
            and _same(list(old.values()), list(new.values()))
        )
    if isinstance(old, list):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, (bool, int, float, str, set)):
        return type(old) is type(new) and old == new
    return old is new

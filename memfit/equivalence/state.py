"""The state from which passes begin, and the changes that a forward pass makes to it.

Two passes can be compared only if both begin from the same state. The state consists of parameters
(forward may change a teacher's), buffers, attributes of every kind (queues, counters), random
states, objects that the loss function uses, and variables that the code writes. `memfit.memory`
restores the values.
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

from memfit.equivalence.variables import Variable, own_classes, variables_of
from memfit.equivalence.widening import as_they_are
from memfit.memory.attributes import save_contents
from memfit.memory.restore import save_random_states

__all__ = ["changed_state", "held_by", "same_start"]

_KEPT = (nn.Module, torch.Tensor, list, dict, deque, set)
_FUNCTIONS = (functools.partial, types.MethodType, types.FunctionType)
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
    variables = [(one, one.read()) for one in _variables(objects)]
    with as_they_are():
        put_back = save_contents(cast("Sequence[nn.Module]", objects))
        put_random_back = save_random_states()

    def put_all_back() -> None:
        for variable, value in variables:
            if variable.read() is not value:
                variable.write(value)
        with as_they_are():
            put_back()
            put_random_back()

    def restore() -> None:
        gradients = [(parameter, parameter.grad) for parameter in parameters]
        put_all_back()
        for parameter, gradient in gradients:
            parameter.grad = gradient

    try:
        yield restore
    finally:
        put_all_back()


def _variables(objects: Sequence[object]) -> Iterator[Variable]:
    modules = [one for one in objects if isinstance(one, nn.Module)]
    classes = dict.fromkeys(kind for module in modules for kind in own_classes(module))
    functions = [one for one in objects if isinstance(one, types.FunctionType)]
    for kind in classes:
        functions += (one for one in vars(kind).values() if isinstance(one, types.FunctionType))
    return variables_of(dict.fromkeys(functions), classes)


def held_by(loss: Callable[..., Any], model: nn.Module) -> tuple[object, ...]:
    """Return the objects in which a loss or a user's own layers can keep state between calls.

    Args:
        loss: A module, a function, a method or a partial of one.
        model: The model.

    Returns:
        Modules, tensors and containers; and functions, whose variables may change.
    """
    layers = [model, loss] if isinstance(loss, nn.Module) else [model]
    kinds = dict.fromkeys(kind for layer in layers for kind in own_classes(layer))
    left: list[tuple[Any, bool]] = [(loss, True)]
    for kind in kinds:
        values = [value for name, value in vars(kind).items() if not name.startswith("__")]
        left += ((value, True) for value in values if isinstance(value, types.FunctionType))
        left += ((value, False) for value in values if isinstance(value, _KEPT))
    found: dict[int, object] = {}
    while left:
        value, is_outer = left.pop()
        if id(value) in found:
            continue
        if isinstance(value, functools.partial):
            held = [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            held = [value.__func__, value.__self__]
        elif isinstance(value, types.FunctionType):
            found[id(value)] = value
            held = _of_function(value)
        else:
            found[id(value)] = value
            continue
        for inner in held:
            # A function's own functions are followed, and the functions of those are not.
            if is_outer and isinstance(inner, _FUNCTIONS):
                left.append((inner, inner is getattr(value, "func", None)))
            elif isinstance(inner, _KEPT) or inner is getattr(value, "__self__", None):
                left.append((inner, False))
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
        for variable in _variables((model, *held_by(loss, model))):
            yield variable.name, variable.read()

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

"""Finds the modules, the optimizers and other objects with tensors that a loss function uses.

A loss is often a short function around a module: a method, a partial, or a lambda that uses one. If
a step is repeated, the state that the loss changed has to be restored first.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["held_by"]


def held_by(part: object) -> tuple[tuple[nn.Module, ...], tuple[object, ...]]:
    """Return the modules and other objects that a model or a loss function uses.

    Args:
        part: A module, a function, or an object that can be called.

    Returns:
        The modules, and the other objects.
    """
    modules: dict[int, nn.Module] = {}
    others: dict[int, object] = {}
    seen: set[int] = set()
    left = [part]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            modules[id(value)] = value
        elif isinstance(value, (functools.partial, types.MethodType, types.FunctionType)):
            left += _inside(value)
        elif not isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType)):
            others[id(value)] = value
            # Objects inside a module are searched too; its submodules are found as modules.
            left += [v for v in getattr(value, "__dict__", {}).values() if _has_state(v)]
    return tuple(modules.values()), tuple(others.values())


def _inside(function: Any) -> Iterator[object]:
    if isinstance(function, functools.partial):
        yield from (function.func, *function.args, *function.keywords.values())
    elif isinstance(function, types.MethodType):
        yield from (function.__self__, function.__func__)
    elif function.__module__ is None or function.__module__.partition(".")[0] != "torch":
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # the variable has no value yet
                yield cell.cell_contents
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        named = (function.__globals__.get(name) for name in function.__code__.co_names)
        # Of a script's global names, only objects that can be called count, not its data.
        yield from (v for v in named if _has_state(v) or _is_own(v, function))


def _has_state(value: object) -> bool:
    return isinstance(value, (nn.Module, Optimizer))


def _is_own(value: object, function: types.FunctionType) -> bool:
    """Whether a value is a function of the same script, or an object of one of its classes."""
    return (
        callable(value)
        and not isinstance(value, type)
        and getattr(value, "__module__", None) == function.__module__
    )

"""Variables that the code of a step writes outside of objects.

A loss may count its calls in a `nonlocal` or a `global` variable, and a layer in an attribute of
its class. Such a variable is state, as an attribute of the model is. It is found in the code of the
loss, of the user's layers, and of the functions that these use.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

__all__ = ["Variable", "own_classes", "variables_of"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A name whose value can be read and written.

    Args:
        name: What it is called in reports.
        read: A function that returns its value.
        write: A function that gives it a value.
    """

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None]


def own_classes(model: nn.Module) -> tuple[type, ...]:
    """Return the classes of a model's layers, and the classes that they inherit from.

    Classes of torch are left out.
    """
    found = dict.fromkeys(
        kind for layer in map(type, model.modules()) for kind in layer.__mro__ if kind is not object
    )
    return tuple(kind for kind in found if kind.__module__.partition(".")[0] != "torch")


def variables_of(
    functions: Iterable[types.FunctionType], classes: Iterable[type]
) -> Iterator[Variable]:
    """Yield the variables that functions write, and the attributes of classes that are values.

    Args:
        functions: The functions.
        classes: The classes.
    """
    for function in functions:
        names = function.__code__.co_freevars
        for name, cell in zip(names, function.__closure__ or (), strict=True):
            if name == "__class__":  # what `super()` reads
                continue
            yield Variable(
                name=f"{name} of {function.__name__}",
                read=functools.partial(getattr, cell, "cell_contents", None),
                write=functools.partial(setattr, cell, "cell_contents"),
            )
        held = function.__globals__
        for name in _globals_written(function.__code__):
            yield Variable(
                name=f"the global variable {name}",
                read=functools.partial(held.get, name),
                write=functools.partial(held.__setitem__, name),
            )
    for kind in classes:
        for name, value in tuple(vars(kind).items()):
            if not (name.startswith("__") or callable(value) or hasattr(value, "__get__")):
                yield Variable(
                    name=f"{kind.__name__}.{name}",
                    read=functools.partial(getattr, kind, name, None),
                    write=functools.partial(setattr, kind, name),
                )


@functools.lru_cache(maxsize=1024)
def _globals_written(code: types.CodeType) -> tuple[str, ...]:
    found = {one.argval for one in dis.get_instructions(code) if one.opname == "STORE_GLOBAL"}
    return tuple(sorted(found))

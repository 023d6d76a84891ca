"""Remembers what is true of an operation, whatever its arguments are.

The hash of an operation is computed in Python, and a trace asks several things of each operation
that it sees. So operations are told apart by their ids here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["name_of", "once_per_operation"]

_Answer = TypeVar("_Answer")


def once_per_operation(function: Callable[[Any], _Answer]) -> Callable[[Any], _Answer]:
    """Call a function once for each operation, and return the same from then on.

    Args:
        function: A function of an operation.
    """
    # The operation is kept with the answer, so that no other operation can get its id.
    answers: dict[int, tuple[Any, _Answer]] = {}

    @functools.wraps(function)
    def asked(func: Any) -> _Answer:
        found = answers.get(id(func))
        if found is None:
            found = answers[id(func)] = func, function(func)
        return found[1]

    return asked


@once_per_operation
def name_of(func: Any) -> str:
    """Return an operation's name, such as `aten.add.Tensor`."""
    return str(func)

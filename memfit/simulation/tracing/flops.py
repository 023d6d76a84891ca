"""Counts operations of tensors as torch counts them.

Products of matrices, convolutions and attention are counted. A multiplication and an addition are
two operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["flops_of_call"]


def flops_of_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the operations of one call, which has run.

    Args:
        func: The operation of torch.
        args: Its positional arguments.
        kwargs: Its other arguments.
        result: What it returned.
    """
    formula = _formulas().get(func)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


@functools.cache
def _formulas() -> dict[Any, Callable[..., int]]:
    # It reads torch's operations when it is imported, and most commands count none.
    from torch.utils.flop_counter import flop_registry

    return {
        getattr(packet, overload): formula
        for packet, formula in flop_registry.items()
        # What is no ordinary operation (flex attention) has no overloads.
        for overload in getattr(packet, "overloads", tuple)()
    }

"""Counts operations of tensors as torch counts them.

Products of matrices, convolutions, attention and recurrent layers are counted. A multiplication and
an addition are two operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from memfit._torch_private import aten_if_there
from memfit.simulation.tracing.by_operation import once_per_operation

__all__ = ["flops_formula", "flops_of_call"]


def flops_of_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the operations of one call, which has run.

    Args:
        func: The operation of torch.
        args: Its positional arguments.
        kwargs: Its other arguments.
        result: What it returned.
    """
    formula = flops_formula(func)
    if formula is None:
        return 0
    try:
        return int(formula(*args, **kwargs, out_val=result))
    except AssertionError:
        # torch's formula for attention refuses keys that all heads share, which its kernels take.
        return 0


@once_per_operation
def flops_formula(func: Any) -> Callable[..., int] | None:
    """Return the function that counts an operation's calls; `None` if they are not counted.

    Args:
        func: The operation of torch. The function takes its arguments, and its result as `out_val`.
    """
    return _formulas().get(func)


@functools.cache
def _formulas() -> dict[Any, Callable[..., int]]:
    # It reads torch's operations when it is imported, and most commands count none.
    from torch.utils.flop_counter import flop_registry

    ours = {aten_if_there("_cudnn_rnn.default"): _recurrent_flops}
    return ours | {
        getattr(packet, overload): formula
        for packet, formula in flop_registry.items()
        # What is no ordinary operation (flex attention) has no overloads.
        for overload in getattr(packet, "overloads", tuple)()
    }


def _recurrent_flops(data: Any, weights: Any, *_args: Any, **_kwargs: Any) -> int:
    """Return the products of a recurrent layer: each position meets each matrix of weights once.

    torch's counter sees the products only where the layer is taken apart, as on a CPU.
    """
    num_positions = data.numel() // data.shape[-1]
    num_weights = sum(int(weight.numel()) for weight in weights if weight.ndim > 1)
    return 2 * int(num_positions) * num_weights

"""Gives a script the smallest normal number instead of zero for a number that no kernel computed.

Scripts divide by numbers and take logarithms of them. With a zero, such a script fails, and with a
real value it does not. Whole numbers stay zero: most of them count something that is rare. What
torch itself reads stays zero too, because it asks in this way whether anything was infinite.
"""

from __future__ import annotations

import functools
import warnings
from types import ModuleType
from typing import Any

from .reads import Reads

__all__ = ["replace_zeros"]

_SMALLEST = 2.0**-126
_METHODS = ("item", "__float__")


def replace_zeros(torch: ModuleType, reads: Reads) -> None:
    """Replace how a tensor becomes a Python number.

    Args:
        torch: The module torch.
        reads: It knows which reads give what no kernel computed.
    """
    for name in _METHODS:
        setattr(torch.Tensor, name, _nonzero(getattr(torch.Tensor, name), reads))


def _nonzero(original: Any, reads: Reads) -> Any:
    is_warned = False

    def first(tensor: Any) -> Any:
        # torch warns once, and names the line that called it. That has to be the script's.
        nonlocal is_warned
        is_warned = True
        with warnings.catch_warnings(record=True) as caught:
            value = original(tensor)
        for warning in caught:
            warnings.warn(warning.message, warning.category, stacklevel=3)
        return value

    @functools.wraps(original)
    def read(tensor: Any) -> Any:
        num_before = reads.num_of_script
        value = original(tensor) if is_warned or not tensor.requires_grad else first(tensor)
        # A tensor that is traced gives a symbol, which must not be compared.
        if type(value) is float and value == 0.0 and reads.num_of_script != num_before:
            return _SMALLEST
        return value

    return read

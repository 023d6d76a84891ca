"""Answers code that asks whether its tensors are on the meta device as the card would.

Some models compute differently there. For example, timm's EfficientViT switches autocast off for
its attention only if the tensors are not on the meta device. A function that names the meta device,
or that reads `is_meta`, gets the card's answer. Other code, and torch's own, sees the meta device.
"""

from __future__ import annotations

import inspect
import types
from typing import Any, Final

import torch

__all__ = ["answer_of_card", "on_meta"]

_CARD: Final = torch.device("cuda", 0)
_META: Final = torch.device("meta")
_ASKS_DEVICE: Final = torch.Tensor.device.__get__
_ASKS_IS_META: Final = torch.Tensor.is_meta.__get__  # type: ignore[attr-defined]
_OWN: Final = ("torch", "memfit")


def answer_of_card(getter: Any, args: tuple[Any, ...]) -> torch.device | bool | None:
    """Return what a model is told about the device of a tensor.

    Call it from `__torch_function__`, which is called by the frame that asks.

    Args:
        getter: The getter of the attribute that is read.
        args: The tensor.

    Returns:
        The card's answer; `None` if the tensor's own answer holds.
    """
    # Inside the mode, the getter itself gives the tensor's own answer.
    if getter not in (_ASKS_DEVICE, _ASKS_IS_META) or not args[0].is_meta:
        return None
    # The frame is kept in no variable of the caller: that would be a cycle, which keeps tensors.
    here = inspect.currentframe()
    asking = here and here.f_back and here.f_back.f_back
    del here
    if asking is None or _is_own(asking):
        return None
    if getter == _ASKS_IS_META:
        return False
    return _CARD if _META.type in asking.f_code.co_consts else None


def on_meta(value: Any) -> Any:
    """Return the meta device for the card that a model was told of, and anything else as it is."""
    return _META if isinstance(value, torch.device) and value.type == _CARD.type else value


def _is_own(frame: types.FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _OWN

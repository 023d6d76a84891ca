"""Regions of autocast that a model opens itself, and its questions about autocast.

`torch.autocast("cuda", enabled=False)` opens a region in the traced step's autocast. So does the
same call for the device of a tensor. If a model asks whether autocast is on, it gets the answer
that it would get on the card.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import torch

from memfit._torch_private import any_autocast
from memfit.simulation.tracing.autocast import CudaAutocast

__all__ = ["regions_followed"]

_DEVICES: Final = ("cuda", "meta")


@contextlib.contextmanager
def regions_followed(autocast: CudaAutocast) -> Iterator[None]:
    """Make `torch.autocast` for the card act on the autocast of the traced step.

    Args:
        autocast: The casts of the step.
    """
    mode = torch.autocast
    with contextlib.ExitStack() as stack:
        for name, method in _methods(autocast, mode).items():
            stack.enter_context(_replaced(mode, name, method))
        for name, function in _questions(autocast).items():
            stack.enter_context(_replaced(torch, name, function))
        home, name = any_autocast()
        is_any = getattr(home, name)
        stack.enter_context(_replaced(home, name, lambda: autocast.is_active or is_any()))
        stack.enter_context(_replaced(torch.amp, "is_autocast_available", _available(torch.amp)))
        yield


def _methods(autocast: CudaAutocast, mode: Any) -> dict[str, Any]:
    """Return the functions that replace the methods of `torch.autocast`."""
    make, enter, leave = mode.__init__, mode.__enter__, mode.__exit__

    def init(
        self: Any,
        device_type: str,
        dtype: torch.dtype | None = None,
        enabled: bool = True,
        cache_enabled: bool | None = None,
    ) -> None:
        if device_type not in _DEVICES:
            make(self, device_type, dtype, enabled, cache_enabled)
            return
        self.device = device_type
        self.fast_dtype = dtype
        self._enabled = enabled

    def entered(self: Any) -> Any:
        if self.device not in _DEVICES:
            return enter(self)
        # As in torch, a region without a type takes the type that is set.
        autocast.open_region(self.fast_dtype, enabled=self._enabled)
        return self

    def left(self: Any, *raised: Any) -> Any:
        if self.device not in _DEVICES:
            return leave(self, *raised)
        autocast.close_region()
        return False

    return {"__init__": init, "__enter__": entered, "__exit__": left}


def _questions(autocast: CudaAutocast) -> dict[str, Any]:
    """Return the functions that replace torch's functions that ask about autocast."""
    is_enabled, get_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype

    def enabled(device_type: str | None = None) -> bool:
        if device_type is None or device_type in _DEVICES:
            return autocast.is_active
        return is_enabled(device_type)

    def dtype(device_type: str) -> torch.dtype:
        return autocast.dtype if device_type in _DEVICES else get_dtype(device_type)

    return {
        "is_autocast_enabled": enabled,
        "get_autocast_dtype": dtype,
        "get_autocast_gpu_dtype": lambda: autocast.dtype,
    }


def _available(home: Any) -> Any:
    original = home.is_autocast_available
    return lambda device_type: device_type in _DEVICES or original(device_type)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, original)

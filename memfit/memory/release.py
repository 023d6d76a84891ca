"""Giving memory back between trials: what caches, workspaces and dead cycles hold.

Nothing here decides when; the callers do.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys

import torch

from memfit._torch_private import clear_blas_workspaces

__all__ = ["release", "trim_heap"]


def release(device: torch.device) -> int:
    """Give back what this process holds of a device without using it.

    Call it outside any `except` block: the traceback of an exception keeps every frame of the step
    that raised it, and so every tensor, alive.

    Args:
        device: The device to clean.

    Returns:
        Bytes of the device that tensors of this process still hold; 0 on a CPU, which does not
        count them.

    Source: pytorch/pytorch#27600 (tracebacks), #82218 (leftovers after backward);
        aten/src/ATen/cuda/CublasHandlePool.cpp (workspaces).
    """
    torch.clear_autocast_cache()
    gc.collect()
    if device.type != "cuda":
        trim_heap()
        return 0
    torch.cuda.synchronize(device)
    clear_blas_workspaces()
    torch.cuda.empty_cache()
    trim_heap()
    return torch.cuda.memory_allocated(device)


def trim_heap() -> None:
    """Ask glibc to return freed heap to the system; elsewhere do nothing."""
    # Windows has no library of the process itself, and macOS none with that function.
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)

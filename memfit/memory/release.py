"""Releases memory between trials: caches, workspaces, and unreachable reference cycles.

The callers decide when to release it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time

import torch

from memfit._torch_private import clear_blas_workspaces

__all__ = ["release", "release_down_to", "trim_heap"]

_MOST_SECONDS = 0.5
_SECONDS_BETWEEN = 0.01


def release(device: torch.device) -> int:
    """Release the memory of a device that this process holds but does not use.

    Call it outside any `except` block. The traceback of an exception keeps every frame of the
    failed step alive, and so it keeps every tensor alive.

    Args:
        device: The device to clean.

    Returns:
        Bytes of the device that tensors of this process still hold. It is 0 on a CPU, where torch
        does not count them.

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


def release_down_to(device: torch.device, held_bytes: int) -> int:
    """Release memory, and wait a little for what autograd's threads still hold.

    An error in backward is raised while the thread that ran it still holds tensors of the graph.

    Args:
        device: The device to clean.
        held_bytes: What tensors held before the step. Nothing is waited for below that.

    Returns:
        Bytes of the device that tensors of this process still hold.

    Source: torch/csrc/autograd/engine.cpp, `Engine::thread_main`.
    """
    left_bytes = release(device)
    end = time.monotonic() + _MOST_SECONDS
    while left_bytes > held_bytes and time.monotonic() < end:
        time.sleep(_SECONDS_BETWEEN)
        if torch.cuda.memory_allocated(device) < left_bytes:
            left_bytes = release(device)
    return left_bytes


def trim_heap() -> None:
    """Ask glibc to return freed heap memory to the system. Without glibc, do nothing."""
    # Windows cannot open the process as a library, and macOS has no `malloc_trim`.
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)

"""Measures and drops what libraries keep in this process: oneDNN its kernels, MKL its buffers.

oneDNN compiles a kernel for each shape and keeps the last 1024 kernels. MKL keeps the buffers of
matrix products, some megabytes. A process that has trained already has some of what a trial needs.
Its trial would then seem to need less memory than in a new process.
"""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import Final

import torch

from memfit._torch_private import mkldnn_layout

__all__ = ["compiled_bytes", "forget_kernels", "free_buffers"]

# The number of kernels that oneDNN keeps (its src/common/primitive_cache.cpp). A new one replaces
# the oldest one.
_NUM_KEPT: Final = 1024
_NUM_FIELDS: Final = 5


def compiled_bytes() -> int:
    """Return the bytes of compiled kernels, which is memory both writable and executable."""
    num_bytes = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=_NUM_FIELDS)
        # Memory without a file has no name, so its line has one field less.
        if len(fields) == _NUM_FIELDS and fields[1].startswith("rwxp"):
            start, _, end = fields[0].partition("-")
            num_bytes += int(end, 16) - int(start, 16)
    return num_bytes


def forget_kernels() -> None:
    """Make oneDNN drop every kernel, if it has compiled any.

    oneDNN has no public function for this. So sums of empty tensors are computed, each with another
    shape, as many as oneDNN keeps kernels. They push out the kernels, and oneDNN compiles nothing
    for a sum.
    """
    layout = mkldnn_layout()
    if layout is None or not torch.backends.mkldnn.is_available() or not compiled_bytes():
        return
    for size in range(1, _NUM_KEPT + 1):
        nothing = torch.empty(size, layout=layout)
        torch.add(nothing, nothing)


def free_buffers() -> None:
    """Make MKL free the buffers that it keeps for matrix products, where torch has MKL.

    Source: oneMKL's developer reference, `mkl_free_buffers`.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL("libtorch_cpu.so").mkl_serv_free_buffers()

"""The kernels that oneDNN has compiled for this process, and how to be rid of them.

oneDNN compiles a kernel for each shape and keeps the last 1024. A process that has trained has some
of those that a trial needs, and would seem to need that much less than a fresh one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch

from memfit._torch_private import mkldnn_layout

__all__ = ["compiled_bytes", "forget_kernels"]

# oneDNN's src/common/primitive_cache.cpp: how many it keeps. Each new one pushes out the oldest.
_NUM_KEPT: Final = 1024
_NUM_FIELDS: Final = 5


def compiled_bytes() -> int:
    """Return the bytes of memory that is both writable and executable: compiled kernels."""
    num_bytes = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=_NUM_FIELDS)
        # One field less than a file's: such memory has no name.
        if len(fields) == _NUM_FIELDS and fields[1].startswith("rwxp"):
            start, _, end = fields[0].partition("-")
            num_bytes += int(end, 16) - int(start, 16)
    return num_bytes


def forget_kernels() -> None:
    """Have oneDNN forget every kernel, where it has compiled any.

    It has no public way to do that. So as many sums of empty tensors are taken as it keeps kernels,
    each of another shape: for a sum it compiles nothing.
    """
    layout = mkldnn_layout()
    if layout is None or not torch.backends.mkldnn.is_available() or not compiled_bytes():
        return
    for size in range(1, _NUM_KEPT + 1):
        nothing = torch.empty(size, layout=layout)
        torch.add(nothing, nothing)

"""The releases of torch and of its cuDNN, which decide what kernels take."""

from __future__ import annotations

import contextlib
import functools
import re

import torch

__all__ = ["cudnn_version", "torch_release"]


def torch_release() -> tuple[int, int]:
    """Return the major and minor version of the torch that is installed."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    assert found is not None
    return int(found[1]), int(found[2])


@functools.cache
def cudnn_version() -> int | None:
    """Return the version of the installed cuDNN, such as 92600; `None` where there is none."""
    if not torch.backends.cuda.is_built():
        return None
    # A cuDNN that does not fit torch is an error, which a step on the card would say.
    with contextlib.suppress(RuntimeError):
        version: int | None = torch.backends.cudnn.version()
        return version
    return None

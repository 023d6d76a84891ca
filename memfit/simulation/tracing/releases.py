"""The releases of torch and of its cuDNN, which decide what kernels take."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re

import torch

__all__ = ["cudnn_version", "has_cub_3", "has_outer_products", "torch_release"]

_CUDA_WITH_CUB_3 = 13


def torch_release() -> tuple[int, int]:
    """Return the major and minor version of the torch that is installed."""
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    assert found is not None
    return int(found[1]), int(found[2])


def has_cub_3() -> bool:
    """Whether this torch is built with the CUB of CUDA 13, or with none of NVIDIA's."""
    version = torch.version.cuda
    return version is None or int(version.partition(".")[0]) >= _CUDA_WITH_CUB_3


@functools.cache
def has_outer_products() -> bool:
    """Whether this torch computes outer products in a kernel that Triton compiles, not in BLAS.

    Source: torch/_native/ops/bmm_outer_product/triton_impl.py.
    """
    names = "torch._native", "torch._native.ops", "torch._native.ops.bmm_outer_product", "triton"
    return all(importlib.util.find_spec(name) is not None for name in names)


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

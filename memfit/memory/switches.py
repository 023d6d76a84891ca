"""torch's switches for a whole process that decide what a step takes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch

__all__ = ["set_switches", "switches"]

_cuda = torch.backends.cuda
_cudnn = torch.backends.cudnn

_Switch = tuple[Callable[[], Any], Callable[[Any], Any]]
"""Functions that read it and throw it."""


def _attribute(owner: Any, name: str) -> _Switch:
    return functools.partial(getattr, owner, name), functools.partial(setattr, owner, name)


_SWITCHES: Final[Mapping[str, _Switch]] = {
    "cudnn.enabled": _attribute(_cudnn, "enabled"),
    "cudnn.benchmark": _attribute(_cudnn, "benchmark"),
    "cudnn.benchmark_limit": _attribute(_cudnn, "benchmark_limit"),
    "cudnn.deterministic": _attribute(_cudnn, "deterministic"),
    "cudnn.allow_tf32": _attribute(_cudnn, "allow_tf32"),
    "fp16 reductions": _attribute(_cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    "bf16 reductions": _attribute(_cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    "flash_sdp": (_cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    "mem_efficient_sdp": (_cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    "math_sdp": (_cuda.math_sdp_enabled, _cuda.enable_math_sdp),
    "cudnn_sdp": (_cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
    "half_math_sdp": (
        _cuda.fp16_bf16_reduction_math_sdp_allowed,
        _cuda.allow_fp16_bf16_reduction_math_sdp,
    ),
    "deterministic": (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda modes: torch.use_deterministic_algorithms(modes[0], warn_only=modes[1]),
    ),
    # torch refuses to tell this one after `matmul.allow_tf32` was set.
    "float32 matmul precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
}


def switches() -> dict[str, Any]:
    """Return the switches by name, without those that this torch does not tell."""
    found = {}
    for name, (read, _) in _SWITCHES.items():
        # TF32's are not told after its newer settings were used, and cuDNN may be missing.
        with contextlib.suppress(AttributeError, RuntimeError):
            found[name] = read()
    return found


def set_switches(values: Mapping[str, Any]) -> None:
    """Throw the switches that have another value.

    Args:
        values: What `switches` returned, here or in another process.
    """
    here = switches()
    for name, value in values.items():
        if name in here and here[name] != value:
            _SWITCHES[name][1](value)

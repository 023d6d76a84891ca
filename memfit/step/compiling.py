"""Compiles the model of a training step with `torch.compile`, as a training run of one size does.

torch compiles a model for the first batch size that it sees. For the second one it compiles again,
with the batch size as a variable, and the kernels are then others. A training run has one batch
size. So every trial begins without compiled code (`torch.compiler.reset`), and its first iteration
compiles for its own batch size.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Final, cast

import torch
from torch import nn

from memfit._torch_private import is_compiled
from memfit.errors import UnsupportedError, UsageError
from memfit.user_cache import compiler

__all__ = ["CompiledModel", "check_can_compile", "check_not_compiled"]

_OLDEST: Final = (7, 0)
"""Source: torch._inductor, `GPUTooOldForTriton`."""


def check_not_compiled(model: nn.Module, name: str) -> None:
    """Refuse to compile a model that is compiled already.

    Raises:
        UsageError: The user has compiled the model, or a part of it.
    """
    if any(is_compiled(part) or is_compiled(part.forward) for part in model.modules()):
        raise UsageError(
            f"{name} is compiled already, so it is tried as it is: leave compile (--compile) out."
        )


def check_can_compile(device: torch.device) -> None:
    """Refuse a device for which torch cannot compile, before torch fails on the way.

    Raises:
        UsageError: The device is a CPU.
        UnsupportedError: The GPU is too old, or Triton or a C compiler is missing.
    """
    if device.type == "cpu":
        raise UsageError(
            "compile (--compile) is for GPUs: on a CPU the compiler itself takes more memory than "
            "many steps, and it would count as the step's. Leave it out, or name a --gpu."
        )
    if device.type != "cuda" or torch.version.hip is not None:
        return
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _OLDEST:
        raise UnsupportedError(
            f"torch.compile needs a GPU of compute capability 7.0 or newer, and "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}: leave compile out."
        )
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedError("torch.compile needs Triton for a GPU: pip install triton.")
    if compiler() is None:
        raise UnsupportedError(
            "torch.compile needs a C compiler for Triton's launchers: install cc, gcc or clang, or "
            "name one in CC."
        )


class CompiledModel:
    """A model that is compiled when it is first called in a trial.

    The module itself is not changed.

    Args:
        model: The model, on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._compiled: nn.Module | None = None

    @property
    def module(self) -> nn.Module:
        """The module to call in place of the model."""
        if self._compiled is None:
            torch.compiler.reset()
            # torch's types say that a compiled module is a function.
            self._compiled = cast("nn.Module", cast("Any", torch.compile)(self._model))
        return self._compiled

    def forget(self) -> None:
        """Drop what was compiled, so that the next call compiles for its own batch size."""
        if self._compiled is not None:
            self._compiled = None
            torch.compiler.reset()

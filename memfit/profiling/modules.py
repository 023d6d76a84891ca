"""Which module is running. Hooks tell it in forward, autograd's sequence numbers in backward.

A node of the graph gets its sequence number when forward makes it. The module that was running at
that time is the module that the node belongs to. Nothing is registered on tensors or nodes, and no
tensor is kept alive, so the step allocates and frees the same as without watching.
"""

from __future__ import annotations

import contextlib
import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

import torch
from torch import nn
from torch.nn.modules import module as hooks

from memfit._torch_private import sequence_number, sequence_number_of
from memfit.step import runner

__all__ = [
    "AVERAGE",
    "BATCH",
    "COMPILED",
    "LOSS",
    "OPTIMIZER",
    "ModuleStack",
    "SourceLines",
    "buffers_of",
    "is_own_file",
    "line_of",
    "parameters_of",
    "shown_file",
]

LOSS: Final = "(loss)"
OPTIMIZER: Final = "(optimizer)"
BATCH: Final = "(batch)"
AVERAGE: Final = "(EMA of the weights)"
COMPILED: Final = "(compiled model)"

_OWN = Path(__file__).parent.parent
_TORCH = Path(torch.__file__).parent
_PACKAGES = _TORCH.parent
_STANDARD_LIBRARY = Path(contextlib.__file__).parent
_STARTS_THE_STEP = runner.__file__


def parameters_of(prepared: runner.PreparedStep) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every parameter of the model and of the loss, with the path of its module."""
    for name, module in _parts(prepared):
        for path, parameter in module.named_parameters():
            yield _owner(name, path), parameter


def buffers_of(prepared: runner.PreparedStep) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every buffer of the model and of the loss, with the path of its module."""
    for name, module in _parts(prepared):
        for path, buffer in module.named_buffers():
            yield _owner(name, path), buffer


def _parts(prepared: runner.PreparedStep) -> Iterator[tuple[str, nn.Module]]:
    yield "", prepared.model
    if prepared.loss_module is not None:
        yield LOSS, prepared.loss_module


def _owner(name: str, path: str) -> str:
    inner = path.rpartition(".")[0]
    return ".".join(part for part in (name, inner) if part) or "(model)"


class ModuleStack:
    """The modules of a model, and which of them is running.

    Args:
        model: The model.
        entered: Called with the path of a module whenever the running module changes in forward.
    """

    def __init__(
        self, model: nn.Module, *, entered: Callable[[str], None] = lambda _path: None
    ) -> None:
        self._paths = {id(module): path or "(model)" for path, module in model.named_modules()}
        self._entered = entered
        self._stack: list[str] = []
        self._begins: list[int] = []
        self._at: list[str] = []

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Follow the calls of the model's modules."""
        # If this torch lacks the function, the error must come from here and not from a hook.
        sequence_number()
        handles = (
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def current(self) -> str | None:
        """The module whose forward is running; `None` outside the model."""
        return self._stack[-1] if self._stack else None

    def of_node(self, node: Any) -> str | None:
        """Return the module whose forward made a node of the graph, if it is known."""
        return self.of_sequence(sequence_number_of(node))

    def of_sequence(self, number: int) -> str | None:
        """Return the module that was running when autograd gave out a sequence number."""
        index = bisect_right(self._begins, number) - 1
        return self._at[index] if index >= 0 else None

    def _enter(self, module: nn.Module, _args: Any) -> None:
        path = self._paths.get(id(module))
        if path is not None:
            self._stack.append(path)
            self._note(path)

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if id(module) in self._paths and self._stack:
            self._stack.pop()
            self._note(self._stack[-1] if self._stack else LOSS)

    def _note(self, path: str) -> None:
        self._begins.append(sequence_number())
        self._at.append(path)
        self._entered(path)


class SourceLines:
    """The innermost line that is running and that belongs neither to torch nor to memfit."""

    def __init__(self) -> None:
        self._files: dict[CodeType, str | None] = {}

    def current(self) -> str | None:
        """Return the line as `file:line`; `None` if only torch and memfit are running."""
        frame: FrameType | None = inspect.currentframe()
        # Frames outside the start of the step belong to the caller of the profile.
        while frame is not None and frame.f_code.co_filename != _STARTS_THE_STEP:
            code = frame.f_code
            if code not in self._files:
                self._files[code] = shown_file(code.co_filename)
            shown = self._files[code]
            if shown is not None:
                return f"{shown}:{frame.f_lineno}"
            frame = frame.f_back
        return None


def line_of(frames: Iterable[tuple[str, int]]) -> str | None:
    """Return the innermost line of a recorded stack that belongs to the step.

    Args:
        frames: Files and lines, the innermost first.

    Returns:
        `file:line`; `None` if memfit's own frames come first. The frames outside those belong to
        the caller of the profile.
    """
    for filename, line in frames:
        if is_own_file(filename):
            return None
        shown = shown_file(filename)
        if shown is not None:
            return f"{shown}:{line}"
    return None


def is_own_file(filename: str) -> bool:
    """Whether a file belongs to memfit. torch.profiler names it relative to the import path."""
    path = Path(filename)
    return path.is_relative_to(_OWN) if path.is_absolute() else path.parts[:1] == (_OWN.name,)


def shown_file(filename: str) -> str | None:
    """Return the name of a file in reports; `None` for a file of torch, memfit or Python.

    Args:
        filename: Its path. A path from torch.profiler is relative to the import path.
    """
    path = Path(filename)
    if not path.is_absolute():
        is_hidden = path.parts[:1] == ("torch",) or filename.startswith("<")
        is_standard = (_STANDARD_LIBRARY / path).exists()
        return None if is_hidden or is_own_file(filename) or is_standard else path.as_posix()
    if path.is_relative_to(_TORCH) or is_own_file(filename):
        return None
    if path.is_relative_to(_PACKAGES):
        return path.relative_to(_PACKAGES).as_posix()
    return None if path.is_relative_to(_STANDARD_LIBRARY) else path.name

"""Which layer of a model is running, and the inputs and outputs of each call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["LOSS", "CallStack"]

LOSS = "loss"
"""What is called the layer of what runs outside the model."""


class CallStack:
    """The layers whose forward is running, innermost last; a context manager.

    Args:
        model: The model whose layers are followed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._running: list[tuple[nn.Module, str]] = []
        self._handles: list[RemovableHandle] = []

    @property
    def innermost(self) -> str:
        """The path of the running layer: empty in the model itself, `LOSS` outside of the model."""
        return self._running[-1][1] if self._running else LOSS

    def __enter__(self) -> Self:
        """Start to follow the layers."""
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entered(name)))
            self._handles.append(module.register_forward_hook(self._left, always_call=True))
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop following the layers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._running.clear()

    def _entered(self, name: str) -> Any:
        def enter(module: nn.Module, _args: Any) -> None:
            self._running.append((module, name))

        return enter

    def _left(self, module: nn.Module, _args: Any, _output: Any) -> None:
        # A module that another hook refused to enter is left all the same.
        if self._running and self._running[-1][0] is module:
            self._running.pop()

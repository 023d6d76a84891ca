"""Finds which module is running, in a script that the watch does not know.

Global hooks run when a module is called. The paths of modules begin at the outermost module that is
called. In backward, a node of the graph has the sequence number that it got in forward. It belongs
to the module whose forward was running at that time.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from .internals import Internals
from .start import after_import

__all__ = ["Modules"]

_MAX_NOTES = 200_000
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "OptimizedModule")


class _Stack(threading.local):
    """The modules that are running in a thread, the outermost first."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.root: Any = None


class Modules:
    """The modules of a process.

    Args:
        torch: The module torch.
        internals: torch's private functions.
        begun: Called with a root module and its arguments before its forward runs.
        ended: Called with a root module and its output after its forward has run.
        entered: Called with the path of a module whenever the running module changes.
    """

    def __init__(
        self,
        torch: ModuleType,
        internals: Internals,
        *,
        begun: Callable[[Any, Any], None],
        ended: Callable[[Any, Any], None],
        entered: Callable[[str | None], None],
    ) -> None:
        self._torch = torch
        self._internals = internals
        self._begun = begun
        self._ended = ended
        self._entered = entered
        self._stack = _Stack()
        self._paths: dict[int, str] = {}
        self._roots: dict[int, str] = {}
        self._begins: list[int] = []
        self._at: list[str] = []
        self._handles: list[Any] = []
        self.are_followed = True

    def begin(self) -> None:
        """Follow every module. Stop when something is compiled."""
        hooks = self._torch.nn.modules.module
        self._handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        ]
        after_import("torch._dynamo.eval_frame", self._yield_to_compiler)

    @property
    def current(self) -> str | None:
        """The module whose forward this thread runs; `None` if it runs none."""
        return self._stack.paths[-1] if self._stack.paths else None

    @property
    def in_backward(self) -> str | None:
        """The module whose backward this thread runs; `None` if it is not known."""
        node = self._internals.current_node()
        return None if node is None else self.of_node(node) or f"({node.name()})"

    def of_node(self, node: Any) -> str | None:
        """Return the module whose forward made a node of the graph, if it is known."""
        index = bisect_right(self._begins, self._internals.sequence_number_of(node)) - 1
        return self._at[index] if index >= 0 else None

    def forget(self) -> None:
        """Drop the notes about graphs, because another step begins."""
        self._begins.clear()
        self._at.clear()

    def roots(self) -> Iterator[tuple[int, str]]:
        """Yield the id and the name of every module that no other module called."""
        yield from self._roots.items()

    def path_of(self, module: Any) -> str:
        """Return the name of a module in reports."""
        return self._paths.get(id(module)) or f"({type(module).__name__})"

    def _enter(self, module: Any, args: Any) -> None:
        stack = self._stack
        # A forward inside backward is a recomputation. Its module is not a root.
        if not stack.paths and self._internals.current_node() is None:
            self._name(module)
            stack.root = module
            self._begun(module, args)
        path = self.path_of(module)
        stack.paths.append(path)
        self._note(path)

    def _leave(self, module: Any, _args: Any, output: Any) -> None:
        stack = self._stack
        if not stack.paths:
            return
        stack.paths.pop()
        self._note(stack.paths[-1] if stack.paths else "(loss)")
        if not stack.paths and stack.root is module:
            stack.root = None
            self._ended(module, output)

    def _note(self, path: str) -> None:
        if len(self._begins) < _MAX_NOTES:
            self._begins.append(self._internals.sequence_number())
            self._at.append(path)
        self._entered(path)

    def _name(self, root: Any) -> None:
        if self._roots.get(id(root)) == type(root).__name__:
            return
        inner, hidden = root, ""
        while type(inner).__name__ in _WRAPPERS:
            name, inner = next(iter(inner.named_children()))
            hidden += f"{name}."
        # The modules of a second model may have the same paths as those of the first.
        prefix = f"{type(inner).__name__}." if self._roots else ""
        for path, module in root.named_modules():
            shown = path.removeprefix(hidden)
            self._paths[id(module)] = (
                f"{prefix}{shown}" if shown and path != hidden[:-1] else f"({type(inner).__name__})"
            )
        self._roots[id(root)] = type(root).__name__

    def _yield_to_compiler(self, eval_frame: ModuleType) -> None:
        """Remove the hooks when something is compiled, because its graph would include them."""
        context = getattr(eval_frame, "OptimizeContext", None)
        if context is None:
            self._stop()
            return
        original = context.__init__

        def init(this: Any, *args: Any, **kwargs: Any) -> None:
            self._stop()
            original(this, *args, **kwargs)

        context.__init__ = init

    def _stop(self) -> None:
        self.are_followed = False
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stack.paths.clear()

"""All names of torch and Python that begin with an underscore and that the watch uses.

The watch has its own list because it may run in a Python without memfit. torch may drop such a name
in any release. Then the watch records less, and the script runs as without the watch.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any

__all__ = [
    "Dispatch",
    "Distributed",
    "Internals",
    "frame_here",
    "frame_of_main_thread",
    "run_exit_functions",
]

_READERS = ("_cuda_memoryStats", "_accelerator_getDeviceStats")
_RESETTERS = ("_cuda_resetPeakMemoryStats", "_accelerator_resetPeakStats")
_MAX_ENTRIES = 1_000_000


def frame_here() -> FrameType:
    """Return the innermost frame of this thread."""
    return sys._getframe()


def frame_of_main_thread() -> FrameType | None:
    """Return the innermost frame of the main thread."""
    main = threading.main_thread().ident
    return sys._current_frames().get(main or 0)


def run_exit_functions() -> None:
    """Run the functions that are registered with `atexit`, as Python does when it ends."""
    atexit._run_exitfuncs()


class Internals:
    """The private functions of torch.

    Args:
        torch: The module torch.
    """

    def __init__(self, torch: ModuleType) -> None:
        self._torch = torch
        self._c = torch._C
        self.read_stats: Any = getattr(self._c, _READERS[0], None)
        """A function from a device's index to its allocator's statistics, nested."""
        self.reset_peaks: Any = getattr(self._c, _RESETTERS[0], None)
        """A function that resets a device's peaks."""
        self._node: Any = getattr(self._c, "_current_autograd_node", None)
        self._number: Any = getattr(getattr(self._c, "_autograd", None), "_get_sequence_nr", None)

    def replace_stats(self, read: Callable[[int], Any], reset: Callable[[int], Any]) -> None:
        """Replace the functions of torch that read statistics and reset peaks."""
        for names, function in ((_READERS, read), (_RESETTERS, reset)):
            for name in names:
                if hasattr(self._c, name):
                    setattr(self._c, name, function)

    def when_initialised(self, function: Callable[[], Any]) -> None:
        """Call a function when CUDA is initialised. If it already is, call it at once."""
        self._torch.cuda._lazy_call(function)

    def on_out_of_memory(self, function: Callable[[int, int, int, int], Any]) -> None:
        """Register a function that is called before torch raises an out of memory error.

        Only torch's own caching allocator calls it.
        """
        attach = getattr(self._c, "_cuda_attach_out_of_memory_observer", None)
        if attach is not None and self._torch.cuda.get_allocator_backend() == "native":
            attach(function)

    def record_history(self, *, clears: bool) -> None:
        """Record every allocation with its Python frames. `clears` drops earlier records."""
        self._torch.cuda.memory._record_memory_history(
            "all", context="alloc", stacks="python", max_entries=_MAX_ENTRIES, clear_history=clears
        )

    def record_requests(self) -> None:
        """Record every allocation, without frames."""
        self._torch.cuda.memory._record_memory_history(
            "all", context=None, max_entries=_MAX_ENTRIES
        )

    def history(self) -> dict[str, Any]:
        """Return the recorded history and the current segments."""
        snapshot: dict[str, Any] = self._torch.cuda.memory._snapshot()
        return snapshot

    def current_node(self) -> Any:
        """Return the graph's node whose backward this thread runs; `None` if it runs none."""
        return None if self._node is None else self._node()

    def sequence_number(self) -> int:
        """Return the number that the next node of a graph gets."""
        return 0 if self._number is None else int(self._number())

    def sequence_number_of(self, node: Any) -> int:
        """Return the number that a node of a graph got."""
        return int(node._sequence_nr())

    def tensors(self, tree: Any) -> Iterator[Any]:
        """Yield the tensors of nested lists, tuples and dictionaries."""
        for leaf in self._torch.utils._pytree.tree_leaves(tree):
            if isinstance(leaf, self._torch.Tensor):
                yield leaf


class Dispatch:
    """The private names of torch's dispatcher.

    Args:
        torch: The module torch.
    """

    def __init__(self, torch: ModuleType) -> None:
        self._operations = torch.ops.aten
        self.keys_below: Any = torch._C._dispatch_keyset_full_after(
            torch._C.DispatchKey.BackendSelect
        )
        """The keys of the dispatcher below `BackendSelect`."""

    def operation(self, name: str) -> Any:
        """Return an operation, such as `eq.Scalar`; `None` if torch has none of this name."""
        name, _, overload = name.partition(".")
        return getattr(getattr(self._operations, name, None), overload or "default", None)

    def tensor_positions(self, operation: Any) -> tuple[int, ...]:
        """Return which of an operation's positional arguments are tensors."""
        return tuple(
            index
            for index, argument in enumerate(operation._schema.arguments)
            if str(argument.type) == "Tensor" and not argument.kwarg_only
        )

    def drop(self, library: Any) -> None:
        """Remove the kernels of a `torch.library.Library`."""
        library._destroy()


class Distributed:
    """The private names of `torch.distributed`.

    Args:
        c10d: The module `torch.distributed.distributed_c10d`.
    """

    def __init__(self, c10d: ModuleType) -> None:
        self._c10d = c10d

    def is_on_card(self, group: Any) -> bool:
        """Whether a group's collectives of objects go through tensors on the card."""
        return str(self._c10d._get_object_coll_device(group)).startswith("cuda")

    def replace_rendezvous(self, rendezvous: Callable[..., Any]) -> None:
        """Replace how a process group is made from the environment, or from an address."""
        handlers = sys.modules["torch.distributed.rendezvous"]._rendezvous_handlers
        handlers.update(env=rendezvous, tcp=rendezvous)

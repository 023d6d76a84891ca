"""All names of torch that begin with an underscore and that memfit uses.

torch may drop such a name in any release. So each name is fetched only when it is used. If a
release does not have it, the error says what is missing, what memfit uses it for, and what works.

Other modules use public names directly, and documented hooks such as `__torch_function__` too. If
a public name does the same as a private one, memfit uses the public one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from memfit.errors import UnsupportedError

__all__ = [
    "NEEDS",
    "allocator_snapshot",
    "any_autocast",
    "aten",
    "aten_if_there",
    "below_autograd",
    "capturable_supported_on",
    "clear_blas_workspaces",
    "convert_tensors",
    "copy_each",
    "current_node",
    "dispatched",
    "foreach_supported_on",
    "fused_supported_on",
    "graph_task",
    "is_compiled",
    "is_view",
    "memory_events",
    "mkldnn_layout",
    "num_owners",
    "plainly",
    "pytree",
    "recorded_history",
    "run_backward",
    "schema_of",
    "sequence_number",
    "sequence_number_of",
    "sparse_parts",
    "storage_id",
    "version_of",
]

_SIMULATING: Final = (
    "to simulate a training step",
    "Probing, planning, verifying and profiling on a device of this machine still work (--device).",
)
_VERIFYING: Final = (
    "to compare gradients",
    "Probing, planning and profiling still work.",
)
_WATCHING: Final = (
    "to see the operations of a step, for simulating it and for comparing gradients",
    "Probing, planning and profiling on a device of this machine still work (--device).",
)
_RECORDING: Final = (
    "to record what a step allocates on a GPU",
    "Profiling a simulated card (--gpu), and all else, still works.",
)
_PROFILING: Final = (
    "to say which module holds memory",
    "Probing, planning and verifying still work.",
)
_SPARSE: Final = (
    "to say what sparse gradients hold",
    "Profiling a step without them, and all else, still works.",
)

NEEDS: Final = {
    "torch.utils._pytree": (
        "to find the tensors of a batch",
        "Only `memfit gpus` works with this release.",
    ),
    "torch.utils._python_dispatch.TorchDispatchMode": _WATCHING,
    "torch._C._AutoDispatchBelowAutograd": ("to simulate RMSNorm", "All else still works."),
    "torch.optim.optimizer._get_foreach_kernels_supported_devices": _SIMULATING,
    "torch.optim.optimizer._get_capturable_supported_devices": _SIMULATING,
    "torch.optim.optimizer._get_fused_kernels_supported_devices": _SIMULATING,
    "torch._C._current_graph_task_id": _SIMULATING,
    "torch._C._storage_Use_Count": _SIMULATING,
    "torch.Tensor._use_count": _SIMULATING,
    "torch.Tensor._is_view": _SIMULATING,
    "torch.UntypedStorage._cdata": _SIMULATING,
    "torch.autograd.graph._engine_run_backward": _SIMULATING,
    "torch._C._current_autograd_node": (
        "to say which module holds memory in a simulated step",
        "Probing, planning, verifying and profiling on a device still work.",
    ),
    "torch._C._autograd._get_sequence_nr": _PROFILING,
    "torch.autograd.graph.Node._sequence_nr": _PROFILING,
    "torch.autograd.profiler.profile.kineto_results": (
        "to record what a step allocates on a CPU",
        "Profiling a GPU or a simulated card, and all else, still works.",
    ),
    "torch.cuda.memory._record_memory_history": _RECORDING,
    "torch.cuda.memory._snapshot": _RECORDING,
    "torch.Tensor._indices": _SPARSE,
    "torch.Tensor._values": _SPARSE,
    "torch.Tensor._version": (
        "to compare gradients, and to do a training step again that ran out of memory",
        "Probing, planning and profiling still work, and Accumulator with recover=False.",
    ),
    "torch.nn.Module._apply": _VERIFYING,
    "torch._ops.OpOverload._schema": _WATCHING,
}
"""For each name, the purpose and what still works without it, as the error says."""
_LAST: Final = {name: name.rpartition(".")[2] for name in NEEDS}  # read at every operation


def _missing(name: str, needs: tuple[str, str]) -> UnsupportedError:
    import torch

    return UnsupportedError(
        f"torch {torch.__version__} has no {name}, which memfit needs {needs[0]}. {needs[1]}"
    )


def _find(name: str) -> Any:
    """Return the object of torch with this name.

    Args:
        name: One of `NEEDS`.

    Raises:
        UnsupportedError: This torch does not have the name.
    """
    try:
        return _resolved(name)
    except (AttributeError, ImportError):
        raise _missing(name, NEEDS[name]) from None


def _resolved(name: str) -> Any:
    home, _, last = name.rpartition(".")
    owner = _home(home)
    try:
        return getattr(owner, last)
    except AttributeError:
        return importlib.import_module(name)


@functools.cache
def _home(name: str) -> Any:
    """Return a module, or a class in a module."""
    try:
        return importlib.import_module(name)
    except ImportError:
        home, _, last = name.rpartition(".")
        return getattr(_home(home), last)


def _of(value: Any, name: str) -> Any:
    """Return the attribute of a torch object that the last part of a name of `NEEDS` gives."""
    try:
        return getattr(value, _LAST[name])
    except AttributeError:
        raise _missing(name, NEEDS[name]) from None


class _Pytree:
    """`torch.utils._pytree`, which walks tuples, lists, dictionaries and registered classes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_find("torch.utils._pytree"), name)


pytree: Final[Any] = _Pytree()


def convert_tensors(module: Any, convert: Callable[[Any], Any]) -> None:
    """Convert parameters, buffers and gradients in place, as `Module.to` does."""
    _of(module, "torch.nn.Module._apply")(convert)


def copy_each(targets: Sequence[Any], sources: Sequence[Any]) -> None:
    """Copy tensors onto other tensors, all at once if this torch can, else one by one."""
    import torch

    at_once = getattr(torch, "_foreach_copy_", None)
    if at_once is not None:
        at_once(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def clear_blas_workspaces() -> None:
    """Release the megabytes that cuBLAS keeps on the current GPU, if this torch can do it."""
    import torch

    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()


def mkldnn_layout() -> Any:
    """Return the layout of oneDNN's own tensors; `None` if this torch does not have it."""
    return getattr(importlib.import_module("torch"), "_mkldnn", None)


@contextlib.contextmanager
def dispatched(handle: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
    """Pass every operation in the block to a function, instead of running it.

    Args:
        handle: Called with the operation, its positional arguments and its keyword arguments.
            Operations that it calls run normally.
    """

    def dispatch(_mode: Any, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return handle(func, args, kwargs or {})

    base = _find("torch.utils._python_dispatch.TorchDispatchMode")
    # torch keeps its compiler out of such functions, with two more calls for each operation.
    plain = {"__torch_dispatch__": dispatch, "_should_skip_dynamo": lambda: False}
    mode: Any = type("Dispatching", (base,), plain)
    with mode():
        yield


def plainly() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which no function mode is called, if this torch has one."""
    import torch

    return getattr(torch._C, "DisableTorchFunction", contextlib.nullcontext)()


def below_autograd() -> Any:
    """Return a context in which operations reach modes whole, as where CUDA has a kernel."""
    return _find("torch._C._AutoDispatchBelowAutograd")()


def any_autocast() -> tuple[Any, str]:
    """Return where torch keeps the function that says whether any autocast is on, and its name."""
    import torch

    return torch._C, "_is_any_autocast_enabled"


def schema_of(func: Any) -> Any:
    """Return an operation's name and arguments."""
    return _of(func, "torch._ops.OpOverload._schema")


def version_of(tensor: Any) -> int:
    """Return how often a tensor was written to in place."""
    return int(_of(tensor, "torch.Tensor._version"))


def is_view(tensor: Any) -> bool:
    """Whether a tensor is a view of another one for autograd."""
    return bool(_of(tensor, "torch.Tensor._is_view")())


@functools.cache
def aten_if_there(name: str) -> Any:
    """Return an operation.

    Args:
        name: Its name and its overload, such as `"add.Tensor"`.

    Returns:
        The operation; `None` if this torch has no operation with that name.
    """
    import torch

    packet, _, overload = name.partition(".")
    try:
        return getattr(getattr(torch.ops.aten, packet), overload)
    except AttributeError:
        return None


def aten(name: str) -> Any:
    """Return an operation that the simulation calls.

    Args:
        name: Its name and its overload.

    Raises:
        UnsupportedError: This torch has no operation with that name.
    """
    found = aten_if_there(name)
    if found is None:
        raise _missing(f"torch.ops.aten.{name}", _SIMULATING)
    return found


def foreach_supported_on(device_type: str) -> contextlib.AbstractContextManager[None]:
    """Let optimizers choose their foreach implementation on one more type of device.

    Args:
        device_type: The type of device, such as `"meta"`.
    """
    return _one_more("torch.optim.optimizer._get_foreach_kernels_supported_devices", device_type)


def fused_supported_on(device_type: str) -> contextlib.AbstractContextManager[None]:
    """Let optimizers that are made with `fused=True` step on one more type of device.

    Args:
        device_type: The type of device, such as `"meta"`.
    """
    return _one_more("torch.optim.optimizer._get_fused_kernels_supported_devices", device_type)


def capturable_supported_on(device_type: str) -> contextlib.AbstractContextManager[None]:
    """Let optimizers that are made with `capturable=True` step on one more type of device.

    Args:
        device_type: The type of device, such as `"meta"`.
    """
    return _one_more("torch.optim.optimizer._get_capturable_supported_devices", device_type)


@contextlib.contextmanager
def _one_more(name: str, device_type: str) -> Iterator[None]:
    original = _find(name)
    last = name.rpartition(".")[2]

    def devices(*args: Any, **kwargs: Any) -> list[str]:
        return [*original(*args, **kwargs), device_type]

    # Each optimizer's module imports the function, so it is replaced in each of these modules.
    holders = [
        module
        for module_name, module in tuple(sys.modules.items())
        if module_name.startswith("torch.optim.") and getattr(module, last, None) is original
    ]
    for module in holders:
        setattr(module, last, devices)
    try:
        yield
    finally:
        for module in holders:
            setattr(module, last, original)


def is_compiled(value: Any) -> bool:
    """Whether `torch.compile` has compiled a function or a module, or `Module.compile` a module."""
    if getattr(value, "_compiled_call_impl", None) is not None:
        return True
    # A function that must not be compiled is wrapped too, but it is not compiled.
    return getattr(value, "_torchdynamo_orig_callable", None) is not None and not getattr(
        value, "_torchdynamo_disable", False
    )


# --- storages and their owners ------------------------------------------------------------------


def storage_id(storage: Any) -> int:
    """Return a number that no other living storage has."""
    return int(_of(storage, "torch.UntypedStorage._cdata"))


def sparse_parts(tensor: Any) -> tuple[Any, Any]:
    """Return the indices and the values of a sparse tensor, coalesced or not."""
    return _of(tensor, "torch.Tensor._indices")(), _of(tensor, "torch.Tensor._values")()


def num_owners(tensor: Any) -> tuple[int, int]:
    """Return how many owners a tensor and its storage have, as C++ counts them."""
    count_storage = _find("torch._C._storage_Use_Count")
    owners: int = _of(tensor, "torch.Tensor._use_count")()
    return owners, count_storage(storage_id(tensor.untyped_storage()))


# --- autograd -----------------------------------------------------------------------------------


def graph_task() -> int:
    """Return the number of the backward pass that this thread runs; -1 if it runs none."""
    return int(_find("torch._C._current_graph_task_id")())


def current_node() -> Any:
    """Return the node of the graph that this thread runs; `None` if it runs no backward pass."""
    return _find("torch._C._current_autograd_node")()


def sequence_number() -> int:
    """Return the number that the next node of this thread's graph will have."""
    return int(_find("torch._C._autograd._get_sequence_nr")())


def sequence_number_of(node: Any) -> int:
    """Return a node's number, which it got when forward made it."""
    return int(_of(node, "torch.autograd.graph.Node._sequence_nr")())


def run_backward(output: Any, gradient: Any) -> None:
    """Run a backward pass to the leaves.

    `Tensor.backward` and `torch.autograd.backward` are one operation each to a function mode, so
    what gradient checkpointing computes again inside would go past it.

    Args:
        output: The tensor that the pass begins at.
        gradient: The gradient of that tensor.
    """
    _find("torch.autograd.graph._engine_run_backward")(
        (output,), (gradient,), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


# --- what devices record ------------------------------------------------------------------------


def allocator_snapshot() -> dict[str, Any]:
    """Return the blocks and the recorded history of the caching allocators of all GPUs."""
    return dict(_find("torch.cuda.memory._snapshot")())


@contextlib.contextmanager
def recorded_history(*, max_entries: int) -> Iterator[None]:
    """Let the caching allocators record their events in the block, with Python's stacks.

    Args:
        max_entries: The largest number of events that are kept.
    """
    record = _find("torch.cuda.memory._record_memory_history")
    record("all", context="alloc", stacks="python", max_entries=max_entries)
    try:
        yield
    finally:
        record(None)


def memory_events(profiler: Any) -> Any:
    """Return the events that `torch.profiler.profile` recorded, as a tree.

    Its nodes have `tag.name`, `name`, `start_time_ns`, `extra_fields` and `children`.

    Args:
        profiler: A profiler that has ended, made with `profile_memory` and `with_stack`.
    """
    name = "torch.autograd.profiler.profile.kineto_results"
    try:
        return profiler.profiler.kineto_results.experimental_event_tree()
    except AttributeError:
        raise _missing(name, NEEDS[name]) from None

"""Copies a user's objects without the values of their tensors, for a step that only counts bytes.

Every tensor is replaced by a tensor of the same shape, type and layout on the meta device. This
holds for parameters, buffers, activations in attributes and dictionaries, and for variables that a
hook or a loss function uses from outside (its closure). Weights are neither copied nor changed.
Some objects cannot be copied. If such an object holds no state of the step (a lock), a new one is
made. If it does (a generator), it is replaced by an object that raises an error when it is used.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import threading
import types
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from memfit.errors import NotSimulatedError, WorkloadError

__all__ = ["without_values"]

_T = TypeVar("_T")
_META: Final = torch.device("meta")
_CONTAINERS: Final = (dict, list, set, deque)
_HOOKS: Final = "hooks"
_PACKAGES: Final = Path(torch.__file__).parent.parent


def without_values(parts: _T, *, optimizer: Any = None) -> _T:
    """Copy objects with their tensors replaced by ones without values.

    Args:
        parts: The objects to copy, in any nesting. Objects that they share stay shared.
        optimizer: The optimizer among them, if there is one.

    Returns:
        The copy, on the meta device.

    Raises:
        NotSimulatedError: A tensor has no counterpart on the meta device, or an object cannot be
            copied.
        WorkloadError: A module has parameters that are not initialised yet (a lazy module).
    """
    memo: dict[int, Any] = {}
    _refuse_lazy(parts)
    if isinstance(optimizer, Optimizer):
        for state in optimizer.state.values():
            for value in state.values():
                # Step counters stay on the CPU, as in training on a real device.
                if isinstance(value, torch.Tensor) and not value.ndim and not value.is_cuda:
                    memo[id(value)] = value.detach().clone()
    with _copyable():
        try:
            copied = copy.deepcopy(parts, memo)
            return _Rebinder(memo).rebound(copied)
        except (TypeError, RuntimeError) as error:
            raise NotSimulatedError.because(
                "This step", f"an object that it keeps cannot be copied ({error})"
            ) from error


def _refuse_lazy(parts: Any) -> None:
    for part in parts if isinstance(parts, tuple) else (parts,):
        for name, tensor in part.named_parameters() if isinstance(part, nn.Module) else ():
            if nn.parameter.is_lazy(tensor):
                raise WorkloadError(
                    f"{name!r} of {type(part).__name__} has no shape yet, because its "
                    "module is lazy. Run one batch through the model first."
                )


@contextlib.contextmanager
def _copyable() -> Iterator[None]:
    """Make `copy.deepcopy` leave values out, and copy objects that it otherwise refuses."""
    kept = [(kind, kind.__deepcopy__) for kind in (torch.Tensor, nn.Parameter)]
    reducers: dict[Any, Any] = {
        type(threading.Lock()): lambda _lock: (threading.Lock, ()),
        type(threading.RLock()): lambda _lock: (threading.RLock, ()),
        types.GeneratorType: lambda _rows: (_Unusable, ("generator",)),
        torch.Generator: lambda one: (_generator, (one.get_state().numpy().tobytes(),)),
    }
    before = {kind: copyreg.dispatch_table.get(kind) for kind in reducers}
    for kind, _ in kept:
        kind.__deepcopy__ = _empty  # type: ignore[method-assign]
    copyreg.dispatch_table.update(reducers)
    try:
        yield
    finally:
        for kind, original in kept:
            kind.__deepcopy__ = original  # type: ignore[method-assign]
        for reduced, reducer in before.items():
            if reducer is None:
                del copyreg.dispatch_table[reduced]
            else:
                copyreg.dispatch_table[reduced] = reducer


def _empty(tensor: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
    """Stand in for `Tensor.__deepcopy__`."""
    found = memo.get(id(tensor))
    if found is not None:
        known: torch.Tensor = found
        return known
    if _dispatches_itself(tensor):
        raise NotSimulatedError.because(
            "This step",
            (f"{type(tensor).__name__} has its own operations, and their memory is not known"),
        )
    plain = tensor.detach().as_subclass(torch.Tensor)
    if tensor.layout is torch.strided:
        empty = torch.empty_like(plain, device=_META)
    else:
        empty = plain.to(_META)
    is_trained = tensor.requires_grad and tensor.is_leaf
    if isinstance(tensor, nn.Parameter):
        empty = nn.Parameter(empty, requires_grad=is_trained)
    else:
        empty.requires_grad_(is_trained)
    memo[id(tensor)] = empty
    return empty


def _dispatches_itself(tensor: torch.Tensor) -> bool:
    own = type(tensor).__torch_dispatch__
    return own is not torch.Tensor.__torch_dispatch__


def _generator(state: bytes) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


class _Unusable:
    """Replaces an object that can be neither copied nor put back.

    Args:
        kind: The kind of object that it replaces.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __iter__(self) -> _Unusable:
        return self

    def __next__(self) -> Any:
        raise NotSimulatedError.because(
            "This step",
            (
                f"it takes values from a {self._kind} that the model keeps, and memfit "
                "can neither copy it nor put it back"
            ),
        )


class _Rebinder:
    """Makes functions use the copies in their closures, because `copy.deepcopy` shares functions.

    Args:
        memo: The copies, by the id of the original.
    """

    def __init__(self, memo: dict[int, Any]) -> None:
        self._memo = memo
        self._functions: dict[int, types.FunctionType] = {}

    def rebound(self, parts: _T) -> _T:
        """Return the parts with their functions rebound. Modules are changed in place."""
        if isinstance(parts, tuple):
            return type(parts)(map(self._part, parts))
        found: _T = self._part(parts)
        return found

    def _part(self, part: Any) -> Any:
        if isinstance(part, nn.Module):
            for module in part.modules():
                self._module(module)
        elif isinstance(part, Optimizer):
            self._hooks(vars(part))
        elif isinstance(part, types.FunctionType):
            return self._function(part)
        elif isinstance(part, functools.partial):
            return functools.partial(self._part(part.func), *part.args, **part.keywords)
        return part

    def _module(self, module: nn.Module) -> None:
        attributes = vars(module)
        for name, value in tuple(attributes.items()):
            if isinstance(value, types.FunctionType):
                attributes[name] = self._function(value)
        self._hooks(attributes)

    def _hooks(self, attributes: dict[str, Any]) -> None:
        for name, hooks in attributes.items():
            if name.endswith(_HOOKS) and isinstance(hooks, dict):
                for key, hook in tuple(hooks.items()):
                    hooks[key] = self._part(hook)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """Return the function with copies of its closure and of the globals that it names."""
        known = self._functions.get(id(function))
        if known is not None:
            return known
        cells = function.__closure__ or ()
        names = _globals_of(function)
        if not any(map(self._is_copied, (*map(_content, cells), *names.values()))):
            return function
        new_cells = tuple(types.CellType() for _ in cells)
        rebound = types.FunctionType(
            function.__code__,
            dict(function.__globals__),
            function.__name__,
            function.__defaults__,
            new_cells,
        )
        rebound.__kwdefaults__ = function.__kwdefaults__
        # This must come before its closure is copied, because the closure may hold the function.
        self._functions[id(function)] = rebound
        for cell, new_cell in zip(cells, new_cells, strict=True):
            with contextlib.suppress(ValueError):
                new_cell.cell_contents = self._copy(cell.cell_contents)
        rebound.__globals__.update({name: self._copy(value) for name, value in names.items()})
        return rebound

    def _is_copied(self, value: Any) -> bool:
        return id(value) in self._memo or isinstance(
            value, (torch.Tensor, nn.Module, types.FunctionType, *_CONTAINERS)
        )

    def _copy(self, value: Any) -> Any:
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if not self._is_copied(value):
            return value
        # Globals may hold any object. An object that cannot be copied stays shared.
        with contextlib.suppress(Exception):
            return self._part(copy.deepcopy(value, self._memo))
        return value


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _globals_of(function: types.FunctionType) -> dict[str, Any]:
    """Return the globals that a user's function names. A library's globals stay shared."""
    code, known = function.__code__, function.__globals__
    if Path(code.co_filename).is_relative_to(_PACKAGES):
        return {}
    names = (name for name in _names_in(code) if name in known and not name.startswith("__"))
    return {
        name: known[name]
        for name in names
        # A function of another module keeps its own globals.
        if getattr(known[name], "__globals__", known) is known
    }


def _names_in(code: types.CodeType) -> Iterator[str]:
    """Yield the names that a function and those inside it look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_in(constant)

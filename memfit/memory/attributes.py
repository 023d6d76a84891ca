"""Saves what modules keep besides parameters and buffers, and puts it back.

A model keeps counters, lists of losses, queues, dictionaries, tensors that it did not register,
generators, and objects of its own. Each object stays the same object and gets its old content back.
An attribute that was added is removed. An object of another library (a logger, a data loader, a
trainer) is not changed inside: the attribute gets the same object back, with whatever it now holds.
"""

from __future__ import annotations

import random
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from memfit.memory.collector import collector_paused
from memfit.memory.saved_tensor import SavedTensor, can_be_saved

__all__ = ["save_contents", "save_held"]

_UNCHANGING: Final = frozenset(
    (
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        type,
        torch.dtype,
        torch.device,
        torch.Size,
        types.FunctionType,
        types.BuiltinFunctionType,
    )
)
_STANDARD_PACKAGES: Final = sys.stdlib_module_names - {"__main__"}
# Every module has these. torch fills them, and their content must not be walked through.
_REGISTRIES: Final = frozenset(("_parameters", "_buffers", "_modules"))
_OF_EVERY_MODULE: Final = frozenset(vars(nn.Module()))


def save_contents(
    modules: Iterable[nn.Module], *, apart: Iterable[torch.Tensor] = ()
) -> Callable[[], None]:
    """Save the content of modules and of everything that they keep.

    Args:
        modules: The modules. The modules inside them are saved too.
        apart: Tensors that the caller saves and puts back itself.

    Returns:
        A function that puts everything back.
    """
    notes = _Notes(apart)
    for module in modules:
        notes.take(module)
    return notes.put_back


def save_held(
    modules: Iterable[nn.Module],
    others: Iterable[object] = (),
    *,
    apart: Iterable[torch.Tensor] = (),
) -> Callable[[], None]:
    """Save what modules and other objects keep, quickly enough to be called at every step.

    This is `save_contents` with one difference. Of the attributes that torch gives every module,
    only the lists of parameters, buffers and children are saved. Hooks are not.

    Args:
        modules: The modules. The modules inside them are saved too.
        others: Other objects. Only optimizers, tensors and arrays are saved, and lists, queues and
            dictionaries of them. The counters of a function are not, because a loss may count its
            calls.
        apart: Tensors that the caller saves and puts back itself.

    Returns:
        A function that puts everything back.
    """
    notes = _Notes(apart)
    with collector_paused():
        for module in modules:
            for child in module.modules():
                notes.take_attributes(child)
        for other in others:
            notes.take_tensors(other)
    return notes.put_back


class _Notes:
    """What was saved, and a function for each item that puts it back."""

    def __init__(self, apart: Iterable[torch.Tensor]) -> None:
        # The objects are kept alive, so that no new object can get the id of a deleted one.
        self._seen: dict[int, object] = {id(tensor): tensor for tensor in apart}
        self._restores: list[Callable[[], object]] = []

    def put_back(self) -> None:
        for restore in reversed(self._restores):
            restore()

    def take_attributes(self, module: nn.Module) -> None:
        """Save one module without its children, and everything that its attributes hold."""
        if id(module) in self._seen:
            return
        self._seen[id(module)] = module
        attributes = vars(module)
        self._restores.append(_refilling(attributes))
        package = _package_of(module)
        for name, value in attributes.items():
            if name in _REGISTRIES:
                self._restores.append(_refilling(value))
            elif name not in _OF_EVERY_MODULE and type(value) not in _UNCHANGING:
                self.take(value, package)

    def take_tensors(self, value: object) -> None:
        """Save an optimizer, a tensor, a container of tensors, or an object's own tensors."""
        if isinstance(value, Optimizer) or _is_array(value):
            self.take(value)
            return
        if isinstance(value, (dict, list, deque)):
            self._restores.append(_refilling_tensors(value))
            for inner in filter(_is_array, _entries(value)):
                self.take(inner)
            return
        attributes = getattr(value, "__dict__", {})
        for inner in attributes.values():
            if isinstance(inner, (dict, list, deque)):
                self.take_tensors(inner)
        held = {name: inner for name, inner in attributes.items() if _is_array(inner)}
        if held:
            self._restores.append(lambda: attributes.update(held))
            for inner in held.values():
                self.take(inner)

    def take(self, value: object, package: str | None = None) -> None:
        """Save a value and everything that can be reached from it."""
        left: list[tuple[object, str | None]] = [(value, package or _package_of(value))]
        while left:
            value, package = left.pop()
            if type(value) in _UNCHANGING or id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            if isinstance(value, nn.Module):
                package = _package_of(value)
            left += ((inner, package) for inner in self._contents(value, package))

    def _contents(self, value: Any, package: str | None) -> Iterable[object]:
        """Save one object, and return the objects that it holds."""
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, (dict, list, deque, set, bytearray)):
            return self._container(value)
        if isinstance(value, (tuple, frozenset)):
            return value
        if isinstance(value, type) or self._generator(value) or self._array(value):
            return ()
        if isinstance(value, (Optimizer, LRScheduler, GradScaler)):
            return self._object(value)
        own = _package_of(value)
        if _is_data(value) or (own is not None and own == package):
            return self._object(value)
        return ()

    def _tensor(self, tensor: torch.Tensor) -> Iterable[object]:
        if not can_be_saved(tensor):
            return ()
        gradient = tensor.grad if tensor.is_leaf else None
        if tensor.is_leaf:
            self._restores.append(lambda: setattr(tensor, "grad", gradient))
        self._restores.append(SavedTensor.of(tensor).restore)
        return () if gradient is None else (gradient,)

    def _module(self, module: nn.Module) -> Iterator[object]:
        attributes = vars(module)
        self._restores.append(_refilling(attributes))
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
        yield from module.children()
        for name, value in tuple(attributes.items()):
            if name not in _OF_EVERY_MODULE:
                yield value
            elif isinstance(value, (dict, set)):
                self._restores.append(_refilling(value))

    def _container(
        self, value: dict[Any, Any] | list[Any] | deque[Any] | set[Any] | bytearray
    ) -> Iterable[object]:
        self._restores.append(_refilling(value))
        inside = value.values() if isinstance(value, dict) else value
        # Long lists of names and numbers are common, and walking through them takes time.
        return () if _UNCHANGING.issuperset(map(type, inside)) else tuple(inside)

    def _generator(self, value: Any) -> bool:
        """Save the state of a random generator that the model owns."""
        if isinstance(value, torch.Generator):
            state = value.get_state()
            self._restores.append(lambda: value.set_state(state))
        elif isinstance(value, random.Random):
            python_state = value.getstate()
            self._restores.append(lambda: value.setstate(python_state))
        elif (numpy := sys.modules.get("numpy")) is None:
            return False
        elif isinstance(value, numpy.random.Generator):
            numpy_state = value.bit_generator.state
            self._restores.append(lambda: setattr(value.bit_generator, "state", numpy_state))
        elif isinstance(value, numpy.random.RandomState):
            old_state = value.get_state()
            self._restores.append(lambda: value.set_state(old_state))
        else:
            return False
        return True

    def _array(self, value: Any) -> bool:
        numpy = sys.modules.get("numpy")
        if numpy is None or not isinstance(value, numpy.ndarray):
            return False
        if value.flags.writeable:
            kept = value.copy()
            self._restores.append(lambda: value.__setitem__(..., kept))
        return True

    def _object(self, value: Any) -> Iterable[object]:
        """Save the attributes of an object, from its dictionary and from its slots."""
        held: list[object] = []
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._restores.append(_refilling(attributes))
            held += attributes.values()
        for slot in _slots_of(type(value)):
            try:
                kept = slot.__get__(value)
            except AttributeError:
                continue
            self._restores.append(_setting(slot, value, kept))
            held.append(kept)
        return held


def _is_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return isinstance(value, torch.Tensor) or (
        numpy is not None and isinstance(value, numpy.ndarray)
    )


def _setting(slot: types.MemberDescriptorType, owner: object, kept: object) -> Callable[[], object]:
    return lambda: slot.__set__(owner, kept)


def _slots_of(kind: type) -> Iterator[types.MemberDescriptorType]:
    for base in kind.__mro__:
        # Types that are written in C have members too, but they do not define `__slots__`.
        if "__slots__" in vars(base):
            members = vars(base).values()
            yield from (one for one in members if isinstance(one, types.MemberDescriptorType))


def _refilling(
    container: dict[Any, Any] | list[Any] | deque[Any] | set[Any] | bytearray,
) -> Callable[[], object]:
    """Return a function that gives a container its items back, in their order."""
    if isinstance(container, dict):
        base: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        items = dict(container)

        def refill() -> None:
            if not (len(container) == len(items) and _are_same(container, items)):
                base.clear(container)
                base.update(container, items)

        return refill
    if isinstance(container, (list, bytearray)):
        kept = container[:]
        return lambda: container.__setitem__(slice(None), kept)
    members = tuple(container)

    def fill_again() -> None:
        container.clear()
        (container.update if isinstance(container, set) else container.extend)(members)

    return fill_again


def _refilling_tensors(
    container: dict[Any, Any] | list[Any] | deque[Any],
) -> Callable[[], None]:
    """Return a function that gives a container its items back, if some are or were tensors."""
    refill = _refilling(container)
    had_tensors = any(map(_is_array, _entries(container)))

    def refill_tensors() -> None:
        # A memory bank may be empty when the first step begins.
        if had_tensors or any(map(_is_array, _entries(container))):
            refill()

    return refill_tensors


def _entries(container: dict[Any, Any] | list[Any] | deque[Any]) -> Iterable[Any]:
    return container.values() if isinstance(container, dict) else container


def _are_same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return all(
        key is other_key and value is other_value
        for (key, value), (other_key, other_value) in zip(one.items(), other.items(), strict=True)
    )


def _is_data(value: object) -> bool:
    """Whether an object only holds values: a dataclass, or a simple namespace."""
    kind = type(value)
    return hasattr(kind, "__dataclass_fields__") or isinstance(value, types.SimpleNamespace)


def _package_of(value: object) -> str | None:
    """Return the package of an object's class; `None` for a class of torch or Python.

    Objects of torch and Python keep locks, threads and handles, which cannot be put back.
    """
    package = type(value).__module__.partition(".")[0]
    return None if package == "torch" or package in _STANDARD_PACKAGES else package

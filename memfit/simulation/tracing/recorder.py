"""Records what a step on meta tensors allocates and frees, operation by operation.

A storage that was not seen before is an allocation. The end of its life is a free.
`memfit.simulation.tracing.trace` decides which iterations are recorded, and uses the records.

Source: weak references to storages keep their identity under `TorchDispatchMode`.
"""

from __future__ import annotations

import contextlib
import gc
import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import torch

from memfit._torch_private import (
    aten,
    aten_if_there,
    dispatched,
    graph_task,
    num_owners,
    plainly,
    storage_id,
)
from memfit.errors import NotSimulatedError
from memfit.records import Action, Event
from memfit.simulation.needs import Need, NeedEvent
from memfit.simulation.tracing.by_operation import name_of
from memfit.simulation.tracing.flops import flops_formula, flops_of_call
from memfit.simulation.tracing.known_values import NOTHING, KnownValues
from memfit.simulation.tracing.scripts import Drop, Keep, Make, Script, Workspace
from memfit.simulation.tracing.semantics import META
from memfit.simulation.tracing.workspace import Kernels

__all__ = ["PLANS_TRIED", "Recorder", "Watcher"]

PLANS_TRIED: Final = "cudnn.benchmark"
_ADD: Final = "add.Tensor"
_DIMS_OF_IMAGES: Final = (4, 5)
_FIRST_KEPT_ID: Final = -1_000_001  # no tensor has one below 0
_WRITTEN_IN_BACKWARD: Final = (
    "index_put.default",
    "index_add.default",
    "scatter_add.default",
    "scatter.src",
)


class Watcher(Protocol):
    """Is told about every allocation of a traced step, so that it can find what it is for."""

    def watch(
        self, prepared: Any, mark: Callable[[str], None]
    ) -> contextlib.AbstractContextManager[None]:
        """Begin to watch a step. `mark` writes the name of a phase between the events."""

    def allocated(self, block_id: int, tensor: torch.Tensor, args: tuple[Any, ...]) -> None:
        """Take note of a new storage, and of the arguments of the operation that made it."""

    def took_workspace(self, block_id: int) -> None:
        """Take note of a kernel's workspace, which is freed when the operation ends."""

    def freed(self, block_id: int) -> None:
        """Take note that a storage was freed."""


class Recorder:
    """Records allocations and frees of meta storages.

    Args:
        kernels: Knows the memory that kernels take besides their outputs.
        watcher: Is told about every allocation.
    """

    def __init__(self, kernels: Kernels, watcher: Watcher | None) -> None:
        self._kernels = kernels
        self._watcher = watcher
        self._events: list[Event] = []
        self._ids: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._next_id = 0
        self._tried_plans: set[Any] = set()
        self._kept: dict[tuple[str, bool], tuple[int, NeedEvent]] = {}
        self.num_operations = 0
        self.forward_flops = 0
        self.has_tf32 = False
        self._sole_owner = _sole_owner()
        self._add = aten(_ADD)
        # Asked once: every operation enters one.
        self._plainly = type(plainly())
        written = (aten_if_there(name) for name in _WRITTEN_IN_BACKWARD)
        self._written_in_backward = frozenset(id(func) for func in written if func is not None)
        self._known = KnownValues()
        self._is_closed = False
        self._residents: list[Event] = []
        # Until its end: what residents it uses is seen, and its operations are counted.
        self._is_first_iteration = True

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and record what it allocates."""
        # What is read of tensors here is no question of the model's. Without this, every attribute
        # would be looked up through the function modes that correct what a model does.
        with self._plainly():
            return self._handle(func, args, kwargs)

    def _handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.num_operations += 1
        if self._is_first_iteration:
            self._see_arguments(args)
        if func is self._add and self._accumulates_in_place(*args):
            return args[0]
        result = self._known.answer(func, args, kwargs)
        if result is NOTHING and id(func) in self._written_in_backward and _is_backward():
            # Under a dispatch mode, autograd writes these gradients to a new tensor. Without one it
            # writes to the zeros that it has just made (`index_backward` and others in
            # torch/csrc/autograd/FunctionsManual.cpp: areAnyTensorSubclassLike).
            result = args[0]
        if result is NOTHING:
            result = self._kernels.run(func, args, kwargs)
            self._known.note(func, args, kwargs, result)
        is_counted = self._is_first_iteration and flops_formula(func) is not None
        if is_counted and graph_task() == -1:
            self.forward_flops += flops_of_call(func, args, kwargs, result)
        self._play(self._kernels.script(func, args, result), func, args, result)
        return result

    def _play(self, script: Script, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Write down what a kernel takes and gives back, and its outputs."""
        outputs = result if isinstance(result, (tuple, list)) else (result,)
        taken: dict[str, int] = {}
        for line in script:
            if isinstance(line, Make):
                made = [outputs[index] for index in line.indices] if line.indices else outputs
                self._see_made(made, name_of(func), args)
            elif isinstance(line, Drop):
                for name in line.names:
                    self._give_back(taken.pop(name, None))
            elif isinstance(line, Keep):
                self._keep(line)
            else:
                number = self._take(line)
                if number is not None:
                    taken[line.name] = number
        for number in reversed(taken.values()):
            self._give_back(number)

    @property
    def kept(self) -> tuple[tuple[int, NeedEvent], ...]:
        """What libraries keep from their first call on, each with the allocation before it."""
        return tuple(self._kept.values())

    def _keep(self, line: Keep) -> None:
        # Backward runs in a thread of its own, and libraries have a handle for each thread.
        key = line.name, graph_task() != -1
        if key in self._kept:
            return
        number = _FIRST_KEPT_ID - len(self._kept)
        event = NeedEvent(
            action=Action.ALLOC, id=number, num_bytes=0, origin=line.name, need=line.need
        )
        self._kept[key] = self._next_id, event

    def _see_made(self, made: Iterable[Any], origin: str, args: tuple[Any, ...]) -> None:
        for output in made:
            if isinstance(output, torch.Tensor):
                self._see(output, origin, args)
            elif isinstance(output, list):
                self._see_made(output, origin, args)

    def _accumulates_in_place(self, gradient: Any, more: Any) -> bool:
        """Whether the autograd engine would sum these two gradients in place.

        Under a dispatch mode, the engine does not sum in place. So its condition is checked here:
        the engine is the only owner of the gradient and of the gradient's storage.

        Source: `can_accumulate_inplace` in torch/csrc/autograd/input_buffer.cpp.
        """
        if not _is_backward():
            return False
        return (
            isinstance(more, torch.Tensor)
            and (gradient.shape, gradient.dtype) == (more.shape, more.dtype)
            and all(map(operator.le, num_owners(gradient), self._sole_owner))
        )

    @property
    def num_answers(self) -> int:
        """How often the step asked for a value and got an answer."""
        return self._known.num_answers

    def see(self, tensor: torch.Tensor) -> None:
        """Record a tensor that exists before the first iteration."""
        if tensor.layout is torch.strided:
            self._see(tensor, "model")

    def see_moved(self, tensors: Iterable[torch.Tensor], *, moves_twice: bool) -> None:
        """Record the tensors of a model that was moved to the device.

        Args:
            tensors: The tensors, in the order in which they were moved. One that comes again is
                recorded once.
            moves_twice: Weights of convolutions were moved again, to the layout of channels-last
                images. Each had two copies for a moment. So had those of a recurrent layer.
        """
        copies: dict[int, tuple[torch.Tensor, int]] = {}
        # Tensors that are moved alone, and then joined in one storage: by the storage, the tensor.
        parts: dict[int, dict[int, tuple[torch.Tensor, int]]] = {}
        for tensor in filter(_is_on_meta, tensors):
            storage = tensor.untyped_storage()
            key, num_bytes = storage_id(storage), storage.nbytes()
            if key in self._ids or key in copies:
                continue
            is_part = 0 < tensor.nbytes < num_bytes
            if is_part and not self._completes(tensor, parts.setdefault(key, {})):
                continue
            if moves_twice and (is_part or tensor.ndim in _DIMS_OF_IMAGES):
                copies[key] = tensor, self._take_for(tensor, num_bytes)
            else:
                self.see(tensor)
            for _, number in parts.pop(key, {}).values():
                self._drop(number)
        # A model may also hold a part of a tensor and not the rest.
        unjoined = (part for moved in parts.values() for part in moved.values())
        for tensor, number in (*unjoined, *copies.values()):
            self.see(tensor)
            self._drop(number)

    def _completes(self, part: torch.Tensor, others: dict[int, tuple[torch.Tensor, int]]) -> bool:
        """Record a part of a storage that is moved alone, and say whether it is the last one."""
        if id(part) not in others:
            others[id(part)] = part, self._take_for(part, part.nbytes)
        return (
            sum(tensor.nbytes for tensor, _ in others.values()) >= part.untyped_storage().nbytes()
        )

    def _take_for(self, tensor: torch.Tensor, num_bytes: int) -> int:
        number = self._take_id()
        self._write(Action.ALLOC, number, num_bytes, "model, before its last move")
        if self._watcher is not None:
            self._watcher.allocated(number, tensor, ())
        return number

    def _drop(self, number: int) -> None:
        self._give_back(number)
        if self._watcher is not None:
            self._watcher.freed(number)

    def numbers_of(self, tensors: Iterable[torch.Tensor]) -> frozenset[int]:
        """Return the ids of the events that allocated some tensors."""
        keys = (storage_id(tensor.untyped_storage()) for tensor in tensors)
        return frozenset(self._ids[key] for key in keys if key in self._ids)

    def take_residents(self) -> list[Event]:
        """Return the tensors that the first iteration used and did not make.

        Call it once, after the first iteration. For example, a loss function may use tensors that
        belong to no module.
        """
        self._is_first_iteration = False
        found, self._residents = self._residents, []
        return found

    def _see_arguments(self, args: Any) -> None:
        for value in args:
            if isinstance(value, torch.Tensor):
                if value.is_meta and value.layout is torch.strided:
                    before = len(self._events)
                    self._see(value, "model")
                    self._residents += self._events[before:]
                    del self._events[before:]
            elif isinstance(value, (tuple, list)):
                self._see_arguments(value)

    def cut(self) -> list[Event]:
        """Free unreachable reference cycles, and return the events since the last cut."""
        gc.collect()
        return self.take()

    def take(self) -> list[Event]:
        """Return the events since they were last taken."""
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Stop recording. Later frees belong to the end of the trace, not to the step."""
        self._is_closed = True

    def forget_plans(self) -> None:
        """Let convolutions try their plans again, so that each iteration has the same events."""
        self._tried_plans.clear()

    def mark(self, name: str) -> None:
        """Write the name of a phase that begins."""
        self._write(Action.USER_DEFINED, 0, 0, name)

    def _see(self, tensor: torch.Tensor, origin: str, args: tuple[Any, ...] = ()) -> None:
        if tensor.layout is not torch.strided:
            raise NotSimulatedError.because(
                "This step", f"{origin} makes a sparse tensor, whose bytes depend on values"
            )
        storage = tensor.untyped_storage()
        key = storage_id(storage)
        if key in self._ids or storage.device.type != "meta":
            return
        num_bytes = storage.nbytes()
        if num_bytes == 0:
            return
        number = self._take_id()
        self._ids[key] = number
        watcher = self._watcher

        def ended(_: object) -> None:
            if self._is_closed:
                return
            del self._ids[key], self._references[number]
            self._write(Action.FREE_COMPLETED, number, 0, "")
            if watcher is not None:
                watcher.freed(number)

        self._references[number] = weakref.ref(storage, ended)
        self._write(Action.ALLOC, number, num_bytes, origin)
        if watcher is not None:
            watcher.allocated(number, tensor, args)

    def _take(self, workspace: Workspace) -> int | None:
        self.has_tf32 |= workspace.is_tf32
        if workspace.plan is not None and workspace.plan not in self._tried_plans:
            self._tried_plans.add(workspace.plan)
            self._try_plans(workspace.tried)
        if not workspace.num_bytes and workspace.need is None:
            return None
        number = self._take_id()
        if workspace.need is None:
            self._write(Action.ALLOC, number, workspace.num_bytes, workspace.name)
        else:
            # For a plan's workspace, torch asks the allocator as for any tensor, and takes the next
            # plan if it runs out of memory (Conv_v8.cpp).
            action = Action.ALLOC if workspace.is_needed else Action.ALLOC_IF_ROOM
            self._write_need(action, number, workspace.need, workspace.name)
        if self._watcher is not None:
            self._watcher.took_workspace(number)
        return number

    def _try_plans(self, need: Need | None) -> None:
        """Record that plans are tried with one workspace for all, and that the cache is emptied.

        Source: `run_single_conv` in aten/src/ATen/native/cudnn/Conv_v8.cpp.
        """
        if need is not None:
            number = self._take_id()
            self._write_need(Action.TRY_ALLOC, number, need, PLANS_TRIED)
            self._write(Action.FREE_COMPLETED, number, 0, PLANS_TRIED)
        self._write(Action.EMPTY_CACHE, 0, 0, PLANS_TRIED)

    def _give_back(self, number: int | None) -> None:
        if number is not None:
            self._write(Action.FREE_COMPLETED, number, 0, "")

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _write_need(self, action: Action, number: int, need: Need, origin: str) -> None:
        self._events.append(
            NeedEvent(action=action, id=number, num_bytes=0, origin=origin, need=need)
        )

    def _write(self, action: Action, number: int, num_bytes: int, origin: str) -> None:
        self._events.append(Event(action=action, id=number, num_bytes=num_bytes, origin=origin))


def _is_on_meta(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.is_meta


def _is_backward() -> bool:
    """Whether the autograd engine runs, and not a segment that is computed again."""
    return graph_task() != -1 and not torch.is_grad_enabled()


def _sole_owner() -> tuple[int, int]:
    """Return the owner counts of a gradient that only the engine holds, Python's included."""
    seen = []
    add = aten(_ADD)

    def watch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is add and graph_task() != -1:
            seen.append(num_owners(args[0]))
        return func(*args, **kwargs)

    with dispatched(watch):
        leaf = torch.empty(2, device=META, requires_grad=True).exp()
        (leaf.sin() * leaf.cos()).sum().backward()
    return seen[0]

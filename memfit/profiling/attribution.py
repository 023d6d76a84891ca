"""What every allocation of a traced step is for: its role, module, operation and source line.

Parameters, gradients and the optimizer's state are recognised by their storage. A tensor of forward
that still lives when backward begins was saved for backward. A tensor that is freed in the phase
that made it is temporary. Watching does not change the trace.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memfit._torch_private import (
    current_node,
    sequence_number,
    sequence_number_of,
    storage_id,
)
from memfit.profiling.modules import (
    AVERAGE,
    BATCH,
    LOSS,
    OPTIMIZER,
    ModuleStack,
    SourceLines,
    buffers_of,
    parameters_of,
)
from memfit.profiling.phases import BACKWARD, FORWARD, Phases, states_of
from memfit.profiling.replay import Purpose
from memfit.records import Role
from memfit.step.runner import PreparedStep

__all__ = ["Attribution"]


@dataclasses.dataclass(slots=True)
class _Note:
    """What is known about an allocation so far."""

    module: str
    source_line: str | None
    phase: int
    role: Role | None = None
    is_forward: bool = False
    outlives_phase: bool = True
    is_freed: bool = False


class Attribution:
    """Finds the purpose of every allocation while a step is traced (`trace.Watcher`)."""

    def __init__(self) -> None:
        self._notes: dict[int, _Note] = {}
        self._numbers: dict[int, int] = {}
        self._parameters: dict[int, str] = {}
        self._lines = SourceLines()
        self._lines_of_nodes: dict[int, str | None] = {}
        self._modules_of_storages: dict[int, str] = {}
        self._prepared: PreparedStep | None = None
        self._stack: ModuleStack | None = None
        self._phases: Phases | None = None

    def purpose(self, block_id: int) -> Purpose:
        """Return what an allocation was for, once the trace has ended."""
        note = self._notes[block_id]
        role = note.role
        if role is None and note.is_forward and note.outlives_phase:
            # If no step frees it, it belongs to the model, such as a table made at its first use.
            role = Role.ACTIVATIONS if note.is_freed else Role.BUFFERS
        return Purpose(
            role=role or Role.TEMPORARIES, module=note.module, source_line=note.source_line
        )

    @contextlib.contextmanager
    def watch(self, prepared: PreparedStep, mark: Callable[[str], None]) -> Iterator[None]:
        """Begin to watch a step.

        Args:
            prepared: The step. Its batches and its precision policy are wrapped.
            mark: A function that writes the name of a phase between the events.
        """
        # A step may be traced a second time, at other batch sizes.
        self._notes.clear()
        self._numbers.clear()
        self._lines_of_nodes.clear()
        self._stack = ModuleStack(prepared.model)
        self._phases = Phases(
            begun=mark, gradients_ready=self._see_gradients, stepped=self._see_state
        )
        self._prepared = prepared
        self._parameters = {id(one): owner for owner, one in parameters_of(prepared)}
        held = (*parameters_of(prepared), *buffers_of(prepared))
        self._modules_of_storages = {
            storage_id(tensor.untyped_storage()): owner for owner, tensor in reversed(held)
        }
        with self._stack.watched(), self._phases.watched(prepared):
            yield

    def allocated(self, block_id: int, tensor: torch.Tensor, args: tuple[Any, ...]) -> None:
        """Take note of a new storage."""
        assert self._phases is not None
        key = storage_id(tensor.untyped_storage())
        self._numbers[key] = block_id
        phase = self._phases.current
        if phase is None:
            self._notes[block_id] = self._resident(tensor, key)
            return
        # Recomputing a checkpointed segment runs forward inside backward, with gradients enabled.
        is_forward = phase.name == FORWARD or (phase.name == BACKWARD and torch.is_grad_enabled())
        role = None
        if phase.is_making_batch:
            role = Role.INPUTS
        elif is_forward and self._is_cast_parameter(tensor, args):
            role = Role.AUTOCAST_COPIES
        module, line = self._place_of(phase.name)
        self._notes[block_id] = _Note(
            module=BATCH if phase.is_making_batch else module,
            source_line=line,
            phase=phase.index,
            role=role,
            is_forward=is_forward,
        )

    def took_workspace(self, block_id: int) -> None:
        """Take note of a kernel's workspace."""
        assert self._phases is not None
        phase = self._phases.current
        module, line = self._place_of("" if phase is None else phase.name)
        self._notes[block_id] = _Note(
            module=module, source_line=line, phase=0, role=Role.WORKSPACES
        )

    def freed(self, block_id: int) -> None:
        """Take note that a storage was freed."""
        assert self._phases is not None
        note, phase = self._notes[block_id], self._phases.current
        note.is_freed = True
        if phase is None or note.phase != phase.index:
            return
        # A recomputed activation is freed in the phase that made it, but after the recomputation.
        is_kept = phase.name == BACKWARD and note.is_forward and not torch.is_grad_enabled()
        note.outlives_phase = is_kept

    def _place_of(self, phase: str) -> tuple[str, str | None]:
        stack = self._stack
        assert stack is not None
        line = self._lines.current()
        if phase == "optimizer":
            return OPTIMIZER, line
        node: Any = current_node()
        if node is None or stack.current is not None:
            if torch.is_grad_enabled():
                self._lines_of_nodes[sequence_number() - 1] = line
            return stack.current or LOSS, line
        variable = getattr(node, "variable", None)
        if variable is not None:
            return self._parameters.get(id(variable), LOSS), None
        number = sequence_number_of(node)
        return stack.of_sequence(number) or LOSS, self._lines_of_nodes.get(number)

    def _resident(self, tensor: torch.Tensor, key: int) -> _Note:
        """Return the note of a tensor that exists before the first iteration.

        It belongs to the model, or to the state of an optimizer that the user gave.
        """
        is_parameter = isinstance(tensor, nn.Parameter)
        return _Note(
            module=self._modules_of_storages.get(key, OPTIMIZER),
            source_line=None,
            phase=0,
            role=Role.PARAMETERS
            if is_parameter
            else Role.BUFFERS
            if key in self._modules_of_storages
            else Role.OPTIMIZER_STATE,
        )

    def _is_cast_parameter(self, tensor: torch.Tensor, args: tuple[Any, ...]) -> bool:
        source = args[0] if args else None
        return (
            isinstance(source, torch.Tensor)
            and id(source) in self._parameters
            and source.dtype is not tensor.dtype
        )

    def _see_gradients(self) -> None:
        assert self._prepared is not None
        for average in self._prepared.averages:
            number = self._numbers.get(storage_id(average.untyped_storage()))
            if number is not None:
                note = self._notes[number]
                note.role, note.module = Role.BUFFERS, AVERAGE
        for owner, parameter in parameters_of(self._prepared):
            if parameter.grad is not None:
                self._settle(parameter.grad, Role.GRADIENTS, owner)

    def _see_state(self, optimizer: Optimizer) -> None:
        for parameter, value in states_of(optimizer):
            module = self._parameters.get(id(parameter), OPTIMIZER)
            self._settle(value, Role.OPTIMIZER_STATE, module)

    def _settle(self, tensor: torch.Tensor, role: Role, module: str) -> None:
        number = self._numbers.get(storage_id(tensor.untyped_storage()))
        if number is not None and tensor.device.type == "meta":
            note = self._notes[number]
            if note.role is None:
                note.role, note.module = role, module

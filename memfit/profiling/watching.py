"""Takes notes while a real step runs, so that its allocations can be told apart afterwards.

Hooks note the times at which each module begins and ends. In backward, they are hooks of the
graph's nodes. The addresses of parameters, gradients, optimizer state and batches are noted too. No
tensor is kept alive, so the step allocates and frees the same as without the notes.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from memfit._torch_private import pytree, sparse_parts
from memfit.profiling.modules import (
    AVERAGE,
    BATCH,
    COMPILED,
    LOSS,
    OPTIMIZER,
    ModuleStack,
    buffers_of,
    parameters_of,
)
from memfit.profiling.phases import BACKWARD, FORWARD, Phases, states_of
from memfit.profiling.recorded import KnownBlock, ModuleActive, Notes, PhaseStart
from memfit.records import Role
from memfit.step.runner import PreparedStep

__all__ = ["StepNotes"]


class StepNotes:
    """The notes of a prepared step.

    Args:
        prepared: The step.
        copy_bytes: Bytes of an element in the type that autocast casts parameters to; `None`
            without autocast.
        rounds_to: The allocator rounds requests up to a multiple of this many bytes.
    """

    def __init__(
        self, prepared: PreparedStep, *, copy_bytes: int | None = None, rounds_to: int = 1
    ) -> None:
        self._prepared = prepared
        self._model = prepared.model
        self._copy_bytes = copy_bytes
        self._rounds_to = rounds_to
        self._is_compiled = prepared.has_compiled_code
        self._stack = ModuleStack(self._model, entered=self._enter)
        self._phases: list[PhaseStart] = []
        self._work: list[ModuleActive] = []
        self._settled: list[KnownBlock] = []
        self._optimizer: Optimizer | None = None
        self.started_ns = 0
        self._owners = {id(one): owner for owner, one in parameters_of(prepared)}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Take notes."""
        phases = Phases(
            begun=self._begin,
            batch_made=self._see_batch,
            loss_made=self._see_graph,
            gradients_ready=self._see_gradients,
            stepped=self._see_state,
        )
        with contextlib.ExitStack() as stack:
            if not self._is_compiled:
                # Hooks would become part of the compiled code.
                stack.enter_context(self._stack.watched())
            stack.enter_context(phases.watched(self._prepared))
            yield

    def start(self) -> tuple[tuple[int, int], ...]:
        """Drop all notes, and note which tensors exist before the next step.

        Returns:
            Address and bytes of every known storage.
        """
        self._phases.clear()
        self._work.clear()
        self._settled.clear()
        self.started_ns = time.time_ns()
        known: dict[int, int] = {}
        for owner, tensor, role in (
            *((o, t, Role.PARAMETERS) for o, t in parameters_of(self._prepared)),
            *((o, t, Role.BUFFERS) for o, t in buffers_of(self._prepared)),
        ):
            self._settle(tensor, role, owner, known)
        for average in self._prepared.averages:
            self._settle(average, Role.BUFFERS, AVERAGE, known)
        if self._optimizer is not None:
            self._see_state(self._optimizer, known)
        return tuple(known.items())

    def notes(self) -> Notes:
        """Return what was noted since the start."""
        return Notes(
            phases=tuple(self._phases),
            work=tuple(self._work),
            settled=tuple(self._settled),
            copies=self._copies(),
        )

    def _copies(self) -> dict[str, frozenset[int]]:
        if self._copy_bytes is None:
            return {}
        unit = self._rounds_to
        sizes: dict[str, set[int]] = {}
        for _, parameter in parameters_of(self._prepared):
            num_bytes = parameter.numel() * self._copy_bytes
            sizes.setdefault(self._owners[id(parameter)], set()).add(-(-num_bytes // unit) * unit)
        return {module: frozenset(found) for module, found in sizes.items()}

    def _begin(self, name: str) -> None:
        now = time.time_ns()
        self._phases.append(PhaseStart(time_ns=now, name=name))
        backward = COMPILED if self._is_compiled else LOSS
        module = {FORWARD: BATCH, BACKWARD: backward}.get(name, OPTIMIZER)
        self._work.append(ModuleActive(time_ns=now, module=module, is_forward=False))

    def _enter(self, path: str) -> None:
        self._work.append(
            ModuleActive(
                time_ns=time.time_ns(), module=path, is_forward=self._stack.current is not None
            )
        )

    def _see_batch(self, batch: Any) -> None:
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, torch.Tensor):
                self._settle(leaf, Role.INPUTS, BATCH)
        if self._is_compiled:
            now = time.time_ns()
            self._work.append(ModuleActive(time_ns=now, module=COMPILED, is_forward=True))

    def _see_graph(self, loss: torch.Tensor) -> None:
        """Hook every node of the graph, so that the time at which it runs is noted."""
        if self._is_compiled:
            return
        seen = {loss.grad_fn}
        left = [loss.grad_fn]
        while left:
            node = left.pop()
            if node is None:
                continue
            if not hasattr(node, "variable"):
                path = self._stack.of_node(node) or LOSS
                node.register_prehook(self._noting(path))
            following = [child for child, _ in node.next_functions if child not in seen]
            seen.update(following)
            left += following

    def _noting(self, path: str) -> Any:
        def note(_gradients: Any) -> None:
            self._work.append(ModuleActive(time_ns=time.time_ns(), module=path, is_forward=False))

        return note

    def _see_gradients(self) -> None:
        for owner, parameter in parameters_of(self._prepared):
            if parameter.grad is not None:
                self._settle(parameter.grad, Role.GRADIENTS, owner)

    def _see_state(self, optimizer: Optimizer, known: dict[int, int] | None = None) -> None:
        self._optimizer = optimizer
        for parameter, value in states_of(optimizer):
            owner = self._owners.get(id(parameter), OPTIMIZER)
            self._settle(value, Role.OPTIMIZER_STATE, owner, known)

    def _settle(
        self,
        tensor: torch.Tensor | nn.Parameter,
        role: Role,
        module: str,
        known: dict[int, int] | None = None,
    ) -> None:
        if tensor.layout is torch.sparse_coo:
            for part in sparse_parts(tensor):
                self._settle(part, role, module, known)
            return
        # A shard is a tensor around the part that this rank holds.
        local = getattr(tensor, "to_local", None)
        if local is not None:
            tensor = local()
        if tensor.device.type != self._device.type or not tensor.untyped_storage().nbytes():
            return
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if known is not None:
            known[address] = storage.nbytes()
        self._settled.append(
            KnownBlock(time_ns=time.time_ns(), address=address, role=role, module=module)
        )

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

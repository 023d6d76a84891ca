"""Finds what each block of a model holds for backward, and what its forward costs, from one trace.

The trace of the unchanged step is marked where a block's forward begins and ends, and where its
backward begins. Replayed at a batch size, it says what is held at every moment. From that follows
what is held if some of the blocks are recomputed (`memfit.simulation.recomputation`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from memfit._torch_private import dispatched, pytree, storage_id
from memfit.backends.traces import trace, trace_options
from memfit.cards import Gpu
from memfit.memory.restore import preserved
from memfit.records import Action, Event
from memfit.simulation.recomputation import Block, Moment, Recomputable
from memfit.simulation.schedule import traced_id
from memfit.simulation.tracing.flops import flops_of_call
from memfit.simulation.tracing.refusals import META_ERRORS
from memfit.simulation.tracing.semantics import META
from memfit.step.calling import call_model
from memfit.step.checkpointing import blocks_of
from memfit.step.runner import PreparedStep
from memfit.step.training_step import TrainingStep

__all__ = ["recomputable"]

_BEGINS: Final = "(begins) "
_ENDS: Final = "(ends) "
_BACKWARD: Final = "(backward) "
_NUM_ITERATIONS: Final = 3
_FEW: Final = 2
_UNIT_BYTES: Final = 512


def recomputable(step: TrainingStep, gpu: Gpu, batch_size: int) -> Recomputable:
    """Return what a step's blocks hold and cost at a batch size.

    Args:
        step: The step, without any block recomputed; its precision is chosen.
        gpu: The card.
        batch_size: Samples in each micro-batch.

    Raises:
        UnsupportedError: The step cannot be traced.
    """
    watcher = _Marks()
    traced = trace(step, trace_options(gpu), watcher=watcher)
    events = tuple(traced.schedule.at(batch_size, num_iterations=_NUM_ITERATIONS))
    return _Replay(events, watcher).recomputable(_flops_of(step, watcher.names))


def _flops_of(step: TrainingStep, names: Sequence[str]) -> dict[str, int] | None:
    """Return the operations of each block's forward, and under `""` those of the whole model's.

    Products, convolutions and attention are counted.

    Args:
        step: The step.
        names: The blocks.

    Returns:
        The operations of one forward; `None` if the model needs values, which a trace gives it and
        a plain forward on the meta device does not.
    """
    prepared = step.prepare(META)
    inputs, _ = prepared.make_batch(_FEW)
    flops = dict.fromkeys(("", *names), 0)
    running = [""]

    def count(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        num_flops = flops_of_call(func, args, kwargs, result)
        for name in dict.fromkeys(("", running[-1])):
            flops[name] += num_flops
        return result

    with contextlib.ExitStack() as stack:
        for name in names:
            block = prepared.model.get_submodule(name)
            for handle in (
                block.register_forward_pre_hook(
                    lambda _module, _args, name=name: running.append(name)
                ),
                block.register_forward_hook(lambda _module, _args, _outputs: _dropped(running)),
            ):
                stack.callback(handle.remove)
        stack.enter_context(preserved())
        # Attention as products, which are counted on every release of torch.
        stack.enter_context(sdpa_kernel([SDPBackend.MATH]))
        stack.enter_context(torch.no_grad())
        stack.enter_context(dispatched(count))
        try:
            call_model(prepared.model, inputs)
        except META_ERRORS:
            # The trace before this gave the model its values, so it is no mistake of the model.
            return None
    return flops


def _dropped(running: list[str]) -> None:
    running.pop()


class _Marks:
    """Marks where the blocks of a traced step begin and end (`Watcher`)."""

    def __init__(self) -> None:
        # Allocations that recomputing a block does not free: what the next block gets from it, and
        # copies of weights that autocast keeps until forward ends.
        self.kept: set[int] = set()
        self._ids: dict[int, int] = {}
        self._mark: Callable[[str], None] = lambda _name: None
        self._num_calls: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The blocks that forward calls once, in the order of forward."""
        return tuple(name for name, calls in self._num_calls.items() if calls == 1)

    @contextlib.contextmanager
    def watch(self, prepared: PreparedStep, mark: Callable[[str], None]) -> Iterator[None]:
        """Begin to watch a step. A step may be traced a second time."""
        self._mark = mark
        self.kept.clear()
        self._ids.clear()
        model = prepared.model
        with contextlib.ExitStack() as stack:
            handles = [model.register_forward_pre_hook(self._model_begins)]
            for name in blocks_of(model):
                block = model.get_submodule(name)
                handles.append(block.register_forward_pre_hook(self._beginning(name)))
                handles.append(block.register_forward_hook(self._ending(name)))
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def allocated(self, block_id: int, tensor: torch.Tensor, args: tuple[Any, ...]) -> None:
        """Take note of a new storage."""
        self._ids[storage_id(tensor.untyped_storage())] = block_id
        source = args[0] if args else None
        if isinstance(source, nn.Parameter) and source.dtype is not tensor.dtype:
            self.kept.add(block_id)

    def took_workspace(self, block_id: int) -> None:
        """Do nothing: a workspace is freed when its operation ends."""

    def freed(self, block_id: int) -> None:
        """Do nothing: the events say it too."""

    def _model_begins(self, _module: nn.Module, _args: Any) -> None:
        self._num_calls.clear()

    def _beginning(self, name: str) -> Callable[[nn.Module, Any], None]:
        def begins(_module: nn.Module, _args: Any) -> None:
            self._num_calls[name] = self._num_calls.get(name, 0) + 1
            self._mark(_BEGINS + name)

        return begins

    def _ending(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def backward_begins(_gradient: torch.Tensor) -> None:
            self._mark(_BACKWARD + name)

        def ends(_module: nn.Module, _args: Any, outputs: Any) -> None:
            for output in pytree.tree_leaves(outputs):
                if isinstance(output, torch.Tensor):
                    number = self._ids.get(storage_id(output.untyped_storage()))
                    if number is not None:
                        self.kept.add(number)
                    if output.requires_grad:
                        output.register_hook(backward_begins)
            self._mark(_ENDS + name)

        return ends


@dataclasses.dataclass(slots=True)
class _Pass:
    """One forward of a block: its allocations, and where it begins, ends and is needed again."""

    before_bytes: int
    peak_bytes: int
    parked_bytes: int = 0
    is_parked: bool = False


class _Replay:
    """Goes through the events of the last iteration."""

    def __init__(self, events: Sequence[Event], marks: _Marks) -> None:
        self._events = events
        self._names = marks.names
        self._marks = marks
        self._passes: dict[str, _Pass] = {}
        self._saved = dict.fromkeys(self._names, 0)
        self._again = dict.fromkeys(self._names, 0)
        self._moments: dict[int, int] = {}

    def recomputable(self, flops: Mapping[str, int] | None) -> Recomputable:
        """Return the blocks and moments of the step.

        Args:
            flops: The operations of each block's forward, and under `""` of the whole forward;
                `None` if they are not known. Then bytes stand for operations.
        """
        last = self._last_iteration()
        parked = self._parked_bytes()
        alive: dict[int, int] = {}
        total = peak = 0
        for at, event in enumerate(self._events):
            if event.action is Action.USER_DEFINED:
                if at >= last:
                    self._close(peak)
                    self._take(event.origin, total, parked.get(at, 0))
                peak = total
                continue
            total += _change(event, alive)
            peak = max(peak, total)
            for one in self._passes.values():
                if not one.is_parked:
                    one.peak_bytes = max(one.peak_bytes, total)
        self._close(peak)
        if flops is None:
            flops = {**self._saved, "": sum(self._saved.values())}
        return Recomputable(
            blocks=tuple(
                Block(
                    name=name,
                    flops=flops[name],
                    parked_bytes=self._saved[name],
                    recomputed_bytes=self._again[name],
                )
                for name in self._names
            ),
            moments=tuple(
                Moment(held_bytes=held, num_parked=count) for count, held in self._moments.items()
            ),
            total_flops=flops[""],
        )

    def _take(self, mark: str, total: int, parked_bytes: int) -> None:
        """Take a mark of a block."""
        kind, name = _read(mark)
        if name not in self._saved:
            return
        if kind == _BEGINS:
            self._passes[name] = _Pass(before_bytes=total, peak_bytes=total)
        elif kind == _ENDS and name in self._passes:
            one = self._passes[name]
            one.parked_bytes, one.is_parked = parked_bytes, True
            # A step with several micro-batches frees at least this in each of them.
            self._saved[name] = min(self._saved[name] or parked_bytes, parked_bytes)
        elif kind == _BACKWARD and name in self._passes:
            one = self._passes.pop(name)
            rise = one.peak_bytes - one.before_bytes
            self._again[name] = max(self._again[name], total - one.parked_bytes + rise)

    def _close(self, peak: int) -> None:
        """Note the peak since the last mark with the number of blocks that are parked."""
        count = 0
        for name in self._names:
            if name not in self._passes or not self._passes[name].is_parked:
                break
            count += 1
        self._moments[count] = max(self._moments.get(count, 0), peak)

    def _last_iteration(self) -> int:
        """Return where the last iteration's first block begins."""
        begins = [
            at
            for at, event in enumerate(self._events)
            if event.action is Action.USER_DEFINED
            and self._names
            and event.origin == _BEGINS + self._names[0]
        ]
        return begins[len(begins) * (_NUM_ITERATIONS - 1) // _NUM_ITERATIONS] if begins else 0

    def _parked_bytes(self) -> dict[int, int]:
        """Return for each end of a block's forward the bytes that are freed in its backward."""
        freed_at = {
            event.id: at
            for at, event in enumerate(self._events)
            if event.action is Action.FREE_COMPLETED
        }
        begun: dict[str, int] = {}
        ended: dict[str, tuple[int, list[Event]]] = {}
        found: dict[int, int] = {}
        made: list[Event] = []
        for at, event in enumerate(self._events):
            if event.action is not Action.USER_DEFINED:
                if event.action is not Action.FREE_COMPLETED and begun:
                    made.append(event)
                continue
            kind, name = _read(event.origin)
            if kind == _BEGINS:
                begun, made = {name: at}, []
            elif kind == _ENDS and name in begun:
                ended[name] = (at, made)
                begun, made = {}, []
            elif kind == _BACKWARD and name in ended:
                end, own = ended.pop(name)
                found[end] = sum(
                    _rounded(event.num_bytes)
                    for event in own
                    if freed_at.get(event.id, 0) > at
                    and traced_id(event.id) not in self._marks.kept
                )
        return found


def _read(mark: str) -> tuple[str, str]:
    """Return the kind of a mark, and the block's name."""
    kind, space, name = mark.partition(" ")
    return kind + space, name


def _change(event: Event, alive: dict[int, int]) -> int:
    """Return the bytes that an event adds to what is held."""
    if event.action is Action.FREE_COMPLETED:
        return -alive.pop(event.id, 0)
    if event.action in (Action.ALLOC, Action.ALLOC_IF_ROOM):
        alive[event.id] = _rounded(event.num_bytes)
        return alive[event.id]
    return 0


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // _UNIT_BYTES) * _UNIT_BYTES

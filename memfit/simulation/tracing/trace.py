"""One training step on meta tensors, watched: which storages it allocates and frees, in order.

A model without weights runs forward, backward and the optimizer; a dispatch mode sees each
operation's outputs, and a storage not seen before is an allocation, its end a free. What the device
would do differently from the meta device (autocast, attention, foreach optimizers, workspaces) is
put right on the way. It does not handle models whose computation depends on values: a meta tensor
has none.

Source: the order of events is the autograd engine's own; weak references to storages keep their
    identity under `TorchDispatchMode`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import operator
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

import torch
from torch import nn

from memfit._torch_private import aten, dispatched, graph_task, num_owners, pytree, storage_id
from memfit.errors import UnsupportedError
from memfit.memory.collector import collector_paused
from memfit.records import Action, Event
from memfit.simulation.schedule import Schedule, StepSchedule
from memfit.simulation.steady import Iteration, settle
from memfit.simulation.tracing.attention import AttentionBackend, AttentionCall, choose
from memfit.simulation.tracing.autocast import functional_layer_open
from memfit.simulation.tracing.semantics import META, CudaSemantics, MetaPrecision, foreach_on_meta
from memfit.simulation.tracing.workspace import Kernels, Workspace

__all__ = ["StepTrace", "TraceOptions", "Watcher", "trace_step"]

_BATCH_SIZES: Final = (2, 3)
_PLANS_TRIED: Final = "cudnn.benchmark"
_ADD: Final = "add.Tensor"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """What decides a trace besides the training step.

    Args:
        compute_capability: Of the card, such as (8, 6).
        kernels: What its kernels take besides tensors.
        prefers_cudnn_attention: See `memfit.simulation.tracing.attention.choose`.
        has_fused_attention: There is `scaled_dot_product_attention`; otherwise models write
            attention out.
        uses_foreach: Optimizers take their foreach implementation by default.
        keeps_gradients: Gradients are zeroed in place instead of dropped.
        cudnn_benchmark: Convolutions try their plans once (`torch.backends.cudnn.benchmark`).
        num_prefetched_batches: Batches on the device besides the one in training.
        prefetches_as_uint8: The loader copies images as bytes and converts them on the device, so
            one batch of bytes is there too.
    """

    compute_capability: tuple[int, int]
    kernels: Kernels
    prefers_cudnn_attention: bool = False
    has_fused_attention: bool = True
    uses_foreach: bool = True
    keeps_gradients: bool = False
    cudnn_benchmark: bool = True
    num_prefetched_batches: int = 0
    prefetches_as_uint8: bool = False

    def choose_attention(self, call: AttentionCall) -> AttentionBackend:
        """Return the kernel that attention takes."""
        if not self.has_fused_attention:
            return AttentionBackend.WRITTEN_OUT
        return choose(call, self.compute_capability, prefers_cudnn=self.prefers_cudnn_attention)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class StepTrace:
    """A traced training step.

    Args:
        schedule: Its events.
        attention: Every kind of attention that it ran, and the kernel taken.
        num_operations: Operations that one iteration dispatched.
    """

    schedule: StepSchedule
    attention: tuple[tuple[AttentionCall, AttentionBackend], ...]
    num_operations: int


class PreparedStep(Protocol):
    """What a trace needs of a training step on the meta device (`PreparedStep`)."""

    model: nn.Module
    make_batch: Callable[[int], tuple[Any, tuple[Any, ...]]]

    def begin(self) -> None:
        """Start as training does."""

    def accumulate(self, batch_size: int) -> None:
        """Run every micro-batch forward and backward."""

    def update(self, *, set_to_none: bool) -> None:
        """Take the optimizer's step and zero the gradients."""


class Watcher(Protocol):
    """Who is told of every allocation while a step is traced, to know what it is for."""

    def watch(
        self, prepared: Any, mark: Callable[[str], None]
    ) -> contextlib.AbstractContextManager[None]:
        """Begin to watch a step; `mark` writes the name of a phase between the events."""

    def allocated(self, block_id: int, tensor: torch.Tensor, args: tuple[Any, ...]) -> None:
        """Take note of a new storage, and of what the operation that made it was called with."""

    def took_workspace(self, block_id: int) -> None:
        """Take note of a kernel's workspace, which ends with the operation."""

    def freed(self, block_id: int) -> None:
        """Take note of a storage's end."""


def trace_step(
    prepared: PreparedStep,
    *,
    precision_policy: MetaPrecision,
    options: TraceOptions,
    name: str,
    watcher: Watcher | None = None,
) -> StepTrace:
    """Trace a training step on the meta device.

    Args:
        prepared: The step, made with `precision_policy`.
        precision_policy: How it computes in mixed precision.
        options: What else decides.
        name: What an error calls the model.
        watcher: Told of every allocation; the events are the same with it and without.

    Returns:
        The events of setting up, of the first iteration and of the later ones.

    Raises:
        UnsupportedError: The step needs values that a meta tensor does not have.
    """
    recorder = _Recorder(options.kernels, watcher)
    semantics = CudaSemantics(precision_policy.autocast, options.choose_attention)
    with contextlib.ExitStack() as stack:
        stack.enter_context(foreach_on_meta(enabled=options.uses_foreach))
        stack.enter_context(functional_layer_open())
        stack.enter_context(_garbage_held())
        stack.enter_context(_sentences_for(prepared.model, name))
        if watcher is not None:
            stack.enter_context(watcher.watch(prepared, recorder.mark))
        stack.enter_context(semantics)
        stack.enter_context(dispatched(recorder.handle))
        schedule = _record(prepared, recorder, options)
    return StepTrace(
        schedule=schedule,
        attention=tuple(semantics.attention.items()),
        num_operations=recorder.num_operations,
    )


def _record(prepared: PreparedStep, recorder: _Recorder, options: TraceOptions) -> StepSchedule:
    recorder.see_all(prepared)
    prepared.begin()
    setup = recorder.cut()

    def iterate(batch_size: int) -> Iteration:
        recorder.forget_plans()
        recorder.num_operations = 0
        prepared.accumulate(batch_size)
        run = tuple(recorder.cut())
        prepared.update(set_to_none=not options.keeps_gradients)
        return Iteration(batch_size=batch_size, run=run, update=tuple(recorder.cut()))

    schedule = settle(setup, iterate, batch_sizes=_BATCH_SIZES, only_first=_PLANS_TRIED)
    first = schedule.first
    return dataclasses.replace(
        schedule,
        setup=_with_prefetched(schedule.setup, prepared, options),
        first=first if options.cudnn_benchmark else first.without(_PLANS_TRIED),
    )


def _with_prefetched(setup: Schedule, prepared: PreparedStep, options: TraceOptions) -> Schedule:
    if not options.num_prefetched_batches:
        return setup
    inputs, targets = prepared.make_batch(1)
    leaves = pytree.tree_leaves((inputs, targets))
    sizes = [leaf.untyped_storage().nbytes() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    sizes *= options.num_prefetched_batches
    if options.prefetches_as_uint8:
        sizes += [leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    events = tuple(
        Event(
            action=Action.ALLOC,
            id=-1 - index,
            num_bytes=size * setup.batch_size,
            origin="prefetched batch",
        )
        for index, size in enumerate(sizes)
    )
    return dataclasses.replace(
        setup, events=setup.events + events, growth_bytes=setup.growth_bytes + tuple(sizes)
    )


class _Recorder:
    """Writes down allocations and frees of meta storages.

    Args:
        kernels: What kernels take besides their outputs.
        watcher: Told of every allocation.
    """

    def __init__(self, kernels: Kernels, watcher: Watcher | None) -> None:
        self._kernels = kernels
        self._watcher = watcher
        self._events: list[Event] = []
        self._ids: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._next_id = 0
        self._tried_plans: set[Any] = set()
        self.num_operations = 0
        self._sole_owner = _sole_owner()
        self._add = aten(_ADD)

    def handle(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, and write down what it allocates."""
        self.num_operations += 1
        if func is self._add and self._accumulates_in_place(*args):
            return args[0]
        result = self._kernels.run(func, args, kwargs)
        if type(result) is torch.Tensor:
            self._see(result, func, args)
        elif isinstance(result, (tuple, list)):
            for output in result:
                if isinstance(output, torch.Tensor):
                    self._see(output, func, args)
        for workspace in self._kernels.workspaces(func, args, result):
            if workspace.plan is not None and workspace.plan not in self._tried_plans:
                self._tried_plans.add(workspace.plan)
                # Trying cuDNN's plans ends with an emptied cache (run_single_conv in
                # aten/src/ATen/native/cudnn/Conv_v8.cpp).
                self._write(Action.EMPTY_CACHE, 0, 0, _PLANS_TRIED)
            if workspace.num_bytes:
                self._pass(workspace)
        return result

    def _accumulates_in_place(self, gradient: Any, more: Any) -> bool:
        """Whether the autograd engine is summing two gradients that it would sum in place.

        Under a dispatch mode it does not, so its own condition is asked here: it is the gradient's
        only owner, and its storage's.

        Source: `can_accumulate_inplace` in torch/csrc/autograd/input_buffer.cpp.
        """
        if graph_task() == -1 or torch.is_grad_enabled():
            return False
        return (
            isinstance(more, torch.Tensor)
            and (gradient.shape, gradient.dtype) == (more.shape, more.dtype)
            and all(map(operator.le, num_owners(gradient), self._sole_owner))
        )

    def see_all(self, prepared: PreparedStep) -> None:
        """Write down what is there before the first iteration."""
        modules = [prepared.model]
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._see(tensor, "model")

    def cut(self) -> list[Event]:
        """Return the events since the last cut, once unreachable cycles are gone."""
        gc.collect()
        events, self._events = self._events, []
        return events

    def forget_plans(self) -> None:
        """Have every convolution try its plans again, so that iterations make the same stream."""
        self._tried_plans.clear()

    def mark(self, name: str) -> None:
        """Write the name of a phase that begins."""
        self._write(Action.USER_DEFINED, 0, 0, name)

    def _see(self, tensor: torch.Tensor, origin: Any, args: tuple[Any, ...] = ()) -> None:
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
            del self._ids[key], self._references[number]
            self._write(Action.FREE_COMPLETED, number, 0, "")
            if watcher is not None:
                watcher.freed(number)

        self._references[number] = weakref.ref(storage, ended)
        self._write(Action.ALLOC, number, num_bytes, str(origin))
        if watcher is not None:
            watcher.allocated(number, tensor, args)

    def _pass(self, workspace: Workspace) -> None:
        number = self._take_id()
        action = Action.ALLOC if workspace.is_needed else Action.TRY_ALLOC
        self._write(action, number, workspace.num_bytes, workspace.name)
        if self._watcher is not None:
            self._watcher.took_workspace(number)
        self._write(Action.FREE_COMPLETED, number, 0, "")

    def _take_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _write(self, action: Action, number: int, num_bytes: int, origin: str) -> None:
        self._events.append(Event(action=action, id=number, num_bytes=num_bytes, origin=origin))


def _sole_owner() -> tuple[int, int]:
    """What is counted of a gradient that only the engine holds, Python's own share included."""
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


@contextlib.contextmanager
def _garbage_held() -> Iterator[None]:
    """Keep the collector from freeing at moments that depend on what else the process did."""
    with collector_paused():
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()


@contextlib.contextmanager
def _sentences_for(model: nn.Module, name: str) -> Iterator[None]:
    """Turn what a meta tensor cannot do into a sentence that names the operation and the module."""
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error).lower():
            raise
        where = _innermost_module(model, error)
        raise UnsupportedError(
            f"{name} cannot be simulated: {where} needs the values of its tensors "
            f"({str(error).splitlines()[0]}). Probe it on a device instead."
        ) from error


def _innermost_module(model: nn.Module, error: BaseException) -> str:
    names = {id(module): name for name, module in model.named_modules()}
    found = "it"
    traceback = error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            found = f"{type(owner).__name__} {names[id(owner)]!r}"
        traceback = traceback.tb_next
    return found

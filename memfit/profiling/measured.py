"""Profiles a training step on the device that is there, from the device's own record.

On a GPU, the record is the caching allocator's history. On a CPU, it is the memory events of
torch.profiler. The step runs three times. Only the third run is recorded, because the optimizer's
state exists by then.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any, Final, Protocol

import torch
from torch.profiler import ProfilerActivity

from memfit._torch_private import allocator_snapshot, memory_events, recorded_history
from memfit.backends import Backend
from memfit.cards import is_rehearsed
from memfit.errors import DoesNotFitError
from memfit.memory import oom
from memfit.memory.release import release
from memfit.memory.restore import preserved
from memfit.profiling.modules import is_own_file, line_of, shown_file
from memfit.profiling.peak import peak_of
from memfit.profiling.recorded import RecordedEvent, assemble, events_of
from memfit.profiling.snapshot import Profiled
from memfit.profiling.watching import StepNotes
from memfit.records import (
    Action,
    Capacity,
    MemoryBlock,
    MemoryProfile,
    Outcome,
    Precision,
    Source,
    Timeline,
)
from memfit.simulation.history import Resident, read_history, read_residents
from memfit.step.runner import PreparedStep
from memfit.step.training_step import TrainingStep
from memfit.units import format_bytes

__all__ = ["profile_current_gpu", "profile_device"]

_WARM_UP_STEPS: Final = 2
_MAX_ENTRIES: Final = 1_000_000
_BLOCK_BYTES: Final = 512
_HALF_BYTES: Final = 2
_MAKES_ROOM: Final = ("aten::empty", "aten::new_empty", "aten::resize_")
_LOG_LEVEL: Final = "KINETO_LOG_LEVEL"


class DeviceFacts(Protocol):
    """What a profile reports about the device that it ran on."""

    @property
    def device_name(self) -> str:
        """The name of the device in reports."""
        ...

    def capacity(self) -> Capacity:
        """Return how many bytes a step may use there."""
        ...


def profile_device(
    step: TrainingStep,
    batch_size: int,
    backend: DeviceFacts,
    device: torch.device,
    *,
    context_bytes: int = 0,
) -> Profiled:
    """Run a training step on a device and record its allocations.

    Args:
        step: The step to train. Its precision is chosen.
        batch_size: Samples in each micro-batch, at least 1.
        backend: Says which device it is and how much memory it has.
        device: The device.
        context_bytes: The bytes of the device that the process takes outside the allocator, if they
            are known.

    Raises:
        DoesNotFitError: The step ran out of memory.
    """
    start = time.perf_counter()
    recorded = message = None
    try:
        recorded = _record(step, batch_size, device)
    except Exception as error:
        if oom.classify(error) is oom.Likelihood.NO:
            raise
        message = oom.first_line(error)
    # The except block keeps the step's tensors alive, so memory is released after it.
    release(device)
    if recorded is None:
        hint = " Simulate it with --gpu to see what is missing."
        raise DoesNotFitError(
            f"A batch of {batch_size} does not fit {backend.device_name} "
            f"({format_bytes(backend.capacity().usable_bytes)} usable): {message}"
            f"{hint if step.options.parallel is None else ''}"
        )
    timeline, blocks, snapshot = recorded
    profile = MemoryProfile(
        subject=step.name,
        device=backend.device_name,
        source=Source.REHEARSED if is_rehearsed() and device.type == "cuda" else Source.MEASURED,
        options=step.options,
        batch_size=batch_size,
        num_micro_batches=step.num_micro_batches,
        capacity=backend.capacity(),
        outcome=Outcome.FITS,
        message=None,
        timeline=timeline,
        peak=peak_of(blocks, timeline, context_bytes=context_bytes),
        blocks=blocks,
        cards=(),
        advice=(),
        seconds=time.perf_counter() - start,
        torch_version=torch.__version__,
    )
    return Profiled(profile=profile, snapshot=snapshot)


def profile_current_gpu(
    backend: Backend, step: TrainingStep, batch_size: int, context_bytes: int
) -> Profiled:
    """Profile a step on the current CUDA device; see `profile_device`.

    Args:
        backend: Says which device it is and how much memory it has.
        step: The step to train. Its precision is chosen.
        batch_size: Samples in each micro-batch, at least 1.
        context_bytes: The bytes of the card that the process takes outside the allocator.
    """
    cuda = torch.device("cuda")
    return profile_device(step, batch_size, backend, cuda, context_bytes=context_bytes)


_Recorded = tuple[Timeline, tuple[MemoryBlock, ...], dict[str, Any] | None]


def _record(step: TrainingStep, batch_size: int, device: torch.device) -> _Recorded:
    record = _record_on_gpu if device.type == "cuda" else _record_on_cpu
    with preserved(*step.live_modules, optimizer=step.live_optimizer) as kept:
        prepared = step.prepare(device)
        kept.release_replaced()
        try:
            return record(step, prepared, batch_size, device)
        finally:
            prepared.end()


def _record_on_cpu(
    step: TrainingStep, prepared: PreparedStep, batch_size: int, device: torch.device
) -> _Recorded:
    del device
    notebook = StepNotes(prepared, copy_bytes=_copy_bytes(step))
    with notebook.watched():
        _warm_up(prepared, batch_size)
        with _quiet_profiler() as profiler:
            known = notebook.start()
            prepared.iterate(batch_size)
    residents = [
        Resident(address=address, held_bytes=num_bytes, requested_bytes=num_bytes)
        for address, num_bytes in known
    ]
    tree = memory_events(profiler)
    events = [event for event in _memory_events(tree) if event.time_ns >= notebook.started_ns]
    timeline, blocks = assemble(events, residents, notebook.notes(), reserved_bytes=None)
    return timeline, blocks, None


def _record_on_gpu(
    step: TrainingStep, prepared: PreparedStep, batch_size: int, device: torch.device
) -> _Recorded:
    notebook = StepNotes(prepared, copy_bytes=_copy_bytes(step), rounds_to=_BLOCK_BYTES)
    index: int | None = device.index
    if index is None:
        index = torch.cuda.current_device()
    with notebook.watched(), torch.cuda.device(index):
        _warm_up(prepared, batch_size)
        torch.cuda.synchronize(index)
        with recorded_history(max_entries=_MAX_ENTRIES):
            before = allocator_snapshot()["segments"]
            residents, reserved = read_residents(before, device_index=index)
            notebook.start()
            prepared.iterate(batch_size)
            torch.cuda.synchronize(index)
            snapshot = allocator_snapshot()
    recorded = read_history(snapshot["device_traces"][index], since_ns=notebook.started_ns)
    events = events_of(recorded, line_of=line_of)
    timeline, blocks = assemble(events, residents, notebook.notes(), reserved_bytes=reserved)
    return timeline, blocks, snapshot


def _warm_up(prepared: PreparedStep, batch_size: int) -> None:
    prepared.begin()
    for _ in range(_WARM_UP_STEPS):
        prepared.iterate(batch_size)


def _copy_bytes(step: TrainingStep) -> int | None:
    is_mixed = step.options.precision in (Precision.AMP_BF16, Precision.AMP_FP16)
    return _HALF_BYTES if is_mixed else None


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[Any]:
    """Profile memory. Hide the log lines that Kineto writes when it finds no GPU."""
    is_set = _LOG_LEVEL in os.environ
    os.environ.setdefault(_LOG_LEVEL, "99")
    try:
        with torch.profiler.profile(
            activities=[ProfilerActivity.CPU],
            profile_memory=True,
            with_stack=True,
            acc_events=True,  # there is one cycle; torch 2.11 warns if this is not said
        ) as profiler:
            yield profiler
    finally:
        if not is_set:
            del os.environ[_LOG_LEVEL]


def _memory_events(
    tree: Any, operation: str = "", line: str | None = None
) -> Iterator[RecordedEvent]:
    """Yield the memory events of a profiler's tree, each with the operation that caused it."""
    for event in tree:
        fields = event.extra_fields
        if event.tag.name == "Allocation":
            yield RecordedEvent(
                time_ns=event.start_time_ns,
                action=Action.ALLOC if fields.alloc_size > 0 else Action.FREE_COMPLETED,
                address=fields.ptr,
                num_bytes=abs(fields.alloc_size),
                operation=operation,
                source_line=line,
            )
            continue
        inner, inner_line = operation, line
        if event.tag.name == "TorchOp":
            # An operation that only allocates is reported as the operation that called it.
            if event.name.startswith("aten::") and not event.name.startswith(_MAKES_ROOM):
                inner = event.name
        elif event.tag.name in ("PyCall", "PyCCall"):
            caller = fields.caller
            name = shown_file(caller.file_name)
            if is_own_file(caller.file_name):
                inner_line = None
            elif name is not None:
                inner_line = f"{name}:{caller.line_number}"
        yield from _memory_events(event.children, inner, inner_line)

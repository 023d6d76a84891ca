"""The processes that trials on the CPU run in: a server, and a child of it for each trial.

The server builds the step once and forks a child for each trial. The child limits its own memory,
runs the step and reports. The server goes on even if a child is killed, and every request gets one
answer. `memfit.backends.cpu.server` starts the server.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import gc
import mmap
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import IO, Any, Final

import torch

from memfit.backends.cpu.glibc_heap import block_bytes, fill_heap, steady_heap
from memfit.backends.cpu.kernel_cache import compiled_bytes, forget_kernels, free_buffers
from memfit.backends.cpu.limits import (
    Footprint,
    fork_as_is,
    limit_data,
    prepare_to_fork,
    status_bytes,
)
from memfit.backends.crossing import portable
from memfit.backends.readings import Reading, steady_readings
from memfit.errors import UnsupportedError
from memfit.memory import oom
from memfit.memory.release import release
from memfit.records import Outcome, Source, Trial
from memfit.step.runner import PreparedStep
from memfit.step.training_step import TrainingStep
from memfit.units import MIB

__all__ = ["LOST", "Report", "Request", "serve"]

LOST: Final = 75
"""The server's exit code if it no longer knows which request an answer is for (EX_TEMPFAIL)."""

_CPU = torch.device("cpu")
_MOST_IDLE_DEATHS: Final = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One trial to run.

    Args:
        batch_size: Samples in each micro-batch.
        limit_bytes: Bytes that the step may use beyond the loaded process.
        confirmed: Suspected messages that another trial has confirmed as out of memory.
    """

    batch_size: int
    limit_bytes: int
    confirmed: frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of a request: a trial, an error, or a suspect (it may be out of memory)."""

    trial: Trial | None = None
    error: BaseException | None = None
    suspect: str | None = None


class _Reached(enum.IntEnum):
    """How far the process of a trial got. The server reads it after the process has ended."""

    WAITING = 0
    READING = 1
    RUNNING = 2
    ANSWERED = 3
    CLOSED = 4


# --- the server -----------------------------------------------------------------------------------


def serve(connection: Connection, step: TrainingStep, output: IO[bytes]) -> None:
    """Build a step, and run the requested trials until the connection is closed.

    Args:
        connection: It receives requests and sends answers. An answer is a report with the traceback
            of its error, or the exit code of a trial that died without a report.
        step: The step to train.
        output: The file that receives the step's output.
    """
    # The server gets its own process group, so that all its processes can be killed together. With
    # its own session, Linux would schedule it apart from the user's other processes (autogroups).
    # Training is not scheduled in that way.
    os.setpgid(0, 0)
    steady_heap()
    _load_lazily()
    _start_thread_pool()
    # A collection would walk all objects that this process had before, so they are frozen.
    gc.freeze()
    forget_kernels()
    free_buffers()
    # Each trial begins without gradients. They are dropped here, before the heap's holes are
    # filled.
    for module in step.live_modules:
        module.zero_grad(set_to_none=True)
    fill_heap()
    # oneDNN never drops a few kernels. A new process would compile them, so they are counted.
    before = Footprint.now() - Footprint.of(compiled_bytes())
    built: PreparedStep | None = None
    held = Footprint.of(0)
    failure: tuple[str | None, Report] = (None, Report())
    try:
        built = step.prepare(_CPU)
        held = _held_by(step)
    except Exception as error:  # noqa: BLE001 - the user's model is built here; sent, not swallowed
        failure = (traceback.format_exc(), Report(error=portable(error)))
    release(_CPU)
    gc.freeze()
    if step.live_modules:
        # A user's own objects count as part of the step, as a model does that is built here. Their
        # memory from before a conversion does not.
        fill_heap()
        before = Footprint.now() - held - Footprint.of(compiled_bytes())
    model = Footprint.now() - before

    def run(request: Request) -> tuple[str | None, Report]:
        os.ftruncate(output.fileno(), 0)
        os.lseek(output.fileno(), 0, os.SEEK_SET)
        return _try(built, request, model) if built is not None else failure

    # Trials have to begin in the same state, because the heap's holes change their memory by up to
    # a megabyte. So each one is forked before its request comes, and nothing else runs here.
    prepare_to_fork()
    _answer_requests(connection, run, output)


def _answer_requests(
    connection: Connection, run: Callable[[Request], Any], output: IO[bytes]
) -> None:
    """Fork a process for each request, and let another process send its answer.

    A process that runs a trial may be killed at any moment. So it writes its answer to a file. Only
    a process without a limit writes to the connection.
    """
    reached = mmap.mmap(-1, 1)
    answer = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process

    def run_one() -> None:
        connection.poll(None)
        reached[0] = _Reached.READING
        try:
            request = connection.recv()
        except EOFError:
            reached[0] = _Reached.CLOSED
            return
        reached[0] = _Reached.RUNNING
        text = pickle.dumps(run(request))
        os.ftruncate(answer.fileno(), 0)
        os.pwrite(answer.fileno(), text, 0)
        reached[0] = _Reached.ANSWERED

    num_idle_deaths = 0
    while True:
        reached[0] = _Reached.WAITING
        _, status = os.waitpid(fork_as_is(run_one, but_keep=output), 0)
        if reached[0] == _Reached.CLOSED:
            return
        if reached[0] == _Reached.WAITING and num_idle_deaths < _MOST_IDLE_DEATHS:
            # There was no request yet.
            num_idle_deaths += 1
            continue
        if reached[0] in (_Reached.WAITING, _Reached.READING):
            # The rest of the request would be read as the beginning of the next one.
            os._exit(LOST)

        def tell(status: int = status, is_answered: bool = reached[0] == _Reached.ANSWERED) -> None:
            size = os.fstat(answer.fileno()).st_size
            text = os.pread(answer.fileno(), size, 0)
            died = pickle.dumps(os.waitstatus_to_exitcode(status))
            connection.send_bytes(text if is_answered else died)

        _, status = os.waitpid(fork_as_is(tell, but_keep=output), 0)
        if status:
            os._exit(LOST)


def _held_by(step: TrainingStep) -> Footprint:
    """Return the footprint of a user's objects: parameters, buffers and optimizer state."""
    storages = {}
    for tensor in step.live_tensors:
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = block_bytes(storage.nbytes())
    return Footprint.of(sum(storages.values()))


def _load_lazily() -> None:
    """Take a tiny step, because torch imports many modules at the first optimizer step."""
    weight = torch.nn.Parameter(torch.ones(1, 1))
    optimizer = torch.optim.AdamW([weight])
    torch.nn.functional.linear(torch.ones(1, 1), weight).sum().backward()
    optimizer.step()


def _start_thread_pool() -> None:
    """Start all threads, because their stacks belong to the loaded process and not to the step.

    After a fork, torch makes its second pool anew, in whichever thread asks first. If several
    threads ask at once, one of them gets none, and torch raises an error («Invalid thread pool»).
    So it is asked for here, where there is one thread.
    """
    torch.set_num_threads(torch.get_num_threads())
    torch.ones(torch.get_num_threads() * MIB).add_(1)


# --- the trial, in the child --------------------------------------------------------------------


def _try(prepared: PreparedStep, request: Request, model: Footprint) -> tuple[str | None, Report]:
    # libgomp ends the process if it cannot map its stacks, so this comes before the limit is set.
    _start_thread_pool()
    meter = _Meter(Footprint.now() - model, request.limit_bytes)
    room_bytes = request.limit_bytes - model.data_bytes
    limit_data(Footprint.now().data_bytes + max(room_bytes, 0))
    try:
        prepared.begin()
        # First take a step on gradients of zero, so that the optimizer's state exists before the
        # readings begin. Otherwise it would be made in the first iteration, and be part of the peak
        # only from the second on. Some optimizers refuse such gradients. Then it is made later.
        with contextlib.suppress(RuntimeError):
            prepared.step_on_zeros()
        _, grows = steady_readings(prepared, request.batch_size, meter.measured)
    except Exception as error:  # noqa: BLE001 - the user's own code runs here; judged, then sent
        limit_data(None)
        verdict = oom.classify(error)
        message = oom.first_line(error)
        text = traceback.format_exc()
        if verdict is oom.Likelihood.NO:
            return text, Report(error=portable(_explained(error)))
        trial = meter.trial(request.batch_size, prepared, message=message, grows=False)
        if verdict is oom.Likelihood.SUSPECTED and message not in request.confirmed:
            return text, Report(trial=trial, error=portable(error), suspect=message)
        return None, Report(trial=trial)
    trial = meter.trial(request.batch_size, prepared, message=None, grows=grows)
    return None, Report(trial=trial)


def _explained(error: Exception) -> Exception:
    if "autograd's threading in combination with fork" in str(error):
        return UnsupportedError(
            "This process has already run a backward pass while it could see a "
            "GPU. After that, PyTorch cannot run backward in a fork of it. Probe "
            "the CPU before the first backward pass, or in a new process."
        )
    return error


class _Meter:
    """Reads peaks, and subtracts the memory that the process holds apart from the model.

    Args:
        base: The footprint that is subtracted.
        limit_bytes: Bytes that the step may use.
    """

    def __init__(self, base: Footprint, limit_bytes: int) -> None:
        self._base = base
        self._limit_bytes = limit_bytes
        self._readings: list[Reading] = []

    def measured(self, iterate: Callable[[], None]) -> Reading:
        """Run one iteration, and read the peaks at its end."""
        start = time.perf_counter()
        iterate()
        reading = self._read(time.perf_counter() - start)
        self._readings.append(reading)
        return reading

    def trial(
        self, batch_size: int, prepared: PreparedStep, *, message: str | None, grows: bool
    ) -> Trial:
        """Return the trial of the readings. With a message, it ran out of memory."""
        peak = self._read(0.0)
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if message is None else Outcome.OUT_OF_MEMORY,
            source=Source.MEASURED,
            peak_allocated_bytes=peak.allocated_bytes,
            peak_reserved_bytes=peak.reserved_bytes,
            num_iterations=len(self._readings),
            step_seconds=self._readings[-1].seconds if self._readings else None,
            num_micro_batches=prepared.num_micro_batches,
            left_behind_bytes=0,
            peak_grows=grows and message is None,
            peak_varies=prepared.peak_varies,
            message=message,
        )

    def _read(self, seconds: float) -> Reading:
        status = status_bytes()
        # A fork begins with new peaks, but Linux keeps them only for all mapped memory and for all
        # resident memory, files included. The memory of files only grows. So the peak minus the
        # files' memory at the end is the peak of the other memory.
        data = status["VmPeak"] - (status["VmSize"] - status["VmData"]) - self._base.data_bytes
        resident = status["VmHWM"] - status["RssFile"] - status["RssShmem"]
        return Reading(
            # The kernel enforces the limit. Memory beyond it was reserved but could not be written,
            # as when glibc looks for another arena.
            reserved_bytes=min(max(0, data), self._limit_bytes),
            allocated_bytes=max(0, resident - self._base.anonymous_bytes),
            requested_bytes=None,
            seconds=seconds,
        )

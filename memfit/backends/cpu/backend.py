"""Trials on the CPU: real steps in child processes under a real memory limit.

The limit is `RLIMIT_DATA`. It limits private writable memory, which Linux counts when it is mapped.
Memory that the process holds before the model is built is not counted. A trial imports nothing and
starts from the same state every time. It can be killed without harm, and it never changes the
user's own objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import psutil

from memfit.backends.cpu import glibc_heap
from memfit.backends.cpu.limits import limit_works
from memfit.backends.cpu.machine import cpu_name, memory_left
from memfit.backends.cpu.server import LostError, Server, ran_out
from memfit.backends.cpu.trials import Report, Request
from memfit.backends.protocol import Prediction
from memfit.errors import StepCrashedError, UnsupportedError, UsageError
from memfit.records import Capacity, Precision, Source, Trial
from memfit.step.training_step import TrainingStep
from memfit.units import format_bytes

__all__ = ["CpuBackend"]

# The share of the machine's free memory that a trial gets if it is to have all of it.
_ROOM_SHARE = 0.95
# A limit that is larger by less than this factor does not count as more memory.
_MORE_ROOM = 1.1
# If less than this share of the limit was in use, memory was not the cause of a failure.
_NEARLY_FULL_SHARE = 0.8
_MOST_SERVERS = 3

_Returned = TypeVar("_Returned")


class CpuBackend:
    """Tries training steps in child processes of this one.

    Args:
        memory_bytes: Bytes that a step may use beyond the loaded process; `None` for the bytes that
            the machine and its control group have left, less the headroom.
        headroom: The share that is kept free when `memory_bytes` is `None`.

    Raises:
        UnsupportedError: This system does not enforce `RLIMIT_DATA`.
        UsageError: `memory_bytes` is more than the machine has left.
    """

    def __init__(self, *, memory_bytes: int | None = None, headroom: float = 0.05) -> None:
        if not limit_works():
            raise UnsupportedError(
                "Trials on a CPU need a memory limit that the system enforces "
                "(RLIMIT_DATA), but this kernel ignores it."
            )
        left_bytes, origin = memory_left()
        total_bytes = psutil.virtual_memory().total
        if memory_bytes is None:
            usable_bytes = int(left_bytes * (1 - headroom))
            origin = f"{origin}, less {headroom:.0%}"
        elif memory_bytes > left_bytes:
            raise UsageError(
                f"A limit of {format_bytes(memory_bytes)} is more than this machine has "
                f"left. Give at most {format_bytes(left_bytes)} ({origin})."
            )
        else:
            usable_bytes, origin = memory_bytes, "the limit that was asked for"
        self._capacity = Capacity(usable_bytes=usable_bytes, total_bytes=total_bytes, origin=origin)
        self._server: Server | None = None
        # Messages that were only suspected, and that another trial has confirmed as out of memory.
        self._confirmed: frozenset[str] = frozenset()

    @property
    def device_name(self) -> str:
        """The name of the device in reports."""
        return cpu_name()

    @property
    def source(self) -> Source:
        """The kind of its figures: measured."""
        return Source.MEASURED

    @property
    def auto_precision(self) -> Precision:
        """The precision that `Precision.AUTO` stands for on a CPU."""
        return Precision.FP32

    @property
    def environment(self) -> tuple[str, ...]:
        """Environment variables that a training script needs too, as NAME=value."""
        if glibc_heap.is_heap_tuned():
            return ()
        return (f"MALLOC_MMAP_THRESHOLD_={glibc_heap.MMAP_THRESHOLD_BYTES}",)

    @property
    def has_retries(self) -> bool:
        """Whether the allocator gives back its cache and retries when memory is short."""
        return False

    @property
    def takes_ranks(self) -> bool:
        """Whether a trial can be one rank of many."""
        return False

    def capacity(self) -> Capacity:
        """Return how many bytes a training step may use, and the source of that figure."""
        return self._capacity

    def trial(self, step: TrainingStep, batch_size: int) -> Trial:
        """Try one batch size in a process of its own.

        Args:
            step: The step to train. Its precision is chosen.
            batch_size: Samples in each micro-batch, at least 1.

        Returns:
            The result of the trial. Its reserved bytes are private writable memory beyond the
            loaded process. Its allocated bytes are the resident part of that memory.

        Raises:
            StepCrashedError: The step crashed its process, and memory was not the cause.
        """
        report = self._ask(step, batch_size, self._capacity.usable_bytes)
        if report.error is None:
            assert report.trial is not None
            return report.trial
        if report.suspect is None or not self._is_memory(step, batch_size, report):
            raise report.error
        self._confirmed |= {report.suspect}
        return report.trial or ran_out(batch_size, report.suspect)

    def needed_bytes(self, step: TrainingStep, batch_size: int) -> int | None:
        """Return the bytes of a batch size that did not fit, if the machine has enough memory."""
        roomier = self._ask(step, batch_size, _room_bytes()).trial
        return roomier.peak_reserved_bytes if roomier is not None and roomier.fits else None

    def _is_memory(self, step: TrainingStep, batch_size: int, report: Report) -> bool:
        """Whether a suspected failure goes away with more memory.

        Code that does not expect an allocation to fail may crash. It may also raise the same error
        as for a limit of its own. The step is tried in a new process, because libraries remember
        failures.
        """
        room_bytes = _room_bytes()
        roomier = self._ask(step, batch_size, room_bytes)
        if roomier.error is None:
            return True
        limit_bytes = self._capacity.usable_bytes
        if room_bytes > _MORE_ROOM * limit_bytes or batch_size == 1:
            return False
        # There is no more memory to give. A step that ran out of memory had nearly
        # reached the limit, and half of its batch fits.
        peak = None if report.trial is None else report.trial.peak_reserved_bytes
        if peak is not None and peak < _NEARLY_FULL_SHARE * limit_bytes:
            return False
        half = self._ask(step, batch_size // 2, limit_bytes)
        return half.trial is not None and half.trial.fits

    def _ask(self, step: TrainingStep, batch_size: int, limit_bytes: int) -> Report:
        request = Request(batch_size=batch_size, limit_bytes=limit_bytes, confirmed=self._confirmed)
        for _ in range(_MOST_SERVERS):
            server = self._server_for(step)
            try:
                return server.ask(request)
            except LostError:
                continue
            finally:
                if server.is_dead:
                    self.__exit__()
        raise StepCrashedError(
            f"Another program ended the process that runs trials {_MOST_SERVERS} "
            "times, each time before there was an answer for batch size "
            f"{batch_size}."
        )

    def _server_for(self, step: TrainingStep) -> Server:
        if self._server is None or self._server.step is not step:
            self.__exit__()
            self._server = Server(step)
        return self._server

    def call(
        self, function: Callable[..., _Returned], step: TrainingStep, *arguments: Any
    ) -> _Returned:
        """Call a function in this process. See `Backend.call`."""
        return function(self, step, *arguments)

    def prediction(self, step: TrainingStep) -> Prediction:  # noqa: ARG002 - as every backend
        """Return nothing, because memfit has no model of a CPU's memory."""
        return Prediction()

    def simulated_counterpart(self) -> None:
        """Return nothing, because memfit has no model of a CPU's memory."""
        return

    def __enter__(self) -> CpuBackend:
        """Return the backend."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End the server and the trial that it is running."""
        if self._server is not None:
            self._server.kill()
            self._server = None


def _room_bytes() -> int:
    """Return nearly all bytes that the machine has left, for a trial that may need them."""
    return int(memory_left()[0] * _ROOM_SHARE)

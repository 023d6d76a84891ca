"""Trials on a GPU: real steps in this process, NVIDIA's and AMD's through the same API.

`memfit.memory.restore.preserved` keeps the user's objects from the first trial until the backend is
left. Memory is given back between trials.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import psutil
import torch

from memfit.backends.protocol import Prediction, SimulatedGpu, predicted
from memfit.backends.readings import Reading, steady_readings
from memfit.cards import is_rehearsed
from memfit.errors import UnknownDeviceError, UsageError
from memfit.memory import oom
from memfit.memory.release import release, release_down_to
from memfit.memory.restore import preserved
from memfit.records import Capacity, DeviceProcess, Outcome, Precision, Source, Trial
from memfit.step.runner import PreparedStep
from memfit.step.training_step import TrainingStep
from memfit.step.unfilled import UnfilledWeights
from memfit.units import format_bytes

__all__ = ["CudaBackend"]

# A library that failed while less than this share was in use did not fail because of memory.
_NEARLY_FULL_SHARE = 0.8

_Returned = TypeVar("_Returned")


class CudaBackend:
    """Tries training steps on a GPU of this machine.

    Args:
        device: Which GPU: `cuda` for the current one, or `cuda:1`.
        memory_bytes: A cap on what the caching allocator may reserve, to emulate a smaller card;
            `None` for what the GPU has free.
        counterpart: From the device's name and its room to its simulation; `None` for a search
            without a prediction.

    Raises:
        UnknownDeviceError: There is no such GPU.
        UsageError: `memory_bytes` is more than the GPU has free.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        memory_bytes: int | None = None,
        counterpart: Callable[[str, Capacity], SimulatedGpu] | None = None,
    ) -> None:
        num_devices = torch.cuda.device_count()
        if num_devices == 0:
            raise UnknownDeviceError(
                f"There is no GPU for {str(device)!r}: torch {torch.__version__} sees none on this "
                "machine; give --device cpu."
            )
        index: int | None = device.index
        if index is None:
            index = torch.cuda.current_device()
        if index >= num_devices:
            raise UnknownDeviceError(
                f"There is no {str(device)!r}: the last GPU here is cuda:{num_devices - 1}."
            )
        self._device = torch.device("cuda", index)
        self._memory_bytes = memory_bytes
        # A rehearsed card has torch's own memory, and no time of its own.
        self._is_there = not is_rehearsed()
        self._source = Source.MEASURED if self._is_there else Source.REHEARSED
        self._counterpart = counterpart
        self._stack = contextlib.ExitStack()
        self._step: TrainingStep | None = None
        self._prepared: PreparedStep | None = None
        release(self._device)
        self._capacity = _capacity(self._device, memory_bytes)

    @property
    def device_name(self) -> str:
        """What reports call the device."""
        return torch.cuda.get_device_name(self._device)

    @property
    def source(self) -> Source:
        """What its figures are."""
        return self._source

    @property
    def auto_precision(self) -> Precision:
        """What `Precision.AUTO` means on this GPU: bf16 where it is in the hardware, else fp16."""
        with torch.cuda.device(self._device):
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Precision.AMP_BF16 if has_bf16 else Precision.AMP_FP16

    @property
    def environment(self) -> tuple[str, ...]:
        """What trials ran with that a training script has to be given: nothing."""
        return ()

    @property
    def has_retries(self) -> bool:
        """Whether a step can fit only after the allocator gave back its cache and asked again."""
        return True

    @property
    def takes_ranks(self) -> bool:
        """Whether a trial can be one rank of many."""
        return False

    def capacity(self) -> Capacity:
        """Return how many bytes a training step may use, and where that figure comes from."""
        return self._capacity

    def trial(self, step: TrainingStep, batch_size: int) -> Trial:
        """Try one batch size on the GPU.

        Args:
            step: What to train; its precision is chosen.
            batch_size: Samples in each micro-batch, at least 1.

        Returns:
            How it ended, in the caching allocator's own figures.
        """
        prepared = self._prepared_for(step)
        if isinstance(prepared, str):
            return self._ran_out_before(step, batch_size, message=prepared)
        attempt = self._attempt(prepared, batch_size)
        if attempt.is_suspected and not self._is_memory(prepared, attempt):
            # Memory was not the cause, so the same error is raised again.
            attempt = self._attempt(prepared, batch_size, suspects_are_errors=True)
        if not prepared.is_rank:
            return attempt.trial
        # Shards cannot be made whole again, so a rank's model is used for one trial.
        self.__exit__()
        return dataclasses.replace(attempt.trial, left_behind_bytes=None)

    def needed_bytes(self, step: TrainingStep, batch_size: int) -> int | None:
        """Return what a batch size that did not fit takes without the cap, if it fits then."""
        if self._memory_bytes is None:
            return None
        # Without the cap from the start: the weights alone may be what is too large.
        self.__exit__()
        cap, self._memory_bytes = self._memory_bytes, None
        try:
            roomier = self.trial(step, batch_size)
        finally:
            self.__exit__()
            self._memory_bytes = cap
        return roomier.peak_reserved_bytes if roomier.fits else None

    def call(
        self, function: Callable[..., _Returned], step: TrainingStep, *arguments: Any
    ) -> _Returned:
        """Call a function in this process; see `Backend.call`."""
        return function(self, step, *arguments)

    def prediction(self, step: TrainingStep) -> Prediction:
        """Simulate where the edge of a step is.

        Args:
            step: What to train; its precision is chosen.
        """
        return predicted(self.simulated_counterpart(), step)

    def simulated_counterpart(self) -> SimulatedGpu | None:
        """Return the simulation of this GPU, with the room that it has now."""
        if self._counterpart is None:
            return None
        return self._counterpart(self.device_name, self._capacity)

    def __enter__(self) -> CudaBackend:
        """Return the backend."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Put the user's objects back, lift the cap, and give all memory back."""
        self._prepared = self._step = None
        try:
            self._stack.close()
        finally:
            release(self._device)

    def _prepared_for(self, step: TrainingStep) -> PreparedStep | str:
        """Return the step on the device, or how torch says that not even its weights fit there."""
        if self._prepared is not None and self._step is step:
            return self._prepared
        self.__exit__()
        torch.cuda.reset_peak_memory_stats(self._device)
        self._stack.enter_context(torch.cuda.device(self._device))
        self._stack.enter_context(_capped(self._device, self._memory_bytes))
        kept = self._stack.enter_context(
            preserved(*step.live_modules, optimizer=step.live_optimizer)
        )
        try:
            with contextlib.nullcontext() if self._is_there else UnfilledWeights():
                prepared = step.prepare(self._device)
        except Exception as error:
            if oom.classify(error) is not oom.Likelihood.CERTAIN:
                raise
            return oom.first_line(error)
        self._prepared, self._step = prepared, step
        kept.release_replaced()
        return prepared

    def _ran_out_before(self, step: TrainingStep, batch_size: int, *, message: str) -> Trial:
        """Return the trial of a step whose weights found no room."""
        peak = _peaks(self._device, 0.0)
        self.__exit__()
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.OUT_OF_MEMORY,
            source=self._source,
            peak_requested_bytes=peak.requested_bytes,
            peak_allocated_bytes=peak.allocated_bytes,
            peak_reserved_bytes=peak.reserved_bytes,
            num_micro_batches=step.num_micro_batches,
            message=message,
        )

    def _attempt(
        self, prepared: PreparedStep, batch_size: int, *, suspects_are_errors: bool = False
    ) -> _Attempt:
        device = self._device
        held_bytes = release(device)
        torch.cuda.reset_peak_memory_stats(device)
        num_retries = _stat(device, "num_alloc_retries")
        readings: list[Reading] = []

        def measured(iterate: Callable[[], None]) -> Reading:
            reading = _measured(device, iterate)
            # With retries, the next iteration can run out although this one has not.
            has_retries = _stat(device, "num_alloc_retries") > num_retries
            if has_retries or not self._is_there:
                calls = _stat(device, "num_device_alloc") + _stat(device, "num_device_free")
                reading = dataclasses.replace(reading, num_device_calls=calls)
            readings.append(reading)
            return reading

        grows = is_suspected = False
        message = None
        try:
            prepared.begin()
            _, grows = steady_readings(prepared, batch_size, measured)
        except Exception as error:
            verdict = oom.classify(error)
            is_suspected = verdict is oom.Likelihood.SUSPECTED
            if verdict is oom.Likelihood.NO or (is_suspected and suspects_are_errors):
                raise
            message = oom.first_line(error)
        finally:
            prepared.end()
        # Only here, out of the except block, are the failed step's tensors gone.
        peak = _peaks(device, 0.0)
        left_bytes = release_down_to(device, held_bytes) - held_bytes
        trial = Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if message is None else Outcome.OUT_OF_MEMORY,
            source=self._source,
            peak_requested_bytes=peak.requested_bytes,
            peak_allocated_bytes=peak.allocated_bytes,
            peak_reserved_bytes=peak.reserved_bytes,
            num_alloc_retries=_stat(device, "num_alloc_retries") - num_retries,
            num_iterations=len(readings),
            step_seconds=readings[-1].seconds if readings and self._is_there else None,
            num_micro_batches=prepared.num_micro_batches,
            left_behind_bytes=max(0, left_bytes),
            peak_grows=grows and message is None,
            peak_varies=prepared.peak_varies,
            message=message,
        )
        return _Attempt(trial=trial, is_suspected=is_suspected)

    def _is_memory(self, prepared: PreparedStep, attempt: _Attempt) -> bool:
        """Whether a suspected failure goes away with more room, or at least with less to hold."""
        batch_size = attempt.trial.batch_size
        peak = attempt.trial.peak_reserved_bytes or 0
        is_nearly_full = peak >= _NEARLY_FULL_SHARE * self._capacity.usable_bytes
        if prepared.is_rank:
            # What a rank holds of the failed trial would be in the way of another one.
            return is_nearly_full
        if self._memory_bytes is not None:
            with _capped(self._device, None):
                roomier = self._attempt(prepared, batch_size)
            return roomier.trial.fits or not roomier.is_suspected
        if batch_size == 1 or not is_nearly_full:
            return False
        return self._attempt(prepared, batch_size // 2).trial.fits


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Attempt:
    trial: Trial
    is_suspected: bool


def _measured(device: torch.device, iterate: Callable[[], None]) -> Reading:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    iterate()
    end.record()
    torch.cuda.synchronize(device)
    return _peaks(device, start.elapsed_time(end) / 1000)


def _peaks(device: torch.device, seconds: float) -> Reading:
    return Reading(
        reserved_bytes=_stat(device, "reserved_bytes.all.peak"),
        allocated_bytes=_stat(device, "allocated_bytes.all.peak"),
        requested_bytes=_stat(device, "requested_bytes.all.peak"),
        seconds=seconds,
    )


def _stat(device: torch.device, name: str) -> int:
    return int(torch.cuda.memory_stats(device).get(name, 0))


@contextlib.contextmanager
def _capped(device: torch.device, memory_bytes: int | None) -> Iterator[None]:
    """Cap what the caching allocator may reserve, and put the cap back as it was."""
    before = torch.cuda.get_per_process_memory_fraction(device)
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    fraction = 1.0 if memory_bytes is None else min(1.0, memory_bytes / total_bytes)
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def _capacity(device: torch.device, memory_bytes: int | None) -> Capacity:
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    left_bytes = free_bytes + torch.cuda.memory_reserved(device)
    others = _other_processes(device)
    if memory_bytes is None:
        usable_bytes, origin = left_bytes, "free on the device"
    elif memory_bytes > left_bytes:
        held = "".join(f"; {other.name} (pid {other.pid}) is on it too" for other in others)
        raise UsageError(
            f"A cap of {format_bytes(memory_bytes)} is more than {device} has free. "
            f"Give at most {format_bytes(left_bytes)}{held}."
        )
    else:
        usable_bytes, origin = memory_bytes, "the cap that was asked for"
    return Capacity(
        usable_bytes=usable_bytes,
        total_bytes=total_bytes,
        origin=origin,
        other_processes=others,
    )


def _other_processes(device: torch.device) -> tuple[DeviceProcess, ...]:
    """Return the other processes that hold memory of the device, if the driver names them.

    To the driver and to torch, a MIG slice is a device with an identifier of its own.

    Source: NVIDIA's NVML API reference (nvmlDeviceGetHandleByUUID,
        nvmlDeviceGetComputeRunningProcesses).
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handle = _nvml_handle(str(torch.cuda.get_device_properties(device).uuid))
        if handle is None:
            return ()
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()
    own = psutil.Process().pid
    return tuple(
        DeviceProcess(pid=entry.pid, name=_process_name(entry.pid), used_bytes=entry.usedGpuMemory)
        for entry in running
        if entry.pid != own
    )


def _nvml_handle(uuid: str) -> object | None:
    import pynvml

    for prefix in ("GPU-", "MIG-"):
        with contextlib.suppress(pynvml.NVMLError):
            return pynvml.nvmlDeviceGetHandleByUUID(f"{prefix}{uuid}")  # type: ignore[no-any-return]
    return None


def _process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "a process of another container or user"

"""Where a trial runs: the protocol that the search relies on, and the choice of a backend.

Every backend measures the same way: `steady_readings` repeats the training step until its peak has
settled, with readings that the backend takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import torch

from memfit.errors import UnknownDeviceError
from memfit.records import Capacity, Precision, Trial
from memfit.workload import PreparedStep, TrainingStep

__all__ = ["Backend", "Reading", "open_backend", "steady_readings"]

_MIN_ITERATIONS = 2
_MAX_ITERATIONS = 6
# Two peaks agree when they differ by no more than this share; allocators round and pages wobble.
_AGREEMENT_SHARE = 0.01


class Backend(Protocol):
    """A device that training steps can be tried on.

    A backend is a context manager: leaving it gives everything back and puts the user's objects
    back as they were, however it is left.
    """

    @property
    def device_name(self) -> str:
        """What reports call the device."""
        ...

    @property
    def auto_precision(self) -> Precision:
        """What `Precision.AUTO` means on this device."""
        ...

    def capacity(self) -> Capacity:
        """Return how many bytes a training step may use, and where that figure comes from."""
        ...

    def trial(self, step: TrainingStep, batch_size: int) -> Trial:
        """Try one batch size.

        Args:
            step: What to train; its precision is chosen.
            batch_size: Samples in each micro-batch, at least 1.

        Returns:
            How it ended. Out of memory is an outcome; any other error is raised as it came.
        """
        ...

    def __enter__(self) -> Backend: ...

    def __exit__(self, *exc_info: object) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one iteration took.

    Args:
        reserved_bytes: Peak of what was taken of the device's capacity.
        allocated_bytes: Peak of what was handed out of that.
        requested_bytes: Peak of what tensors asked for; `None` where it is not known.
        seconds: How long the iteration took.
    """

    reserved_bytes: int
    allocated_bytes: int
    requested_bytes: int | None
    seconds: float


def steady_readings(
    prepared: PreparedStep, batch_size: int, measured: Callable[[Callable[[], None]], Reading]
) -> tuple[tuple[Reading, ...], bool]:
    """Iterate a training step until the peaks of the last two iterations agree.

    The optimizer's state appears in the first step and is at the peak from the second iteration on,
    so a growth by that state is expected and settles nothing and excuses nothing else.

    Args:
        prepared: The step, begun.
        batch_size: Samples in each micro-batch.
        measured: Runs one iteration and reads what it took.

    Returns:
        The readings, and whether the peak still grew when the iterations were used up.
    """
    readings: list[Reading] = []
    grows = True
    while grows and len(readings) < _MAX_ITERATIONS:
        state_bytes = prepared.optimizer_state_bytes
        readings.append(measured(lambda: prepared.iterate(batch_size)))
        if len(readings) >= _MIN_ITERATIONS:
            growth = readings[-1].reserved_bytes - readings[-2].reserved_bytes
            expected = state_bytes if len(readings) == _MIN_ITERATIONS else 0
            grows = growth > expected + _AGREEMENT_SHARE * readings[-1].reserved_bytes
    return tuple(readings), grows


def open_backend(
    device: str | torch.device | None, *, memory_bytes: int | None = None, headroom: float = 0.05
) -> Backend:
    """Choose the backend for a device.

    Args:
        device: `"cuda"`, `"cuda:1"` or `"cpu"`; `None` for the first GPU, or else the CPU.
        memory_bytes: What the training step may use; `None` for what the device has left.
        headroom: Share of a CPU's memory that stays out of reach when `memory_bytes` is `None`.

    Returns:
        A backend to enter.

    Raises:
        UnknownDeviceError: No such device here, or none that memfit can measure on.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UnknownDeviceError(
            f"{str(device)!r} is not a device: give cpu, cuda or cuda:0."
        ) from error
    if chosen.type == "cuda":
        from memfit.backends.cuda import CudaBackend

        return CudaBackend(chosen, memory_bytes=memory_bytes)
    if chosen.type == "cpu":
        from memfit.backends.cpu import CpuBackend

        return CpuBackend(memory_bytes=memory_bytes, headroom=headroom)
    raise UnknownDeviceError(
        f"memfit cannot measure on {str(device)!r}: give cpu, or cuda for NVIDIA and AMD GPUs."
    )

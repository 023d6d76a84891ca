"""Where a trial runs: the protocol that the search relies on, and the choice of a backend."""

from __future__ import annotations

import sys
from typing import Protocol

import torch

from memfit.errors import UnknownDeviceError, UnsupportedError
from memfit.records import Capacity, Precision, Trial
from memfit.step.workload import TrainingStep

__all__ = ["Backend", "open_backend"]


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

    @property
    def environment(self) -> tuple[str, ...]:
        """What trials ran with that a training script has to be given, as NAME=value."""
        ...

    @property
    def has_retries(self) -> bool:
        """Whether a step can fit only after the allocator gave back its cache and asked again."""
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

    def needed_bytes(self, step: TrainingStep, batch_size: int) -> int | None:
        """Return the peak reserved bytes of a batch size that did not fit.

        Args:
            step: What to train.
            batch_size: A batch size that ran out.

        Returns:
            What it takes where there is more room than was allowed; `None` where there is not.
        """
        ...

    def __enter__(self) -> Backend: ...

    def __exit__(self, *exc_info: object) -> None: ...


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
        if sys.platform != "linux":
            raise UnsupportedError(
                "Trials on a CPU need Linux, whose memory limit (RLIMIT_DATA) they run under, and "
                f"this is {sys.platform}: run memfit in Linux, or in a Linux container."
            )
        from memfit.backends.cpu.backend import CpuBackend

        return CpuBackend(memory_bytes=memory_bytes, headroom=headroom)
    raise UnknownDeviceError(
        f"memfit cannot measure on {str(device)!r}: give cpu, or cuda for NVIDIA and AMD GPUs."
    )

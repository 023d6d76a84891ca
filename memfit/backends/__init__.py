"""Where a trial runs: the choice of a backend."""

from __future__ import annotations

import sys

import torch

from memfit.backends.protocol import Backend, Prediction, SimulatedGpu, with_precision
from memfit.errors import UnknownDeviceError, UnsupportedError
from memfit.records import Capacity

__all__ = [
    "Backend",
    "Prediction",
    "SimulatedGpu",
    "open_backend",
    "simulated_counterpart",
    "with_precision",
]


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

        return CudaBackend(chosen, memory_bytes=memory_bytes, counterpart=simulated_counterpart)
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


def simulated_counterpart(device_name: str, capacity: Capacity) -> SimulatedGpu:
    """Return the simulation of a GPU that is there.

    Args:
        device_name: As torch prints it.
        capacity: The room that it has now.
    """
    from memfit.backends.simulated import SimulatedBackend
    from memfit.cards import gpu_like

    card = gpu_like(device_name, total_bytes=capacity.total_bytes)
    return SimulatedBackend(card, memory_bytes=capacity.usable_bytes)

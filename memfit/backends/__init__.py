"""Backends, which run trials, and the choice of one."""

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
    "device_of",
    "open_backend",
    "simulated_counterpart",
    "with_precision",
]


def open_backend(
    device: str | torch.device | None, *, memory_bytes: int | None = None, headroom: float = 0.05
) -> Backend:
    """Choose the backend for a device.

    Args:
        device: `"cuda"`, `"cuda:1"` or `"cpu"`; `None` for the first GPU, or the CPU if there is
            no GPU.
        memory_bytes: Bytes that the training step may use; `None` for all that the device has
            left.
        headroom: The share of a CPU's memory that is kept free when `memory_bytes` is `None`.

    Returns:
        A backend, which is a context manager.

    Raises:
        UnknownDeviceError: There is no such device here, or memfit cannot measure on it.
    """
    chosen = device_of(device)
    if chosen.type == "cuda":
        from memfit.backends.cuda import CudaBackend

        return CudaBackend(chosen, memory_bytes=memory_bytes, counterpart=simulated_counterpart)
    if sys.platform != "linux":
        raise UnsupportedError(
            "Trials on a CPU need Linux, because they run under its memory limit "
            f"(RLIMIT_DATA), but this is {sys.platform}. Run memfit on Linux or in "
            "a Linux container."
        )
    from memfit.backends.cpu.backend import CpuBackend

    return CpuBackend(memory_bytes=memory_bytes, headroom=headroom)


def device_of(device: str | torch.device | None) -> torch.device:
    """Return a device of this machine by its name.

    Args:
        device: `"cuda"`, `"cuda:1"` or `"cpu"`; `None` for the first GPU, or the CPU if there is
            no GPU.

    Raises:
        UnknownDeviceError: There is no such device here, or memfit cannot measure on it.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        hint = "; a GPU is called cuda" if str(device).lower().startswith("gpu") else ""
        raise UnknownDeviceError(
            f"{str(device)!r} is not a device: give cpu, cuda or cuda:0{hint}."
        ) from error
    if chosen.type not in ("cpu", "cuda"):
        raise UnknownDeviceError(
            f"memfit cannot measure on {str(device)!r}: give cpu, or cuda for NVIDIA and AMD GPUs."
        )
    if chosen.type == "cpu" and chosen.index:
        raise UnknownDeviceError(f"There is no {str(device)!r}: give cpu, which is all processors.")
    num_devices = torch.cuda.device_count() if chosen.type == "cuda" else 0
    if chosen.type == "cuda" and num_devices == 0:
        raise UnknownDeviceError(
            f"There is no GPU for {str(device)!r}: torch {torch.__version__} sees none on this "
            "machine; give --device cpu."
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= num_devices:
        raise UnknownDeviceError(
            f"There is no {str(device)!r}: the last GPU here is cuda:{num_devices - 1}."
        )
    return chosen


def simulated_counterpart(device_name: str, capacity: Capacity) -> SimulatedGpu:
    """Return the simulation of a GPU of this machine.

    Args:
        device_name: The name of the GPU, as torch prints it.
        capacity: The memory that it has for a step now.
    """
    from memfit.backends.simulated import SimulatedBackend
    from memfit.cards import gpu_like

    card = gpu_like(device_name, total_bytes=capacity.total_bytes)
    return SimulatedBackend(card, memory_bytes=capacity.usable_bytes)

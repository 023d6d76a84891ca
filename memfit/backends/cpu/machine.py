"""The machine's processor, and the memory that it has left.

This module sets no limits. It runs on every system, and reads Linux's files if they exist.
"""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

import psutil
import torch

from memfit.records import Capacity, Precision

__all__ = ["UnlimitedCpu", "cpu_name", "memory_left"]


def memory_left() -> tuple[int, str]:
    """Return the bytes that this process can still get, and the source of that figure."""
    left, origin = psutil.virtual_memory().available, "memory available on this machine"
    for limit, used in _control_groups():
        if limit - used < left:
            left, origin = max(limit - used, 0), "memory left in this control group"
    return left, origin


def _control_groups(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """Return (limit, used) in bytes of each control group that limits this process.

    Cached pages of files that the kernel can drop do not count as used.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group == base.parent:
                break
            with contextlib.suppress(OSError, ValueError):
                # "max" is not a number. It means no limit.
                limit = int((group / names[0]).read_text())
                used = int((group / names[1]).read_text())
                found.append((limit, used - _stat(group / "memory.stat", names[2])))
    return found


def _stat(path: Path, key: str) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def cpu_name() -> str:
    """Return the name of the CPU in reports."""
    threads = torch.get_num_threads()
    return f"CPU ({_processor_name()}, {threads} thread{'s' if threads != 1 else ''})"


def _processor_name() -> str:
    """Return the processor's name from Linux, or the name of the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


class UnlimitedCpu:
    """The CPU for a step that runs in this process without a limit."""

    @property
    def device_name(self) -> str:
        """The name of the CPU in reports."""
        return cpu_name()

    @property
    def auto_precision(self) -> Precision:
        """The precision that `Precision.AUTO` stands for on a CPU."""
        return Precision.FP32

    def capacity(self) -> Capacity:
        """Return how many bytes a step may use, which is all that is left."""
        left_bytes, origin = memory_left()
        total_bytes = psutil.virtual_memory().total
        return Capacity(usable_bytes=left_bytes, total_bytes=total_bytes, origin=origin)

"""What this machine is to a process: its processor, and the memory that is left.

Nothing here limits anything, and all of it runs on every system: Linux's files are read where they
are.
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
    """Return the bytes that this process can still have, and who says so."""
    left, origin = psutil.virtual_memory().available, "memory available on this machine"
    for limit, used in _control_groups():
        if limit - used < left:
            left, origin = max(limit - used, 0), "memory left in this control group"
    return left, origin


def _control_groups(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """Return (limit, used) in bytes of each control group that limits this process.

    Pages of files that can be dropped do not count as used.

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
                # "max" is no number, and so no limit.
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
    """Return what reports call the CPU."""
    threads = torch.get_num_threads()
    return f"CPU ({_processor_name()}, {threads} thread{'s' if threads != 1 else ''})"


def _processor_name() -> str:
    """Return the processor's name as Linux has it, or the architecture's."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


class UnlimitedCpu:
    """The CPU as a place where a step runs in this process, under no limit."""

    @property
    def device_name(self) -> str:
        """What reports call it."""
        return cpu_name()

    @property
    def auto_precision(self) -> Precision:
        """What `Precision.AUTO` means on a CPU."""
        return Precision.FP32

    def capacity(self) -> Capacity:
        """Return how many bytes a step may use: what is left."""
        left_bytes, origin = memory_left()
        total_bytes = psutil.virtual_memory().total
        return Capacity(usable_bytes=left_bytes, total_bytes=total_bytes, origin=origin)

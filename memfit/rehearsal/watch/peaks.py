"""Peaks of the caching allocator for each part of a script, without a change that it can see.

torch keeps one peak since the start of the process or the last reset. To get a peak for each part,
the watch resets it at each part. A script that reads the peak (`torch.cuda.max_memory_allocated`
and similar functions) gets the highest peak since the script's own last reset. This is the number
that it would get without the watch.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from .internals import Internals

__all__ = ["FIGURES", "Peaks"]

FIGURES = ("requested_bytes", "allocated_bytes", "reserved_bytes")
"""torch's names of the peaks that are reported."""


class Peaks:
    """The peaks of every device of a process.

    Args:
        torch: The module torch.
        internals: torch's private functions.
    """

    def __init__(self, torch: ModuleType, internals: Internals) -> None:
        self._torch = torch
        self._internals = internals
        self._read = internals.read_stats
        self._reset = internals.reset_peaks
        self._unseen: dict[int, dict[str, int]] = {}
        self._earlier: dict[int, dict[str, Any]] = {}
        self._num_devices: int | None = None

    def install(self) -> None:
        """Give scripts the peaks that they would get without the watch."""
        if self._read is not None and self._reset is not None:
            self._internals.replace_stats(self._seen_stats, self._seen_reset)

    def take(self) -> dict[int, dict[str, int]]:
        """Return the peaks of each used device since the last call, and reset them.

        Returns:
            For each device, `FIGURES` and `num_alloc_retries`. The retries are counted from the
            beginning.
        """
        if not self._torch.cuda.is_initialized() or self._read is None or self._reset is None:
            return {}
        if self._num_devices is None:
            self._num_devices = self._torch.cuda.device_count()
        taken = {}
        for device in range(self._num_devices):
            stats = self._read(device)
            figures = self._with_unseen(device, stats)
            if not figures["reserved_bytes"]:
                continue
            taken[device] = {**figures, "num_alloc_retries": stats["num_alloc_retries"]}
            self._earlier[device] = _merged(stats, self._earlier.get(device))
            self._unseen.pop(device, None)
            self._reset(device)
        return taken

    def _with_unseen(self, device: int, stats: dict[str, Any]) -> dict[str, int]:
        unseen = self._unseen.get(device, {})
        return {name: max(stats[name]["all"]["peak"], unseen.get(name, 0)) for name in FIGURES}

    def _seen_stats(self, device: int) -> Any:
        assert self._read is not None
        return _merged(self._read(device), self._earlier.get(device))

    def _seen_reset(self, device: int) -> None:
        assert self._read is not None
        assert self._reset is not None
        # The peak until now still counts for the current part of the script.
        self._unseen[device] = self._with_unseen(device, self._read(device))
        self._earlier.pop(device, None)
        self._reset(device)


def _merged(stats: dict[str, Any], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Return statistics with the higher peaks of the two."""
    if earlier is None:
        return stats
    merged: dict[str, Any] = {}
    for name, value in stats.items():
        before = earlier.get(name)
        if isinstance(value, dict):
            merged[name] = _merged(value, before if isinstance(before, dict) else None)
        elif name == "peak" and isinstance(before, int):
            merged[name] = max(value, before)
        else:
            merged[name] = value
    return merged

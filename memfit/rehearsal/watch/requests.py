"""Records every request of a process to torch's allocator, for a forecast of other batch sizes.

No stack is recorded, so this takes little time. `memfit.rehearsal.forecast` reads the file.
"""

from __future__ import annotations

import pickle
import time

from .internals import Internals
from .journal import Journal

__all__ = ["Requests"]

_KEPT = ("action", "addr", "size", "time_us")


class Requests:
    """The requests from the moment at which the device was initialised.

    Args:
        internals: torch's private functions.
        journal: The report. The requests are written to a file beside it.
    """

    def __init__(self, internals: Internals, journal: Journal) -> None:
        self._internals = internals
        self._journal = journal
        self._step_ends: list[int] = []

    def begin(self) -> None:
        """Begin to record."""
        self._internals.record_requests()

    def step_ends(self) -> None:
        """Take note that an optimizer's step has ended."""
        self._step_ends.append(time.time_ns())

    def keep(self) -> None:
        """Write what was recorded, and when each step ended."""
        traces = self._internals.history()["device_traces"]
        content = {
            "step_ends_ns": self._step_ends,
            "traces": [
                [{name: entry[name] for name in _KEPT if name in entry} for entry in trace]
                for trace in traces
            ],
        }
        self._journal.write_beside(".requests", pickle.dumps(content))

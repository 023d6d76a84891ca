"""Python's garbage collector, kept away from where it costs much and can find nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["collector_paused"]


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Keep the collector from walking what is just being made, again and again.

    It sets out whenever enough objects are new, and while modules are imported or blocks of a
    simulated card laid out all of them are, and stay.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

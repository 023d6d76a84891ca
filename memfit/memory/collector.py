"""Python's garbage collector, kept away from where it costs much and can find nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["collector_paused", "old_objects_set_aside"]


@contextlib.contextmanager
def collector_paused(*, for_good: bool = False) -> Iterator[None]:
    """Pause the garbage collector while many objects are made that all stay.

    The collector runs whenever there are enough new objects. While modules are imported or a
    simulation is replayed, it would walk over the same living objects again and again.

    Args:
        for_good: What is made stays as long as the process. It joins the oldest generation at once.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good and not gc.get_freeze_count():
            gc.freeze()
            gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """Pause the collector, and have `gc.collect` in the block look only at what is made there.

    Where the user has frozen objects, those stay frozen and the others are looked at each time:
    Python can only set all objects free together.
    """
    with collector_paused():
        if gc.get_freeze_count():
            yield
            return
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()

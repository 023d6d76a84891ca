"""Pauses Python's garbage collector where it takes much time and finds nothing to free."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["collector_paused", "old_objects_set_aside"]

# Python 3.12 freezes some of its own objects when it starts: 375 were seen with 3.12.1. A user who
# freezes has many more.
_MOST_OF_PYTHONS_OWN = 1000


@contextlib.contextmanager
def collector_paused(*, for_good: bool = False) -> Iterator[None]:
    """Pause the garbage collector while many objects are made that all stay alive.

    The collector runs whenever there are enough new objects. While modules are imported or a
    simulation is replayed, it would walk over the same living objects again and again.

    Args:
        for_good: The objects stay alive until the process ends. They join the oldest generation at
            once.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if for_good and not _has_frozen():
            gc.freeze()
            gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """Pause the collector. In the block, `gc.collect` looks only at objects made in the block.

    If the user has frozen objects with `gc.freeze`, they stay frozen. Then `gc.collect` looks at
    all other objects each time, because Python can only unfreeze all objects together.
    """
    with collector_paused():
        if _has_frozen():
            yield
            return
        gc.freeze()
        try:
            yield
        finally:
            gc.unfreeze()


def _has_frozen() -> bool:
    """Whether the user has frozen objects with `gc.freeze`."""
    return gc.get_freeze_count() > _MOST_OF_PYTHONS_OWN

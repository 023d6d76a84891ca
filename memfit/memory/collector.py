"""Python's garbage collector, kept away from where it costs much and can find nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["collector_paused"]


@contextlib.contextmanager
def collector_paused(*, for_good: bool = False) -> Iterator[None]:
    """Keep the collector from walking what is just being made, again and again.

    It sets out whenever enough objects are new, and while modules are imported or blocks of a
    simulated card laid out all of them are.

    Args:
        for_good: What is made stays, as modules do: it joins the oldest generation at once, and not
            after two more walks.
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

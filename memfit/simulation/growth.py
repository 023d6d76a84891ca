"""Two recordings of the same stretch of a step, at two batch sizes, without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from memfit.records import Action, Event
from memfit.simulation.needs import NeedEvent

__all__ = ["grown", "matches", "with_growth_of"]


def grown(event: Event, other: Event, samples: int) -> tuple[Event, float]:
    """Return an event with what it grows by, seen from the same event at another batch size.

    Args:
        event: The event.
        other: The same event.
        samples: How many samples more `other` has.

    Returns:
        The event, and the bytes that each further sample adds. They are 0 for a `NeedEvent`, which
        knows its growth itself.
    """
    if isinstance(event, NeedEvent):
        return event.grown_like(other, samples), 0
    growth = (other.num_bytes - event.num_bytes) / samples
    return event, int(growth) if growth == int(growth) else growth


def with_growth_of(event: Event, other: Event) -> Event:
    """Return the same event at another batch size, with the growth that is known of the first.

    Args:
        event: The event whose growth is known.
        other: The same event at another batch size.
    """
    if isinstance(event, NeedEvent) and isinstance(other, NeedEvent):
        return dataclasses.replace(other, growth=event.growth)
    return other


def matches(left: Sequence[Event], right: Sequence[Event]) -> bool:
    """Whether two recordings do the same, event by event."""
    if len(left) != len(right):
        return False
    twins: dict[int, int] = {}
    for one, other in zip(left, right, strict=True):
        if (one.action, one.origin) != (other.action, other.origin):
            return False
        if one.action is Action.FREE_COMPLETED:
            if twins.get(one.id, other.id) != other.id:
                return False
        else:
            twins[one.id] = other.id
    return True

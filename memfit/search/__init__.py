"""The largest batch size for which a trial fits. It knows no torch."""

from __future__ import annotations

from memfit.search.extrapolate import further
from memfit.search.headroom import (
    Recommended,
    checked_headroom,
    foreseen,
    has_headroom,
    larger,
    leaves_much_more,
    limit_of,
    recommended,
)
from memfit.search.largest import DEFAULT_CEILING, Found, find_largest

__all__ = [
    "DEFAULT_CEILING",
    "Found",
    "Recommended",
    "checked_headroom",
    "find_largest",
    "foreseen",
    "further",
    "has_headroom",
    "larger",
    "leaves_much_more",
    "limit_of",
    "recommended",
]

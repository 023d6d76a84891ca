"""The largest batch size for which a trial fits. It knows no torch."""

from __future__ import annotations

from memfit.search.largest import (
    DEFAULT_CEILING,
    Found,
    Recommended,
    find_largest,
    has_headroom,
    limit_of,
    recommended,
)

__all__ = [
    "DEFAULT_CEILING",
    "Found",
    "Recommended",
    "find_largest",
    "has_headroom",
    "limit_of",
    "recommended",
]

"""Where memfit keeps files for one user between runs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return memfit's folder in the user's cache. It may not exist yet.

    Source: https://specifications.freedesktop.org/basedir-spec/latest/
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"  # noqa: PTH117
    return root / "memfit"

"""Files that commands write."""

from __future__ import annotations

import os
from pathlib import Path

from memfit.errors import UsageError

__all__ = ["check_writable", "write"]


def check_writable(*paths: Path | None) -> None:
    """Refuse, before any work is done, files that could not be written after it.

    Args:
        *paths: Where to; `None` for what is not asked for.

    Raises:
        UsageError: There is no such folder, or writing there is not allowed.
    """
    for path in paths:
        if path is None:
            continue
        folder = path.parent
        if not folder.is_dir():
            raise UsageError(f"{path} cannot be written: there is no folder {folder}.")
        if not os.access(path if path.exists() else folder, os.W_OK):
            raise UsageError(f"{path} cannot be written: permission denied.")


def write(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.") from error

"""Writes what a watched process sees to a file of its own, one JSON object a line.

A line is in the file when `write` returns. So nothing is lost when the process is killed, crashes
or calls `os._exit`. No file is held open: a script may close what it does not know.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from typing import Any

__all__ = ["Journal"]


class Journal:
    """A process's report.

    Args:
        folder: Where the reports of a rehearsal are kept.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._path: str | None = None

    def restart(self) -> None:
        """Begin another file at the next line: this process is a copy of another."""
        self._path = None

    def write(self, event: str, **fields: Any) -> None:
        """Append a line. What cannot be written is lost: the script goes on.

        Args:
            event: What happened.
            **fields: What is known of it, as plain values.
        """
        line = json.dumps({"event": event, **fields}, separators=(",", ":")) + "\n"
        with contextlib.suppress(OSError):
            handle = os.open(self._named(".jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)

    def write_beside(self, suffix: str, content: bytes) -> None:
        """Write a file that goes with this report, in place of an earlier one.

        Args:
            suffix: What its name ends with, such as `.history`.
            content: All of it.
        """
        path = self._named(suffix)
        with contextlib.suppress(OSError):
            with open(f"{path}.part", "wb") as file:  # noqa: PTH123 - no pathlib in every Python
                file.write(content)
            os.replace(f"{path}.part", path)  # noqa: PTH105 - see above

    def _named(self, suffix: str) -> str:
        if self._path is None:
            name = f"{os.getpid()}-{secrets.token_hex(4)}"
            self._path = os.path.join(self._folder, name)  # noqa: PTH118 - see above
        return self._path + suffix

"""Writes the records of a watched process to its own file, one JSON object for each line.

A line is in the file when `write` returns. So no line is lost if the process is killed, crashes or
calls `os._exit`. No file is kept open, because a script may close files that it did not open.
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
        folder: The folder for the reports of a rehearsal.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._path: str | None = None

    def restart(self) -> None:
        """Begin a new file at the next line, because this process is a fork of another one."""
        self._path = None

    def write(self, event: str, **fields: Any) -> None:
        """Append a line. If it cannot be written, it is lost and the script goes on.

        Args:
            event: The name of the event.
            **fields: Its details, as plain values.
        """
        line = json.dumps({"event": event, **fields}, separators=(",", ":")) + "\n"
        with contextlib.suppress(OSError):
            handle = os.open(self._named(".jsonl"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)

    def write_beside(self, suffix: str, content: bytes) -> None:
        """Write a file that belongs to this report. It replaces an earlier one.

        Args:
            suffix: The end of its name, such as `.history`.
            content: The whole content.
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

"""The answers of a sweep in a file, one in each line, so that an interrupted sweep can go on.

A process that is killed may leave half a line, which is dropped. Answers of other versions of
torch, timm or memfit are not used either.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Generic, TypeVar

from memfit.errors import UsageError
from memfit.records import ChoiceRow, SweepRow

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Journal", "default_path"]

_Row = TypeVar("_Row", SweepRow, ChoiceRow)


def default_path(keys: Iterable[str], versions: Mapping[str, str]) -> Path:
    """Return the file in the user's cache for one question.

    Args:
        keys: The keys of the question's tasks.
        versions: The versions that decide the answers.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    asked = json.dumps([sorted(keys), sorted(versions.items())])
    return root / "memfit" / "sweeps" / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.jsonl"


class Journal(Generic[_Row]):
    """A file of answers, open while a sweep runs.

    Args:
        path: The file; it is made with its folder. `None` keeps nothing.
        kind: The class of the rows that an answer has.
        versions: The versions that decide the answers.

    Raises:
        UsageError: The file cannot be read or written, or it is no journal.
    """

    def __init__(self, path: Path | None, kind: type[_Row], versions: Mapping[str, str]) -> None:
        self._path = path
        self._kind: type[_Row] = kind
        self._versions = dict(versions)
        self._file: IO[str] | None = None
        self.answers: dict[str, tuple[_Row, ...]] = {}

    def __enter__(self) -> Self:
        """Read what is there, and open the file to add to it."""
        if self._path is None:
            return self
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            good = self._read(self._path)
            self._file = self._path.open("r+" if self._path.exists() else "w", encoding="utf-8")
            self._file.seek(good)
            self._file.truncate()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise UsageError(f"{self._path} cannot be used as a journal: {why}.") from error
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def add(self, key: str, answer: tuple[_Row, ...]) -> None:
        """Keep an answer.

        Args:
            key: The key of its task.
            answer: The answer.
        """
        self.answers[key] = answer
        if self._file is not None:
            rows = [row.to_dict() for row in answer]
            line = {"key": key, "versions": self._versions, "rows": rows}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def delete(self) -> None:
        """Delete the file: the sweep is complete."""
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _read(self, path: Path) -> int:
        """Take over the answers of a file, and return where its last whole line ends."""
        if not path.exists():
            return 0
        end = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                read = json.loads(line)
                key, versions, rows = read["key"], read["versions"], read["rows"]
            except (ValueError, KeyError, TypeError):
                if line.endswith(b"\n"):
                    raise UsageError(
                        f"{path} is not the journal of a sweep: it has the line "
                        f"{line[:40].decode(errors='replace')!r}. Give another file."
                    ) from None
                break
            end += len(line)
            if versions == self._versions:
                self.answers[key] = tuple(self._kind.from_dict(row) for row in rows)
        return end

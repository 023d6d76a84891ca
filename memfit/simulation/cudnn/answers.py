"""Keeps cuDNN's answers in memory and in a file, because each question takes some milliseconds.

The file is an SQLite database in the user's cache. Its name has everything that an answer depends
on besides the question: cuDNN's version, the compute capability and torch's settings. A file that
cannot be read is deleted, and cuDNN is asked again. If the file cannot be written, answers are kept
in memory only.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

from memfit.simulation.cudnn.plans import CudnnPlans, PlanSettings, cudnn_plans
from memfit.simulation.cudnn.questions import Convolution
from memfit.user_cache import cache_folder

__all__ = ["Workspaces", "keep_answers", "workspaces_of"]

_SCHEMA: Final = "CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, num_bytes INTEGER)"
_SECONDS_TO_WAIT: Final = 2.0

_log = logging.getLogger(__name__)
_opened: list[Workspaces] = []


class Asked(Protocol):
    """What answers questions (`CudnnPlans`)."""

    def workspace_bytes(self, convolution: Convolution) -> int | None:
        """Return the bytes of a workspace; `None` if there is no plan."""


class Workspaces:
    """Answers of cuDNN for one compute capability, each asked for once.

    Args:
        plans: Answers what is not known yet.
        path: Where answers are kept; `None` for nowhere.
    """

    def __init__(self, plans: Asked, *, path: Path | None) -> None:
        self._plans = plans
        self._path = path
        self._known: dict[str, int | None] = self._read()
        self._new: dict[str, int | None] = {}

    def of(self, convolution: Convolution) -> int | None:
        """Return the workspace of a convolution.

        Args:
            convolution: The question.

        Returns:
            Bytes; `None` if cuDNN has no plan.
        """
        text = convolution.text
        if text not in self._known:
            self._known[text] = self._new[text] = self._plans.workspace_bytes(convolution)
        return self._known[text]

    def keep(self) -> None:
        """Write what was asked since the last time into the file."""
        if self._new:
            self._write(self._new.items())
            self._new = {}

    def _read(self) -> dict[str, int | None]:
        if self._path is None or not self._path.exists():
            return {}
        try:
            with self._opened() as database:
                return dict(database.execute("SELECT question, num_bytes FROM answers"))
        except (sqlite3.Error, OSError) as exc:
            _log.debug("%s cannot be read: %s", self._path, exc)
            with contextlib.suppress(OSError):
                self._path.unlink()
            return {}

    def _write(self, answers: Iterable[tuple[str, int | None]]) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._opened() as database:
                database.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", answers)
        except (sqlite3.Error, OSError) as exc:
            _log.debug("%s cannot be written: %s", self._path, exc)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        assert self._path is not None
        connection = sqlite3.connect(self._path, timeout=_SECONDS_TO_WAIT)
        with contextlib.closing(connection) as database, database:
            database.execute(_SCHEMA)
            yield database


def workspaces_of(compute_capability: tuple[int, int]) -> Workspaces | None:
    """Return the answers of the installed cuDNN for a card.

    Args:
        compute_capability: Such as (8, 6).

    Returns:
        The answers, shared in this process; `None` if cuDNN cannot be asked.
    """
    return _workspaces(compute_capability, PlanSettings.current())


@functools.cache
def _workspaces(compute_capability: tuple[int, int], settings: PlanSettings) -> Workspaces | None:
    plans: CudnnPlans | None = cudnn_plans(compute_capability, settings)
    if plans is None:
        return None
    major, minor = compute_capability
    name = f"{plans.version}-{major}.{minor}-{settings.text}.sqlite"
    opened = Workspaces(plans, path=cache_folder() / "cudnn" / name)
    _opened.append(opened)
    return opened


def keep_answers() -> None:
    """Write what was asked in this process into the files."""
    for workspaces in _opened:
        workspaces.keep()

"""Keeps cuDNN's answers in memory and in a file, because each question takes some milliseconds.

The file is an SQLite database in the user's cache. Its name has everything that an answer depends
on besides the question: cuDNN's version, the compute capability, on Turing and Hopper the
multiprocessors, torch's settings, and whether cuDNN found a driver. A file that cannot be read is
deleted, and cuDNN is asked again. If the file cannot be written, answers are kept in memory only.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sqlite3
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Protocol

from memfit.cards import Gpu
from memfit.simulation.cudnn.plans import ANY_QUESTION, PlanSettings, cudnn_plans
from memfit.simulation.cudnn.questions import Convolution
from memfit.simulation.cudnn.splits import SPLITTING
from memfit.user_cache import cache_folder

__all__ = ["Workspaces", "keep_answers", "workspaces_of"]

_SCHEMA: Final = "CREATE TABLE IF NOT EXISTS answers (question TEXT PRIMARY KEY, num_bytes INTEGER)"
# Changed when cuDNN is asked in another way.
_EDITION: Final = 5
_SECONDS_TO_WAIT: Final = 2.0
# Where plans or their workspaces depend on the number of multiprocessors too
# (`memfit.simulation.cudnn.plans`).
_COUNTS_MULTIPROCESSORS: Final = ((7, 5), SPLITTING, (10, 0), (10, 3))

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
        self._known: dict[str, int | None] = {}
        self._new: dict[str, int | None] = {}
        # The open file, and the process that opened it: a fork must not use it.
        self._reader: tuple[int, sqlite3.Connection | None] | None = None

    def of(self, convolution: Convolution) -> int | None:
        """Return the workspace of a convolution.

        Args:
            convolution: The question.

        Returns:
            Bytes; `None` if cuDNN has no plan.
        """
        text = convolution.text
        if text not in self._known:
            kept = self._looked_up(text)
            if kept is None:
                kept = (self._plans.workspace_bytes(convolution),)
                self._new[text] = kept[0]
            self._known[text] = kept[0]
        return self._known[text]

    def keep(self) -> None:
        """Write what was asked since the last time into the file."""
        if self._new:
            self._write(self._new.items())
            self._new = {}

    def _looked_up(self, text: str) -> tuple[int | None] | None:
        """Return an answer that the file holds; `None` if it does not."""
        database = self._opened_to_read()
        if database is None:
            return None
        try:
            row = database.execute(
                "SELECT num_bytes FROM answers WHERE question = ?", (text,)
            ).fetchone()
        except sqlite3.Error as exc:
            self._give_up(exc)
            return None
        return None if row is None else (row[0],)

    def _opened_to_read(self) -> sqlite3.Connection | None:
        if self._reader is None or self._reader[0] != os.getpid():
            self._reader = (os.getpid(), self._connected())
        return self._reader[1]

    def _connected(self) -> sqlite3.Connection | None:
        if self._path is None or not self._path.exists():
            return None
        try:
            database = sqlite3.connect(
                f"{self._path.absolute().as_uri()}?mode=ro",
                uri=True,
                timeout=_SECONDS_TO_WAIT,
                check_same_thread=False,
            )
        except sqlite3.Error as exc:
            _log.debug("%s cannot be opened: %s", self._path, exc)
            return None
        weakref.finalize(self, database.close)
        return database

    def _give_up(self, exc: sqlite3.Error) -> None:
        """Delete a file that cannot be read, and read no more from it."""
        _log.debug("%s cannot be read: %s", self._path, exc)
        self._reader = (os.getpid(), None)
        if isinstance(exc, sqlite3.OperationalError) or self._path is None:
            return  # It is only busy, or has no table yet.
        with contextlib.suppress(OSError):
            self._path.unlink()

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


def workspaces_of(gpu: Gpu) -> Workspaces | None:
    """Return the answers of the installed cuDNN for a card.

    Args:
        gpu: The card.

    Returns:
        The answers, shared in this process by all cards for which they are the same; `None` if
        cuDNN cannot be asked, or does not know such cards.
    """
    counts = gpu.compute_capability in _COUNTS_MULTIPROCESSORS
    return _workspaces(
        gpu.compute_capability,
        gpu.multiprocessors if counts else None,
        PlanSettings.current(),
    )


@functools.cache
def _workspaces(
    compute_capability: tuple[int, int], multiprocessors: int | None, settings: PlanSettings
) -> Workspaces | None:
    plans = cudnn_plans(compute_capability, settings, multiprocessors=multiprocessors)
    if plans is None:
        return None
    major, minor = compute_capability
    card = f"{major}.{minor}" + ("" if multiprocessors is None else f"-{multiprocessors}")
    driver = "" if plans.has_driver else "-no-driver"
    name = f"{plans.version}-{card}-{settings.text}{driver}-{_EDITION}.sqlite"
    opened = Workspaces(plans, path=cache_folder() / "cudnn" / name)
    _opened.append(opened)
    # A file that has this answer spares a first question, which takes a hundred milliseconds.
    return None if opened.of(ANY_QUESTION) is None else opened


def keep_answers() -> None:
    """Write what was asked in this process into the files."""
    for workspaces in _opened:
        workspaces.keep()

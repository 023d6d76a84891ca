"""The process that rehearses: how it is started, and how it is ended.

A new Python imports torch again, which takes seconds. If torch was imported with the rehearsed
device in front of it, a fork of this process does as well. The command line prepares that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection, Pipe
from typing import Protocol

from memfit.backends.rehearsed.server import serve

__all__ = ["ServerProcess", "end_forked", "fork_ahead", "new_process", "taken"]

_SERVER = "from memfit.backends.rehearsed.server import main; main()"
_ENDING_SECONDS = 5.0


class _Process(Protocol):
    """What is used of `subprocess.Popen`."""

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServerProcess:
    """A process that serves one card after another.

    Args:
        process: The process.
        connection: This side of the connection to it.
    """

    process: _Process
    connection: Connection

    def end(self) -> int | None:
        """End the process; it ends by itself when its connection is gone.

        Returns:
            Its exit code, which is 0 if it ended because of this; `None` if it had to be killed.
        """
        self.connection.close()
        try:
            return self.process.wait(timeout=_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None


class _Fork:
    """A fork of this process, with the methods of `subprocess.Popen` that are used."""

    def __init__(self, theirs: Connection, ours: Connection) -> None:
        fork = multiprocessing.get_context("fork")
        self._process = fork.Process(target=_serve_forked, args=(theirs, ours), daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        """Return the exit code, if it has ended."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end, and return the exit code."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(_SERVER, timeout or 0.0)
        return code

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()


# At most one: the fork that waits for the next question.
_forked: list[ServerProcess] = []


def new_process(environment: Mapping[str, str]) -> ServerProcess:
    """Return a process that rehearses: the fork that waits, or else a new Python.

    Args:
        environment: The variables that put the rehearsed device in front of torch.
    """
    if _forked:
        return _forked.pop()
    ours, theirs = Pipe()
    descriptor = theirs.fileno()
    process = subprocess.Popen(  # noqa: S603 - this interpreter
        [sys.executable, "-c", _SERVER, str(descriptor)],
        env={**os.environ, **environment},
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
    )
    theirs.close()
    return ServerProcess(process=process, connection=ours)


def fork_ahead() -> None:
    """Fork this process, so that the fork rehearses whatever is asked next.

    torch was imported with the rehearsed device in front of it, CUDA is untouched, and this is the
    only thread.
    """
    end_forked()
    ours, theirs = Pipe()
    process = _Fork(theirs, ours)
    theirs.close()
    _forked.append(ServerProcess(process=process, connection=ours))


def taken(server: ServerProcess) -> bool:
    """Take back a fork that serves no card, for the next question; `False` if it is not one."""
    if _forked or not isinstance(server.process, _Fork) or server.process.poll() is not None:
        return False
    _forked.append(server)
    return True


def end_forked() -> None:
    """End the fork that waits, if there is one."""
    while _forked:
        _forked.pop().end()


def _serve_forked(connection: Connection, other_side: Connection) -> None:
    # The end of the connection is noticed only if no copy of the other side is open.
    other_side.close()
    with contextlib.suppress(EOFError, ConnectionError):
        serve(connection)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

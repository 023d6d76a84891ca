"""Reads a process's memory from /proc, limits it with `RLIMIT_DATA`, and forks processes.

`memfit.backends.cpu.server` decides what runs in the forks.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import mmap
import os
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO, NoReturn

from memfit.units import KIB, MIB

__all__ = [
    "Footprint",
    "exit_code_of",
    "fork",
    "fork_as_is",
    "limit_data",
    "limit_works",
    "prepare_to_fork",
    "status_bytes",
]

_OMP_PAUSE_SOFT = 1  # OpenMP's omp.h
_PR_SET_PDEATHSIG = 1  # Linux's prctl.h
_REFUSED = b"refused"


# --- the footprint and its limit ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Footprint:
    """The memory that the kernel counts for this process, in bytes.

    Args:
        data_bytes: Private writable memory that is mapped. `RLIMIT_DATA` limits it.
        anonymous_bytes: Resident memory that does not belong to a file.

    Source: Linux, Documentation/filesystems/proc.rst (VmData, RssAnon).
    """

    data_bytes: int
    anonymous_bytes: int

    @classmethod
    def now(cls) -> Footprint:
        """Return the footprint of this process now."""
        status = status_bytes()
        return cls(status["VmData"], status["RssAnon"])

    @classmethod
    def of(cls, num_bytes: int) -> Footprint:
        """Return the footprint of memory that was written to."""
        return cls(num_bytes, num_bytes)

    def __sub__(self, other: Footprint) -> Footprint:
        return Footprint(
            max(0, self.data_bytes - other.data_bytes),
            max(0, self.anonymous_bytes - other.anonymous_bytes),
        )


def status_bytes() -> dict[str, int]:
    """Return the sizes in /proc/self/status by their names, in bytes."""
    status = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if value.endswith(" kB"):
            status[key] = int(value[:-3]) * KIB
    return status


def limit_data(num_bytes: int | None) -> None:
    """Limit this process's private writable memory. `None` removes the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = hard if num_bytes is None else num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def limit_works() -> bool:
    """Whether this system refuses to map more than `RLIMIT_DATA`. A child process tries it."""

    def overdraw() -> None:
        limit_data(Footprint.now().data_bytes + 16 * MIB)
        try:
            mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            os.write(output.fileno(), _REFUSED)

    with tempfile.TemporaryFile() as output:
        exit_code_of(fork(overdraw, but_keep=output))
        return os.pread(output.fileno(), len(_REFUSED), 0) == _REFUSED


# --- forks --------------------------------------------------------------------------------------


def fork(target: Callable[[], None], *, but_keep: IO[bytes]) -> int:
    """Fork a child that only runs the target. Return its process id.

    Args:
        target: The function that the child runs.
        but_keep: The file that receives the child's output.
    """
    with warnings.catch_warnings():
        prepare_to_fork()
        return fork_as_is(target, but_keep=but_keep)


def exit_code_of(pid: int) -> int | None:
    """Wait until a child has ended.

    Returns:
        Its exit code, or a number below 0 if a signal ended it. `None` if the system did not keep
        the exit code. That is so if this process ignores SIGCHLD.
    """
    with contextlib.suppress(ChildProcessError):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None


def prepare_to_fork() -> None:
    """Flush buffers and end threads, which do not survive a fork. Silences a warning for good."""
    sys.stdout.flush()
    sys.stderr.flush()
    _end_thread_pool()
    # Python warns if there are other threads. A child uses none of its parent's threads.
    warnings.simplefilter("ignore", DeprecationWarning)


def fork_as_is(target: Callable[[], None], *, but_keep: IO[bytes]) -> int:
    """Fork as `fork` does, but from a process that is prepared. The heap is not changed.

    Args:
        target: The function that the child runs.
        but_keep: The file that receives the child's output.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    _run_and_exit(target, parent, but_keep)


def _end_thread_pool() -> None:
    """End this thread's OpenMP pool. The next parallel operation starts it again.

    libgomp's pool does not survive a fork, and the child would wait for threads that do not exist.
    Other OpenMP libraries handle this themselves.

    Source: OpenMP 5.0, section 3.2.44 (omp_pause_resource_all).
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    paths = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if "gomp" in line}
    for path in paths:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(path).omp_pause_resource_all(_OMP_PAUSE_SOFT)


def _run_and_exit(target: Callable[[], None], parent: int, output: IO[bytes]) -> NoReturn:
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            # The user's handler is not meant for these children. If SIGCHLD were ignored, their
            # exit codes would be lost.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # A background process that reads from the terminal would be stopped.
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - lives as long as the process
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            faulthandler.enable(output.fileno())
            target()
            code = 0
    except BaseException:  # noqa: BLE001 - the child writes the error to its output
        os.write(output.fileno(), traceback.format_exc().encode())
    finally:
        os._exit(code)

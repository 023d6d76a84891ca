"""What Linux does for a process: its footprint, its limit, its forks.

Reads /proc, sets `RLIMIT_DATA`, and forks. What is tried in the forks is
`memfit.backends.cpu.server`'s.
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
    """What the kernel counts for this process, in bytes.

    Args:
        data_bytes: Private writable memory, mapped: what `RLIMIT_DATA` limits.
        anonymous_bytes: Resident memory that is no file's.

    Source: Linux, Documentation/filesystems/proc.rst (VmData, RssAnon).
    """

    data_bytes: int
    anonymous_bytes: int

    @classmethod
    def now(cls) -> Footprint:
        """Return the footprint of this process at this moment."""
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
    """Limit this process's private writable memory, or with `None` lift the limit again."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = hard if num_bytes is None else num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def limit_works() -> bool:
    """Whether mapping more than `RLIMIT_DATA` allows is refused here: tried, in a child."""

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
    """Fork a child that runs the target and nothing else; return its process id.

    Args:
        target: What it runs.
        but_keep: Where what it writes goes.
    """
    with warnings.catch_warnings():
        prepare_to_fork()
        return fork_as_is(target, but_keep=but_keep)


def exit_code_of(pid: int) -> int | None:
    """Wait for a child's end.

    Returns:
        Its exit code, or less than 0 for a signal; `None` where the system has thrown it away, as
        it does for a process that ignores SIGCHLD.
    """
    with contextlib.suppress(ChildProcessError):
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return None


def prepare_to_fork() -> None:
    """Let go of what does not survive a fork: buffers, threads. Filters a warning for good."""
    sys.stdout.flush()
    sys.stderr.flush()
    _end_thread_pool()
    # Python warns of any thread. A child uses none of its parent's.
    warnings.simplefilter("ignore", DeprecationWarning)


def fork_as_is(target: Callable[[], None], *, but_keep: IO[bytes]) -> int:
    """Fork as `fork` does, from a process that is prepared, and leave its heap as it is.

    Args:
        target: What the child runs.
        but_keep: Where what it writes goes.
    """
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    _run_and_exit(target, parent, but_keep)


def _end_thread_pool() -> None:
    """End this thread's OpenMP pool; the next parallel operation starts it again.

    libgomp's pool does not survive a fork: the child would wait for threads it does not have. Other
    OpenMP libraries take care of that themselves.

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
            # The user's handler is not meant for these children, and to ignore them loses how they
            # ended.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Outside the terminal's foreground a process that reads from it is stopped.
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - lives as long as the process
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            faulthandler.enable(output.fileno())
            target()
            code = 0
    except BaseException:  # noqa: BLE001 - what a child cannot report it writes down
        os.write(output.fileno(), traceback.format_exc().encode())
    finally:
        os._exit(code)

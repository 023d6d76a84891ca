"""Runs a command as a child process to its end, and ends the processes that it leaves running.

The command reads this process's standard input. A signal that should end this process is passed on
to the command. Between two runs, it ends this process by an exception, so that files are deleted.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import enum
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

import psutil

from memfit.errors import ToldToEnd, UsageError

__all__ = ["Ended", "Output", "check_command", "raising_when_told_to_end", "run_to_end"]

_SET_CHILD_SUBREAPER: Final = 36
_SECONDS_TO_END: Final = 5.0
_TAIL_BYTES: Final = 4000
_ENDING_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Output(enum.Enum):
    """Where a command's output goes.

    `OWN`: where this process's goes. `STANDARD_ERROR`: all of it to standard error. `KEPT`: into a
    file, of which the end is given back.
    """

    OWN = "own"
    STANDARD_ERROR = "standard_error"
    KEPT = "kept"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended.

    Args:
        exit_code: Its exit code; negative for a signal.
        ended_by: The signal that came to end this process, SIGINT first; `None` if none came.
        last_words: The end of its output, if that was kept.
    """

    exit_code: int
    ended_by: signal.Signals | None
    last_words: str


def check_command(command: Sequence[str]) -> None:
    """Refuse a command that cannot be run here.

    Raises:
        UsageError: The command is empty, or there is no program with its name.
    """
    if not command:
        raise UsageError("Name the command to rehearse after --, such as -- python train.py.")
    program = command[0]
    if shutil.which(program) is not None:
        return
    if program.endswith(".py") and Path(program).is_file():
        raise UsageError(f"{program} is not a program. Write -- python {program}.")
    raise UsageError(f"There is no command {program!r} here.")


def run_to_end(
    command: Sequence[str], variables: Mapping[str, str], *, output: Output, folder: Path
) -> Ended:
    """Run a command to its end.

    Args:
        command: The words of the command.
        variables: Its environment.
        output: The destination of its output.
        folder: A folder for a file with its output.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    kept = folder / "output"
    with _adopting() as others, _passing_signals_on() as passed, kept.open("wb") as file:
        child = subprocess.Popen(  # noqa: S603 - the user's own
            list(command),
            env=dict(variables),
            stdout={Output.OWN: None, Output.STANDARD_ERROR: 2, Output.KEPT: file}[output],
            stderr=file if output is Output.KEPT else None,
        )
        passed.child = child
        try:
            exit_code = child.wait()
        finally:
            _end_descendants(others)
    return Ended(
        exit_code=exit_code,
        ended_by=min(passed.seen, key=_ENDING_SIGNALS.index, default=None),
        last_words=_tail(kept),
    )


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")


@contextlib.contextmanager
def _adopting() -> Iterator[frozenset[int]]:
    """Adopt processes that a descendant leaves behind. Yields the children from before."""
    others = frozenset(child.pid for child in psutil.Process().children())
    prctl = ctypes.CDLL(None).prctl
    prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield others
    finally:
        prctl(_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _end_descendants(others: frozenset[int]) -> None:
    left = [
        process
        for child in psutil.Process().children()
        if child.pid not in others
        for process in (child, *_children(child))
    ]
    for ending in (signal.SIGTERM, signal.SIGKILL):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.send_signal(ending)
        _, left = psutil.wait_procs(left, timeout=_SECONDS_TO_END)
        if not left:
            return


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


@dataclasses.dataclass(slots=True)
class _Passed:
    """The signals that came while a command ran."""

    child: subprocess.Popen[bytes] | None = None
    seen: set[signal.Signals] = dataclasses.field(default_factory=set)


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[_Passed]:
    """Let the command end by the signals that are meant to end this process."""
    passed = _Passed()

    def take(number: int, _frame: FrameType | None) -> None:
        # A terminal sends Ctrl-C to the command too. A second Ctrl-C must end it.
        is_told_already = number == signal.SIGINT and _is_in_foreground()
        is_repeated = number in passed.seen
        passed.seen.add(signal.Signals(number))
        if passed.child is not None and (is_repeated or not is_told_already):
            passed.child.send_signal(signal.SIGTERM if is_repeated else number)

    with _handling(_ENDING_SIGNALS, take):
        yield passed


@contextlib.contextmanager
def raising_when_told_to_end() -> Iterator[None]:
    """Raise `ToldToEnd` if a signal comes to end this process and no command runs.

    Raises:
        ToldToEnd: SIGTERM or SIGHUP came. `KeyboardInterrupt` is for SIGINT.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        raise ToldToEnd

    with _handling((signal.SIGTERM, signal.SIGHUP), end):
        yield


@contextlib.contextmanager
def _handling(
    numbers: Sequence[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    # What this process was started to ignore, as by nohup, stays ignored.
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    earlier = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, previous in earlier.items():
            signal.signal(number, previous)


def _is_in_foreground() -> bool:
    try:
        with Path("/dev/tty").open("rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False

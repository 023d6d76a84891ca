"""Runs a command on a rehearsed card, watched, and says what was seen.

The command's own input, output and exit code stay its own. When it has ended, whatever it left
running is ended too, and the files of its reports are gone.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import Any, Final

import psutil

from memfit.cards import Gpu
from memfit.errors import UsageError
from memfit.records import Capacity, Rehearsal, RehearsalEnd, RehearsedProcess
from memfit.rehearsal.journals import Report, read_reports
from memfit.rehearsal.watch.start import SETTINGS

__all__ = ["History", "Rehearsed", "rehearse_command"]

_STARTUP: Final = Path(__file__).parent / "watch" / "startup"
_SET_CHILD_SUBREAPER: Final = 36
_SECONDS_TO_END: Final = 5.0
_SIGNAL_CODES: Final = 128

History = Mapping[str, Any]
"""What a process recorded of one step (`watch.history`)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """A rehearsal, and what was recorded of the process that held most.

    Args:
        rehearsal: What was seen.
        process: Whose history it is; `None` where no device was used.
        history: The allocations of the step that decides; `None` where they were not recorded.
    """

    rehearsal: Rehearsal
    process: RehearsedProcess | None
    history: History | None


def rehearse_command(
    command: Sequence[str],
    gpu: Gpu,
    environment: Mapping[str, str],
    *,
    num_steps: int = 3,
    is_whole: bool = False,
    keeps_history: bool = False,
    is_quiet: bool = False,
) -> Rehearsed:
    """Run a command on a card that is not there.

    Args:
        command: Its words.
        gpu: The card.
        environment: The variables that put it on the card, in place of or beside this process's.
        num_steps: It is ended when its peak has not risen over so many optimizer steps.
        is_whole: It runs to its own end.
        keeps_history: Record the allocations of a step, too.
        is_quiet: What it writes to standard output goes to standard error instead.

    Raises:
        UsageError: There is no such command.
    """
    _check(command)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="memfit-rehearsal-") as name:
        folder = Path(name)
        settings = {
            "folder": name,
            "num_steps": num_steps,
            "is_whole": is_whole,
            "keeps_history": keeps_history,
        }
        exit_code, was_interrupted = _run(
            command, _watched(environment, settings), is_quiet=is_quiet
        )
        reports = read_reports(folder)
        processes = tuple(process for report in reports for process in report.processes)
        rehearsal = Rehearsal(
            command=tuple(command),
            device=gpu.name,
            capacity=Capacity(
                usable_bytes=gpu.usable_bytes,
                total_bytes=gpu.total_bytes,
                origin="the card's total less the CUDA context",
            ),
            context_bytes=gpu.context_bytes,
            end=_end(reports, exit_code, was_interrupted=was_interrupted),
            exit_code=exit_code,
            processes=processes,
            notes=tuple(_notes(reports, processes, exit_code)),
            seconds=time.perf_counter() - start,
        )
        process, history = _history_of(reports, rehearsal) if keeps_history else (None, None)
    return Rehearsed(rehearsal=rehearsal, process=process, history=history)


def _check(command: Sequence[str]) -> None:
    if not command:
        raise UsageError("Name the command to rehearse after --, such as -- python train.py.")
    program = command[0]
    if shutil.which(program) is not None:
        return
    if program.endswith(".py") and Path(program).is_file():
        raise UsageError(f"{program} is not a program: write -- python {program}.")
    raise UsageError(f"There is no command {program!r} here.")


def _watched(environment: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    variables = {**os.environ, **environment, SETTINGS: json.dumps(settings)}
    paths = [str(_STARTUP), variables.get("PYTHONPATH", "")]
    return {**variables, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _run(
    command: Sequence[str], variables: Mapping[str, str], *, is_quiet: bool
) -> tuple[int, bool]:
    """Run it to its end, and return what it ended with and whether the user interrupted it."""
    sys.stdout.flush()
    sys.stderr.flush()
    with _adopting() as others, _passing_signals_on() as passed:
        child = subprocess.Popen(  # noqa: S603 - the user's own
            list(command), env=dict(variables), stdout=sys.stderr.fileno() if is_quiet else None
        )
        passed.child = child
        try:
            exit_code = child.wait()
        finally:
            _end_descendants(others)
    return exit_code, signal.SIGINT in passed.seen


@contextlib.contextmanager
def _adopting() -> Iterator[frozenset[int]]:
    """Be the parent of what a descendant leaves behind; gives the children that were there."""
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
    seen: set[int] = dataclasses.field(default_factory=set)


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[_Passed]:
    """Let the command end by the signals that are meant to end this process."""
    passed = _Passed()

    def take(number: int, _frame: FrameType | None) -> None:
        # A terminal sends Ctrl-C to the command, too; a second one is meant to be obeyed.
        is_told_already = number == signal.SIGINT and _is_in_foreground()
        is_repeated = number in passed.seen
        passed.seen.add(number)
        if passed.child is not None and (is_repeated or not is_told_already):
            passed.child.send_signal(signal.SIGTERM if is_repeated else number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    earlier = {number: signal.signal(number, take) for number in numbers}
    try:
        yield passed
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _is_in_foreground() -> bool:
    try:
        with Path("/dev/tty").open("rb") as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False


def _end(reports: Sequence[Report], exit_code: int, *, was_interrupted: bool) -> RehearsalEnd:
    if was_interrupted:
        return RehearsalEnd.INTERRUPTED
    if exit_code != 0:
        ran_out = any(report.ran_out for report in reports)
        return RehearsalEnd.OUT_OF_MEMORY if ran_out else RehearsalEnd.FAILED
    has_settled = any(process.has_settled for report in reports for process in report.processes)
    return RehearsalEnd.SETTLED if has_settled else RehearsalEnd.FINISHED


def _notes(
    reports: Sequence[Report], processes: Sequence[RehearsedProcess], exit_code: int
) -> Iterator[str]:
    if exit_code < 0:
        yield f"The command was ended by the signal {signal.Signals(-exit_code).name}."
    if any(not report.has_cuda for report in reports):
        yield "The command's torch is built without CUDA, so there was no card to rehearse on."
    elif not processes:
        yield (
            "No process of the command used the card: it ended before, trains on another device, "
            "or runs a Python with -S, -E or -I, which cannot be watched."
        )
    if any(process.has_settled for process in processes) and not any(
        process.phase("evaluation") for process in processes
    ):
        yield (
            "No evaluation was seen before the peak had settled: it is not part of the figures. "
            "--whole lets the command run to its end."
        )
    handled = sum(
        shortage.num_times
        for process in processes
        for shortage in process.shortages
        if not shortage.ended_script
    )
    if handled:
        yield (
            f"{handled} requests found no room, and what made them did without: cuDNN takes a plan "
            "with a smaller workspace, or the script catches the error."
        )
    if any(not process.follows_modules for process in processes):
        yield "Something was compiled: phases and modules are not told apart in it."
    for report in reports:
        for fault in report.faults:
            yield f"The watch failed, and figures may be missing: {fault}."


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain values and nothing that runs."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is not a plain value")


def _history_of(
    reports: Sequence[Report], rehearsal: Rehearsal
) -> tuple[RehearsedProcess | None, History | None]:
    """Return the history of the process that ran out, or else of the one that held most."""

    def rank(report: Report) -> tuple[bool, int]:
        held = max((process.peak.reserved_bytes for process in report.processes), default=0)
        return report.ran_out and not rehearsal.fits, held

    for report in sorted(reports, key=rank, reverse=True):
        path = report.path.with_suffix(".history")
        if report.processes and path.exists():
            process = max(report.processes, key=lambda process: process.peak.reserved_bytes)
            return process, _PlainUnpickler(BytesIO(path.read_bytes())).load()
    return rehearsal.largest, None

"""Starts the server process for trials on the CPU, sends it requests, and ends it.

If a trial dies without a report, this module decides what that means. `memfit.backends.cpu.trials`
runs in the server and in its children.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import tempfile
from multiprocessing.connection import Pipe
from typing import IO, Final

import psutil

from memfit.backends.cpu.limits import exit_code_of, fork
from memfit.backends.cpu.trials import LOST, Report, Request, serve
from memfit.backends.crossing import ChildTraceback
from memfit.errors import StepCrashedError
from memfit.memory import oom
from memfit.records import Outcome, Source, Trial
from memfit.step.training_step import TrainingStep

__all__ = ["LostError", "Server", "ran_out"]

_LOOK_SECONDS: Final = 1.0
_STALLED_SECONDS: Final = 60.0


class LostError(Exception):
    """The server ended before it took the request, or before it answered it."""


class Server:
    """The forked process that builds the step once and forks a child for each trial."""

    def __init__(self, step: TrainingStep) -> None:
        self.step = step
        self.is_dead = False
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - kill() closes it
        self._connection, theirs = Pipe()
        self._pid = fork(lambda: serve(theirs, step, self._output), but_keep=self._output)
        theirs.close()

    def ask(self, request: Request) -> Report:
        """Let the server run one trial, and wait for its report.

        Raises:
            LostError: The server ended. Ask a new one.
        """
        is_sent = is_stalled = False
        answer: object
        try:
            self._connection.send(request)
            is_sent = True
            is_stalled = self._wait()
            answer = pickle.loads(self._connection.recv_bytes())  # noqa: S301 - our own bytes
        except (EOFError, OSError, pickle.UnpicklingError):
            self.is_dead = True
            answer = exit_code_of(self._pid)
            if answer == LOST or not is_sent:
                raise LostError from None
        if is_stalled:
            return _stalled(request, _written(self._output))
        if answer is None or isinstance(answer, int):
            return _judge_death(answer, request, _written(self._output))
        assert isinstance(answer, tuple)
        text, report = answer
        assert isinstance(report, Report)
        if text is not None and report.error is not None:
            report.error.__cause__ = ChildTraceback(text)
        return report

    def kill(self) -> None:
        """End the server and its trial, and release everything that they hold."""
        if not self.is_dead:
            # Early in its start, the server does not have its own process group yet.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            exit_code_of(self._pid)
        self._connection.close()
        self._output.close()

    def _wait(self) -> bool:
        """Wait for an answer, and end a trial that is stuck. Return whether a trial was ended.

        A trial is stuck if it waits for a lock that another thread of this process held at the
        fork. In the child, such a lock is never released.
        """
        seconds, idle = -1.0, 0.0
        while not self._connection.poll(_LOOK_SECONDS):
            processes = _family(self._pid)
            before, seconds = seconds, _busy_seconds(processes)
            idle = idle + _LOOK_SECONDS if seconds == before else 0.0
            if idle >= _STALLED_SECONDS:
                for process in processes[1:] or processes:
                    with contextlib.suppress(psutil.Error):
                        # Its last output shows the line at which it waits.
                        process.send_signal(signal.SIGABRT)
                return True
        return False


def _family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _busy_seconds(processes: list[psutil.Process]) -> float:
    """Return the CPU time of processes in seconds; NaN if one of them is not asleep.

    NaN differs from every number, also from itself. So a process that runs or waits for a disk
    never looks stuck.
    """
    seconds = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            seconds += times.user + times.system
            if process.status() != psutil.STATUS_SLEEPING:
                return float("nan")
    return seconds


def _stalled(request: Request, written: str) -> Report:
    words = _last_words(written).partition(", ")[2]
    where = f" ({words})" if words else ""
    return Report(
        error=StepCrashedError(
            f"The training step did nothing for {_STALLED_SECONDS:.0f} s at batch "
            f"size {request.batch_size}{where}. A trial runs in a fork of this "
            "process, and a fork does not have the other threads. If one of them "
            "held a lock, the lock is never released there. End such threads "
            "first, or run memfit in its own process."
        )
    )


def _judge_death(exit_code: int | None, request: Request, written: str) -> Report:
    """Return the report of a trial whose process died without one."""
    last_words = _last_words(written)
    if exit_code == -signal.SIGKILL or oom.classify_text(written) is oom.Likelihood.CERTAIN:
        message = "killed by the kernel" if exit_code == -signal.SIGKILL else last_words
        return Report(trial=ran_out(request.batch_size, message))
    if exit_code is None:
        # The exit code is lost, because this process ignores SIGCHLD.
        crash = f"The training step ended its process at batch size {request.batch_size}"
        return Report(error=StepCrashedError(crash), suspect=crash)
    how = (
        f"died of {signal.Signals(-exit_code).name}"
        if exit_code < 0
        else f"ended its process with exit code {exit_code}"
    )
    words = f"; its last words: {last_words}" if last_words else ""
    crash = f"The training step {how} at batch size {request.batch_size}{words}"
    return Report(error=StepCrashedError(crash), suspect=crash)


def ran_out(batch_size: int, message: str) -> Trial:
    """Return the trial of a process that died before it measured anything."""
    return Trial(
        batch_size=batch_size,
        outcome=Outcome.OUT_OF_MEMORY,
        source=Source.MEASURED,
        left_behind_bytes=0,
        message=message,
    )


def _written(output: IO[bytes]) -> str:
    size = os.fstat(output.fileno()).st_size
    return os.pread(output.fileno(), size, 0).decode(errors="replace")


def _last_words(written: str) -> str:
    """Return the line where a dead process crashed, or else the last line that it wrote."""
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if line.startswith("Fatal Python error"):
            frames = (later for later in lines[number:] if later.startswith("File "))
            return f"{line}, {next(frames, 'nowhere in Python')}"
    return lines[-1] if lines else ""

"""Trials on the CPU: real steps in a child process under a real memory limit.

The first trial of a step forks a server from this process: it has torch and timm loaded, builds the
model once, and forks a child for each trial. A trial therefore imports nothing, starts from the
same state every time, can be killed without harm, and never touches the user's own objects.

The limit is `RLIMIT_DATA`: private writable memory, which Linux counts when it is mapped. What the
process holds before the model is built is not counted; see `_Footprint`.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import gc
import mmap
import os
import pickle
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, NoReturn

import psutil
import torch

from memfit import cleanup, oom
from memfit.backends.readings import Reading, steady_readings
from memfit.errors import StepCrashedError, UnsupportedError, UsageError
from memfit.records import Capacity, Outcome, Precision, Source, Trial
from memfit.units import KIB, MIB, format_bytes
from memfit.workload import PreparedStep, TrainingStep

__all__ = ["CpuBackend"]

_CPU = torch.device("cpu")
_M_MMAP_THRESHOLD = -3  # glibc's malloc.h
_M_ARENA_MAX = -8  # glibc's malloc.h
# glibc's own threshold at start. Left alone it follows the largest block that was freed, up to
# 32 MiB; blocks below it then come from a heap that fragments differently in every run, and the
# same step needs a few percent more or less each time (mallopt(3); benchmarks/heap.py).
_MMAP_THRESHOLD_BYTES = 128 * KIB
_OMP_PAUSE_SOFT = 1  # OpenMP's omp.h
_PR_SET_PDEATHSIG = 1  # Linux's prctl.h
# Of what the machine has left, for a trial that is to need all of it.
_ROOM_SHARE = 0.95
# Less than this factor is no more room to speak of.
_MORE_ROOM = 1.1
# A step that failed with less than this share of the limit in use did not fail for memory.
_NEARLY_FULL_SHARE = 0.8
_WARM_UP_BATCH_SIZE = 2  # not 1, which a batch norm after global pooling refuses


class CpuBackend:
    """Tries training steps in child processes of this one.

    Args:
        memory_bytes: What a step may use beyond the loaded process; `None` for what the machine and
            its control group have left, less the headroom.
        headroom: The share kept out of reach when `memory_bytes` is `None`.

    Raises:
        UnsupportedError: This system does not enforce `RLIMIT_DATA`.
        UsageError: `memory_bytes` is more than the machine has left.
    """

    def __init__(self, *, memory_bytes: int | None = None, headroom: float = 0.05) -> None:
        if not _limit_works():
            raise UnsupportedError(
                "Trials on a CPU need Linux to enforce a memory limit (RLIMIT_DATA), and "
                f"{sys.platform} here does not: run memfit in Linux or in a Linux container."
            )
        left_bytes, origin = _memory_left()
        total_bytes = psutil.virtual_memory().total
        if memory_bytes is None:
            usable_bytes = int(left_bytes * (1 - headroom))
            origin = f"{origin}, less {headroom:.0%}"
        elif memory_bytes > left_bytes:
            raise UsageError(
                f"A limit of {format_bytes(memory_bytes)} is more than this machine has left: at "
                f"most {format_bytes(left_bytes)} ({origin})."
            )
        else:
            usable_bytes, origin = memory_bytes, "the limit that was asked for"
        self._capacity = Capacity(usable_bytes=usable_bytes, total_bytes=total_bytes, origin=origin)
        self._server: _Server | None = None
        # Suspected messages that turned out to be about memory.
        self._confirmed: frozenset[str] = frozenset()

    @property
    def device_name(self) -> str:
        """What reports call the device."""
        threads = torch.get_num_threads()
        return f"CPU ({_processor()}, {threads} thread{'s' if threads != 1 else ''})"

    @property
    def auto_precision(self) -> Precision:
        """What `Precision.AUTO` means on a CPU."""
        return Precision.FP32

    @property
    def environment(self) -> tuple[str, ...]:
        """What trials ran with that a training script has to be given, as NAME=value."""
        return () if _is_heap_tuned() else (f"MALLOC_MMAP_THRESHOLD_={_MMAP_THRESHOLD_BYTES}",)

    def capacity(self) -> Capacity:
        """Return how many bytes a training step may use, and where that figure comes from."""
        return self._capacity

    def trial(self, step: TrainingStep, batch_size: int) -> Trial:
        """Try one batch size in a process of its own.

        Args:
            step: What to train; its precision is chosen.
            batch_size: Samples in each micro-batch, at least 1.

        Returns:
            How it ended. Reserved bytes are private writable memory beyond the loaded process,
            allocated bytes the resident ones among them.

        Raises:
            StepCrashedError: The step took its process down, and not for want of memory.
        """
        report = self._ask(step, batch_size, self._capacity.usable_bytes)
        if report.error is None:
            assert report.trial is not None
            return report.trial
        if report.suspect is None or not self._is_memory(step, batch_size, report):
            raise report.error
        self._confirmed |= {report.suspect}
        return report.trial or _ran_out(batch_size, report.suspect)

    def needed_bytes(self, step: TrainingStep, batch_size: int) -> int | None:
        """Return what a batch size that did not fit takes where the machine has the room."""
        roomier = self._ask(step, batch_size, _room_bytes()).trial
        return roomier.peak_reserved_bytes if roomier is not None and roomier.fits else None

    def _is_memory(self, step: TrainingStep, batch_size: int, report: _Report) -> bool:
        """Whether a suspected failure goes away with more room.

        Code that does not expect an allocation to fail crashes, or raises what it also raises for
        limits of its own. A process of its own tells: libraries remember what failed.
        """
        room_bytes = _room_bytes()
        roomier = self._ask(step, batch_size, room_bytes)
        if roomier.trial is not None and roomier.trial.fits:
            return True
        limit_bytes = self._capacity.usable_bytes
        if room_bytes > _MORE_ROOM * limit_bytes or batch_size == 1:
            return False
        # There is no more room to give. A step that ran out was near the limit, and half of it is
        # not.
        peak = None if report.trial is None else report.trial.peak_reserved_bytes
        if peak is not None and peak < _NEARLY_FULL_SHARE * limit_bytes:
            return False
        half = self._ask(step, batch_size // 2, limit_bytes)
        return half.trial is not None and half.trial.fits

    def _ask(self, step: TrainingStep, batch_size: int, limit_bytes: int) -> _Report:
        if self._server is None or self._server.step is not step:
            self.__exit__()
            self._server = _Server(step)
        report = self._server.ask(
            _Request(batch_size=batch_size, limit_bytes=limit_bytes, confirmed=self._confirmed)
        )
        if self._server.is_dead:
            self.__exit__()
        return report

    def __enter__(self) -> CpuBackend:
        """Return the backend."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End the server and whatever trial it is running."""
        if self._server is not None:
            self._server.kill()
            self._server = None


# --- messages between the processes -------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    batch_size: int
    limit_bytes: int
    confirmed: frozenset[str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Report:
    """How a trial ended: a trial, an error, or an error that may be about memory: a suspect."""

    trial: Trial | None = None
    error: BaseException | None = None
    suspect: str | None = None


class _ChildTraceback(Exception):  # noqa: N818 - the cause of an error, not one itself
    """Where an error happened in the child, as text."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _portable(error: BaseException) -> BaseException:
    """Return the error in a form that survives the way to the parent."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    except Exception:  # noqa: BLE001 - a user's exception may fail to pickle in any way
        return StepCrashedError(f"The training step raised {type(error).__name__}: {error}")
    return error


# --- the parent's side --------------------------------------------------------------------------


class _Server:
    """The forked process that builds the step once and forks a child for each trial."""

    def __init__(self, step: TrainingStep) -> None:
        self.step = step
        self.is_dead = False
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - kill() closes it
        self._connection, theirs = Pipe()
        self._pid = _fork(lambda: _serve(theirs, step, self._output), but_keep=self._output)
        theirs.close()

    def ask(self, request: _Request) -> _Report:
        """Have one trial run, and wait for its report."""
        try:
            self._connection.send(request)
            text, report = self._connection.recv()
        except (EOFError, OSError):
            report = _judge_death(self._reap(), request, _written(self._output))
            self.is_dead = True
            text = None
        if text is not None and report.error is not None:
            report.error.__cause__ = _ChildTraceback(text)
        assert isinstance(report, _Report)
        return report

    def kill(self) -> None:
        """End the server, its trial, and everything they hold."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        self._reap()
        self._connection.close()
        self._output.close()

    def _reap(self) -> int:
        with contextlib.suppress(ChildProcessError):
            return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return -signal.SIGKILL


def _judge_death(exit_code: int, request: _Request, written: str) -> _Report:
    """Say what it means that the process of a trial died without a report."""
    last_words = _last_words(written)
    if exit_code == -signal.SIGKILL or oom.classify_text(written) is oom.Verdict.CERTAIN:
        message = "killed by the kernel" if exit_code == -signal.SIGKILL else last_words
        return _Report(trial=_ran_out(request.batch_size, message))
    how = (
        f"died of {signal.Signals(-exit_code).name}"
        if exit_code < 0
        else f"ended its process with exit code {exit_code}"
    )
    words = f"; its last words: {last_words}" if last_words else ""
    crash = f"The training step {how} at batch size {request.batch_size}{words}"
    return _Report(error=StepCrashedError(crash), suspect=crash)


def _ran_out(batch_size: int, message: str) -> Trial:
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
    """Return what a dead process wrote that says most: where it crashed, or its last line."""
    lines = [line.strip() for line in written.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if line.startswith("Fatal Python error"):
            frames = (later for later in lines[number:] if later.startswith("File "))
            return f"{line}, {next(frames, 'nowhere in Python')}"
    return lines[-1] if lines else ""


def _fork(target: Callable[[], None], *, but_keep: IO[bytes]) -> int:
    """Fork a child that runs the target and nothing else; return its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    _end_thread_pool()
    with warnings.catch_warnings():
        # Python warns of any thread. The child uses none of this process's.
        warnings.simplefilter("ignore", DeprecationWarning)
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


# --- the server's side --------------------------------------------------------------------------


def _serve(connection: Connection, step: TrainingStep, output: IO[bytes]) -> None:
    os.setsid()
    _steady_heap()
    _load_lazily()
    before = _Footprint.now()
    built: PreparedStep | None = None
    failure: tuple[str, _Report] | None = None
    try:
        built = step.prepare(_CPU)
    except Exception as error:  # noqa: BLE001 - the user's model is built here; sent, not swallowed
        failure = (traceback.format_exc(), _Report(error=_portable(error)))
    cleanup.release(_CPU)
    gc.freeze()
    model = _Footprint.now() - before
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if built is None:
            connection.send(failure)
            continue
        connection.send(_try_in_child(built, request, model, output))


def _load_lazily() -> None:
    """Take a tiny step, for torch imports a good deal when the first optimizer takes its first."""
    weight = torch.nn.Parameter(torch.ones(1, 1))
    optimizer = torch.optim.AdamW([weight])
    torch.nn.functional.linear(torch.ones(1, 1), weight).sum().backward()
    optimizer.step()


def _steady_heap() -> None:
    with contextlib.suppress(AttributeError):
        # One arena: others would be mapped in the middle of a trial, for the thread pool.
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
        if not _is_heap_tuned():
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)


def _is_heap_tuned() -> bool:
    """Whether the user has chosen glibc's mmap threshold, or another allocator."""
    return (
        "MALLOC_MMAP_THRESHOLD_" in os.environ
        or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
        or "malloc" in os.environ.get("LD_PRELOAD", "")
    )


def _try_in_child(
    prepared: PreparedStep, request: _Request, model: _Footprint, output: IO[bytes]
) -> tuple[str | None, _Report]:
    os.ftruncate(output.fileno(), 0)
    os.lseek(output.fileno(), 0, os.SEEK_SET)
    ours, theirs = Pipe(duplex=False)

    pid = _fork(lambda: theirs.send(_try(prepared, request, model)), but_keep=output)
    theirs.close()
    report: tuple[str | None, _Report] | None = None
    with contextlib.suppress(EOFError):
        report = ours.recv()
    ours.close()
    exit_code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if report is None:
        return None, _judge_death(exit_code, request, _written(output))
    return report


# --- the trial, in the child --------------------------------------------------------------------


def _try(
    prepared: PreparedStep, request: _Request, model: _Footprint
) -> tuple[str | None, _Report]:
    # The pool's stacks belong to the loaded process, and libgomp ends the process if they cannot
    # be had: start it before the limit holds.
    torch.ones(torch.get_num_threads() * MIB).add_(1)
    meter = _Meter(_Footprint.now() - model)
    room_bytes = request.limit_bytes - model.data_bytes
    _limit_data(_Footprint.now().data_bytes + max(room_bytes, 0))
    try:
        prepared.begin()
        # A step on a small batch first: what comes once (the optimizer's state, the libraries' own
        # buffers) is there before the readings begin.
        prepared.iterate(min(request.batch_size, _WARM_UP_BATCH_SIZE))
        _, grows = steady_readings(prepared, request.batch_size, meter.measured)
    except Exception as error:  # noqa: BLE001 - the user's own code runs here; judged, then sent
        _limit_data(None)
        verdict = oom.classify(error)
        message = oom.first_line(error)
        text = traceback.format_exc()
        if verdict is oom.Verdict.NO:
            return text, _Report(error=_portable(_explained(error)))
        trial = meter.trial(request.batch_size, prepared, message=message, grows=False)
        if verdict is oom.Verdict.SUSPECTED and message not in request.confirmed:
            return text, _Report(trial=trial, error=_portable(error), suspect=message)
        return None, _Report(trial=trial)
    trial = meter.trial(request.batch_size, prepared, message=None, grows=grows)
    return None, _Report(trial=trial)


def _explained(error: Exception) -> Exception:
    if "autograd's threading in combination with fork" in str(error):
        return UnsupportedError(
            "This process has already run a backward pass with a GPU in sight, and PyTorch cannot "
            "run one in a fork of it: probe the CPU before that, or in a fresh process."
        )
    return error


@dataclasses.dataclass(frozen=True, slots=True)
class _Footprint:
    """What the kernel counts for this process, in bytes.

    Args:
        data_bytes: Private writable memory, mapped: what `RLIMIT_DATA` limits.
        anonymous_bytes: Resident memory that is no file's.

    Source: Linux, Documentation/filesystems/proc.rst (VmData, RssAnon).
    """

    data_bytes: int
    anonymous_bytes: int

    @classmethod
    def now(cls) -> _Footprint:
        status = _status()
        return cls(status["VmData"], status["RssAnon"])

    def __sub__(self, other: _Footprint) -> _Footprint:
        return _Footprint(
            max(0, self.data_bytes - other.data_bytes),
            max(0, self.anonymous_bytes - other.anonymous_bytes),
        )


class _Meter:
    """Reads peaks against what the process holds apart from the model.

    Args:
        base: The footprint to count from.
    """

    def __init__(self, base: _Footprint) -> None:
        self._base = base
        self._readings: list[Reading] = []

    def measured(self, iterate: Callable[[], None]) -> Reading:
        """Run one iteration and read the peaks up to its end."""
        start = time.perf_counter()
        iterate()
        reading = self._read(time.perf_counter() - start)
        self._readings.append(reading)
        return reading

    def trial(
        self, batch_size: int, prepared: PreparedStep, *, message: str | None, grows: bool
    ) -> Trial:
        """Return the trial that the readings make; with a message, one that ran out."""
        peak = self._read(0.0)
        return Trial(
            batch_size=batch_size,
            outcome=Outcome.FITS if message is None else Outcome.OUT_OF_MEMORY,
            source=Source.MEASURED,
            peak_allocated_bytes=peak.allocated_bytes,
            peak_reserved_bytes=peak.reserved_bytes,
            num_iterations=len(self._readings),
            step_seconds=self._readings[-1].seconds if self._readings else None,
            num_micro_batches=prepared.num_micro_batches,
            left_behind_bytes=0,
            peak_grows=grows and message is None,
            message=message,
        )

    def _read(self, seconds: float) -> Reading:
        status = _status()
        # A fork starts its peaks anew, but Linux keeps them only for all that is mapped and all
        # that is resident. Files and their pages only come in, so the peak less what they are at
        # the end is the peak of the rest.
        data = status["VmPeak"] - (status["VmSize"] - status["VmData"])
        resident = status["VmHWM"] - status["RssFile"] - status["RssShmem"]
        return Reading(
            reserved_bytes=max(0, data - self._base.data_bytes),
            allocated_bytes=max(0, resident - self._base.anonymous_bytes),
            requested_bytes=None,
            seconds=seconds,
        )


def _status() -> dict[str, int]:
    status = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if value.endswith(" kB"):
            status[key] = int(value[:-3]) * KIB
    return status


# --- the machine --------------------------------------------------------------------------------


def _limit_data(num_bytes: int | None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    soft = hard if num_bytes is None else num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _limit_works() -> bool:
    """Whether mapping more than `RLIMIT_DATA` allows is refused here: tried, in a child."""
    if sys.platform != "linux":
        return False

    def overdraw() -> None:
        _limit_data(_Footprint.now().data_bytes + 16 * MIB)
        try:
            mmap.mmap(-1, 64 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError:
            return
        sys.exit(1)

    with tempfile.TemporaryFile() as output:
        pid = _fork(overdraw, but_keep=output)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _room_bytes() -> int:
    """Return nearly all that the machine has left, for a trial that is to need it."""
    return int(_memory_left()[0] * _ROOM_SHARE)


def _memory_left() -> tuple[int, str]:
    """Return the bytes that this process can still have, and who says so."""
    left, origin = psutil.virtual_memory().available, "memory available on this machine"
    for limit, used in _control_groups():
        if limit - used < left:
            left, origin = max(limit - used, 0), "memory left in this control group"
    return left, origin


def _control_groups(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """Return (limit, used) in bytes of each control group that limits this process.

    Pages of files that can be dropped do not count as used.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group == base.parent:
                break
            with contextlib.suppress(OSError, ValueError):
                # "max" is no number, and so no limit.
                limit = int((group / names[0]).read_text())
                used = int((group / names[1]).read_text())
                found.append((limit, used - _stat(group / "memory.stat", names[2])))
    return found


def _stat(path: Path, key: str) -> int:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return os.uname().machine

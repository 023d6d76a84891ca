"""Runs a command on a rehearsed card with the watch, and returns what the watch recorded.

The command keeps its own input, output and exit code. When it has ended, the processes that it left
running are ended too, and the files of its reports are deleted.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import torch

from memfit.cards import REHEARSED_CARD_VARIABLE, Gpu
from memfit.errors import UsageError
from memfit.records import Capacity, Rehearsal, RehearsalEnd, RehearsedProcess, Source
from memfit.rehearsal.children import Output, check_command, run_to_end
from memfit.rehearsal.journals import Report, read_reports
from memfit.rehearsal.ranks import LoneRank
from memfit.rehearsal.watch.start import SETTINGS
from memfit.units import format_bytes

__all__ = ["History", "Rehearsed", "Requests", "capacity_of", "rehearse_command"]

_STARTUP: Final = Path(__file__).parent / "watch" / "startup"
_NO_CACHING: Final = "PYTORCH_NO_CUDA_MEMORY_CACHING"

History = Mapping[str, Any]
"""The record of one step of a process (`watch.history`)."""

Requests = Mapping[str, Any]
"""The requests of a process to torch's allocator (`watch.requests`)."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """A rehearsal, and the record of the process that held the most memory.

    Args:
        rehearsal: The results of the rehearsal.
        process: The process that the history or the requests belong to; `None` if no device was
            used, or if neither was asked for.
        history: The allocations of the step with the peak; `None` if they were not recorded.
        requests: Every request of that process until its last step (`watch.requests`); `None` if
            they were not recorded, or if memory ran out.
        last_words: The end of the command's output, if that was kept.
    """

    rehearsal: Rehearsal
    process: RehearsedProcess | None
    history: History | None
    last_words: str
    requests: Requests | None = None


def rehearse_command(
    command: Sequence[str],
    gpu: Gpu | None,
    environment: Mapping[str, str],
    *,
    num_steps: int = 3,
    is_whole: bool = False,
    keeps_history: bool = False,
    keeps_requests: bool = False,
    output: Output = Output.OWN,
    lone_rank: LoneRank | None = None,
    computes: bool = True,
) -> Rehearsed:
    """Run a command on a card that is not there, and watch it.

    Args:
        command: The words of the command.
        gpu: The card; `None` to measure the command on this machine's own GPU.
        environment: Variables that put the command on the card. They are added to this process's
            variables, or replace them.
        num_steps: The command is ended when its peak has not risen for this many optimizer steps.
        is_whole: Whether the command runs to its own end instead.
        keeps_history: Whether to record the allocations of a step too.
        keeps_requests: Whether to record every request until the last step, without its place in
            the script. Only one of the two can be recorded.
        output: The destination of the command's output.
        lone_rank: The rank that the command is; the others have no process. `None` if the command
            starts its ranks itself, or has none.
        computes: Whether a few operations on small tensors are computed on the host.

    Raises:
        UsageError: There is no such command, or this machine has no GPU.
    """
    check_command(command)
    if gpu is None and torch.cuda.device_count() == 0:
        raise UsageError(
            "There is no GPU here. Name a card with --gpu, and the command is rehearsed on it."
        )
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="memfit-rehearsal-") as name:
        folder = Path(name)
        settings = {
            "folder": name,
            "num_steps": num_steps,
            "is_whole": is_whole,
            "keeps_history": keeps_history,
            "keeps_requests": keeps_requests,
            "computes": computes,
            "lone_rank": None if lone_rank is None else (lone_rank.rank, lone_rank.world_size),
        }
        ranked = {} if lone_rank is None else lone_rank.environment
        variables = _watched({**environment, **ranked}, settings)
        ended = run_to_end(command, variables, output=output, folder=folder)
        reports = read_reports(folder, exit_code=ended.exit_code)
        processes = tuple(process for report in reports for process in report.processes)
        rehearsal = Rehearsal(
            command=tuple(command),
            **_card(gpu, reports),
            end=_end(reports, ended.exit_code, ended.ended_by),
            exit_code=ended.exit_code,
            processes=processes,
            notes=tuple(_notes(reports, processes, ended.exit_code, _other_python(command))),
            seconds=time.perf_counter() - start,
        )
        suffix = ".history" if keeps_history else ".requests" if keeps_requests else None
        process, kept = (None, None) if suffix is None else _kept(reports, rehearsal, suffix)
    return Rehearsed(
        rehearsal=rehearsal,
        process=process,
        history=kept if keeps_history else None,
        requests=kept if keeps_requests else None,
        last_words=ended.last_words,
    )


def capacity_of(gpu: Gpu) -> Capacity:
    """Return what a command can use of a rehearsed card."""
    return Capacity(
        usable_bytes=gpu.usable_bytes,
        total_bytes=gpu.total_bytes,
        origin="the card's total less the CUDA context",
        cautious_bytes=gpu.cautious_bytes,
    )


def _card(gpu: Gpu | None, reports: Sequence[Report]) -> dict[str, Any]:
    """Return the fields of a record that describe the card that the command ran on."""
    if gpu is not None:
        return {
            "device": gpu.name,
            "capacity": capacity_of(gpu),
            "context_bytes": gpu.context_bytes,
            "source": Source.REHEARSED,
        }
    seen = next((report for report in reports if report.devices), None)
    if seen is None:
        # The command failed, ended or was ended before it came to the GPU.
        return {
            "device": "cuda",
            "capacity": Capacity(
                usable_bytes=0, total_bytes=0, origin="the command did not come to the GPU"
            ),
            "context_bytes": 0,
            "source": Source.MEASURED,
        }
    return {
        "device": seen.devices[0],
        "capacity": Capacity(
            usable_bytes=seen.free_bytes,
            total_bytes=seen.total_bytes,
            origin="free when the command began",
        ),
        "context_bytes": 0,
        # If memfit itself runs on a rehearsed card, its figures are not measured.
        "source": Source.REHEARSED if seen.is_rehearsed else Source.MEASURED,
    }


def _watched(environment: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    variables = {**os.environ, **environment, SETTINGS: json.dumps(settings)}
    paths = [str(_STARTUP), variables.get("PYTHONPATH", "")]
    return {**variables, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _end(
    reports: Sequence[Report], exit_code: int, ended_by: signal.Signals | None
) -> RehearsalEnd:
    if ended_by is not None:
        is_interrupt = ended_by is signal.SIGINT
        return RehearsalEnd.INTERRUPTED if is_interrupt else RehearsalEnd.TERMINATED
    if exit_code != 0:
        ran_out = any(report.ran_out for report in reports)
        return RehearsalEnd.OUT_OF_MEMORY if ran_out else RehearsalEnd.FAILED
    has_settled = any(process.has_settled for report in reports for process in report.processes)
    return RehearsalEnd.SETTLED if has_settled else RehearsalEnd.FINISHED


def _other_python(command: Sequence[str]) -> str | None:
    """Return the path of the command's Python, if it is not the one that memfit runs in."""
    path = shutil.which(command[0])
    if path is None or not Path(path).name.startswith("python"):
        return None
    # A virtual environment's python is a link to the one that it was made from, so no links are
    # followed. Its folder tells them apart.
    is_same = Path(path).absolute().parent == Path(sys.executable).absolute().parent
    return None if is_same else path


def _of_use(
    reports: Sequence[Report], processes: Sequence[RehearsedProcess], other_python: str | None
) -> Iterator[str]:
    """Say why there are fewer figures than expected, or none."""
    if not processes and _NO_CACHING in os.environ:
        yield (
            f"{_NO_CACHING} is set. PyTorch's allocator counts no bytes then, so there are no "
            "figures, only whether memory ran out."
        )
    elif any(not report.has_cuda for report in reports):
        yield "The command's torch is built without CUDA, so there was no card to rehearse on."
    elif not processes and not any(report.ran_out for report in reports):
        yield (
            "No process of the command is known to have used the card. Perhaps the command ended "
            "before, trains on another device, or starts Python with -S, -E or -I, "
            "which memfit cannot watch."
        )
        if other_python is not None:
            yield (
                f"The command's Python is {other_python}, and memfit runs in {sys.executable}. If "
                "the command needs the packages of memfit's, activate that environment first."
            )
    if any(report.allocator == "cudaMallocAsync" for report in reports):
        yield (
            "torch's allocator is cudaMallocAsync, which neither counts the requested bytes nor "
            "says where memory ran out."
        )


def _notes(
    reports: Sequence[Report],
    processes: Sequence[RehearsedProcess],
    exit_code: int,
    other_python: str | None,
) -> Iterator[str]:
    if exit_code < 0:
        ended = f"The command was ended by the signal {signal.Signals(-exit_code).name}"
        # At SIGINT, Python raises an error, and memfit sees all up to it.
        unseen = ", so what it took after its last step or phase is not in the figures"
        yield ended + ("." if exit_code == -signal.SIGINT else f"{unseen}.")
    yield from _of_use(reports, processes, other_python)
    if any(process.has_settled for process in processes) and not any(
        process.phase("evaluation") for process in processes
    ):
        yield (
            "The command had not evaluated its model when the peak had settled, so "
            "evaluation is not part of the figures. --whole lets the command run "
            "to its end."
        )
    handled = sum(
        shortage.num_times
        for process in processes
        for shortage in process.shortages
        if not shortage.ended_script
    )
    if handled:
        requests = "1 request" if handled == 1 else f"{handled} requests"
        yield (
            f"{requests} for memory failed, and the command went on without it. Either "
            "cuDNN took a plan with a smaller workspace, or the script caught the error."
        )
    if any(not process.follows_modules for process in processes):
        yield (
            "The command compiles code. memfit cannot tell phases and modules "
            "apart in compiled code."
        )
    yield from _of_shared_cards(processes)
    yield from _of_cudnn(reports)
    yield from _blame(reports, exit_code)
    for report in reports:
        for fault in report.faults:
            yield f"memfit failed to watch the command, so figures may be missing: {fault}."


def _of_shared_cards(processes: Sequence[RehearsedProcess]) -> Iterator[str]:
    """Say that processes which are not ranks would share a card, where each rehearsed its own."""
    alone = [process for process in processes if process.rank is None]
    for index in sorted({process.device_index for process in alone}):
        here = [process for process in alone if process.device_index == index]
        if len(here) > 1:
            together = sum(process.peak.reserved_bytes for process in here)
            yield (
                f"{len(here)} processes used GPU {index}, and each rehearsed a card of its own. If "
                f"they use one card at the same time, it holds up to {format_bytes(together)} and "
                "a context for each."
            )


def _of_cudnn(reports: Sequence[Report]) -> Iterator[str]:
    """Say where cuDNN does otherwise than on a card."""
    if any(report.searches_plans and report.is_rehearsed for report in reports):
        yield (
            "torch.backends.cudnn.benchmark is on. On a card the fastest plan of a convolution "
            "wins. Here nothing is timed: the first plan of cuDNN's heuristics wins every time, "
            "and the search takes the workspace of the largest."
        )
    left_out = dict.fromkeys(name for report in reports for name in report.left_out)
    if left_out:
        yield (
            "cuDNN does not say without a GPU how many bytes these take, so they are not counted: "
            f"{', '.join(left_out)}."
        )


def _blame(reports: Sequence[Report], exit_code: int) -> Iterator[str]:
    """Name the lines whose zeros may have led to a failure."""
    lines = dict.fromkeys(line for report in reports for line in report.suspects)
    if exit_code != 0 and lines and not any(report.ran_out for report in reports):
        yield (
            f"It failed after it had read what no kernel computed, in {', '.join(lines)}. A value "
            "read there is zero, and on a card it has another value. If that led to the error, "
            f"set the value yourself where os.environ has {REHEARSED_CARD_VARIABLE}."
        )


class _PlainUnpickler(pickle.Unpickler):
    """Reads plain values only, so that a file cannot run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"{module_name}.{global_name} is not a plain value")


def _kept(
    reports: Sequence[Report], rehearsal: Rehearsal, suffix: str
) -> tuple[RehearsedProcess | None, Mapping[str, Any] | None]:
    """Return what the process that ran out of memory, or else the largest one, wrote beside."""

    def rank(report: Report) -> tuple[bool, int]:
        held = max((process.peak.reserved_bytes for process in report.processes), default=0)
        return report.ran_out and not rehearsal.fits, held

    for report in sorted(reports, key=rank, reverse=True):
        path = report.path.with_suffix(suffix)
        if report.processes and path.exists():
            process = max(report.processes, key=lambda process: process.peak.reserved_bytes)
            return process, _PlainUnpickler(BytesIO(path.read_bytes())).load()
    return rehearsal.largest, None

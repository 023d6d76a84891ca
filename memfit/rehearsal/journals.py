"""Reads what the watched processes of a command wrote (`watch.journal`), and makes records of it.

A report may end at any point, because its process may have been killed. All complete lines count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from memfit.memory import oom
from memfit.records import (
    DeviceRead,
    HeldBytes,
    ReadKind,
    RehearsedPhase,
    RehearsedProcess,
    RehearsedStep,
    Shortage,
)
from memfit.rehearsal.courses import Spot, changes_course

__all__ = ["Report", "read_reports"]

_PHASES: Final = ("setup", "data", "forward", "backward", "optimizer", "evaluation")
# GradScaler reads here whether a gradient was infinite. It reads no, as in most real steps.
_EXPECTED: Final = (("amp/grad_scaler.py", ReadKind.NUMBER),)
# By the bits of `libraries.h` in the device.
_LEFT_OUT: Final = (
    "buffers of plain recurrent layers (nn.RNN), of which a part is supposed",
    "the states of dropout between recurrent layers",
    "the workspace of CTC loss",
    "the workspace of batch normalization in channels_last",
)
# Events that show that a script went on after a shortage.
_EVENTS: Final = ("step", "settled", "out_of_memory")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What one process wrote.

    Args:
        path: The file of the report.
        processes: The process, once for each device that it used.
        command: The words that it was started with.
        devices: The names of the devices that it saw.
        free_bytes: The free bytes of the first device when the process began to use it.
        total_bytes: The total bytes of the first device.
        is_rehearsed: False if the device is a real one.
        has_cuda: False if its torch is built without CUDA.
        allocator: torch's allocator: `native`, or `cudaMallocAsync`. `None` if it is not known.
        ran_out: Whether its last error is out of memory.
        faults: The errors of the watch itself.
        left_out: The buffers of cuDNN that were used and not counted.
        searches_plans: Whether `torch.backends.cudnn.benchmark` was on.
        suspects: Lines that read what no kernel computed, before its last error.
    """

    path: Path
    processes: tuple[RehearsedProcess, ...]
    command: tuple[str, ...]
    devices: tuple[str, ...]
    free_bytes: int
    total_bytes: int
    is_rehearsed: bool
    has_cuda: bool
    allocator: str | None
    ran_out: bool
    faults: tuple[str, ...]
    left_out: tuple[str, ...]
    searches_plans: bool
    suspects: tuple[str, ...]


def read_reports(folder: Path, *, exit_code: int) -> tuple[Report, ...]:
    """Read every report in a folder.

    Args:
        folder: The folder with the reports.
        exit_code: What the command ended with. If it is 0, no shortage ended the command.

    Returns:
        One report for each process that imported torch and used a device or failed to. They are
        ordered by rank.
    """
    has_failed = exit_code != 0
    reports = [_report(path, has_failed=has_failed) for path in sorted(folder.glob("*.jsonl"))]
    return tuple(
        sorted(
            reports,
            key=lambda report: [
                (process.rank or 0, process.process) for process in report.processes
            ],
        )
    )


def _report(path: Path, *, has_failed: bool) -> Report:
    lines = tuple(_lines(path))
    of = functools.partial(_of_kind, lines)
    begun: Mapping[str, Any] = next(of("device"), {})
    memory: Mapping[str, Any] = next(of("memory"), {})
    devices = {int(name) for line in lines for name in line.get("peaks", ())}
    failures = tuple(of("out_of_memory"))
    last: Mapping[str, Any] = next(
        (line for line in reversed(lines) if line["event"] in _EVENTS), {}
    )
    message = next(of("exit"), {}).get("message")
    ran_out = has_failed and (
        last.get("event") == "out_of_memory"
        if message is None
        else oom.classify_text(message) is oom.Likelihood.CERTAIN
    )
    return Report(
        path=path,
        processes=tuple(
            _process(lines, begun, device, failures, ended_by=last if ran_out else {})
            for device in sorted(devices | {line["device"] for line in failures})
            if begun
        ),
        command=tuple(begun.get("command", ())),
        devices=tuple(begun.get("names", ())),
        free_bytes=memory.get("free_bytes", 0),
        total_bytes=memory.get("total_bytes", 0),
        is_rehearsed=begun.get("is_rehearsed", False),
        has_cuda=not any(of("no_cuda")),
        allocator=begun.get("allocator"),
        ran_out=ran_out,
        faults=tuple(line["message"] for line in of("fault")),
        left_out=tuple(
            name
            for index, name in enumerate(_LEFT_OUT)
            if any(line.get("left_out", 0) >> index & 1 for line in lines)
        ),
        searches_plans=any(line.get("searches_plans") for line in lines),
        suspects=tuple(next(of("exit"), {}).get("suspects", ())),
    )


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        # A process may have been killed while it wrote.
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _of_kind(lines: Iterable[dict[str, Any]], event: str) -> Iterator[dict[str, Any]]:
    return (line for line in lines if line["event"] == event)


def _process(
    lines: tuple[dict[str, Any], ...],
    begun: Mapping[str, Any],
    device: int,
    failures: tuple[dict[str, Any], ...],
    *,
    ended_by: Mapping[str, Any],
) -> RehearsedProcess:
    seen = [line for line in lines if str(device) in line.get("peaks", ())]
    ranked = [line for line in lines if line.get("rank") is not None]
    last = ranked[-1] if ranked else {}
    retries = [line["peaks"][str(device)]["num_alloc_retries"] for line in seen]
    messages = [line["message"] for line in lines if line["event"] == "exit" and line["message"]]
    return RehearsedProcess(
        process=begun["process"],
        rank=last.get("rank"),
        num_ranks=last.get("num_ranks"),
        device_index=device,
        torch_version=begun["torch"],
        peak=_peak(line["peaks"][str(device)] for line in seen),
        num_alloc_retries=max(retries, default=0),
        num_steps=max((line.get("step", 0) for line in _counting(lines)), default=0),
        steps=tuple(_steps(lines, str(device))),
        phases=tuple(_phases(lines, str(device))),
        reads=_reads(lines),
        shortages=_shortages(
            [line for line in failures if line["device"] == device], ended_by=ended_by
        ),
        has_settled=any(_of_kind(lines, "settled")),
        follows_modules=all(line.get("has_modules", True) for line in lines),
        message=messages[-1] if messages else None,
    )


def _counting(lines: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    # A shortage belongs to the current step, which has not ended.
    return (line for line in lines if line["event"] in ("step", "phase", "exit"))


def _peak(figures: Iterable[Mapping[str, int]]) -> HeldBytes:
    peak = HeldBytes(requested_bytes=0, allocated_bytes=0, reserved_bytes=0)
    for held in figures:
        peak |= _held(held)
    return peak


def _held(figures: Mapping[str, int]) -> HeldBytes:
    return HeldBytes(
        requested_bytes=figures["requested_bytes"],
        allocated_bytes=figures["allocated_bytes"],
        reserved_bytes=figures["reserved_bytes"],
    )


def _steps(lines: Iterable[dict[str, Any]], device: str) -> Iterator[RehearsedStep]:
    retries = 0
    for line in _of_kind(lines, "step"):
        figures = line["peaks"].get(device)
        if figures is None:
            continue
        yield RehearsedStep(
            number=line["step"],
            optimizer=line["optimizer"],
            peak=_held(figures),
            num_alloc_retries=max(0, figures["num_alloc_retries"] - retries),
        )
        retries = figures["num_alloc_retries"]


def _phases(lines: Iterable[dict[str, Any]], device: str) -> Iterator[RehearsedPhase]:
    held: dict[str, list[Mapping[str, int]]] = {}
    for line in lines:
        for name, figures in line.get("phases", {}).items():
            if device in figures:
                held.setdefault(name, []).append(figures[device])
    for name in _PHASES:
        if name in held:
            yield RehearsedPhase(name=name, peak=_peak(held[name]))


def _reads(lines: Iterable[dict[str, Any]]) -> tuple[DeviceRead, ...]:
    # A later line of a place counts from the beginning, so it replaces the earlier lines.
    places = {
        (read["line"], read["library_line"], read["innermost_line"], read["instruction"]): read
        for line in lines
        for read in line.get("reads", ())
    }
    # Reads of one line, such as those of a mask in forward and again in backward, are joined.
    joined: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for read in places.values():
        kind = ReadKind(read["kind"])
        innermost = read["innermost_line"] or ""
        if any(kind is known and f"{file}:" in innermost for file, known in _EXPECTED):
            continue
        joined.setdefault((read["line"], read["library_line"], kind), []).append(read)
    reads = (_read(kind, alike) for (*_, kind), alike in joined.items())
    return tuple(sorted(reads, key=lambda read: (not read.changes_course, -read.num_reads)))


def _read(kind: ReadKind, alike: Sequence[Mapping[str, Any]]) -> DeviceRead:
    line, library, phase = alike[0]["line"], alike[0]["library_line"], alike[0]["phase"]
    return DeviceRead(
        line=line,
        library_line=None if library == line else library,
        kind=kind,
        phase=phase or "setup",
        num_reads=sum(read["num_reads"] for read in alike),
        num_bytes=sum(read["num_bytes"] for read in alike),
        changes_course=any(
            _is_in_course(kind, read["phase"])
            and any(changes_course(kind, _spot(spot)) for spot in read["spots"])
            for read in alike
        ),
    )


def _is_in_course(kind: ReadKind, phase: str) -> bool:
    # A decision before the first call of a model is seldom about a batch.
    return kind is ReadKind.SIZE or phase != "setup"


def _spot(spot: tuple[str, int, int, int | None, int | None]) -> Spot:
    path, line, end_line, column, end_column = spot
    return Spot(path=path, line=line, end_line=end_line, column=column, end_column=end_column)


def _shortages(
    lines: Sequence[Mapping[str, Any]], *, ended_by: Mapping[str, Any]
) -> tuple[Shortage, ...]:
    """Return the shortages. Those with the same place and the same request are joined."""
    places: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for line in lines:
        key = (line["line"], line["library_line"], line["module"], line["wanted_bytes"])
        places.setdefault((*key, line is ended_by), []).append(line)
    return tuple(
        _shortage(alike[-1], num_times=len(alike), ended_script=alike[-1] is ended_by)
        for alike in places.values()
    )


def _shortage(line: Mapping[str, Any], *, num_times: int, ended_script: bool) -> Shortage:
    place, library = line["line"], line["library_line"]
    return Shortage(
        wanted_bytes=line["wanted_bytes"],
        free_bytes=line["free_bytes"],
        line=place,
        library_line=None if library == place else library,
        module=line["module"],
        phase=line["phase"],
        step=line["step"],
        ended_script=ended_script,
        num_times=num_times,
    )

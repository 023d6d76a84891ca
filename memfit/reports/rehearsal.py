"""Shows a rehearsal in the terminal: the peak of a command, or where memory would run out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memfit.records import (
    CommandPlan,
    CommandProbe,
    DeviceRead,
    HeldBytes,
    ReadKind,
    Rehearsal,
    RehearsalEnd,
    RehearsedProcess,
    Shortage,
)
from memfit.reports.probe import share_free, trial_table
from memfit.reports.tables import plain_table
from memfit.units import format_bytes

__all__ = [
    "doubts",
    "first_words",
    "render",
    "render_plan",
    "render_probe",
    "render_several",
    "short_line",
]

_NUM_STEPS = 6
_NUM_READS = 6
_NUM_NAMED = 3
_WHAT = {
    ReadKind.SIZE: "a size",
    ReadKind.DECISION: "true or false",
    ReadKind.NUMBER: "a number",
    ReadKind.TENSOR: "a tensor",
}


def render(rehearsal: Rehearsal) -> RenderableType:
    """Lay out one rehearsal.

    Args:
        rehearsal: The rehearsal.

    Returns:
        An object for `rich.console.Console.print`. It shows the peak or the shortage, steps,
        phases, ranks, and what the figures do not include.
    """
    parts: list[RenderableType] = ["", _heading(rehearsal), ""]
    parts += _answer(rehearsal)
    largest = rehearsal.largest
    if len(rehearsal.processes) > 1:
        parts += ["", _ranks(rehearsal.processes)]
    if largest is not None:
        whose = "" if len(rehearsal.processes) == 1 else f" of {_name(largest)}"
        if largest.steps:
            parts += ["", Text(f"Peak of each step{whose}", "bold"), _steps(largest)]
        if largest.phases:
            parts += ["", Text(f"Peak of each phase{whose}", "bold"), _phases(largest)]
    parts += _reads(rehearsal)
    notes = (*rehearsal.notes, _source((rehearsal,)))
    parts += ["", *(Text(note, "dim") for note in notes)]
    return Group(*parts)


def render_several(rehearsals: Sequence[Rehearsal]) -> RenderableType:
    """Lay out one command on several cards as a table.

    Args:
        rehearsals: One for each card, at least one.
    """
    table = plain_table()
    table.add_column("GPU (rehearsed)")
    table.add_column("ended")
    for name in ("steps", "peak", "with context", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    for rehearsal in rehearsals:
        table.add_row(rehearsal.device, *_cells(rehearsal))
    parts: list[RenderableType] = [
        "",
        Text(rehearsals[0].subject, "bold"),
        "",
        table,
    ]
    for rehearsal in rehearsals:
        if rehearsal.shortage is not None:
            parts += ["", Text(rehearsal.device, "bold"), *_shortage(rehearsal.shortage)]
    # A card whose memory ran out may not have come to the lines that read.
    parts += _reads(max(rehearsals, key=_num_lines))
    notes = dict.fromkeys(note for rehearsal in rehearsals for note in rehearsal.notes)
    parts += ["", *(Text(note, "dim") for note in (*notes, _source(rehearsals)))]
    return Group(*parts)


def render_probe(found: CommandProbe) -> RenderableType:
    """Lay out the batch sizes of a command.

    Args:
        found: The result of the probe.
    """
    best, recommended = found.max_batch_size, found.recommended_batch_size
    proof = (
        f"it fitted, and {best + 1} ran out of memory"
        if found.proved
        else "where the search was told to stop; more may fit (--max-batch-size)"
    )
    kept = share_free(found.trial_at(recommended or 0), found.capacity.usable_bytes, found.headroom)
    table = plain_table(has_header=False)
    table.add_row("largest", Text(str(best), "bold"), f"{found.source.value}: {proof}")
    table.add_row(
        "recommended",
        Text("none" if recommended is None else str(recommended), "bold green"),
        f"{kept}, without allocator retries",
    )
    parts: list[RenderableType] = [_on_card(found), "", trial_table(found.trials), "", table, ""]
    parts += [Text(note, "bold red" if "not trust" in note else "") for note in found.notes]
    return Group(*parts, Text(_in_trials(found), "dim"))


def render_plan(found: CommandPlan) -> RenderableType:
    """Lay out an effective batch size as a command.

    Args:
        found: The plan.
    """
    parts = f"{found.accumulation_steps} x {found.micro_batch_size}" + (
        f" x {found.world_size} ranks" if found.world_size > 1 else ""
    )
    return Group(
        _on_card(found),
        "",
        trial_table(found.trials),
        "",
        Text.assemble(
            (f"{found.effective_batch_size} = {parts}", "bold green"),
            f": it fitted, with at least {found.headroom:.0%} kept free and no allocator retries.",
        ),
        Text("Train with:"),
        Text(shlex.join(found.command), "bold"),
        "",
        *(Text(note) for note in found.notes),
        Text(_in_trials(found), "dim"),
    )


def _on_card(found: CommandProbe | CommandPlan) -> Text:
    words = found.command if isinstance(found, CommandProbe) else found.template
    return Text.assemble(
        (" ".join(words), "bold"),
        f"\non {found.device}, {format_bytes(found.capacity.usable_bytes)} usable",
    )


def _in_trials(found: CommandProbe | CommandPlan) -> str:
    ran_out = sum(not trial.fits for trial in found.trials)
    return (
        f"{found.source.value.capitalize()} in {_count(len(found.trials), 'run')} of the command "
        f"({ran_out} ran out) and {found.seconds:.1f} s."
    )


def doubts(rehearsal: Rehearsal) -> tuple[str, ...]:
    """Say why the figures may be wrong; nothing if there is no known reason.

    A size that no kernel computed makes them wrong. A decision makes them wrong only if real values
    decide otherwise, which the reader may know.
    """
    lines: dict[bool, set[str]] = {True: set(), False: set()}
    for process in rehearsal.processes:
        for read in process.reads:
            if read.changes_course:
                place = short_line(read.library_line or read.line)
                lines[read.kind is ReadKind.SIZE].add(place)
    told = []
    if lines[True]:
        told.append(
            f"Do not trust these figures. {_some(lines[True])}: sizes were read there. No kernel "
            "computed them, so they were zero."
        )
    if lines[False]:
        told.append(
            f"{_some(lines[False])}: values were read there to decide what to do next. No kernel "
            "computed them, so they were zero or false. The figures hold if values on the card "
            "decide in the same way."
        )
    return tuple(told)


def _some(lines: set[str]) -> str:
    others = " and others" if len(lines) > _NUM_NAMED else ""
    return ", ".join(sorted(lines)[:_NUM_NAMED]) + others


def first_words(message: str) -> str:
    """Return torch's message without its links, and of several lines the first."""
    return message.partition("\n")[0].partition("  See ")[0]


def short_line(place: str | None) -> str:
    """Return a line's short path, relative to the working folder or to a package."""
    path, _, number = (place or "").rpartition(":")
    if not path:
        return "(unknown)"
    parts = Path(path).parts
    if "site-packages" in parts:
        shown = Path(*parts[parts.index("site-packages") + 1 :])
    elif Path(path).is_relative_to(Path.cwd()):
        shown = Path(path).relative_to(Path.cwd())
    else:
        shown = Path(Path(path).name)
    return f"{shown.as_posix()}:{number}"


def _heading(rehearsal: Rehearsal) -> Text:
    room = (
        f"{format_bytes(rehearsal.capacity.usable_bytes)} usable: "
        f"{format_bytes(rehearsal.capacity.total_bytes)} less "
        f"{format_bytes(rehearsal.context_bytes)} for the CUDA context"
    )
    return Text.assemble(
        (rehearsal.subject, "bold"),
        f"\non {rehearsal.device}, rehearsed\n",
        (room, "dim"),
    )


def _answer(rehearsal: Rehearsal) -> Iterator[RenderableType]:
    largest = rehearsal.largest
    if rehearsal.end is RehearsalEnd.OUT_OF_MEMORY:
        if rehearsal.shortage is None:
            yield Text("Out of memory.", "bold red")
        else:
            yield from _shortage(rehearsal.shortage)
        if rehearsal.message is not None:
            yield Text(first_words(rehearsal.message), "dim")
        return
    if largest is not None:
        assert rehearsal.total_bytes is not None
        left = rehearsal.capacity.total_bytes - rehearsal.total_bytes
        yield Text.assemble(
            ("Peak ", "bold"),
            (format_bytes(largest.peak.reserved_bytes), "bold"),
            f" reserved; {format_bytes(rehearsal.total_bytes)} of "
            f"{format_bytes(rehearsal.capacity.total_bytes)} with the context; "
            f"{format_bytes(left)} left",
        )
        if largest.num_alloc_retries:
            yield Text(
                "The allocator gave back its cache and asked again "
                f"{_times(largest.num_alloc_retries)}. The step fits, but it is slower.",
                "yellow",
            )
    yield Text(_ending(rehearsal))


def _ending(rehearsal: Rehearsal) -> str:
    largest = rehearsal.largest
    steps = "" if largest is None else f" after {_count(largest.num_steps, 'optimizer step')}"
    return {
        RehearsalEnd.SETTLED: f"The peak had settled, so memfit ended the command{steps}.",
        RehearsalEnd.FINISHED: f"The command ended by itself{steps}.",
        RehearsalEnd.FAILED: (
            f"The command failed by itself with exit code {rehearsal.exit_code}{steps}, and not "
            "because memory ran out."
            if rehearsal.exit_code >= 0
            else f"A signal ended the command{steps}. The card's memory had not run out."
        ),
        RehearsalEnd.INTERRUPTED: f"The command was interrupted{steps}.",
        RehearsalEnd.TERMINATED: f"memfit was told to end{steps}, and ended the command.",
        RehearsalEnd.OUT_OF_MEMORY: f"Memory ran out{steps}.",
    }[rehearsal.end]


def _shortage(shortage: Shortage) -> Iterator[RenderableType]:
    yield Text(
        f"Out of memory in step {shortage.step}, {shortage.phase}: "
        f"{format_bytes(shortage.missing_bytes)} were missing.",
        "bold red",
    )
    table = plain_table(has_header=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("asked for", format_bytes(shortage.wanted_bytes))
    table.add_row("free", format_bytes(shortage.free_bytes))
    if shortage.line is not None:
        table.add_row("line", short_line(shortage.line))
    if shortage.library_line is not None:
        table.add_row("in", short_line(shortage.library_line))
    if shortage.module is not None:
        table.add_row("module", shortage.module)
    yield table


def _ranks(processes: Sequence[RehearsedProcess]) -> Table:
    table = plain_table()
    table.add_column("process")
    table.add_column("GPU", justify="right")
    for name in ("steps", "requested", "allocated", "reserved", "retries"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for process in processes:
        ran_out = any(shortage.ended_script for shortage in process.shortages)
        table.add_row(
            _name(process),
            str(process.device_index),
            str(process.num_steps),
            *_held(process.peak),
            str(process.num_alloc_retries),
            Text("out of memory", "red") if ran_out else "",
        )
    return table


def _steps(process: RehearsedProcess) -> Table:
    table = plain_table()
    for name in ("step", "requested", "allocated", "reserved", "retries"):
        table.add_column(name, justify="right", no_wrap=True)
    rows: list[tuple[int, int, tuple[str, ...]]] = []
    for step in process.steps:
        cells: tuple[str, ...] = (*_held(step.peak), str(step.num_alloc_retries))
        if rows and rows[-1][1:] == (step.number - 1, cells):
            rows[-1] = (rows[-1][0], step.number, cells)
        else:
            rows.append((step.number, step.number, cells))
    half = _NUM_STEPS // 2
    for first, last, cells in rows if len(rows) <= _NUM_STEPS else rows[:half] + rows[-half:]:
        table.add_row(str(first) if first == last else f"{first} to {last}", *cells)
    return table


def _phases(process: RehearsedProcess) -> Table:
    table = plain_table()
    table.add_column("phase")
    for name in ("requested", "allocated", "reserved"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in process.phases:
        table.add_row(phase.name, *_held(phase.peak))
    return table


def _reads(rehearsal: Rehearsal) -> Iterator[RenderableType]:
    # All ranks run the same lines, so one rank's reads are enough.
    reads = next((process.reads for process in rehearsal.processes if process.reads), ())
    if not reads:
        return
    yield ""
    for doubt in doubts(rehearsal):
        yield Text(doubt, "bold red" if "not trust" in doubt else "yellow")
        yield ""
    yield Text(
        f"Lines that read what no kernel computed ({_count(len(reads), 'line')}, "
        f"{_count(sum(read.num_reads for read in reads), 'read')})",
        "bold",
    )
    table = plain_table()
    table.add_column("reads", justify="right")
    table.add_column("what")
    table.add_column("line")
    table.add_column("")
    for read in reads[:_NUM_READS]:
        table.add_row(
            str(read.num_reads),
            _WHAT[read.kind],
            _place(read),
            Text("decides", "yellow") if read.changes_course else "",
        )
    yield table


def _num_lines(rehearsal: Rehearsal) -> int:
    return max((len(process.reads) for process in rehearsal.processes), default=0)


def _place(read: DeviceRead) -> str:
    places = (read.line, read.library_line)
    return ", in ".join(short_line(place) for place in places if place is not None) or "(unknown)"


def _cells(rehearsal: Rehearsal) -> tuple[str | Text, ...]:
    largest, total = rehearsal.largest, rehearsal.total_bytes
    shortage = rehearsal.shortage
    if rehearsal.end is RehearsalEnd.OUT_OF_MEMORY:
        missing = "" if shortage is None else f"-{format_bytes(shortage.missing_bytes)}"
        left: str | Text = Text(missing, "red")
        ended: str | Text = Text("out of memory", "red")
    else:
        left = "" if total is None else format_bytes(rehearsal.capacity.total_bytes - total)
        ended = rehearsal.end.value
    return (
        ended,
        "" if largest is None else str(largest.num_steps),
        "" if largest is None else format_bytes(largest.peak.reserved_bytes),
        "" if total is None else format_bytes(total),
        left,
    )


def _source(rehearsals: Sequence[Rehearsal]) -> str:
    processes = [process for rehearsal in rehearsals for process in rehearsal.processes]
    # A process has a row for each device that it used.
    num_processes = sum(
        len({process.process for process in rehearsal.processes}) for rehearsal in rehearsals
    )
    seconds = sum(rehearsal.seconds for rehearsal in rehearsals)
    return (
        "Rehearsed, not measured: PyTorch's own software ran, its kernels did nothing. The CUDA "
        f"context is the catalogue's figure. {_count(num_processes, 'process')}, {seconds:.1f} s"
        + (f", torch {processes[0].torch_version}." if processes else ".")
    )


def _held(peak: HeldBytes) -> tuple[str, str, str]:
    return (
        format_bytes(peak.requested_bytes),
        format_bytes(peak.allocated_bytes),
        format_bytes(peak.reserved_bytes),
    )


def _name(process: RehearsedProcess) -> str:
    return f"process {process.process}" if process.rank is None else f"rank {process.rank}"


def _count(number: int, thing: str) -> str:
    plural = f"{thing}es" if thing.endswith("s") else f"{thing}s"
    return f"{number} {thing if number == 1 else plural}"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number} times"

"""A page that shows a rehearsal: the peak, and the recorded step with this peak."""

from __future__ import annotations

from memfit.records import HeldBytes, RecordedStep, Rehearsal, RehearsalEnd
from memfit.reports.html import Page, Panel, render
from memfit.reports.profile_page import blocks_panel, step_panels
from memfit.reports.rehearsal import doubts, first_words, short_line
from memfit.reports.roles import STYLES
from memfit.units import format_bytes

__all__ = ["page"]


def page(rehearsal: Rehearsal, step: RecordedStep) -> str:
    """Return a rehearsal as one HTML document, which needs no network.

    Args:
        rehearsal: The rehearsal.
        step: The recorded step: the step that needs the most memory, or that ran out of it.
    """
    largest = max(step.peak.roles, key=lambda share: share.num_bytes)
    where = "the script" if step.number == 0 else f"optimizer step {step.number}"
    panels = [*step_panels(step), *_tables(rehearsal), blocks_panel()]
    return render(
        Page(
            title=f"{rehearsal.subject}: where the memory goes",
            lead=(
                f"At the peak of {where}, in {step.peak.phase or 'setup'}, the process takes "
                f"{format_bytes(step.peak.total_bytes)} of {rehearsal.device}; "
                f"{format_bytes(largest.num_bytes)} of it are {STYLES[largest.role].label}."
            ),
            warning=_warning(rehearsal),
            facts=(
                ("Peak", format_bytes(step.peak.total_bytes)),
                ("Device", rehearsal.device),
                ("It has", format_bytes(rehearsal.capacity.total_bytes)),
                ("Ended", rehearsal.end.value.replace("_", " ")),
                ("Figures", rehearsal.source.value),
            ),
            panels=tuple(panels),
            footer=(
                f"memfit, {rehearsal.source.value}: PyTorch's own software ran, its kernels did "
                f"nothing; {rehearsal.seconds:.1f} s."
            ),
        )
    )


def _warning(rehearsal: Rehearsal) -> str | None:
    if rehearsal.end is RehearsalEnd.OUT_OF_MEMORY:
        missing = (
            ""
            if rehearsal.shortage is None
            else f" {format_bytes(rehearsal.shortage.missing_bytes)} were missing."
        )
        return f"It does not fit.{missing} {first_words(rehearsal.message or '')}".strip()
    return " ".join(doubts(rehearsal)) or None


def _tables(rehearsal: Rehearsal) -> list[Panel]:
    steps = tuple(
        (
            f"{process.process}" if process.rank is None else f"rank {process.rank}",
            str(step.number),
            *_held(step.peak),
            str(step.num_alloc_retries),
        )
        for process in rehearsal.processes
        for step in process.steps
    )
    panels = []
    # A command that ran out in its first step took none.
    if steps:
        panels.append(
            _table(
                "processes",
                "Steps of every process",
                "The peaks of each optimizer step, with everything since the one before.",
                ("process", "step", "requested", "allocated", "reserved", "retries"),
                steps,
            )
        )
    reads = next((process.reads for process in rehearsal.processes if process.reads), ())
    if reads:
        panels.append(
            _table(
                "reads",
                "Reads of what no kernel computed",
                (
                    "Zeros were read there. If the script decides by them, the figures hold only "
                    "where values on the card decide in the same way."
                ),
                ("line", "what", "reads", "decides"),
                tuple(
                    (
                        short_line(read.line or read.library_line),
                        read.kind.value,
                        str(read.num_reads),
                        "yes" if read.changes_course else "no",
                    )
                    for read in reads
                ),
            )
        )
    return panels


def _table(
    key: str, title: str, note: str, header: tuple[str, ...], rows: tuple[tuple[str, ...], ...]
) -> Panel:
    return Panel(
        key=key,
        kind="table",
        title=title,
        note=note,
        data={"toggle": None, "columns": [{"name": name} for name in header], "rows": rows},
    )


def _held(peak: HeldBytes) -> tuple[str, str, str]:
    return (
        format_bytes(peak.requested_bytes),
        format_bytes(peak.allocated_bytes),
        format_bytes(peak.reserved_bytes),
    )

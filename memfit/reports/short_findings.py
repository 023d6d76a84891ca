"""Verifications, profiles, explorations and sweeps in a few lines, for `print` and a notebook.

The whole of them is a page or more: `memfit.reports.equivalence`, `profile`, `plan` and `sweep`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from memfit.records import Choice, Equivalence, Exploration, MemoryProfile, Record, Sweep
from memfit.records.looks import register_look
from memfit.reports.equivalence import cut_words, verdict_words
from memfit.reports.pictures import as_image
from memfit.reports.plan import alternative_cells, words_without_gain
from memfit.reports.probe import step_words
from memfit.reports.roles import STYLES
from memfit.reports.short import Short, html_table, text_table
from memfit.reports.sources import about, how_it_was_had, no_gpu_took_part
from memfit.units import format_bytes, format_parts

__all__ = ["register"]

_NUM_ROWS = 12


def register() -> None:
    """Use these forms when results are printed or shown in notebooks."""
    forms: dict[type[Record], Callable[[Any], Short]] = {
        Equivalence: _verification,
        MemoryProfile: _profile,
        Exploration: _exploration,
        Sweep: _sweep,
        Choice: _choice,
    }
    for kind, form in forms.items():
        register_look(
            kind,
            as_text=functools.partial(_as_text, form),
            as_html=functools.partial(_as_html, form),
        )


def _as_text(form: Callable[[Any], Short], record: Record) -> str:
    return text_table(form(record))


def _as_html(form: Callable[[Any], Short], record: Record) -> str:
    table = html_table(form(record))
    return table + as_image(record) if isinstance(record, MemoryProfile) else table


def _first(rows: Iterable[tuple[str, ...]]) -> tuple[tuple[str, ...], ...]:
    """Return the first rows, and one that says how many more there are."""
    every = tuple(rows)
    if len(every) <= _NUM_ROWS:
        return every
    more = (f"and {len(every) - _NUM_ROWS} more", *("" for _ in every[0][1:]))
    return (*every[:_NUM_ROWS], more)


def _verification(found: Equivalence) -> Short:
    return Short(
        title=verdict_words(found),
        header=("precision", "compared", "largest error", "differ"),
        rows=tuple(
            (
                check.precision,
                cut_words(check.cut),
                f"{check.worst_relative_error:.2g}",
                f"{check.num_differing} of {check.num_parameters}",
            )
            for check in found.checks
        ),
        note=f"Computed on {found.device} with {', '.join(step_words(found.options))}.",
    )


def _profile(found: MemoryProfile) -> Short:
    peak = found.peak
    step = ", ".join(step_words(found.options))
    said = f"{how_it_was_had(found.source)}."
    used = f"of {format_bytes(found.capacity.total_bytes)}"
    if peak.context_bytes:
        used = f"reserved; {format_bytes(peak.total_bytes)} {used} with the CUDA context"
    return Short(
        title=f"{found.subject} on {found.device}, {found.batch_size} samples: {step}",
        rows=(
            (
                "peak",
                format_bytes(peak.reserved_bytes),
                f"{used}, in {peak.phase or 'the step'}",
            ),
            *(
                (
                    STYLES[share.role].label,
                    format_bytes(share.num_bytes),
                    f"{share.num_bytes / peak.total_bytes:.1%}",
                )
                for share in sorted(peak.roles, key=lambda share: -share.num_bytes)
                if share.num_bytes
            ),
        ),
        note=said if found.message is None else f"{said} {found.message}",
    )


def _exploration(found: Exploration) -> Short:
    ranks = f" over {found.world_size} ranks" if found.world_size > 1 else ""
    step = ", ".join(step_words(found.baseline.options))
    note = [no_gpu_took_part(found.source)]
    if found.others:
        note.append(words_without_gain(found))
    return Short(
        title=(
            f"{found.effective_batch_size} samples a step{ranks}: {found.subject} on "
            f"{found.device}: {step}"
        ),
        header=("change", "fits", "plan", "peak"),
        rows=tuple(alternative_cells(each)[:4] for each in (found.baseline, *found.gains)),
        note=" ".join(note),
    )


def _sweep(found: Sweep) -> Short:
    ended = "" if found.is_complete else " It was interrupted."
    return Short(
        title=f"{found.num_steps} steps on {', '.join(found.gpus)}",
        header=("model", "GPU", "precision", "largest", "recommended"),
        rows=_first(
            (
                row.model,
                row.device,
                row.options.precision.value,
                "none" if row.max_batch_size is None else about(row.max_batch_size, (row,)),
                str(row.recommended_batch_size or "none"),
            )
            for row in found.rows
        ),
        note=no_gpu_took_part(found.source) + ended,
    )


def _choice(found: Choice) -> Short:
    ended = "" if found.is_complete else " It was interrupted, so better models may be missing."
    return Short(
        title=f"{found.device}, effective batch {found.effective_batch_size}",
        header=("model", "top-1", "plan"),
        rows=_first(
            (
                row.model,
                "" if row.top1_percent is None else f"{row.top1_percent:.1f}%",
                format_parts(row.micro_batch_sizes) if row.micro_batch_sizes else "does not fit",
            )
            for row in found.rows
        ),
        note=f"{found.num_tried} of {found.num_known} models were tried.{ended}",
    )

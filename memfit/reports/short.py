"""Results in a few lines, as `print` and a notebook show them."""

from __future__ import annotations

import dataclasses
import html
import io
import textwrap

from rich.console import Console

from memfit.records import Plan, PlanSurvey, ProbeResult, Survey, Trial
from memfit.records.looks import register_look
from memfit.reports.pictures import as_image
from memfit.reports.probe import step_words, why_largest, why_recommended
from memfit.reports.sources import (
    about,
    edge_words,
    how_it_was_had,
    no_gpu_took_part,
    said_of_edges,
    said_of_kernels,
)
from memfit.reports.tables import plain_table
from memfit.units import format_bytes, format_parts

__all__ = ["Short", "as_html", "as_text", "html_table", "register", "short", "text_table"]

_WIDTH = 100
_LEFT = "padding:.1em 1em .1em 0;text-align:left;vertical-align:top"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Short:
    """A result in a few lines.

    Args:
        title: The subject of the result.
        header: Names of the columns; empty for a table of names and values.
        rows: The cells.
        note: Where the figures come from.
    """

    title: str
    rows: tuple[tuple[str, ...], ...]
    note: str
    header: tuple[str, ...] = ()


def short(record: ProbeResult | Plan | Survey | PlanSurvey | Trial) -> Short:
    """Return a result in a few lines.

    Args:
        record: The result.
    """
    if isinstance(record, ProbeResult):
        return _probe(record)
    if isinstance(record, Plan):
        return _plan(record)
    if isinstance(record, Survey):
        return _survey(record)
    if isinstance(record, PlanSurvey):
        return _plan_survey(record)
    return _trial(record)


def as_text(record: ProbeResult | Plan | Survey | PlanSurvey | Trial) -> str:
    """Return a result as the lines that `print` shows.

    Args:
        record: The result.
    """
    return text_table(short(record))


def text_table(shown: Short) -> str:
    """Return the few lines as text.

    Args:
        shown: The result in a few lines.
    """
    table = plain_table(*shown.header, has_header=bool(shown.header))
    for row in shown.rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=_WIDTH, color_system=None, force_jupyter=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return "\n".join([shown.title, *lines, textwrap.fill(shown.note, _WIDTH)])


def as_html(record: ProbeResult | Plan | Survey | PlanSurvey | Trial) -> str:
    """Return a result as the table and the picture that a notebook shows.

    Args:
        record: The result.
    """
    table = html_table(short(record))
    return table if isinstance(record, Trial) else table + as_image(record)


def html_table(shown: Short) -> str:
    """Return the few lines as HTML.

    Args:
        shown: The result in a few lines.
    """

    def line(cells: tuple[str, ...], tag: str) -> str:
        inner = "".join(f'<{tag} style="{_LEFT}">{html.escape(cell)}</{tag}>' for cell in cells)
        return f"<tr>{inner}</tr>"

    head = f"<thead>{line(shown.header, 'th')}</thead>" if shown.header else ""
    body = "".join(line(row, "td") for row in shown.rows)
    return (
        f"<div><strong>{html.escape(shown.title)}</strong>"
        f"<table>{head}<tbody>{body}</tbody></table>"
        f"<small>{html.escape(shown.note)}</small></div>"
    )


def register() -> None:
    """Use these forms when results are printed or shown in notebooks."""
    for kind in (ProbeResult, Plan, Survey, PlanSurvey, Trial):
        register_look(kind, as_text=as_text, as_html=as_html)


def _probe(result: ProbeResult) -> Short:
    recommended = result.recommended_batch_size
    return Short(
        title=f"{result.subject} on {result.device}: {', '.join(step_words(result.options))}",
        rows=(
            ("largest", about(result.max_batch_size, result.trials), why_largest(result)),
            (
                "recommended",
                "none" if recommended is None else str(recommended),
                why_recommended(result),
            ),
        ),
        note=(
            f"{how_it_was_had(result.source)}, {format_bytes(result.capacity_bytes)} usable, "
            f"{_count(len(result.trials))}."
        ),
    )


def _count(num_trials: int) -> str:
    return f"{num_trials} trial{'' if num_trials == 1 else 's'}"


def _plan(plan: Plan) -> Short:
    ranks = f" over {plan.world_size} ranks" if plan.world_size > 1 else ""
    peak = plan.peak_reserved_bytes
    edge = about(plan.max_micro_batch_size, plan.trials)
    rows = [
        ("plan", format_parts(plan.micro_batch_sizes)),
        ("steps", str(plan.accumulation_steps)),
        ("largest micro-batch", edge if plan.edge_found else f"at least {edge}"),
    ]
    if peak is not None:
        usable = format_bytes(plan.capacity.usable_bytes)
        rows.append(("peak", f"{format_bytes(peak)} of {usable}"))
    again = plan.recomputation
    if again is not None:
        rows.append(("recomputed", f"{len(again.blocks)} of {again.num_blocks} blocks"))
    return Short(
        title=f"{plan.effective_batch_size} samples a step{ranks}: {plan.subject} on "
        f"{plan.device}: {', '.join(step_words(plan.options))}",
        rows=tuple(rows),
        note=f"{how_it_was_had(plan.source)}, {_count(len(plan.trials))}.",
    )


def _survey(survey: Survey) -> Short:
    rows = []
    trials = [t for answer in survey.answers if answer.result for t in answer.result.trials]
    for answer in survey.answers:
        result = answer.result
        if result is None:
            rows.append((answer.gpu, "", "does not fit", ""))
            continue
        recommended = result.recommended_batch_size
        rows.append(
            (
                answer.gpu,
                result.options.precision.value,
                edge_words(result),
                "none" if recommended is None else str(recommended),
            )
        )
    return Short(
        title=survey.subject,
        header=("GPU", "precision", "largest", "recommended"),
        rows=tuple(rows),
        note=" ".join(
            (
                no_gpu_took_part(survey.source),
                *survey.remarks,
                *said_of_edges(answer.result for answer in survey.answers if answer.result),
                *said_of_kernels(trials),
            )
        ),
    )


def _plan_survey(survey: PlanSurvey) -> Short:
    ranks = f" over {survey.world_size} ranks" if survey.world_size > 1 else ""
    rows = []
    for answer in survey.answers:
        plan = answer.plan
        if plan is None:
            rows.append((answer.gpu, "", "does not fit"))
        else:
            parts = format_parts(plan.micro_batch_sizes)
            rows.append((answer.gpu, plan.options.precision.value, parts))
    return Short(
        title=f"{survey.subject}: {survey.effective_batch_size} samples a step{ranks}",
        header=("GPU", "precision", "plan"),
        rows=tuple(rows),
        note=" ".join((no_gpu_took_part(survey.source), *survey.remarks)),
    )


def _trial(trial: Trial) -> Short:
    peak = trial.peak_reserved_bytes
    rows = [("outcome", "fits" if trial.fits else "out of memory")]
    if peak is not None:
        rows.append(("peak", format_bytes(peak)))
    if trial.num_alloc_retries:
        rows.append(("allocator retries", str(trial.num_alloc_retries)))
    if trial.samples_per_second is not None and trial.fits:
        rows.append(("samples/s", f"{trial.samples_per_second:.4g}"))
    return Short(
        title=f"batch size {trial.batch_size}",
        rows=tuple(rows),
        note=f"{how_it_was_had(trial.source)}.",
    )

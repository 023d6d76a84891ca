"""Shows a survey of GPUs that are not in the machine, in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from memfit.records import ProbeResult, Survey
from memfit.reports.sources import (
    edge_words,
    no_gpu_took_part,
    said_of_edges,
    said_of_kernels,
    said_of_precision,
)
from memfit.reports.tables import cards_table
from memfit.units import format_bytes

__all__ = ["render"]


def render(survey: Survey) -> RenderableType:
    """Lay out the result of each card: batch sizes, peak and the memory left.

    Args:
        survey: The survey.
    """
    table = cards_table(survey.source, "largest", "recommended", "peak", "left")
    for answer in survey.answers:
        if answer.result is None:
            table.add_row(answer.gpu, "", Text("does not fit", "red"))
        else:
            table.add_row(answer.gpu, *_cells(answer.result))
    trials = [t for answer in survey.answers if answer.result for t in answer.result.trials]
    precisions = said_of_precision(
        (answer.gpu, answer.result.options.precision) for answer in survey.answers if answer.result
    )
    edges = said_of_edges(answer.result for answer in survey.answers if answer.result)
    remarks = (*survey.remarks, *edges, *precisions, *said_of_kernels(trials))
    note = (
        " ".join((no_gpu_took_part(survey.source), *remarks))
        + " The peak and what is left are those of the recommended batch size."
    )
    return Group(Text(survey.subject, "bold"), "", table, "", Text(note))


def _cells(result: ProbeResult) -> tuple[str | Text, ...]:
    recommended = result.recommended_batch_size
    trial = None if recommended is None else result.trial_at(recommended)
    peak = None if trial is None else trial.peak_reserved_bytes
    return (
        result.options.precision.value,
        Text(edge_words(result), "bold"),
        Text("none" if recommended is None else str(recommended), "bold green"),
        "" if peak is None else format_bytes(peak),
        "" if peak is None else format_bytes(result.capacity_bytes - peak),
    )

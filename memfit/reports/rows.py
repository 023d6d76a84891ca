"""Turns results into rows of plain values, for tables of comma-separated values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from memfit.records import (
    Plan,
    PlanAnswer,
    PlanSurvey,
    ProbeResult,
    StepOptions,
    Survey,
    SurveyAnswer,
)
from memfit.units import format_parts

__all__ = ["plan_rows", "probe_rows"]

_STEP = (
    "precision",
    "optimizer",
    "image_height",
    "image_width",
    "channels_last",
    "grad_checkpointing",
)
_PROBE = (
    "model",
    "device",
    "source",
    *_STEP,
    "accumulate",
    "max_batch_size",
    "recommended_batch_size",
    "recommended_peak_bytes",
    "capacity_bytes",
    "reason",
)
_PLAN = (
    "model",
    "device",
    "source",
    *_STEP,
    "effective_batch_size",
    "world_size",
    "micro_batch_size",
    "accumulation_steps",
    "micro_batch_sizes",
    "peak_bytes",
    "capacity_bytes",
    "reason",
)


def probe_rows(found: Iterable[ProbeResult | Survey]) -> list[Sequence[object]]:
    """Return a row for every model and card; unknown values are empty.

    Args:
        found: Results of single cards, and surveys of several cards.

    Returns:
        The names of the columns, and the rows.
    """
    rows: list[Sequence[object]] = [_PROBE]
    for each in found:
        if isinstance(each, ProbeResult):
            rows.append(_probe_row(each))
            continue
        for answer in each.answers:
            if answer.result is not None:
                rows.append(_probe_row(answer.result))
            else:
                rows.append(_unfit_row(each, answer, len(_PROBE)))
    return rows


def plan_rows(found: Iterable[Plan | PlanSurvey]) -> list[Sequence[object]]:
    """Return a row for every model and card; unknown values are empty.

    Args:
        found: Plans for single cards, and surveys of several cards.

    Returns:
        The names of the columns, and the rows.
    """
    rows: list[Sequence[object]] = [_PLAN]
    for each in found:
        if isinstance(each, Plan):
            rows.append(_plan_row(each))
            continue
        for answer in each.answers:
            if answer.plan is not None:
                rows.append(_plan_row(answer.plan))
            else:
                rows.append(_unfit_row(each, answer, len(_PLAN)))
    return rows


def _unfit_row(
    survey: Survey | PlanSurvey, answer: SurveyAnswer | PlanAnswer, num_columns: int
) -> list[object]:
    """Return the row of a card that the model does not fit: its names and the reason."""
    gap = [""] * (num_columns - 4)
    return [survey.subject, answer.gpu, survey.source.value, *gap, answer.reason]


def _probe_row(result: ProbeResult) -> list[object]:
    recommended = result.recommended_batch_size
    trial = None if recommended is None else result.trial_at(recommended)
    return [
        result.subject,
        result.device,
        result.source.value,
        *_step_cells(result.options),
        _cell(result.options.accumulate),
        result.max_batch_size,
        _cell(recommended),
        _cell(None if trial is None else trial.peak_reserved_bytes),
        result.capacity_bytes,
        "",
    ]


def _plan_row(plan: Plan) -> list[object]:
    return [
        plan.subject,
        plan.device,
        plan.source.value,
        *_step_cells(plan.options),
        plan.effective_batch_size,
        plan.world_size,
        plan.micro_batch_size,
        plan.accumulation_steps,
        format_parts(plan.micro_batch_sizes),
        _cell(plan.peak_reserved_bytes),
        plan.capacity.usable_bytes,
        "",
    ]


def _step_cells(options: StepOptions) -> list[object]:
    height, width = options.image_size or ("", "")
    return [
        options.precision.value,
        _cell(options.optimizer),
        height,
        width,
        _cell(options.channels_last),
        _cell(options.grad_checkpointing),
    ]


def _cell(value: object) -> object:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else value

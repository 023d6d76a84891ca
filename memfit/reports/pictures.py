"""Draws the main picture of a probe or a plan: memory by batch size, or a bar for each card."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from memfit.records import (
    Capacity,
    MemoryProfile,
    Plan,
    PlanSurvey,
    ProbeResult,
    Source,
    Survey,
    Trial,
)
from memfit.reports.picture import draw, save
from memfit.reports.sources import about
from memfit.units import GIB, MIB, format_bytes, format_parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["as_image", "draw_plan", "draw_probe"]

_FITS, _RAN_OUT, _RECOMMENDED = "#3d9a5f", "#d2504b", "#1f5fae"
_GIB_FROM = 4 * GIB


def as_image(found: ProbeResult | Survey | Plan | PlanSurvey | MemoryProfile) -> str:
    """Return the picture of a result as an HTML image, for a notebook.

    Args:
        found: The result.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture.svg"
        if isinstance(found, MemoryProfile):
            draw(found, path)
        elif isinstance(found, (Plan, PlanSurvey)):
            draw_plan(found, path)
        else:
            draw_probe(found, path)
        data = base64.b64encode(path.read_bytes()).decode()
    # The table beside it says the same in words.
    return f'<img alt="" style="max-width: 100%" src="data:image/svg+xml;base64,{data}">'


def draw_probe(found: ProbeResult | Survey, path: Path) -> None:
    """Write a picture of every trial's peak by batch size, or of each card's batch size.

    Args:
        found: The probe's or survey's result.
        path: The file to write; its ending chooses the format.

    Raises:
        UsageError: The file cannot be written, or its ending is unknown.
    """
    if isinstance(found, ProbeResult):
        recommended = found.recommended_batch_size
        title = f"{found.subject}, {found.options.precision.value}, {found.device}"
        save(
            path,
            lambda axes: _trials(
                axes, found.trials, found.capacity, recommended, title=_titled(title, found.source)
            ),
        )
        return
    bars = [
        (
            answer.gpu,
            0 if answer.result is None else answer.result.recommended_batch_size or 0,
            "does not fit" if answer.result is None else _largest(answer.result),
        )
        for answer in found.answers
    ]
    title = _titled(f"{found.subject}: recommended batch size", found.source)
    save(path, lambda axes: _bars(axes, bars, title=title, x_label="samples"))


def draw_plan(found: Plan | PlanSurvey, path: Path) -> None:
    """Write a picture of a plan's trials and its own micro-batch, or of each card's plan.

    Args:
        found: The plan, or the plans of several cards.
        path: The file to write; its ending chooses the format.

    Raises:
        UsageError: The file cannot be written, or its ending is unknown.
    """
    if isinstance(found, Plan):
        parts = format_parts(found.micro_batch_sizes)
        title = (
            f"{found.subject}, {found.effective_batch_size} = {parts}, "
            f"{found.options.precision.value}, {found.device}"
        )
        save(
            path,
            lambda axes: _trials(
                axes,
                found.trials,
                found.capacity,
                found.micro_batch_size,
                title=_titled(title, found.source),
            ),
        )
        return
    bars = [
        (
            answer.gpu,
            0 if answer.plan is None else answer.plan.micro_batch_size,
            "does not fit" if answer.plan is None else format_parts(answer.plan.micro_batch_sizes),
        )
        for answer in found.answers
    ]
    title = _titled(
        f"{found.subject}: micro-batch for {found.effective_batch_size} samples a step",
        found.source,
    )
    save(path, lambda axes: _bars(axes, bars, title=title, x_label="samples"))


def _titled(title: str, source: Source) -> str:
    return f"{title} ({source.value})"


def _trials(
    axes: Axes,
    trials: tuple[Trial, ...],
    capacity: Capacity,
    recommended: int | None,
    *,
    title: str,
) -> None:
    unit, unit_name = (GIB, "GiB") if capacity.usable_bytes >= _GIB_FROM else (MIB, "MiB")
    for trial in trials:
        if trial.peak_reserved_bytes is None:
            continue
        own = trial.fits and trial.batch_size == recommended
        axes.plot(
            trial.batch_size,
            trial.peak_reserved_bytes / unit,
            marker="D" if own else "o" if trial.fits else "x",
            color=_RECOMMENDED if own else _FITS if trial.fits else _RAN_OUT,
            markersize=8 if own else 6,
            linestyle="none",
            # The first that ran out is beside the last that fitted, and a dot would hide it.
            zorder=2 if trial.fits else 3,
        )
    usable = capacity.usable_bytes / unit
    axes.axhline(usable, color="#888888", linewidth=1, linestyle=":")
    axes.text(
        0.01,
        usable,
        f"usable: {format_bytes(capacity.usable_bytes)}",
        transform=axes.get_yaxis_transform(),
        va="bottom",
        color="#555555",
    )
    axes.set_ylim(0, usable * 1.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel(f"{unit_name} at the peak")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    kinds = (("o", _FITS, "fits"), ("x", _RAN_OUT, "ran out of memory"))
    own_kind = () if recommended is None else (("D", _RECOMMENDED, f"train with {recommended}"),)
    for marker, colour, label in (*kinds, *own_kind):
        axes.plot([], [], marker=marker, color=colour, linestyle="none", label=label)
    axes.legend(loc="lower right", fontsize=8, frameon=False)


def _bars(axes: Axes, bars: list[tuple[str, int, str]], *, title: str, x_label: str) -> None:
    names = [name for name, _, _ in bars]
    drawn = axes.barh(names, [size for _, size, _ in bars], color=_FITS)
    labels = [f" {size} ({more})" if size else f" {more}" for _, size, more in bars]
    axes.bar_label(drawn, labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set_xlim(left=0)
    axes.set_xlabel(x_label)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def _largest(result: ProbeResult) -> str:
    return f"largest {about(result.max_batch_size, result.trials)}"

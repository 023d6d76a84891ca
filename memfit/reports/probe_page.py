"""A page that shows a probe's result, or a survey of cards."""

from __future__ import annotations

import shlex
from typing import Any

from memfit.records import CommandProbe, ProbeResult, Survey, Trial
from memfit.reports.html import Page, Panel, bar_chart, level, line_chart, render
from memfit.reports.probe import once_each, share_free, step_words, trial_notes, why_recommended
from memfit.reports.sources import (
    about,
    edge_words,
    no_gpu_took_part,
    said_of_edges,
    said_of_kernels,
)
from memfit.units import GIB, MIB, format_bytes

__all__ = ["command_page", "memory_panel", "page", "survey_page", "trials_panel"]

_SEARCH_ENDED = "the search's end"
_FITS, _RAN_OUT, _PREDICTED, _MARKED = "#3d9a5f", "#d2504b", "#8a8f98", "#c2185b"
# Predictions mostly lie on the trials, so they are drawn below them, and wider.
_BELOW = {
    "line": {"color": _PREDICTED, "width": 7},
    "marker": {"size": 14},
    "opacity": 0.45,
}


def page(result: ProbeResult) -> str:
    """Return a probe's result as one HTML document, which needs no network.

    Args:
        result: The probe's result.
    """
    largest = about(result.max_batch_size, result.trials)
    panels = [
        memory_panel(
            result.trials,
            usable_bytes=result.capacity_bytes,
            predictions=result.predictions,
            largest=f"the largest that fits is {largest}",
            marked=("recommended", result.recommended_batch_size),
        )
    ]
    if any(trial.samples_per_second for trial in result.trials):
        panels.append(_throughput(result))
    panels.append(trials_panel(result.trials, result.predictions))
    lead, facts = _answer(
        result.recommended_batch_size,
        largest,
        f"{result.max_batch_size + 1} ran out of memory" if result.edge_found else _SEARCH_ENDED,
    )
    return render(
        Page(
            title=f"{result.subject}: the largest batch size",
            lead=lead,
            facts=(
                *facts,
                ("Device", result.device),
                ("Usable", format_bytes(result.capacity_bytes)),
                ("Step", ", ".join(step_words(result.options))),
                ("Figures", result.source.value),
            ),
            panels=tuple(panels),
            footer=" ".join([f"Recommended: {why_recommended(result)}.", *trial_notes(result)]),
        )
    )


def command_page(found: CommandProbe) -> str:
    """Return the batch sizes of a user's own command as one HTML document.

    Args:
        found: The result of the probe.
    """
    best, usable_bytes = found.max_batch_size, found.capacity.usable_bytes
    kept = share_free(
        found.trial_at(found.recommended_batch_size or 0), usable_bytes, found.headroom
    )
    lead, facts = _answer(
        found.recommended_batch_size,
        str(best),
        f"{best + 1} ran out of memory" if found.proved else _SEARCH_ENDED,
    )
    return render(
        Page(
            title=f"{shlex.join(found.command)}: the largest batch size",
            lead=lead,
            warning=" ".join(note for note in found.notes if "not trust" in note) or None,
            facts=(
                *facts,
                ("Device", found.device),
                ("Usable", format_bytes(usable_bytes)),
                ("Figures", found.source.value),
            ),
            panels=(
                memory_panel(
                    found.trials,
                    usable_bytes=usable_bytes,
                    largest=f"the largest that fits is {best}",
                    marked=("recommended", found.recommended_batch_size),
                ),
                trials_panel(found.trials),
            ),
            footer=" ".join(
                (
                    f"Recommended: {kept}, without allocator retries.",
                    *(note for note in found.notes if "not trust" not in note),
                    f"Each trial is a run of the command; {found.seconds:.1f} s in all.",
                )
            ),
        )
    )


def _answer(
    recommended: int | None, largest: str, proof: str
) -> tuple[str, tuple[tuple[str, str], ...]]:
    """Return the sentence that a page begins with, and its first facts."""
    lead = (
        f"Train with {recommended or 'none that keeps the headroom'}; "
        f"the largest that fits is {largest} ({proof})."
    )
    named = "none" if recommended is None else str(recommended)
    return lead, (("Recommended", named), ("Largest", largest))


def survey_page(survey: Survey) -> str:
    """Return a survey of cards that are not in the machine, as one HTML document.

    Args:
        survey: The survey.
    """
    fitting = [answer.result for answer in survey.answers if answer.result is not None]
    names = [result.device for result in fitting]
    bars = {
        "recommended": (names, [float(result.recommended_batch_size or 0) for result in fitting]),
        "largest": (names, [float(result.max_batch_size) for result in fitting]),
    }
    trials = [trial for result in fitting for trial in result.trials]
    rows = tuple((answer.gpu, *_answer_cells(answer.result)) for answer in survey.answers)
    panel = Panel(
        key="cards",
        kind="figure",
        title="Batch size by card",
        note=" ".join(
            (
                no_gpu_took_part(survey.source),
                *survey.remarks,
                *said_of_edges(fitting),
                *said_of_kernels(trials),
            )
        ),
        data=bar_chart(bars, title="samples"),
        alternative="; ".join(f"{name}: {', '.join(cells)}" for name, *cells in rows),
        header=("GPU", "precision", "recommended", "largest"),
        rows=rows,
    )
    return render(
        Page(
            title=f"{survey.subject}: the largest batch size by card",
            lead=f"{len(fitting)} of {len(survey.answers)} cards take a batch.",
            facts=(("Figures", survey.source.value),),
            panels=(panel,),
            footer=f"memfit, {survey.source.value}.",
        )
    )


def _answer_cells(result: ProbeResult | None) -> tuple[str, str, str]:
    if result is None:
        return ("", "does not fit", "does not fit")
    recommended = result.recommended_batch_size
    return (
        result.options.precision.value,
        "none" if recommended is None else str(recommended),
        edge_words(result),
    )


def memory_panel(
    trials: tuple[Trial, ...],
    *,
    usable_bytes: int,
    largest: str,
    predictions: tuple[Trial, ...] = (),
    marked: tuple[str, int | None] | None = None,
) -> Panel:
    """Return the panel of memory by batch size.

    Args:
        trials: The trials.
        usable_bytes: The usable memory, drawn as a line.
        largest: The result, in a few words.
        predictions: The results of simulating the device for the same batch sizes.
        marked: A batch size that gets a mark, after what it is in a word.
    """
    unit, unit_name = (GIB, "GiB") if usable_bytes >= 4 * GIB else (MIB, "MiB")
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for name, shown in (
        ("predicted", [trial for trial in predictions if trial.fits]),
        ("ran out of memory", [trial for trial in trials if not trial.fits]),
        ("fits", [trial for trial in trials if trial.fits]),
    ):
        points = sorted(
            (trial.batch_size, trial.peak_reserved_bytes / unit)
            for trial in shown
            if trial.peak_reserved_bytes is not None
        )
        if points:
            lines[name] = ([float(size) for size, _ in points], [peak for _, peak in points])
    peaks = [peak for _, heights in lines.values() for peak in heights]
    usable = usable_bytes / unit
    # The axis begins at zero, so that heights compare, and has room for the limit's label.
    y_axis = {
        "title": {"text": f"{unit_name} at the peak"},
        "range": [0, 1.12 * max([usable, *peaks])],
    }
    data = line_chart(
        lines,
        x_title="batch size",
        y_title=f"{unit_name} at the peak",
        colours={"fits": _FITS, "ran out of memory": _RAN_OUT},
        layout={
            "shapes": [level(usable, f"usable: {format_bytes(usable_bytes)}")],
            "yaxis": y_axis,
        },
    )
    for trace in data["traces"]:
        if trace["name"] == "predicted":
            trace.update(_BELOW)
    if marked is not None:
        data["traces"] += _mark(*marked, trials, unit)
    note = (
        (
            "Every trial with its peak of reserved bytes. If it ran out, the peak "
            "until then. Predicted is the simulated peak for the same batch size."
        )
        if predictions
        else ("Every trial with its peak of reserved bytes. If it ran out, the peak until then.")
    )
    return Panel(
        key="memory",
        kind="figure",
        title="Batch size against memory",
        note=note,
        data=data,
        alternative=f"{len(trials)} trials; {largest}, of {format_bytes(usable_bytes)} usable.",
    )


def _mark(
    word: str, batch_size: int | None, trials: tuple[Trial, ...], unit: int
) -> list[dict[str, Any]]:
    """Return a diamond on a batch size that fitted, with the number in the legend."""
    peaks = [
        trial.peak_reserved_bytes / unit
        for trial in trials
        if trial.batch_size == batch_size and trial.fits and trial.peak_reserved_bytes is not None
    ]
    if not peaks:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": f"{word}: {batch_size}",
            "x": [float(batch_size or 0)],
            "y": peaks[-1:],
            "marker": {"symbol": "diamond", "size": 13, "color": _MARKED},
        }
    ]


def _throughput(result: ProbeResult) -> Panel:
    points = sorted(
        (trial.batch_size, trial.samples_per_second)
        for trial in result.trials
        if trial.fits and trial.samples_per_second is not None
    )
    speeds = ([float(size) for size, _ in points], [speed for _, speed in points])
    best_size, best = max(points, key=lambda point: point[1])
    return Panel(
        key="throughput",
        kind="figure",
        title="Throughput by batch size",
        note="Samples trained on per second, in each trial's last iteration.",
        data=line_chart({"samples/s": speeds}, x_title="batch size", y_title="samples per second"),
        alternative=f"The fastest trial trained on {best:.4g} samples per second, at batch size "
        f"{best_size}.",
    )


def trials_panel(trials: tuple[Trial, ...], predictions: tuple[Trial, ...] = ()) -> Panel:
    """Return the table of all trials, without empty columns.

    Args:
        trials: The trials.
        predictions: The results of simulating the device for the same batch sizes.
    """
    predicted = {trial.batch_size: trial for trial in predictions}
    names = ("batch size", "outcome", "peak", "predicted", "retries", "s/step", "samples/s")
    rows = [_cells(trial, predicted.get(trial.batch_size)) for trial in once_each(trials)]
    used = [index for index in range(len(names)) if any(_said(row[index]) for row in rows)]
    return Panel(
        key="trials",
        kind="table",
        title="Trials",
        note="Click a heading to sort them.",
        data={
            "toggle": None,
            "columns": [{"name": names[index]} for index in used],
            "rows": [[row[index] for index in used] for row in rows],
        },
    )


def _said(cell: Any) -> bool:
    return bool(cell[1] if isinstance(cell, list) else cell)


def _cells(trial: Trial, prediction: Trial | None) -> list[Any]:
    guess = None if prediction is None else prediction.peak_reserved_bytes
    # The speed of a trial before it ran out of memory says nothing about its batch size.
    seconds = trial.step_seconds if trial.fits else None
    speed = trial.samples_per_second if trial.fits else None
    return [
        [trial.batch_size, str(trial.batch_size)],
        "fits" if trial.fits else "out of memory",
        _number(trial.peak_reserved_bytes),
        _number(guess),
        [trial.num_alloc_retries, str(trial.num_alloc_retries)],
        [seconds or 0, f"{seconds:.3g}" if seconds else ""],
        [speed or 0, f"{speed:.4g}" if speed else ""],
    ]


def _number(num_bytes: int | None) -> list[Any]:
    return [num_bytes or 0, "" if num_bytes is None else format_bytes(num_bytes)]

"""Shows a sweep and a choice in the terminal, and turns them into rows for tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.text import Text

from memfit.accuracies import best_of
from memfit.errors import UsageError
from memfit.records import Choice, ChoiceRow, Sweep, SweepRow
from memfit.reports.probe import step_words
from memfit.reports.sources import about, said_of_sweep
from memfit.reports.tables import plain_table
from memfit.units import format_bytes, format_parts

__all__ = [
    "COLUMNS",
    "ORDERS",
    "choice_rows",
    "flops_words",
    "ordered",
    "render",
    "render_choice",
    "row_words",
    "sweep_rows",
]

_MILLION = 10**6
_GIGA = 10**9
_NUM_REASONS = 12

COLUMNS: Final[tuple[str, ...]] = (
    "model",
    "family",
    "device",
    "source",
    "precision",
    "optimizer",
    "image_height",
    "image_width",
    "num_classes",
    "grad_checkpointing",
    "max_batch_size",
    "recommended_batch_size",
    "peak_bytes",
    "bytes_per_sample",
    "num_parameters",
    "forward_flops",
    "capacity_bytes",
    "top1_percent",
    "reason",
)
"""The columns of a sweep as a table of values."""


def _accuracy(row: SweepRow) -> float | None:
    known = best_of(row.model)
    return None if known is None else known.top1_percent


ORDERS: Final[Mapping[str, Callable[[SweepRow], Any]]] = MappingProxyType(
    {
        "asked": lambda _: None,
        "model": lambda row: row.model,
        "accuracy": _accuracy,
        "largest": lambda row: row.max_batch_size,
        "recommended": lambda row: row.recommended_batch_size,
        "peak": lambda row: row.peak_bytes,
        "sample": lambda row: row.bytes_per_sample,
        "parameters": lambda row: row.num_parameters,
        "operations": lambda row: row.forward_flops,
    }
)
"""What rows can be sorted by."""


def ordered(
    rows: Sequence[SweepRow], order: str, *, min_batch_size: int = 1
) -> tuple[SweepRow, ...]:
    """Return the rows with a batch size, sorted: names from A, figures from the largest.

    Args:
        rows: Rows of a sweep.
        order: A key of `ORDERS`.
        min_batch_size: Rows whose largest batch size is smaller are left out.

    Raises:
        UsageError: There is no such order.
    """
    if order not in ORDERS:
        raise UsageError(f"Rows are not sorted by {order!r}; choose one of {', '.join(ORDERS)}.")
    fits = [row for row in rows if (row.max_batch_size or 0) >= min_batch_size]
    key = ORDERS[order]
    if order == "asked":
        return tuple(fits)
    if order == "model":
        return tuple(sorted(fits, key=lambda row: (row.model, row.device)))
    known = [row for row in fits if key(row) is not None]
    return (
        *sorted(known, key=key, reverse=True),
        *(row for row in fits if key(row) is None),
    )


def render(
    sweep: Sweep, *, order: str = "asked", min_batch_size: int = 1, top: int | None = None
) -> RenderableType:
    """Lay out a sweep as a table, with the failures below it.

    Args:
        sweep: The sweep.
        order: What to sort by, a key of `ORDERS`.
        min_batch_size: Rows whose largest batch size is smaller are left out.
        top: Show so many rows at most.
    """
    rows = ordered(sweep.rows, order, min_batch_size=min_batch_size)
    shown = rows[:top]
    steps = {row.options for row in sweep.rows if row.max_batch_size is not None}
    has_steps = len({tuple(step_words(options)) for options in steps}) > 1
    has_devices = len(sweep.gpus) > 1
    table = plain_table()
    table.add_column("model", no_wrap=True)
    if has_devices:
        table.add_column("card")
    if has_steps:
        table.add_column("step")
    for name in ("top-1", "largest", "recommended", "peak", "a sample", "parameters", "forward"):
        table.add_column(name, justify="right")
    for row in shown:
        middle = [row.device] if has_devices else []
        middle += [", ".join(step_words(row.options))] if has_steps else []
        table.add_row(row.model, *middle, *_figures(row))
    parts: list[RenderableType] = [table] if shown else []
    if len(shown) < len(rows):
        parts.append(Text(f"{len(rows) - len(shown)} more rows fit.", "dim"))
    parts.extend(_failures(sweep.rows))
    parts.append(Text(_note(sweep, has_steps=has_steps), "dim"))
    return Group(*parts)


def _figures(row: SweepRow) -> tuple[str, ...]:
    accuracy = _accuracy(row)
    return (
        "" if accuracy is None else f"{accuracy:.1f}%",
        _largest(row),
        _text(row.recommended_batch_size, str),
        _text(row.peak_bytes, format_bytes),
        _text(row.bytes_per_sample, format_bytes),
        _text(row.num_parameters, _millions),
        _text(row.forward_flops, flops_words),
    )


def _largest(row: SweepRow) -> str:
    if row.max_batch_size is None or not row.edge_found:
        return f">= {row.max_batch_size}"
    return about(row.max_batch_size, (row,))


def _failures(rows: Sequence[SweepRow]) -> list[RenderableType]:
    """Say what failed: each model and reason once, with the number of cards."""
    failed: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.max_batch_size is None:
            key = (row.model, row.reason or "")
            failed[key] = failed.get(key, 0) + 1
    if not failed:
        return []
    lines = [Text(f"{len(failed)} without a batch size:", "bold")]
    for (model, reason), _ in list(failed.items())[:_NUM_REASONS]:
        lines.append(Text(f"  {model}: {reason.removeprefix(model).lstrip()}"))
    if len(failed) > _NUM_REASONS:
        lines.append(Text(f"  and {len(failed) - _NUM_REASONS} more (--csv has all)"))
    return [Text(""), *lines]


def _note(sweep: Sweep, *, has_steps: bool) -> str:
    num_done = len(
        {(row.model, row.options.image_size, row.options.optimizer) for row in sweep.rows}
    )
    step = next((row.options for row in sweep.rows if row.max_batch_size is not None), None)
    cards = f"{len(sweep.gpus)} card{'s' * (len(sweep.gpus) > 1)}"
    versions = f"torch {sweep.torch_version} and timm {sweep.timm_version}"
    models = f"{num_done} model{'s' * (num_done != 1)}"
    words = [f"{models} on {cards}, {sweep.source.value} with {versions}"]
    if step is not None and not has_steps:
        words.append(", ".join(step_words(step)))
    words.append("top-1: the best published weights on ImageNet")
    if not sweep.is_complete:
        words.append(f"interrupted: {num_done} of {sweep.num_steps} are done")
    return " ".join(("; ".join(words) + ".", *said_of_sweep(sweep)))


def row_words(rows: Sequence[SweepRow]) -> str:
    """Return the result of one training step in a line, as it is shown when it comes.

    Args:
        rows: Its rows, one for each card.
    """
    first = rows[0]
    if all(row.max_batch_size is None for row in rows):
        return f"{first.model}: {first.reason}"
    sizes = ", ".join(
        f"{row.device.removeprefix('NVIDIA ').removeprefix('GeForce ')} "
        f"{about(row.max_batch_size, (row,)) if row.max_batch_size else 'none'}"
        for row in rows
    )
    return f"{first.model}: {sizes}"


def sweep_rows(rows: Sequence[SweepRow]) -> list[Sequence[object]]:
    """Return the names of the columns, and a row of plain values for each row of a sweep.

    Args:
        rows: The rows. Unknown values are `None`.
    """
    return [COLUMNS, *(_values(row) for row in rows)]


def _values(row: SweepRow) -> list[object]:
    options = row.options
    height, width = options.image_size or (None, None)
    return [
        row.model,
        row.family,
        row.device,
        row.source.value,
        options.precision.value,
        options.optimizer,
        height,
        width,
        options.num_classes,
        options.grad_checkpointing,
        row.max_batch_size,
        row.recommended_batch_size,
        row.peak_bytes,
        row.bytes_per_sample,
        row.num_parameters,
        row.forward_flops,
        row.capacity_bytes,
        _accuracy(row),
        row.reason,
    ]


_CHOICE: Final = (
    "model",
    "device",
    "source",
    "precision",
    "optimizer",
    "image_height",
    "image_width",
    "top1_percent",
    "top1_image_size",
    "micro_batch_size",
    "accumulation_steps",
    "micro_batch_sizes",
    "is_exact",
    "recommended_micro_batch_size",
    "checkpointed_micro_batch_size",
    "peak_bytes",
    "num_parameters",
    "reason",
)


def choice_rows(choice: Choice) -> list[Sequence[object]]:
    """Return the names of the columns, and a row of plain values for each model of a choice.

    Args:
        choice: The choice. Unknown values are `None`.
    """
    rows: list[Sequence[object]] = [_CHOICE]
    for row in choice.rows:
        height, width = row.options.image_size or (None, None)
        parts = format_parts(row.micro_batch_sizes) if row.micro_batch_sizes else None
        rows.append(
            [
                row.model,
                row.device,
                row.source.value,
                row.options.precision.value,
                row.options.optimizer,
                height,
                width,
                row.top1_percent,
                row.top1_image_size,
                row.micro_batch_size,
                row.accumulation_steps,
                parts,
                row.is_exact,
                row.recommended_micro_batch_size,
                row.checkpointed_micro_batch_size,
                row.peak_bytes,
                row.num_parameters,
                row.reason,
            ]
        )
    return rows


def render_choice(choice: Choice) -> RenderableType:
    """Lay out a choice: a line for each model, best first.

    Args:
        choice: The choice.
    """
    fits = [row for row in choice.rows if row.reason is None]
    table = plain_table()
    table.add_column("model", no_wrap=True)
    for name in ("image", "top-1", "plan", "peak", "parameters"):
        table.add_column(name, justify="right")
    table.add_column("accumulation")
    table.add_column("with checkpointing", justify="right")
    for row in fits:
        table.add_row(
            row.model,
            "x".join(map(str, row.options.image_size or ())) or "own",
            _top1(row),
            format_parts(row.micro_batch_sizes),
            _text(row.peak_bytes, format_bytes),
            _text(row.num_parameters, _millions),
            {None: "not needed", True: "exact", False: "batch norm: not exact"}[row.is_exact],
            _more(row),
        )
    parts: list[RenderableType] = [
        Text(f"{choice.device}, effective batch {choice.effective_batch_size}", "bold"),
        *([table] if fits else []),
    ]
    unfit = (row for row in choice.rows if row.reason is not None)
    parts.extend(Text(f"  {row.model}: {row.reason}") for row in unfit)
    # Each model has its own image size, which is in its line.
    own = dataclasses.replace(fits[0].options, image_size=None) if fits else None
    how = f", {fits[0].source.value}: {', '.join(step_words(own))}" if own is not None else ""
    first = f"{choice.num_tried} of {choice.num_known} models were tried{how}."
    if not choice.is_complete:
        first += " It was interrupted, so better models may be missing."
    parts += [Text(first, "dim"), Text(choice.accuracy_source, "dim")]
    return Group(*parts)


def _top1(row: ChoiceRow) -> str:
    if row.top1_percent is None:
        return ""
    size = row.top1_image_size
    # An accuracy at another size than the one that is planned says so.
    other = row.options.image_size not in (None, (size, size))
    return f"{row.top1_percent:.1f}%" + f" (at {size})" * other


def _more(row: ChoiceRow) -> str:
    checkpointed, now = row.checkpointed_micro_batch_size, row.recommended_micro_batch_size
    if checkpointed is None:
        return ""
    if not now or checkpointed <= now:
        return str(checkpointed)
    return f"{checkpointed} ({checkpointed / now:.1f}x)"


def flops_words(flops: int) -> str:
    """Return operations in billions, as text."""
    return f"{flops / _GIGA:.1f} GFLOP"


def _millions(number: int) -> str:
    return f"{number / _MILLION:.1f} M"


def _text(value: int | None, words: Callable[[int], str]) -> str:
    return "" if value is None else words(value)

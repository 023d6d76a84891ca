"""The page of a sweep: accuracy against the largest batch, filters, and a table that sorts.

The page is one file, and makes no network requests. Its data is held by column, so that all of timm
on a dozen cards stays small. `page/sweep.js` draws it.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Sequence
from typing import Any

import jinja2
from markupsafe import Markup

from memfit.accuracies import accuracy_source, best_of
from memfit.records import Precision, StepOptions, Sweep, SweepRow
from memfit.reports.html import source_of
from memfit.reports.probe import step_words
from memfit.reports.sources import said_of_sweep

__all__ = ["page"]

_Key = tuple[str, StepOptions]


def page(sweep: Sweep) -> str:
    """Return a sweep as one HTML document.

    Args:
        sweep: The sweep.
    """
    data = _data(sweep)
    models = len(set(data["model"]))
    # Text that is not escaped is memfit's own or plotly's.
    return _template().render(
        title="Which model fits which card",
        lead=_lead(sweep, models),
        footer=(
            f"memfit, {sweep.source.value} with torch {sweep.torch_version} and timm "
            f"{sweep.timm_version}. {accuracy_source()}"
        ),
        css=Markup(source_of("page.css") + source_of("sweep.css")),  # noqa: S704 - see above
        script=Markup(source_of("sweep.js")),  # noqa: S704 - see above
        plotly=Markup(source_of("plotly-basic.min.js")),  # noqa: S704 - see above
        data=data,
    )


def _lead(sweep: Sweep, num_models: int) -> str:
    cards = f"{len(sweep.gpus)} card{'s' * (len(sweep.gpus) > 1)}"
    lead = f"{num_models} model{'s' * (num_models != 1)} on {cards}. Nothing was measured."
    lead = " ".join((lead, *said_of_sweep(sweep)))
    return lead if sweep.is_complete else f"{lead} The sweep was interrupted: models are missing."


def _data(sweep: Sweep) -> dict[str, Any]:
    """Return the page's data by column; what depends on the card is a list for each card."""
    by_step = _by_step(sweep.rows)
    firsts = [next(iter(rows.values())) for rows in by_step.values()]
    accuracies = [best_of(row.model) for row in firsts]
    options = [options for _, options in by_step]
    steps = [_step_name(each) for each in options]
    names = sorted(set(steps))

    def of_cards(field: str) -> list[list[Any]]:
        return [
            [getattr(rows[gpu], field) if gpu in rows else None for rows in by_step.values()]
            for gpu in sweep.gpus
        ]

    return {
        "cards": list(sweep.gpus),
        "steps": names,
        "own": [_own_precision(sweep.rows, gpu) for gpu in sweep.gpus],
        "model": [row.model for row in firsts],
        "family": [row.family for row in firsts],
        "step": [names.index(step) for step in steps],
        "size": [list(each.image_size or ()) for each in options],
        "options": [_command_options(each) for each in options],
        "parameters": [row.num_parameters for row in firsts],
        "flops": [row.forward_flops for row in firsts],
        "top1": [None if known is None else known.top1_percent for known in accuracies],
        "weights": [None if known is None else known.model for known in accuracies],
        "licence": [None if known is None else known.licence for known in accuracies],
        "largest": of_cards("max_batch_size"),
        "recommended": of_cards("recommended_batch_size"),
        "peak": of_cards("peak_bytes"),
        "sample": of_cards("bytes_per_sample"),
        "reason": of_cards("reason"),
    }


def _by_step(rows: Sequence[SweepRow]) -> dict[_Key, dict[str, SweepRow]]:
    """Return the rows of each model and step by their cards.

    With `auto`, each card has its own precision. A row says which, and not that `auto` was asked
    for. But then no card has two rows of a model that differ in their precision only.
    """
    by_step: dict[_Key, dict[str, SweepRow]] = {}
    for row in rows:
        options = dataclasses.replace(row.options, precision=Precision.AUTO)
        by_step.setdefault((row.model, options), {})[row.device] = row
    precisions = {row.options.precision for row in rows} - {Precision.AUTO}
    if len(precisions) > 1 and sum(map(len, by_step.values())) == len(rows):
        return by_step
    by_step = {}
    for row in rows:
        by_step.setdefault((row.model, row.options), {})[row.device] = row
    return by_step


def _own_precision(rows: Sequence[SweepRow], gpu: str) -> str:
    """Return the precision that a card has where `auto` was asked for."""
    own = (row.options.precision for row in rows if row.device == gpu)
    return next((each.value for each in own if each is not Precision.AUTO), Precision.AUTO.value)


def _step_name(options: StepOptions) -> str:
    # The table has a column for the size of the images, so models of all sizes are shown together.
    return ", ".join(step_words(dataclasses.replace(options, image_size=None)))


def _command_options(options: StepOptions) -> str:
    """Return the options of `memfit plan` that make the same step."""
    words = []
    if options.precision is not Precision.AUTO:
        words.append(f"--precision {options.precision.value}")
    if options.optimizer not in (None, "adamw"):
        words.append(f"--optimizer {options.optimizer}")
    if options.image_size is not None:
        words.append(f"--image-size {'x'.join(map(str, options.image_size))}")
    if options.num_classes is not None:
        words.append(f"--num-classes {options.num_classes}")
    words += ["--channels-last"] * options.channels_last
    words += ["--grad-checkpointing"] * options.grad_checkpointing
    words += ["--compile"] * options.compile
    words += [f"--checkpoint {shlex.quote(name)}" for name in options.checkpoint]
    return " ".join(words)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.from_string(source_of("sweep.html.j2"))

"""Shows a plan, plans for several GPUs, and what else would fit, in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memfit.records import Alternative, Exploration, Plan, PlanSurvey
from memfit.reports.probe import heading, kept_free, step_words, trial_notes, trial_table
from memfit.reports.sources import about, no_gpu_took_part, said_of_precision
from memfit.reports.tables import cards_table, plain_table
from memfit.units import format_bytes, format_parts

__all__ = [
    "alternative_cells",
    "render",
    "render_exploration",
    "render_survey",
    "words_without_gain",
]


def render(plan: Plan) -> RenderableType:
    """Lay out a plan: the step and device, trials, micro-batches, both limits and remarks.

    Args:
        plan: The plan.

    Returns:
        An object for `rich.console.Console.print`.
    """
    if plan.ranks:
        return _of_ranks(plan)
    return Group(
        heading(plan),
        "",
        trial_table(plan.trials),
        "",
        _answers(plan),
        "",
        *(Text(remark) for remark in plan.remarks),
        *(Text(note) for note in trial_notes(plan)),
        *(("", render_exploration(plan.exploration)) if plan.exploration else ()),
    )


def _of_ranks(plan: Plan) -> RenderableType:
    """Lay out a plan whose ranks have different cards."""
    table = plain_table()
    table.add_column("rank", justify="right")
    table.add_column("card")
    for name in ("samples", "plan", "peak", "left"):
        table.add_column(name, justify="right")
    for rank, part in enumerate(plan.ranks):
        peak = part.peak_reserved_bytes
        table.add_row(
            str(rank),
            part.device,
            str(part.share),
            Text(format_parts(part.micro_batch_sizes), "bold green"),
            "" if peak is None else format_bytes(peak),
            "" if peak is None else format_bytes(part.capacity.usable_bytes - peak),
        )
    num_trials = sum(
        len(part.trials) for part in {part.device: part for part in plan.ranks}.values()
    )
    return Group(
        Text.assemble(
            (plan.subject, "bold"),
            f": {plan.effective_batch_size} samples a step over {plan.world_size} ranks\n",
            (" · ".join(step_words(plan.options)), "dim"),
        ),
        "",
        table,
        "",
        *(Text(remark) for remark in plan.remarks),
        Text(
            f"{plan.source.value.capitalize()} in {num_trials} trials and {plan.seconds:.1f} s "
            f"with torch {plan.torch_version}."
        ),
    )


def _answers(plan: Plan) -> Table:
    table = plain_table(has_header=False)
    ranks = f", {plan.world_size} ranks" if plan.world_size > 1 else ""
    table.add_row(
        "effective batch", Text(str(plan.effective_batch_size), "bold"), f"samples a step{ranks}"
    )
    steps = plan.accumulation_steps
    how = "one step, no accumulation" if steps == 1 else f"{steps} micro-batches a step"
    each = " on each rank" if plan.world_size > 1 and plan.is_even else ""
    first = " on the first rank" if plan.world_size > 1 and not plan.is_even else ""
    table.add_row(
        "plan", Text(format_parts(plan.micro_batch_sizes), "bold green"), f"{how}{each}{first}"
    )
    peak = plan.peak_reserved_bytes
    if peak is not None:
        free = plan.capacity.usable_bytes - peak
        table.add_row(
            "peak",
            format_bytes(peak),
            f"{plan.source.value}; {format_bytes(free)} of "
            f"{format_bytes(plan.capacity.usable_bytes)} left",
        )
    again = plan.recomputation
    if again is not None:
        table.add_row(
            "recomputed",
            f"{len(again.blocks)} of {again.num_blocks}",
            f"blocks: {again.forward_share:.0%} of the operations of forward again, "
            f"{again.forward_share_of_all:.0%} for all blocks",
        )
    edge = plan.max_micro_batch_size
    if plan.edge_found:
        table.add_row(
            "largest",
            about(edge, plan.trials),
            f"micro-batch that fits: {edge + 1} ran out of memory",
        )
        table.add_row(
            "recommended",
            str(plan.recommended_micro_batch_size),
            f"micro-batch with {kept_free(plan)}: the plan's limit",
        )
    else:
        table.add_row("largest", f"≥ {edge}", "micro-batch that fits; no more is needed")
    if plan.samples_per_second is not None:
        table.add_row("speed", f"{plan.samples_per_second:.4g}", "samples/s on each rank, measured")
    return table


def render_survey(survey: PlanSurvey) -> RenderableType:
    """Lay out the plan of each card for an effective batch.

    Args:
        survey: The plans.
    """
    table = cards_table(survey.source, "plan", "peak", "left")
    for answer in survey.answers:
        plan = answer.plan
        if plan is None:
            table.add_row(answer.gpu, "", Text("does not fit", "red"))
            continue
        peak = plan.peak_reserved_bytes
        table.add_row(
            answer.gpu,
            plan.options.precision.value,
            Text(format_parts(plan.micro_batch_sizes), "bold green"),
            "" if peak is None else format_bytes(peak),
            "" if peak is None else format_bytes(plan.capacity.usable_bytes - peak),
        )
    ranks = f" over {survey.world_size} ranks" if survey.world_size > 1 else ""
    precisions = said_of_precision(
        (answer.gpu, answer.plan.options.precision) for answer in survey.answers if answer.plan
    )
    note = (
        " ".join((no_gpu_took_part(survey.source), *survey.remarks, *precisions))
        + " The peak and what is left are those of the plan's micro-batch that needs most."
    )
    return Group(
        Text.assemble(
            (survey.subject, "bold"), f": {survey.effective_batch_size} samples a step{ranks}"
        ),
        "",
        table,
        "",
        Text(note),
    )


def render_exploration(exploration: Exploration) -> RenderableType:
    """Lay out what would fit after single changes of the step. All of it is simulated.

    Args:
        exploration: The exploration.
    """
    table = plain_table()
    table.add_column("change (simulated)")
    table.add_column("fits", justify="right")
    table.add_column("plan", justify="right")
    table.add_column("peak", justify="right")
    table.add_column("at the cost of")
    for alternative in (exploration.baseline, *exploration.gains):
        change, fits, parts, *others = alternative_cells(alternative)
        shown = Text(fits, "" if alternative.micro_batch_sizes else "red")
        table.add_row(change, shown, Text(parts, "bold green"), *others)
    ranks = f" over {exploration.world_size} ranks" if exploration.world_size > 1 else ""
    target = f"{exploration.effective_batch_size} samples a step{ranks}"
    return Group(
        Text.assemble(
            "What one change would do for ",
            (exploration.subject, "bold"),
            f" on {exploration.device} with "
            f"{format_bytes(exploration.capacity.usable_bytes)} usable, {target}\n",
            (" · ".join(step_words(exploration.baseline.options)), "dim"),
        ),
        "",
        table,
        "",
        Text(
            "fits: a micro-batch that leaves the headroom and needs no allocator "
            "retries. ≥: no more is needed."
        ),
        *([Text(words_without_gain(exploration))] if exploration.others else []),
    )


def words_without_gain(exploration: Exploration) -> str:
    """Return a sentence on the changes with which no more fits.

    Args:
        exploration: The exploration; it has such changes.
    """
    by_reason: dict[str, list[str]] = {}
    for each in exploration.others:
        _, fits, *_, cost = alternative_cells(each)
        reason = fits if each.micro_batch_sizes else cost.rstrip(".")
        by_reason.setdefault(reason, []).append(each.change)
    said = [f"{', '.join(changes)}: {reason}" for reason, changes in by_reason.items()]
    return f"Tried, and no more fits. {'; '.join(said)}."


def alternative_cells(alternative: Alternative) -> tuple[str, ...]:
    """Return a change's cells: its name, the micro-batch, the plan, the peak and the cost."""
    change = alternative.change or "as it is"
    if not alternative.micro_batch_sizes:
        return change, "none", "", "", alternative.reason or ""
    peak = alternative.peak_reserved_bytes
    most = alternative.recommended_micro_batch_size
    return (
        change,
        f"{'' if alternative.edge_found else '≥ '}{most}",
        format_parts(alternative.micro_batch_sizes),
        "" if peak is None else format_bytes(peak),
        alternative.costs,
    )

"""A page that shows a plan, or plans for several cards."""

from __future__ import annotations

from memfit.records import Plan, PlanSurvey
from memfit.reports import exploration_page
from memfit.reports.html import Page, Panel, bar_chart, render
from memfit.reports.probe import step_words, trial_notes
from memfit.reports.probe_page import memory_panel, trials_panel
from memfit.reports.sources import about, no_gpu_took_part
from memfit.units import format_bytes, format_parts

__all__ = ["page", "survey_page"]


def page(plan: Plan) -> str:
    """Return a plan as one HTML document, which needs no network.

    Args:
        plan: The plan. Its exploration is shown too, if it has one.
    """
    parts = format_parts(plan.micro_batch_sizes)
    ranks = f" over {plan.world_size} ranks" if plan.world_size > 1 else ""
    peak = plan.peak_reserved_bytes
    edge = about(plan.max_micro_batch_size, plan.trials)
    most = edge if plan.edge_found else f"at least {edge}"
    again = plan.recomputation
    recomputed = "" if again is None else f"{len(again.blocks)} of {again.num_blocks} blocks"
    panels = [
        memory_panel(
            plan.trials,
            usable_bytes=plan.capacity.usable_bytes,
            largest=f"the largest micro-batch that fits is {most}",
            marked=("plan", plan.micro_batch_size),
        ),
        trials_panel(plan.trials),
    ]
    if plan.exploration is not None:
        panels += exploration_page.panels(plan.exploration)
    return render(
        Page(
            title=f"{plan.subject}: {plan.effective_batch_size} samples a step",
            lead=(
                f"{plan.effective_batch_size} samples{ranks} are {parts}"
                f"{' on the first rank' if plan.world_size > 1 else ''}."
            ),
            facts=(
                ("Plan", parts),
                ("Steps", str(plan.accumulation_steps)),
                ("Largest micro-batch", most),
                *((("Peak", format_bytes(peak)),) if peak is not None else ()),
                *((("Recomputed", recomputed),) if recomputed else ()),
                ("Device", plan.device),
                ("Usable", format_bytes(plan.capacity.usable_bytes)),
                ("Step", ", ".join(step_words(plan.options))),
                ("Figures", plan.source.value),
            ),
            panels=tuple(panels),
            footer=" ".join((*plan.remarks, *trial_notes(plan))),
        )
    )


def survey_page(survey: PlanSurvey) -> str:
    """Return the plans of several cards for an effective batch, as one HTML document.

    Args:
        survey: The plans.
    """
    fitting = [answer.plan for answer in survey.answers if answer.plan is not None]
    names = [plan.device for plan in fitting]
    bars = {"micro-batch": (names, [float(plan.micro_batch_size) for plan in fitting])}
    rows = tuple((answer.gpu, *_cells(answer.plan)) for answer in survey.answers)
    ranks = f" over {survey.world_size} ranks" if survey.world_size > 1 else ""
    return render(
        Page(
            title=f"{survey.subject}: {survey.effective_batch_size} samples a step by card",
            lead=f"{len(fitting)} of {len(survey.answers)} cards can take "
            f"{survey.effective_batch_size} samples{ranks} in parts.",
            facts=(("Figures", survey.source.value),),
            panels=(
                Panel(
                    key="cards",
                    kind="figure",
                    title="Micro-batch by card",
                    note=" ".join((no_gpu_took_part(survey.source), *survey.remarks)),
                    data=bar_chart(bars, title="samples"),
                    alternative="; ".join(f"{name}: {', '.join(cells)}" for name, *cells in rows),
                    header=("GPU", "precision", "plan", "steps", "peak"),
                    rows=rows,
                ),
            ),
            footer=f"memfit, {survey.source.value}.",
        )
    )


def _cells(plan: Plan | None) -> tuple[str, str, str, str]:
    if plan is None:
        return ("", "does not fit", "", "")
    peak = plan.peak_reserved_bytes
    return (
        plan.options.precision.value,
        format_parts(plan.micro_batch_sizes),
        str(plan.accumulation_steps),
        "" if peak is None else format_bytes(peak),
    )

"""A page that shows what would fit after single changes of a training step."""

from __future__ import annotations

from memfit.records import Alternative, Exploration
from memfit.reports.html import Page, Panel, bar_chart, render, upright
from memfit.reports.plan import alternative_cells, words_without_gain
from memfit.reports.probe import step_words
from memfit.units import GIB, MIB, format_bytes

__all__ = ["page", "panels"]


def page(exploration: Exploration) -> str:
    """Return an exploration as one HTML document, which needs no network.

    Args:
        exploration: The exploration.
    """
    everything = (exploration.baseline, *exploration.gains)
    best = max(everything, key=lambda each: each.recommended_micro_batch_size or 0)
    ranks = f" over {exploration.world_size} ranks" if exploration.world_size > 1 else ""
    return render(
        Page(
            title=f"{exploration.subject}: what one change would do",
            lead=(
                f"As it is, {_fits(exploration.baseline)}. Most is gained by "
                f"{_name(best)}: {_fits(best)}."
                if best is not exploration.baseline
                else f"As it is, {_fits(best)}. No single change makes more fit."
            ),
            facts=(
                ("Effective batch", f"{exploration.effective_batch_size}{ranks}"),
                ("Device", exploration.device),
                ("Usable", format_bytes(exploration.capacity.usable_bytes)),
                ("Step", ", ".join(step_words(exploration.baseline.options))),
                ("Figures", exploration.source.value),
            ),
            panels=panels(exploration),
            footer="memfit, simulated: nothing ran.",
        )
    )


def panels(exploration: Exploration) -> tuple[Panel, ...]:
    """Return the panels of an exploration, also for pages that show more.

    Args:
        exploration: The exploration.
    """
    everything = (exploration.baseline, *exploration.gains)
    return (_sizes(exploration, everything), _peaks(exploration, everything))


def _sizes(exploration: Exploration, everything: tuple[Alternative, ...]) -> Panel:
    names = [_name(each) for each in everything]
    heights = [float(each.recommended_micro_batch_size or 0) for each in everything]
    bars = {"largest micro-batch": (names, heights)}
    return Panel(
        key="sizes",
        kind="figure",
        title="The largest micro-batch, one change at a time",
        note=(
            "With the headroom kept free and no allocator retries. Changes that affect "
            "training least come first. ≥ means that no more was needed."
            f"{' ' + words_without_gain(exploration) if exploration.others else ''}"
        ),
        data=bar_chart(bars, title="samples"),
        alternative="; ".join(f"{_name(each)}: {_fits(each)}" for each in everything),
        header=("change", "fits", "plan", "peak", "at the cost of"),
        rows=tuple(alternative_cells(each) for each in everything),
    )


def _peaks(exploration: Exploration, everything: tuple[Alternative, ...]) -> Panel:
    usable_bytes = exploration.capacity.usable_bytes
    unit, unit_name = (GIB, "GiB") if usable_bytes >= 4 * GIB else (MIB, "MiB")
    known = [each for each in everything if each.peak_reserved_bytes is not None]
    heights = [(each.peak_reserved_bytes or 0) / unit for each in known]
    bars = {"peak": ([_name(each) for each in known], heights)}
    data = bar_chart(bars, title=f"{unit_name} at the peak")
    usable = usable_bytes / unit
    data["layout"]["shapes"] = [upright(usable, f"usable: {format_bytes(usable_bytes)}")]
    data["layout"]["xaxis"]["range"] = [0, 1.05 * max([usable, *heights])]
    return Panel(
        key="peaks",
        kind="figure",
        title="What each plan takes",
        note="The highest peak of reserved bytes of the plan's parts.",
        data=data,
        alternative="; ".join(
            f"{_name(each)}: {format_bytes(each.peak_reserved_bytes or 0)}" for each in known
        ),
    )


def _name(alternative: Alternative) -> str:
    return alternative.change or "as it is"


def _fits(alternative: Alternative) -> str:
    if not alternative.micro_batch_sizes:
        return "nothing fits"
    at_least = "" if alternative.edge_found else "at least "
    most = alternative.recommended_micro_batch_size
    return f"micro-batches of {at_least}{most} fit"

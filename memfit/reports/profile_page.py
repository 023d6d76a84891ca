"""A page that shows a memory profile."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from memfit.records import CardLine, MemoryProfile, RecordedStep, Role
from memfit.reports.html import Page, Panel, level, line_chart, render
from memfit.reports.probe import step_words
from memfit.reports.roles import STYLES, ModuleNode, module_tree, short_operation
from memfit.units import GIB, MIB, format_bytes

__all__ = ["blocks_panel", "page", "step_panels"]

_ROLES = tuple(Role)
_NUM_MODULE_ROWS = 60
# Parts that would be narrower than a pixel are drawn together.
_LEAST_SHARE = 0.001
_GIB_FROM = 10_000 * MIB
_CARD_COLOURS = ("#1f77b4", "#e07b18", "#2c9a4b", "#8d62c4", "#c2503f", "#6b6f76")
# A label's height, as a share of the highest limit; and how many cards one label names.
_LABEL_HEIGHT = 0.07
_NUM_NAMED_TOGETHER = 2
# The lines of memory by batch size end at this multiple of the largest size that fits.
_BEYOND = 1.25


def page(profile: MemoryProfile) -> str:
    """Return a profile as one HTML document, which needs no network.

    Args:
        profile: The profile.
    """
    peak = profile.peak
    largest = max(peak.roles, key=lambda share: share.num_bytes)
    with_context = " with the CUDA context" if peak.context_bytes else ""
    panels = step_panels(profile)
    if profile.cards:
        panels.append(_cards(profile))
    if profile.advice:
        panels.append(_advice(profile))
    panels.append(blocks_panel())
    facts = [
        ("Peak", format_bytes(peak.reserved_bytes)),
        *([("With the context", format_bytes(peak.total_bytes))] if peak.context_bytes else []),
        ("Device", profile.device),
        ("It has", format_bytes(profile.capacity.total_bytes)),
        ("Step", ", ".join(step_words(profile.options))),
        ("Figures", profile.source.value),
    ]
    if profile.bytes_per_sample is not None and profile.fixed_bytes is not None:
        first = 2 if peak.context_bytes else 1
        facts[first:first] = [
            ("Every sample", format_bytes(round(profile.bytes_per_sample))),
            ("Whatever the batch", format_bytes(profile.fixed_bytes)),
        ]
    return render(
        Page(
            title=f"{profile.subject}, batch size {profile.batch_size}: where the memory goes",
            lead=(
                f"At its peak, in {peak.phase or 'the step'}, the step takes "
                f"{format_bytes(peak.total_bytes)}{with_context}; "
                f"{format_bytes(largest.num_bytes)} of it are "
                f"{STYLES[largest.role].label}."
            ),
            warning=profile.message,
            facts=tuple(facts),
            panels=tuple(panels),
            footer=(
                f"memfit, {profile.source.value}, torch {profile.torch_version}, "
                f"{profile.seconds:.1f} s."
            ),
        )
    )


def step_panels(step: MemoryProfile | RecordedStep) -> list[Panel]:
    """Return the panels of a step over time and at its peak; they need `blocks_panel` too.

    Args:
        step: The step.
    """
    return [_timeline(step), _roles(step), _modules(step)]


def _timeline(profile: MemoryProfile | RecordedStep) -> Panel:
    timeline, peak = profile.timeline, profile.peak
    strings: dict[str, int] = {}

    def number(text: str) -> int:
        return strings.setdefault(text, len(strings))

    blocks = profile.blocks
    last = len(timeline.allocated_bytes)
    changes = [
        (moment, reserved)
        for moment, (before, reserved) in enumerate(
            itertools.pairwise((None, *timeline.reserved_bytes))
        )
        if before != reserved
    ]
    data = {
        "num_moments": last,
        "peak": peak.moment,
        "roles": [{"name": STYLES[role].label, "colour": STYLES[role].colour} for role in _ROLES],
        "slack": _ROLES.index(Role.SLACK),
        "phases": [
            {
                "name": phase.name,
                "label": ""
                if phase.micro_batch is None or profile.num_micro_batches == 1
                else str(phase.micro_batch + 1),
                "begin": phase.begin,
            }
            for phase in timeline.phases
        ],
        "reserved": changes,
        "role": [_ROLES.index(block.role) for block in blocks],
        "requested": [block.requested_bytes for block in blocks],
        "held": [block.held_bytes for block in blocks],
        "born": [-1 if block.born is None else block.born for block in blocks],
        "died": [last if block.died is None else block.died for block in blocks],
        "module": [number(block.module) for block in blocks],
        "operation": [number(short_operation(block.operation)) for block in blocks],
        "line": [number(block.source_line or "") for block in blocks],
        "sample": [
            None if block.bytes_per_sample is None else round(block.bytes_per_sample)
            for block in blocks
        ],
    }
    data["strings"] = list(strings)
    low, high = min(timeline.allocated_bytes), max(timeline.allocated_bytes)
    return Panel(
        key="timeline",
        kind="timeline",
        title="The step, moment by moment",
        note=(
            "The bytes in use, by role, after every allocation and free. The "
            "dashed line shows what the allocator has reserved. Drag to zoom, "
            "double-click to zoom out, point at a moment or move the slider with "
            "the arrow keys to see what is live there."
        ),
        data=data,
        alternative=(
            f"Memory in use over {last} events of the step: it begins at "
            f"{format_bytes(timeline.allocated_bytes[0])}, lies between {format_bytes(low)} and "
            f"{format_bytes(high)}, and peaks in {peak.phase or 'the step'}."
        ),
        header=("phase", "begins with", "at most", "ends with"),
        rows=_phase_rows(profile),
    )


def _phase_rows(profile: MemoryProfile | RecordedStep) -> tuple[tuple[str, ...], ...]:
    values = profile.timeline.allocated_bytes
    ends = [*(phase.begin for phase in profile.timeline.phases[1:]), len(values)]
    return tuple(
        (
            phase.name,
            format_bytes(values[phase.begin]),
            format_bytes(max(values[phase.begin : end])),
            format_bytes(values[end - 1]),
        )
        for phase, end in zip(profile.timeline.phases, ends, strict=True)
        if phase.begin < end
    )


def _roles(profile: MemoryProfile | RecordedStep) -> Panel:
    shares = profile.peak.roles
    total = profile.peak.total_bytes
    unit, unit_name = _unit_of(total)
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": STYLES[share.role].label,
            "y": ["peak"],
            "x": [share.num_bytes / unit],
            "marker": {"color": STYLES[share.role].colour},
            "hovertemplate": f"%{{fullData.name}}: {format_bytes(share.num_bytes)}"
            f" ({share.num_bytes / total:.1%})<extra></extra>",
        }
        for share in shares
    ]
    return Panel(
        key="roles",
        kind="figure",
        title="What the peak is made of",
        note="The parts add up to the peak, to the byte.",
        data={
            "height": 200,
            "traces": traces,
            "layout": {
                "barmode": "stack",
                "xaxis": {"title": {"text": unit_name}},
                "yaxis": {"visible": False},
            },
        },
        alternative="; ".join(
            f"{STYLES[share.role].label} {format_bytes(share.num_bytes)}" for share in shares
        ),
        header=("role", "bytes", "share", "for every sample"),
        rows=tuple(
            (
                STYLES[share.role].label,
                format_bytes(share.num_bytes),
                f"{share.num_bytes / total:.1%}",
                format_bytes(round(share.bytes_per_sample)) if share.bytes_per_sample else "",
            )
            for share in sorted(shares, key=lambda share: -share.num_bytes)
        ),
    )


def _modules(profile: MemoryProfile | RecordedStep) -> Panel:
    tree = module_tree((share.module, share.num_bytes) for share in profile.peak.modules)
    nodes = list(_walk(tree, None, least=tree.num_bytes * _LEAST_SHARE))
    named = (node for node, parent in nodes if parent is not None and "smaller)" not in node.name)
    by_size = sorted(named, key=_by_bytes)
    trace = {
        "type": "icicle",
        "ids": [node.path or "all" for node, _ in nodes],
        "labels": [node.name if parent else profile.subject for node, parent in nodes],
        "parents": ["" if parent is None else parent.path or "all" for _, parent in nodes],
        "values": [node.num_bytes for node, _ in nodes],
        "text": [format_bytes(node.num_bytes) for node, _ in nodes],
        "branchvalues": "total",
        "tiling": {"orientation": "v"},
        "textinfo": "label+text",
        "hovertemplate": "%{id}<br>%{text}, %{percentRoot:.1%} of the peak<extra></extra>",
    }
    return Panel(
        key="modules",
        kind="figure",
        title="Modules at the peak",
        note=(
            "Every module with what it holds at the peak. A wider box holds more. "
            "Click one to look inside. What belongs to no module is in parentheses."
        ),
        data={
            "height": 460,
            "traces": [trace],
            "layout": {"margin": {"l": 0, "r": 0, "t": 8, "b": 0}},
        },
        alternative="The largest: "
        + "; ".join(f"{node.path} {format_bytes(node.num_bytes)}" for node in by_size[:5]),
        header=("module", "bytes", "share"),
        rows=tuple(
            (
                node.path,
                format_bytes(node.num_bytes),
                f"{node.num_bytes / profile.peak.total_bytes:.1%}",
            )
            for node in by_size[:_NUM_MODULE_ROWS]
        ),
    )


def _unit_of(num_bytes: int) -> tuple[int, str]:
    """Return the unit that gives an axis up to so many bytes short numbers."""
    return (GIB, "GiB") if num_bytes >= _GIB_FROM else (MIB, "MiB")


def _by_bytes(node: ModuleNode) -> int:
    return -node.num_bytes


def _walk(
    node: ModuleNode, parent: ModuleNode | None, *, least: float
) -> list[tuple[ModuleNode, ModuleNode | None]]:
    """Return a module and the modules inside it, with their parents; small ones are merged."""
    shown = [child for child in node.largest if child.num_bytes >= least]
    small = sum(child.num_bytes for child in node.largest[len(shown) :])
    if small and shown:
        rest = f"({len(node.children) - len(shown)} smaller)"
        shown.append(ModuleNode(rest, f"{node.path}.{rest}", small))
    inner = [pair for child in shown for pair in _walk(child, node, least=least)]
    return [(node, parent), *inner]


def _limit_labels(cards: Sequence[CardLine]) -> dict[str, str]:
    """Return labels of the cards' limits, by card; cards with almost the same limit share one.

    A label is above its line. So it stands at the highest of its cards, and the next line above is
    a label's height away.
    """
    if len(cards) == 1:
        # The legend has the card's name, and on a phone the name would reach the curve.
        return {cards[0].gpu: f"the card has {format_bytes(cards[0].total_bytes)}"}
    groups: list[list[CardLine]] = []
    ordered = sorted(cards, key=lambda card: card.total_bytes)
    apart = _LABEL_HEIGHT * ordered[-1].total_bytes
    for card in ordered:
        if groups and card.total_bytes - groups[-1][-1].total_bytes < apart:
            groups[-1].append(card)
        else:
            groups.append([card])
    labels = {}
    for group in groups:
        named = [f"{card.gpu} has {format_bytes(card.total_bytes)}" for card in group]
        if len(named) > _NUM_NAMED_TOGETHER:
            rest = len(named) - _NUM_NAMED_TOGETHER
            named = [*named[-_NUM_NAMED_TOGETHER:], f"{rest} more below"]
        labels[group[-1].gpu] = "; ".join(named)
    return labels


def _cards(profile: MemoryProfile) -> Panel:
    cards = profile.cards
    lines = {
        card.gpu: (
            [float(size) for size, _ in card.points],
            [num_bytes / GIB for _, num_bytes in card.points],
        )
        for card in cards
    }
    colours = {
        card.gpu: _CARD_COLOURS[index % len(_CARD_COLOURS)] for index, card in enumerate(cards)
    }
    highest = max(card.total_bytes for card in cards) / GIB
    labels = _limit_labels(cards)
    shapes = [
        level(
            card.total_bytes / GIB,
            labels.get(card.gpu, ""),
            # The curves begin at the lower left, so there a low label would be on them.
            place="start" if card.total_bytes / GIB > highest / 2 else "end",
            colour=colours[card.gpu],
        )
        for card in cards
    ]
    edges = [
        (card.max_batch_size, card.max_batch_bytes)
        for card in cards
        if card.max_batch_size is not None and card.max_batch_bytes is not None
    ]
    y_axis = {"title": {"text": "GiB of the card"}, "range": [0, 1.15 * highest]}
    layout: dict[str, Any] = {"shapes": shapes, "yaxis": y_axis}
    if edges and profile.batch_size > _BEYOND * max(size for size, _ in edges):
        # With a much too large batch, the sizes that fit would be squeezed into a corner.
        layout["xaxis"] = {
            "title": {"text": "batch size"},
            "range": [0, _BEYOND * max(size for size, _ in edges)],
        }
    data = line_chart(lines, x_title="batch size", y_title="GiB", colours=colours, layout=layout)
    data["traces"].append(
        {
            "type": "scatter",
            "mode": "markers",
            "name": "largest batch that fits",
            "x": [size for size, _ in edges],
            "y": [num_bytes / GIB for _, num_bytes in edges],
            "marker": {"symbol": "diamond", "size": 11, "color": "#c2185b"},
        }
    )
    return Panel(
        key="cards",
        kind="figure",
        title="Batch size against memory",
        note=(
            "What the step would take on each card without a limit, with the "
            "context, simulated. The dotted lines show what the cards have. The "
            "largest batch may be beyond the point where the lines meet, because "
            "convolutions use less memory when there is less."
        ),
        data=data,
        alternative="; ".join(
            f"{card.gpu}: at most {card.max_batch_size or 'no'} samples" for card in cards
        ),
        header=("GPU", "precision", "has", "largest batch", f"at {profile.batch_size}"),
        rows=tuple(
            (
                card.gpu,
                card.precision,
                format_bytes(card.total_bytes),
                "none" if card.max_batch_size is None else str(card.max_batch_size),
                format_bytes(dict(card.points)[profile.batch_size]),
            )
            for card in cards
        ),
    )


def _advice(profile: MemoryProfile) -> Panel:
    names = ["as it is", *(change.title for change in profile.advice)]
    totals = [
        dict(profile.cards[0].points)[profile.batch_size]
        if profile.cards
        else profile.peak.total_bytes,
        *(change.total_bytes for change in profile.advice),
    ]
    unit, unit_name = _unit_of(max(totals))
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": names[::-1],
        "x": [total / unit for total in totals[::-1]],
        "text": [format_bytes(total) for total in totals[::-1]],
        "hovertemplate": "%{y}: %{text}<extra></extra>",
    }
    return Panel(
        key="advice",
        kind="figure",
        title="What would free most at the peak",
        note="Each change was simulated on its own, at the same batch size. Figures are with the "
        "CUDA context.",
        data={
            "height": 110 + 46 * len(names),
            "traces": [trace],
            "layout": {
                "xaxis": {"title": {"text": f"{unit_name} at the peak"}},
            },
        },
        alternative="; ".join(
            f"{change.title} frees {format_bytes(change.freed_bytes)}" for change in profile.advice
        ),
        header=("change", "how", "frees", "in all with it", "what it costs"),
        rows=tuple(
            (
                change.title,
                change.how,
                format_bytes(change.freed_bytes),
                format_bytes(change.total_bytes),
                change.cost,
            )
            for change in profile.advice
        ),
    )


def blocks_panel() -> Panel:
    """Return the table of every allocation; it uses the data of the timeline's panel."""
    names = ("bytes", "role", "module", "operation", "line", "for every sample", "phase")
    return Panel(
        key="blocks",
        kind="table",
        title="Blocks",
        note=("Every allocation of the step and what was allocated before it, the largest first."),
        data={
            "of": "timeline",
            "toggle": "only those that live at the peak",
            "columns": [{"name": name} for name in names],
        },
    )

"""Shows a memory profile in the terminal, in 80 columns, readable without colour."""

from __future__ import annotations

import itertools
from collections import defaultdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from memfit.records import MemoryProfile, Role, Source
from memfit.reports.probe import step_words
from memfit.reports.roles import STYLES, ModuleNode, module_tree, short_operation
from memfit.reports.sources import how_it_was_had, said_of_precision
from memfit.reports.tables import plain_table
from memfit.units import format_bytes

__all__ = ["render"]

_WIDTH = 78
_SPARKS = " ▁▂▃▄▅▆▇█"
_NUM_BLOCKS = 8
_NUM_MODULES = 6
_NUM_INNER = 3
_LINE_WIDTH = 28


def render(profile: MemoryProfile) -> RenderableType:
    """Lay out a profile.

    Args:
        profile: The profile.

    Returns:
        An object for `rich.console.Console.print`. It shows the peak by role, the step over time,
        the modules, the largest blocks, the cards and the advice.
    """
    parts: list[RenderableType] = [_heading(profile)]
    if profile.message is not None:
        parts += ["", Text(profile.message, "bold red")]
    parts += ["", _peak_line(profile), _bar(profile), _roles(profile)]
    if profile.bytes_per_sample is not None and profile.fixed_bytes is not None:
        parts.append(
            Text(
                f"Every sample brings {format_bytes(round(profile.bytes_per_sample))} to the peak; "
                f"{format_bytes(profile.fixed_bytes)} are there whatever the batch size"
                f"{'.' if profile.source is Source.SIMULATED else ' (simulated).'}",
                "dim",
            )
        )
    parts += ["", Text("Over the step", "bold"), _sparkline(profile)]
    parts += ["", _modules(profile), "", Text("Largest blocks at the peak, by line", "bold")]
    parts.append(_blocks(profile))
    if profile.cards:
        parts += ["", Text("Cards (simulated), with the CUDA context", "bold"), _cards(profile)]
    if profile.advice:
        parts += ["", Text("What would free most at the peak (simulated)", "bold")]
        parts.append(_advice(profile))
    parts += ["", Text(_note(profile), "dim")]
    return Group(*parts)


def _heading(profile: MemoryProfile) -> Text:
    micro = (
        f"{profile.num_micro_batches} micro-batches of " if profile.num_micro_batches > 1 else ""
    )
    return Text.assemble(
        (profile.subject, "bold"),
        f" on {profile.device}, {micro}{profile.batch_size} samples\n",
        (" · ".join([*step_words(profile.options), profile.source.value]), "dim"),
    )


def _peak_line(profile: MemoryProfile) -> Text:
    peak = profile.peak
    whole = format_bytes(profile.capacity.total_bytes)
    reserved = format_bytes(peak.reserved_bytes)
    used = (
        f" reserved; {format_bytes(peak.total_bytes)} of {whole} with the "
        f"{format_bytes(peak.context_bytes)} context"
        if peak.context_bytes
        else f" of {whole}"
    )
    return Text.assemble(
        ("Peak ", "bold"), (reserved, "bold"), f"{used}, in {peak.phase or 'the step'}"
    )


def _bar(profile: MemoryProfile) -> Text:
    """Return a bar with one letter for every 78th of the peak."""
    total = profile.peak.total_bytes
    bar = Text()
    edge = filled = 0
    for share in profile.peak.roles:
        edge += share.num_bytes
        style = STYLES[share.role]
        length = round(edge / total * _WIDTH) - filled
        bar.append(style.letter * length, f"white on {style.colour}")
        filled += length
    return bar


def _roles(profile: MemoryProfile) -> Table:
    table = plain_table()
    for justify in ("left", "left", "right", "right", "right"):
        table.add_column(justify=justify)
    total = profile.peak.total_bytes
    for share in sorted(profile.peak.roles, key=lambda share: -share.num_bytes):
        style = STYLES[share.role]
        growth = share.bytes_per_sample
        table.add_row(
            Text(style.letter, f"white on {style.colour}"),
            style.label,
            format_bytes(share.num_bytes),
            f"{share.num_bytes / total:.1%}",
            f"{format_bytes(round(growth))} a sample" if growth else "",
        )
    return table


def _sparkline(profile: MemoryProfile) -> Text:
    timeline = profile.timeline
    values = timeline.allocated_bytes
    count = len(values)
    starts = [index * count // _WIDTH for index in range(_WIDTH + 1)]
    tops = [max(values[start : max(start + 1, end)]) for start, end in itertools.pairwise(starts)]
    most = max(tops) or 1
    sparks = "".join(_SPARKS[max(1, round(top / most * (len(_SPARKS) - 1)))] for top in tops)
    edges = [phase.begin * _WIDTH // count for phase in timeline.phases]
    names = Text(" " * (edges[0] if edges else 0), style="dim")
    for phase, (begin, end) in zip(
        timeline.phases, itertools.pairwise([*edges, _WIDTH]), strict=True
    ):
        names.append(f"│{phase.name}"[: end - begin].ljust(end - begin))
    low, high = format_bytes(min(values)), format_bytes(most)
    return Text("\n").join([Text(sparks), names, Text(f"allocated, from {low} to {high}", "dim")])


def _modules(profile: MemoryProfile) -> Tree:
    root = module_tree((share.module, share.num_bytes) for share in profile.peak.modules)
    tree = Tree(Text("Modules at the peak", "bold"), guide_style="dim")
    for node in root.largest[:_NUM_MODULES]:
        branch = tree.add(_labelled(node.name, node, root.num_bytes))
        for inner in node.largest[:_NUM_INNER]:
            branch.add(_labelled(inner.path, inner, root.num_bytes))
        _rest(branch, node.largest[_NUM_INNER:], root.num_bytes)
    _rest(tree, root.largest[_NUM_MODULES:], root.num_bytes)
    return tree


def _rest(tree: Tree, nodes: list[ModuleNode], total: int) -> None:
    if nodes:
        num_bytes = sum(node.num_bytes for node in nodes)
        tree.add(Text(f"{len(nodes)} more  {_share(num_bytes, total)}", "dim"))


def _labelled(name: str, node: ModuleNode, total: int) -> Text:
    return Text.assemble(name, "  ", (_share(node.num_bytes, total), "dim"))


def _share(num_bytes: int, total: int) -> str:
    return f"{format_bytes(num_bytes)}  {num_bytes / total:.1%}"


def _blocks(profile: MemoryProfile) -> Table:
    """Return the blocks of the peak; blocks of one line and operation are added up."""
    groups: dict[tuple[Role, str, str], list[int]] = defaultdict(list)
    for block in profile.blocks_at_peak():
        key = (block.role, short_operation(block.operation), block.source_line or block.module)
        groups[key].append(block.requested_bytes)
    table = plain_table()
    table.add_column("")
    table.add_column("in all", justify="right", no_wrap=True)
    table.add_column("blocks", justify="right")
    table.add_column("largest", justify="right", no_wrap=True)
    table.add_column("operation", max_width=17, no_wrap=True)
    table.add_column("line", max_width=_LINE_WIDTH, no_wrap=True)
    for (role, operation, line), sizes in sorted(
        groups.items(), key=lambda item: (-sum(item[1]), item[0])
    )[:_NUM_BLOCKS]:
        style = STYLES[role]
        table.add_row(
            Text(style.letter, f"white on {style.colour}"),
            format_bytes(sum(sizes)),
            str(len(sizes)),
            format_bytes(max(sizes)),
            Text(operation),
            Text(_tail(line, _LINE_WIDTH), "dim"),
        )
    return table


def _cards(profile: MemoryProfile) -> Table:
    table = plain_table()
    table.add_column("GPU")
    table.add_column("precision")
    table.add_column("largest batch", justify="right")
    table.add_column(f"at {profile.batch_size}", justify="right")
    table.add_column("left", justify="right")
    for card in profile.cards:
        used = dict(card.points)[profile.batch_size]
        left = card.total_bytes - used
        table.add_row(
            card.gpu,
            card.precision,
            Text("none" if card.max_batch_size is None else str(card.max_batch_size), "bold"),
            format_bytes(used),
            Text(format_bytes(left), "red" if left < 0 else ""),
        )
    return table


def _advice(profile: MemoryProfile) -> Table:
    table = plain_table()
    table.add_column("frees", justify="right", no_wrap=True)
    table.add_column("change")
    for change in profile.advice:
        table.add_row(
            Text(format_bytes(change.freed_bytes), "bold green"),
            Text.assemble(
                change.title,
                f" ({change.how})",
                (f"\n{format_bytes(change.total_bytes)} with it; {change.cost}", "dim"),
            ),
        )
    return table


def _note(profile: MemoryProfile) -> str:
    said = said_of_precision([(profile.device, profile.options.precision)])
    return (
        " ".join(said)
        + " " * bool(said)
        + (
            f"{how_it_was_had(profile.source)}, in {profile.seconds:.1f} s with torch "
            f"{profile.torch_version}; "
            f"{len(profile.blocks)} blocks, {len(profile.timeline.allocated_bytes)} events."
        )
    )


def _tail(text: str, width: int) -> str:
    return text if len(text) <= width else "…" + text[1 - width :]

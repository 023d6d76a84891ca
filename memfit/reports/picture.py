"""Draws the main picture of a memory profile, for papers and READMEs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from memfit.errors import UsageError
from memfit.records import MemoryProfile, Role
from memfit.reports.roles import STYLES
from memfit.units import MIB, format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_format", "draw", "save", "series_by_role"]

_FORMATS = (".svg", ".png", ".pdf")
_SIZE_INCHES = (9.5, 4.0)
_DOTS_PER_INCH = 200
_MAX_POINTS = 160
# A phase narrower than this share of the width has no label, because labels would overlap.
_LABEL_SHARE = 0.09
_NOT_OVER_TIME = (Role.FRAGMENTATION, Role.CONTEXT)


def check_format(path: Path) -> None:
    """Refuse a file whose ending is not a known picture format.

    Raises:
        UsageError: The ending is unknown; the message lists the known endings.
    """
    if path.suffix.lower() not in _FORMATS:
        raise UsageError(
            f"{path} has no ending of a picture: end it in {', '.join(_FORMATS[:-1])} or "
            f"{_FORMATS[-1]}."
        )


def draw(profile: MemoryProfile, path: Path) -> None:
    """Write a profile's timeline by role, with its peak marked.

    Args:
        profile: The profile.
        path: The file to write; its ending chooses the format.

    Raises:
        UsageError: The file cannot be written, or its ending is unknown.
    """
    save(path, lambda axes: _timeline(axes, profile))


def save(path: Path, paint: Callable[[Axes], None]) -> None:
    """Write a picture.

    Args:
        path: The file to write; its ending chooses the format.
        paint: A function that draws on the picture's only axes.

    Raises:
        UsageError: The file cannot be written, or its ending is unknown.
    """
    check_format(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # With these settings the same record gives the same file, and text stays text.
    with mpl.rc_context({"svg.hashsalt": "memfit", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        paint(figure.subplots())
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        try:
            figure.savefig(path, dpi=_DOTS_PER_INCH, metadata=metadata)
        except OSError as error:
            raise UsageError(f"{path} cannot be written: {error.strerror}.") from error


def _timeline(axes: Axes, profile: MemoryProfile) -> None:
    timeline, peak = profile.timeline, profile.peak
    series = series_by_role(profile)
    moments = _moments(timeline.allocated_bytes)
    used = [role for role in Role if role not in _NOT_OVER_TIME and any(series[role])]
    axes.stackplot(
        moments,
        [[series[role][moment] / MIB for moment in moments] for role in used],
        labels=[f"{STYLES[role].label}: {format_bytes(peak.bytes_of(role))}" for role in used],
        colors=[STYLES[role].colour for role in used],
        linewidth=0,
        step="post",
    )
    # Without a caching allocator, reserved and allocated bytes are the same.
    if timeline.reserved_bytes != timeline.allocated_bytes:
        axes.step(
            moments,
            [timeline.reserved_bytes[moment] / MIB for moment in moments],
            where="post",
            color="#333333",
            linewidth=1,
            linestyle="--",
            label=f"reserved: {format_bytes(peak.reserved_bytes)}",
        )
    top = max(timeline.reserved_bytes) / MIB * 1.12
    count = len(timeline.allocated_bytes)
    ends = [*(phase.begin for phase in timeline.phases[1:]), count]
    for phase, end in zip(timeline.phases, ends, strict=True):
        axes.axvline(phase.begin, color="#888888", linewidth=0.7, linestyle=":")
        if end - phase.begin > _LABEL_SHARE * count:
            name = axes.text(phase.begin, top, f" {phase.name}", va="top", color="#555555")
            # The line of the peak passes behind the name.
            name.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.axvline(peak.moment, color="#1f5fae", linewidth=1, label="the moment of the peak")
    axes.set_xlim(0, count)
    axes.set_ylim(0, top)
    axes.set_xlabel("event of the step")
    axes.set_ylabel("MiB")
    axes.set_title(
        f"{profile.subject}, batch size {profile.batch_size}, {profile.options.precision.value}, "
        f"{profile.device} ({profile.source.value})",
        fontsize=10,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    # The legend is outside of the axes, so that it hides no part of the chart.
    axes.figure.legend(
        handles[::-1],
        labels[::-1],
        loc="outside right center",
        fontsize=8,
        title="at the peak",
        frameon=False,
    )


def series_by_role(profile: MemoryProfile) -> dict[Role, list[int]]:
    """Return the bytes of every role at every moment; they add up to the allocated bytes.

    Args:
        profile: The profile.
    """
    count = len(profile.timeline.allocated_bytes)
    series = {role: [0] * (count + 1) for role in Role}
    for block in profile.blocks:
        born = 0 if block.born is None else block.born
        died = count if block.died is None else block.died
        slack = block.held_bytes - block.requested_bytes
        for role, num_bytes in ((block.role, block.requested_bytes), (Role.SLACK, slack)):
            series[role][born] += num_bytes
            series[role][died] -= num_bytes
    for values in series.values():
        for moment in range(1, count + 1):
            values[moment] += values[moment - 1]
        values.pop()
    return series


def _moments(values: tuple[int, ...]) -> list[int]:
    """Return the moments to draw: from each part of the timeline the one with the most bytes."""
    width = min(_MAX_POINTS, len(values))
    edges = [round(index * len(values) / width) for index in range(width + 1)]
    return [
        max(range(begin, end), key=values.__getitem__) for begin, end in itertools.pairwise(edges)
    ]

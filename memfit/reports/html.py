"""Pages that are one file: charts by plotly.js, tables, and no request to anywhere.

A page is panels. A panel's chart comes with what it shows in words and, where it can be one, as a
table. What is drawn is decided by whoever makes the panels; drawing it is `page/page.js`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

__all__ = ["Page", "Panel", "bar_chart", "level", "line_chart", "render"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One part of a page.

    Args:
        key: Its anchor.
        kind: What `page.js` draws it as: `figure` (a plotly figure: `traces` and `layout`),
            `timeline` or `table`.
        title: Its heading.
        note: What it shows and how to read it, in a sentence or two.
        data: What is drawn.
        alternative: What the chart says, for who cannot see it; empty for a table.
        header: Names of the columns of the same as a table.
        rows: Its rows; empty where there is no such table.
    """

    key: str
    kind: str
    title: str
    note: str
    data: Mapping[str, Any]
    alternative: str = ""
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """A report.

    Args:
        title: Its heading.
        lead: The answer in a sentence.
        facts: Names and values that are shown beside it.
        panels: Its parts.
        footer: Where the figures come from.
        warning: What must not be overlooked; `None` for nothing.
    """

    title: str
    lead: str
    facts: tuple[tuple[str, str], ...]
    panels: tuple[Panel, ...]
    footer: str
    warning: str | None = None


def render(page: Page) -> str:
    """Return a page as one HTML document.

    Args:
        page: What it shows.
    """
    from plotly.offline import get_plotlyjs

    # What is not escaped is memfit's own and plotly's.
    return _template().render(
        page=page,
        css=Markup(_source("page.css")),  # noqa: S704 - see above
        script=Markup(_source("page.js")),  # noqa: S704 - see above
        plotly=Markup(get_plotlyjs()),  # noqa: S704 - see above
        data={panel.key: panel.data for panel in page.panels},
    )


def line_chart(
    lines: Mapping[str, tuple[list[float], list[float]]],
    *,
    x_title: str,
    y_title: str,
    colours: Mapping[str, str] | None = None,
    layout: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the data of a panel with lines through points.

    Args:
        lines: By name, the points' two coordinates.
        x_title: What is along.
        y_title: What is up.
        colours: Of lines, by name; the others take plotly's.
        layout: What else plotly's layout says.
    """
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": x,
            "y": y,
            **({"line": {"color": colours[name]}} if colours and name in colours else {}),
        }
        for name, (x, y) in lines.items()
    ]
    axes = {"xaxis": {"title": {"text": x_title}}, "yaxis": {"title": {"text": y_title}}}
    return {"traces": traces, "layout": {**axes, **(layout or {})}}


def level(
    height: float, text: str, *, place: str = "start", colour: str | None = None
) -> dict[str, Any]:
    """Return a shape for a chart's layout: a dotted line across it, such as a capacity.

    Args:
        height: Where, in units of the chart's vertical axis.
        text: What it is.
        place: Where on the line that stands: `"start"`, `"middle"` or `"end"`.
        colour: The line's; by default a quiet one.
    """
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": height,
        "y1": height,
        "line": {"dash": "dot", "width": 1.5, **({"color": colour} if colour else {})},
        "label": {"text": text, "textposition": place},
    }


def bar_chart(bars: Mapping[str, tuple[list[str], list[float]]], *, title: str) -> dict[str, Any]:
    """Return the data of a panel with groups of bars, one below the other, the first at the top.

    Names stand beside their bars, so that they are whole however many there are, and on a phone.

    Args:
        bars: By series, the names of the groups and the lengths.
        title: What is along.
    """
    num_groups = max((len(names) for names, _ in bars.values()), default=0)
    return {
        "height": 110 + num_groups * (16 + 18 * len(bars)),
        "traces": [
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": names,
                "x": lengths,
                "text": [_count(length) for length in lengths],
                "textposition": "auto",
                "hovertemplate": "%{y}: %{x}<extra>%{fullData.name}</extra>",
            }
            for name, (names, lengths) in bars.items()
        ],
        "layout": {
            "barmode": "group",
            "xaxis": {"title": {"text": title}, "rangemode": "tozero"},
            "yaxis": {"type": "category", "autorange": "reversed"},
        },
    }


def _count(length: float) -> str:
    return f"{length:,.0f}" if length == int(length) else f"{length:,.3g}"


def upright(place: float, text: str) -> dict[str, Any]:
    """Return a shape for a chart's layout: a dotted line up it, such as a capacity of bars.

    Args:
        place: Where, in units of the chart's horizontal axis.
        text: What it is.
    """
    return {
        "type": "line",
        "yref": "paper",
        "x0": place,
        "x1": place,
        "y0": 0,
        "y1": 1,
        "line": {"dash": "dot", "width": 1.5},
        "label": {"text": text, "textposition": "end", "textangle": 0, "xanchor": "right"},
    }


def _source(name: str) -> str:
    return resources.files(__package__).joinpath("page").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.from_string(_source("page.html.j2"))

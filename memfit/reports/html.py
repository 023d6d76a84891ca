"""Pages in a single file: charts by plotly.js, and tables. A page makes no network requests.

A page consists of panels. Every chart has a description in words and, if possible, a table with the
same data. The code that makes the panels decides what is drawn. `page/page.js` draws it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

__all__ = ["Page", "Panel", "bar_chart", "level", "line_chart", "render", "source_of"]

_BASIC = {"scatter", "bar", "pie"}
_FEW = 5  # batch sizes that an axis can name one by one


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One part of a page.

    Args:
        key: Its anchor.
        kind: How `page.js` draws it: `figure` (a plotly figure: `traces` and `layout`), `timeline`
            or `table`.
        title: Its heading.
        note: What it shows and how to read it, in a sentence or two.
        data: The data to draw.
        alternative: The chart in words, for readers who cannot see it; empty for a table.
        header: Names of the columns of a table with the same data.
        rows: The rows of that table; empty if there is no such table.
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
        warning: A warning that must not be overlooked; `None` without a warning.
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
        page: The contents of the page.
    """
    # Text that is not escaped is memfit's own or plotly's.
    return _template().render(
        page=page,
        css=Markup(source_of("page.css")),  # noqa: S704 - see above
        script=Markup(source_of("page.js")),  # noqa: S704 - see above
        plotly=Markup(_plotly(page)),  # noqa: S704 - see above
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
        lines: By name, the horizontal and vertical coordinates of the points.
        x_title: The title of the horizontal axis.
        y_title: The title of the vertical axis.
        colours: Colours of lines, by name; other lines have plotly's colours.
        layout: More settings for plotly's layout.
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
    x_axis: dict[str, Any] = {"title": {"text": x_title}}
    places = [place for x, _ in lines.values() for place in x]
    if places and max(places) - min(places) <= _FEW:
        # There is no half of a sample.
        x_axis["dtick"] = 1
    axes = {"xaxis": x_axis, "yaxis": {"title": {"text": y_title}}}
    return {"traces": traces, "layout": {**axes, **(layout or {})}}


def level(
    height: float, text: str, *, place: str = "start", colour: str | None = None
) -> dict[str, Any]:
    """Return a shape for a chart's layout: a dotted line across it, such as a capacity.

    Args:
        height: The position, in units of the chart's vertical axis.
        text: The label of the line.
        place: The label's place on the line: `"start"`, `"middle"` or `"end"`.
        colour: The line's colour; by default a quiet one.
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

    Names are beside their bars, so that they are not cut off if there are many, or on a phone.

    Args:
        bars: By series, the names of the groups and the lengths.
        title: The title of the horizontal axis.
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
    """Return a shape for a chart's layout: a vertical dotted line, such as a capacity of bars.

    Args:
        place: The position, in units of the chart's horizontal axis.
        text: The label of the line.
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


def _plotly(page: Page) -> str:
    """Return plotly.js: the whole of it only if a chart needs more than lines and bars.

    The small bundle is plotly.js-basic-dist-min of npm, of the version that plotly for Python has.
    """
    kinds = {
        trace.get("type", "scatter")
        for panel in page.panels
        for trace in panel.data.get("traces", ())
    }
    if kinds <= _BASIC:
        return source_of("plotly-basic.min.js")
    from plotly.offline import get_plotlyjs

    everything: str = get_plotlyjs()
    return everything


def source_of(name: str) -> str:
    """Return a file of the folder `page`.

    Args:
        name: The file's name.
    """
    return resources.files(__package__).joinpath("page").joinpath(name).read_text(encoding="utf-8")


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment.from_string(source_of("page.html.j2"))

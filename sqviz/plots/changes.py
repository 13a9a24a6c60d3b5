"""Changes with their intervals, one row each, around the line of no change; one panel per unit."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sqviz.plots.template import Theme, template, wrapped

Verdict = Literal["better", "worse", "not told apart from noise"]
SHAPES: dict[Verdict, str] = {"better": "diamond", "worse": "square", "not told apart from noise": "circle-open"}
"""The verdict by shape, so that nothing rests on colour."""

_COLOURS: dict[Verdict, int] = {"better": 0, "worse": 1, "not told apart from noise": 5}  # places in the colourway
ROW, PANEL = 26, 64  # pixels of a row, and of a panel's axis and title


@dataclasses.dataclass(frozen=True)
class Change:
    """One row: a change, 0 for none, and the ends of its interval (None: there is none), in the panel's unit."""

    label: str
    change: float
    low: float | None
    high: float | None
    verdict: Verdict


Changes = Mapping[str, Sequence[Change]]
"""Rows by what their axis shows, with its unit."""


def extent(rows: Sequence[Change]) -> tuple[float, float]:
    """Where a panel's axis begins and ends: all intervals and no change are inside, with room on both sides."""
    ends = [0.0, *(end for row in rows for end in (row.change, row.low, row.high) if end is not None)]
    room = 0.08 * ((max(ends) - min(ends)) or 1.0)
    return min(ends) - room, max(ends) + room


def changes(panels: Changes, title: str, *, theme: Theme = "either") -> go.Figure:
    """Panels below each other, rows downwards in order; `title` may hold <br>."""
    heights = [ROW * len(rows) + 10 for rows in panels.values()] or [ROW]
    title = wrapped(title)
    top, total = 46 + 24 * (1 + title.count("<br>")), sum(heights) + PANEL * len(panels)
    figure = make_subplots(len(heights), 1, row_heights=heights, vertical_spacing=PANEL / max(total, PANEL + 1))
    colours, told = template(theme).layout.colorway, set[str]()
    for place, (axis, rows) in enumerate(panels.items(), 1):
        for verdict, shape in SHAPES.items():
            there = [row for row in rows if row.verdict == verdict]
            if not there:
                continue
            colour = colours[_COLOURS[verdict]]
            figure.add_scatter(
                x=[row.change for row in there],
                y=[row.label for row in there],
                mode="markers",
                name=verdict,
                legendgroup=verdict,
                showlegend=verdict not in told,
                marker={"symbol": shape, "size": 10, "color": colour, "line": {"width": 2, "color": colour}},
                error_x=_bars(there),
                hovertemplate="%{y}: %{x:+.4g}<extra>" + verdict + "</extra>",
                row=place,
                col=1,
            )
            told.add(verdict)
        figure.add_vline(x=0, line={"dash": "dash", "width": 1, "color": template(theme).layout.font.color},
                         row=place, col=1)  # fmt: skip
        figure.update_xaxes(title=axis, range=extent(rows), nticks=6, tickangle=0, row=place, col=1)
        names = [row.label for row in rows]
        figure.update_yaxes(categoryorder="array", categoryarray=names, range=[len(rows) - 0.5, -0.5], row=place, col=1)
    figure.update_yaxes(automargin=True)
    figure.update_layout(template=template(theme), title={"text": title, "x": 0.01, "xref": "container"})
    return figure.update_layout(
        height=top + total + 46,
        margin={"t": top, "b": 96, "l": 20, "r": 20},
        legend={
            "orientation": "h",
            "xref": "container",
            "x": 0.01,
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "itemclick": False,
        },
    )


def _bars(rows: Sequence[Change]) -> dict[str, object]:
    """Plotly's error bars: distances from the change to both ends."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [(row.high if row.high is not None else row.change) - row.change for row in rows],
        "arrayminus": [row.change - (row.low if row.low is not None else row.change) for row in rows],
        "thickness": 1.5,
        "width": 4,
    }

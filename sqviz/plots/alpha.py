"""Figures about α: what is lost against it (thesis Figure 3.8)."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sqviz.plots.streams import DASHES, log_axis
from sqviz.plots.template import Theme, template

AlphaLines = Mapping[str, Mapping[str, Sequence[tuple[float | None, float]]]]
"""Points (α, value) by the title of the panel's y axis and by the label of the line; α = None: not smoothed."""

NONE = -0.15
"""Where on the axis of α the models stand that were not smoothed."""

TICKS = (0, 0.2, 0.4, 0.6, 0.8, 1)
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross")
UNQUANTISED = "unquantised"


def place(alpha: float | None) -> float:
    """Where α lies on its axis."""
    return NONE if alpha is None else alpha


def span(lines: AlphaLines, references: Mapping[str, float], panel: str) -> list[float]:
    """All positive values of a panel, that of the model itself among them."""
    found = [value for points in lines[panel].values() for _, value in points if value > 0]
    return found + ([references[panel]] if panel in references else [])


def alpha_lines(
    lines: AlphaLines, references: Mapping[str, float], title: str, note: str = "", *, theme: Theme = "either"
) -> go.Figure:
    """Panels below each other, one line per label, log scale; a star where a line is lowest.

    Traces come in the same number and order whatever is known already, so that a figure can grow.

    Args:
        lines: what to draw.
        references: by panel, the value of the model itself: a dashed line.
        title, note: over all, and below the title.
        theme: light, dark or either.
    """
    figure = make_subplots(len(lines), 1, shared_xaxes=True, vertical_spacing=0.07)
    colours = template(theme).layout.colorway
    for row, (panel, by_label) in enumerate(lines.items(), 1):
        at = {"row": row, "col": 1}
        if row == 1:
            figure.add_trace(_reference(references.get(panel), template(theme).layout.font.color), **at)
        for number, (label, points) in enumerate(by_label.items()):
            colour = colours[number % len(colours)]
            figure.add_trace(_line(label, points, number, colour, legend=row == 1), **at)
            figure.add_trace(_star(label, points, colour), **at)
        figure.update_yaxes(title={"text": panel, "standoff": 10}, **axis_of(span(lines, references, panel)), **at)
    below = textwrap.wrap(note, 64)
    figure.update_xaxes(**alpha_axis(lines))
    figure.update_xaxes(title="migration strength α", row=len(lines), col=1)
    figure.update_layout(
        template=template(theme),
        title={"text": title, "subtitle": {"text": "<br>".join(below)}},
        margin={"t": 60 + 18 * len(below), "l": 78},
        legend={"orientation": "h", "y": -0.3 / len(lines)},
        height=200 + 220 * len(lines),
        hovermode="closest",
    )
    return figure


def alpha_axis(lines: AlphaLines) -> dict[str, Any]:
    """Range and ticks of the axis of α: from 0 to 1, and a place for what was not smoothed."""
    without = any(alpha is None for by_label in lines.values() for points in by_label.values() for alpha, _ in points)
    ticks: dict[float, str] = {tick: f"{tick:g}" for tick in TICKS}
    ticks |= {NONE: "none"} if without else {}
    return {
        "range": [NONE - 0.05 if without else -0.04, 1.04],
        "tickvals": list(ticks),
        "ticktext": list(ticks.values()),
    }


def axis_of(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis for these values; for none yet, any."""
    return log_axis(values) if values else {"type": "log", "range": [0, 1]}


def lowest(points: Sequence[tuple[float | None, float]]) -> list[tuple[float | None, float]]:
    """The point of a line that is lowest; nothing as long as there is none."""
    return [min(points, key=lambda point: point[1])] if points else []


def _reference(value: float | None, colour: str) -> go.Scatter:
    return go.Scatter(
        x=[] if value is None else [NONE - 0.05, 1.04],
        y=[] if value is None else [value, value],
        name=UNQUANTISED,
        mode="lines",
        line={"width": 1.5, "dash": "dash", "color": colour},
        hovertemplate="%{y:.4g}<extra>" + UNQUANTISED + "</extra>",
    )


def _line(
    label: str, points: Sequence[tuple[float | None, float]], number: int, colour: str, *, legend: bool
) -> go.Scatter:
    """What was not smoothed stands by itself: between it and α = 0 there is nothing."""
    gap = len(points) > 1 and points[0][0] is None
    shown = [*points[:1], (None, None), *points[1:]] if gap else list(points)
    names = ["not smoothed" if alpha is None else f"α = {alpha:g}" for alpha, _ in shown]
    return go.Scatter(
        x=[place(alpha) for alpha, _ in shown],
        y=[value for _, value in shown],
        text=names,
        name=label,
        legendgroup=label,
        showlegend=legend,
        mode="lines+markers",
        line={"width": 2, "dash": DASHES[number % len(DASHES)], "color": colour},
        marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7},
        hovertemplate="%{text}: %{y:.4g}<extra>" + label + "</extra>",
    )


def _star(label: str, points: Sequence[tuple[float | None, float]], colour: str) -> go.Scatter:
    best = lowest(points)
    return go.Scatter(
        x=[place(alpha) for alpha, _ in best],
        y=[value for _, value in best],
        text=["not smoothed" if alpha is None else f"α = {alpha:g}" for alpha, _ in best],
        legendgroup=label,
        showlegend=False,
        mode="markers",
        marker={"symbol": "star", "size": 15, "color": colour, "line": {"width": 1, "color": "#ffffff"}},
        hovertemplate="least, %{text}: %{y:.4g}<extra>" + label + "</extra>",
    )

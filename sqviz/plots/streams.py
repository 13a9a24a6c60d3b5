"""Figures of streams: perplexity against position (thesis Figures 4.1, 4.3), cost against position or cache size."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots

from sqviz.plots.template import Theme, template

POINTS = 1200
"""Most points of a drawn curve; more than there are pixels across."""
START = 48
"""Tokens at the beginning of a text that do not stretch the axis."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def log_ticks(lo: float, hi: float) -> dict[str, Any]:
    """Round values between 10^lo and 10^hi as ticks of a logarithmic axis; plotly's own say 2 and 5 for 20 and 500."""
    digits: Sequence[float] = (1, 2, 5) if hi - lo > 1 else (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)
    if hi - lo > 3:
        digits = (1,)
    found = [digit * 10.0**power for power in range(math.floor(lo), math.ceil(hi) + 1) for digit in digits]
    found = [value for value in found if lo <= math.log10(value) <= hi]
    if len(found) < 3:  # hardly a range at all: even steps
        span = 10**hi - 10**lo
        step = next(d * 10.0**k for k in range(-12, 13) for d in (1, 2, 5) if d * 10.0**k >= span / 5)
        found = [step * k for k in range(math.ceil(10**lo / step), math.floor(10**hi / step) + 1)]
    return {"tickvals": found, "ticktext": [f"{value:,.10g}" for value in found]}


def thin(values: Float[np.ndarray, " position"], most: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """(positions, values) of at most `most` points, evenly spaced, the ends among them. Positions count from 1."""
    values = np.asarray(values)
    if len(values) <= most:
        return np.arange(1, len(values) + 1), values
    at = np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))
    return at + 1, values[at]


def perplexity_curves(curves: Mapping[str, Any], title: str, *, theme: Theme = "either", note: str = "") -> go.Figure:
    """Perplexity against position, one line per policy; log scale, because a broken policy is worse by orders.

    Lines differ by dash as well as by colour. `note` stands below the title.
    """
    lines = textwrap.wrap(note, 100)
    figure = go.Figure()
    curves = {label: np.asarray(values) for label, values in curves.items()}
    for number, (label, values) in enumerate(curves.items()):
        positions, shown = thin(values)
        figure.add_scatter(
            x=positions,
            y=shown,
            name=label,
            mode="lines",
            line={"width": 2, "dash": DASHES[number % len(DASHES)]},
            hovertemplate="%{y:.4g} at token %{x:,}<extra>" + label + "</extra>",
        )
    figure.update_layout(
        template=template(theme),
        title={"text": title, "subtitle": {"text": "<br>".join(lines)}},
        margin={"t": 56 + 18 * len(lines)},
        xaxis={"title": "tokens read", "tickformat": ",d"},
        yaxis={"title": "perplexity", "type": "log", **perplexity_axis(curves)},
        legend={"orientation": "h", "y": -0.22},
        showlegend=True,
        hovermode="x unified",
        height=420,
    )
    return figure


def perplexity_axis(curves: Mapping[str, Float[np.ndarray, " position"]]) -> dict[str, Any]:
    """Range and ticks of the axis; none as long as there is nothing to show."""
    limits = perplexity_range(curves)
    return {} if limits is None else {"range": limits, **log_ticks(*limits)}


def perplexity_range(curves: Mapping[str, Float[np.ndarray, " position"]]) -> list[float] | None:
    """log10 of the axis: all curves fit, but for the first tokens, which nobody can predict."""
    settled = [values[min(START, len(values) // 2) :] for values in curves.values() if len(values)]
    if not settled:
        return None
    lo, hi = (np.log10(edge([edge(values) for values in settled])) for edge in (min, max))
    return [float(lo) - 0.08, float(hi) + 0.08]


Panels = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]
"""Points (x, y) by the title of the panel's y axis and by the label of the line."""


def cost_curves(panels: Panels, title: str, x_title: str, *, log: bool = True, theme: Theme = "either") -> go.Figure:
    """Seconds, bytes, … against position or cache size (Figure 4.8): panels below each other, one line per label.

    A label has the same colour and dash in all panels. `log`: all axes logarithmic; otherwise y begins at 0.
    """
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    figure = make_subplots(len(panels), 1, shared_xaxes=True, vertical_spacing=0.06)
    colours = template(theme).layout.colorway
    for row, (name, lines) in enumerate(panels.items(), 1):
        for label, points in lines.items():
            number = labels.index(label)
            figure.add_scatter(
                x=[x for x, _ in points],
                y=[y for _, y in points],
                name=label,
                legendgroup=label,
                showlegend=len(labels) > 1 and label not in {trace.name for trace in figure.data},
                mode="lines+markers" if len(points) < 20 else "lines",
                line={"width": 2, "dash": DASHES[number % len(DASHES)], "color": colours[number % len(colours)]},
                hovertemplate="%{y:.4g}<extra>" + label + "</extra>",
                row=row,
                col=1,
            )
        axis = log_axis([y for points in lines.values() for _, y in points]) if log else {"rangemode": "tozero"}
        figure.update_yaxes(title=name, row=row, col=1, **axis)
    xs = [x for lines in panels.values() for points in lines.values() for x, _ in points]
    figure.update_xaxes(**(log_axis(xs) if log else {"tickformat": ",d"}))
    if log and len(set(xs)) < 8:  # a few sizes: these and no others
        figure.update_xaxes(tickvals=sorted(set(xs)), ticktext=[f"{x:,}" for x in sorted(set(xs))])
    figure.update_xaxes(title=x_title, row=len(panels), col=1)
    figure.update_layout(
        template=template(theme),
        title=title,
        hovermode="x unified",
        legend={"orientation": "h", "y": -0.3 / len(panels)},
        height=180 + 220 * len(panels),
    )
    return figure


def log_axis(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis on which all values fit."""
    lo, hi = math.log10(min(values)) - 0.08, math.log10(max(values)) + 0.08
    return {"type": "log", "range": [lo, hi], **log_ticks(lo, hi)}

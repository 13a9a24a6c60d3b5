"""Figures of streams: perplexity against position (thesis Figures 4.1, 4.3), cost against position or cache size."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float

from sqviz.plots.template import Theme, template

POINTS = 1200
"""Most points of a drawn curve; more than there are pixels across."""
_ROUND = [digit * 10**power for power in range(7) for digit in (1, 2, 5)]
_TICKS = {"tickvals": _ROUND, "ticktext": [f"{value:,}" for value in _ROUND]}  # plotly's own say 2 and 5 for 20 and 500
START = 48
"""Tokens at the beginning of a text that do not stretch the axis."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")


def thin(values: Float[np.ndarray, " position"], most: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """(positions, values) of at most `most` points, evenly spaced, the ends among them. Positions count from 1."""
    values = np.asarray(values)
    if len(values) <= most:
        return np.arange(1, len(values) + 1), values
    at = np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))
    return at + 1, values[at]


def perplexity_curves(curves: Mapping[str, Any], title: str, *, theme: Theme = "either", note: str = "") -> go.Figure:
    """Perplexity against position, one line per policy; log scale, because a broken policy is worse by orders.

    Lines differ by dash as well as by colour.
    """
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
        title={"text": title + (f"<br><sup>{note}</sup>" if note else "")},
        xaxis={"title": "tokens read", "tickformat": ",d"},
        yaxis={"title": "perplexity", "type": "log", "range": perplexity_range(curves), **_TICKS},
        legend={"orientation": "h", "y": -0.22},
        hovermode="x unified",
        height=420,
    )
    return figure


def perplexity_range(curves: Mapping[str, Float[np.ndarray, " position"]]) -> list[float] | None:
    """log10 of the axis: all curves fit, but for the first tokens, which nobody can predict."""
    settled = [values[min(START, len(values) // 2) :] for values in curves.values() if len(values)]
    if not settled:
        return None
    lo, hi = (np.log10(edge([edge(values) for values in settled])) for edge in (min, max))
    return [float(lo) - 0.08, float(hi) + 0.08]


def cost_curves(
    x: Mapping[str, Any], y: Mapping[str, Any], title: str, x_title: str, y_title: str, *, theme: Theme = "either"
) -> go.Figure:
    """Seconds or bytes against position or cache size (Figure 4.8), one line per policy, both axes logarithmic."""
    figure = go.Figure()
    for number, label in enumerate(y):
        dash = DASHES[number % len(DASHES)]
        figure.add_scatter(x=x[label], y=y[label], name=label, mode="lines+markers", line={"width": 2, "dash": dash})
    figure.update_layout(
        template=template(theme),
        title=title,
        xaxis={"title": x_title, "type": "log"},
        yaxis={"title": y_title, "type": "log"},
        legend={"orientation": "h", "y": -0.22},
        height=420,
    )
    return figure

"""The look that all plotly figures of sqviz share: colour-blind-safe colours, quiet axes, light, dark or for either."""

import functools
import textwrap
from typing import Any, Literal

import plotly.graph_objects as go

Theme = Literal["light", "dark", "either"]

# Okabe and Ito's colours, darkened for white paper and lightened for black; the same as in widgets/base.css.
SERIES = {
    "light": ("#0072b2", "#c85200", "#00805e", "#a8558b", "#946200", "#3a3a3a"),
    "dark": ("#56b4e9", "#ff9e4a", "#3fd0a4", "#e39ac6", "#f0d94b", "#cfcfcf"),
    "either": ("#2a8fd0", "#d5761f", "#179c77", "#b8709f", "#a8861f", "#808080"),
}
_INK = {"light": "#1b1b1b", "dark": "#e8e8e8", "either": "#7b7b7b"}
_PAPER = {"light": "#ffffff", "dark": "#111111", "either": "rgba(0,0,0,0)"}
_GRID = {"light": "#dcdcdc", "dark": "#383838", "either": "rgba(128,128,128,0.25)"}
_TIED = "\u00a0"
MAGNITUDE = "Viridis"
"""The colour scale of magnitudes; perceptually even, and readable in grey and by the colour-blind."""


@functools.cache
def template(theme: Theme = "either") -> go.layout.Template:
    """The plotly template of a theme. "either": a transparent ground and middle greys, legible on white and on black.

    Raises:
        ValueError: no such theme.
    """
    if theme not in SERIES:
        raise ValueError(f"theme={theme!r}: must be one of {', '.join(map(repr, SERIES))}")
    ink, paper, grid = _INK[theme], _PAPER[theme], _GRID[theme]
    lines = {"gridcolor": grid, "linecolor": ink, "zerolinecolor": grid}
    axis: dict[str, Any] = lines | {"ticks": "outside", "tickcolor": ink}
    scene_axis: dict[str, Any] = lines | {
        "showbackground": False,
        "color": ink,
        "tickfont": {"size": 10},
        "showspikes": False,
    }
    return go.layout.Template(
        layout={
            "font": {"color": ink, "family": "system-ui, sans-serif", "size": 12},
            "paper_bgcolor": paper,
            "plot_bgcolor": paper,
            "colorway": SERIES[theme],
            "colorscale": {"sequential": MAGNITUDE},
            "xaxis": axis,
            "yaxis": axis,
            "scene": {"xaxis": scene_axis, "yaxis": scene_axis, "zaxis": scene_axis, "bgcolor": "rgba(0,0,0,0)"},
            "title": {"x": 0, "xref": "paper", "xanchor": "left"},  # the tools of a figure come up on its right
            "margin": {"l": 60, "r": 20, "t": 50, "b": 50},
            "hoverlabel": {"font": {"size": 12}},
        }
    )


def wrapped(text: str, width: int = 50) -> str:
    """A title or a label on several lines, of `width` characters at most, so that a narrow window does not cut it off.

    Lines that are there already (<br>) stay; what stands between two " · " stays together if it fits into a line.
    """
    lines = []
    for line in text.split("<br>"):
        parts = [part.replace(" ", _TIED) if len(part) <= width else part for part in line.split(" · ")]
        lines += textwrap.wrap(f"{_TIED}· ".join(parts), width, break_on_hyphens=False)
    return "<br>".join(lines).replace(_TIED, " ")

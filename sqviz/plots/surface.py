"""Magnitudes as rotatable 3-D surfaces, several in one WebGL figure: the thesis's Figure 3.2.

Each panel is max-pooled to `ROWS` × `COLUMNS` cells before drawing, so an outlier of a single cell keeps its height.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Float, UInt8

from sqviz.plots.pool import block_starts, max_pool
from sqviz.plots.template import MAGNITUDE, Theme, template

ROWS, COLUMNS = 96, 192


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """One surface.

    Attributes:
        values: [row column] heights, not negative.
        title: above it.
        z_label, y_label: what the heights and the rows are; the columns are input channels.
        row_units: how many of y one row stands for, such as 2 tokens.
    """

    values: Float[np.ndarray, "row column"]
    title: str
    z_label: str
    y_label: str
    row_units: int = 1


def surface_figure(panels: Sequence[Panel], title: str = "", theme: Theme = "either") -> go.Figure:
    """A figure with the panels two abreast, each in a scene of its own to be turned by hand.

    A button puts panels of the same column on one height scale; at first each has its own, written on its axis.
    """
    rows = (len(panels) + 1) // 2
    figure = go.Figure()
    layout: dict[str, object] = {}
    for i, panel in enumerate(panels):
        scene = f"scene{i + 1}" if i else "scene"
        figure.add_trace(_trace(panel, scene))
        row, column = divmod(i, 2)
        top = 1 - row / rows
        domain = {"x": [0.5 * column, 0.5 * column + 0.49], "y": [top - 1 / rows, top - 0.04]}
        layout[scene] = _scene(panel, domain)
        figure.add_annotation(
            text=f"<b>{panel.title}</b>",
            x=0.5 * column + 0.245,
            y=top,
            xref="paper",
            yref="paper",
            yanchor="top",
            showarrow=False,
        )
    figure.update_layout(
        template=template(theme),
        title={"text": title, "font": {"size": 15}, "x": 0.01, "xanchor": "left", "y": 0.985, "yanchor": "top"},
        height=84 + 380 * rows,
        margin={"l": 0, "r": 0, "t": 84, "b": 0},
        updatemenus=[_scale_buttons(panels)],
        **layout,
    )
    return figure


def _trace(panel: Panel, scene: str) -> go.Surface:
    values = panel.values
    pooled = max_pool(values, ROWS, COLUMNS).astype(np.float32)
    tokens = block_starts(values.shape[0], ROWS) * panel.row_units
    channels = block_starts(values.shape[1], COLUMNS)
    hover = f"channel %{{x}}<br>{panel.y_label} %{{y}}<br>{panel.z_label} %{{z:.3g}}<extra></extra>"
    return go.Surface(
        z=pooled,
        surfacecolor=log_levels(pooled),
        cmin=0,
        cmax=255,
        x=channels.astype(np.int32),
        y=tokens.astype(np.int32),
        scene=scene,
        colorscale=MAGNITUDE,
        showscale=False,
        hovertemplate=hover,
        contours={axis: {"highlight": False} for axis in "xyz"},
        lighting={"ambient": 0.85, "diffuse": 0.4, "specular": 0.05},
    )


def log_levels(values: Float[np.ndarray, "row column"]) -> UInt8[np.ndarray, "row column"]:
    """0 to 255 from the 1st percentile to the maximum on a log scale: colour shows the carpet, height the spikes."""
    alive = values[values > 0]
    if not alive.size:
        return np.zeros(values.shape, np.uint8)
    lo, hi = np.log10(np.quantile(alive, 0.01)), np.log10(alive.max())
    with np.errstate(divide="ignore"):
        at = (np.log10(values) - lo) / max(hi - lo, 1e-6)
    return np.clip(at * 255, 0, 255).astype(np.uint8)


def _scene(panel: Panel, domain: dict[str, list[float]]) -> dict[str, object]:
    pooled_channels = -(-panel.values.shape[1] // COLUMNS)
    pooled_rows = -(-panel.values.shape[0] // ROWS) * panel.row_units
    channel = "input channel" + (f" (max of {pooled_channels})" if pooled_channels > 1 else "")
    row = panel.y_label + (f" (max of {pooled_rows})" if pooled_rows > 1 else "")
    return {
        "domain": domain,
        "xaxis": {"title": {"text": channel, "font": {"size": 11}}, "nticks": 5},
        "yaxis": {"title": {"text": row, "font": {"size": 11}}, "nticks": 5},
        "zaxis": {"title": {"text": panel.z_label, "font": {"size": 11}}, "nticks": 4, "rangemode": "tozero"},
        "aspectmode": "manual",
        "aspectratio": {"x": 1.5, "y": 1.1, "z": 0.85},
        "camera": {"eye": {"x": -1.0, "y": -1.7, "z": 0.95}, "center": {"x": -0.08, "y": 0, "z": -0.22}},
        "dragmode": "turntable",
    }


def _scale_buttons(panels: Sequence[Panel]) -> dict[str, object]:
    """Three buttons: each panel on its own height scale, all of a column (|X|, |W|) on one, or logarithmic heights."""
    own: dict[str, object] = {}
    same: dict[str, object] = {}
    log: dict[str, object] = {}
    for i in range(len(panels)):
        axis = f"scene{i + 1}.zaxis" if i else "scene.zaxis"
        peak = max(float(panel.values.max(initial=0.0)) for panel in panels[i % 2 :: 2])
        own |= {f"{axis}.type": "linear", f"{axis}.autorange": True}
        same |= {f"{axis}.type": "linear", f"{axis}.range": [0.0, peak or 1.0]}
        log |= {f"{axis}.type": "log", f"{axis}.autorange": True}
    buttons = [("Own height scales", own), ("Before and after on one scale", same), ("Log heights", log)]
    return {
        "type": "buttons",
        "direction": "right",
        "x": 0.01,
        "xanchor": "left",
        "y": 1.0,
        "yanchor": "bottom",
        "pad": {"b": 6},
        "showactive": True,
        "font": {"size": 11, "color": "#1b1b1b"},
        "bgcolor": "#f4f4f4",
        "bordercolor": "#8a8a8a",
        "buttons": [{"label": label, "method": "relayout", "args": [changes]} for label, changes in buttons],
    }

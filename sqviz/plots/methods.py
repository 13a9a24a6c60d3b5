"""Accuracy against what it costs: one point per method, against size or latency."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from sqviz.errors import SqvizError
from sqviz.plots.template import Theme, template

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down")


def methods_figure(sheet: Mapping[str, Any], cost: str, title: str, *, theme: Theme = "either") -> go.Figure:
    """The first metric against a cost.

    Args:
        sheet: columns and rows, see `sqviz.evaluation.method_sheet`.
        cost: the key of the column that is across: "size" or "time".
        title: over all.
        theme: light, dark or either.

    Raises:
        SqvizError: no row has both numbers.
    """
    columns = {column["key"]: column for column in sheet["columns"]}
    score = next((column for column in sheet["columns"] if column["kind"] == "number"), None)
    points = [] if score is None else _points(sheet["rows"], cost, score["key"])
    if score is None or cost not in columns or not points:
        raise SqvizError(
            f"no method has both a score and a {'latency' if cost == 'time' else 'size'}. Latency is measured with "
            "compare(…, latency=True), for schemes that can be executed in integers."
        )
    colours = template(theme).layout.colorway
    figure = go.Figure()
    for place, (row, x, y) in enumerate(points):
        figure.add_scatter(
            x=[x],
            y=[y],
            mode="markers",
            name=row["name"],
            marker={
                "size": 11,
                "color": colours[place % len(colours)],
                "symbol": SYMBOLS[place // len(colours) % len(SYMBOLS)],
            },
            hovertemplate=f"{row['name']}<br>{row['what']}<br>%{{x:.4g}}, %{{y:.4g}}<extra></extra>",
        )
    largest = max(y for _, _, y in points)
    wide = score["better"] == "lower" and largest > 2 * min(y for _, _, y in points) > 0
    figure.update_xaxes(title=_named(columns[cost]), rangemode="tozero")
    figure.update_yaxes(title=_named(score), type="log" if wide else "linear", nticks=8)
    figure.update_layout(template=template(theme), title=title, height=max(360, 120 + 22 * len(points)))
    return figure


def _points(rows: list[Any], cost: str, score: str) -> list[tuple[Any, float, float]]:
    """Rows that have both numbers, with these."""
    pairs = [(row, *(row["cells"].get(key, {}).get("value") for key in (cost, score))) for row in rows]
    return [(row, x, y) for row, x, y in pairs if x is not None and y is not None]


def _named(column: Mapping[str, str]) -> str:
    better = {"lower": " (lower is better)", "higher": " (higher is better)"}.get(column["better"], "")
    return f"{column['label']}{', ' if column['unit'] else ''}{column['unit']}{better}"

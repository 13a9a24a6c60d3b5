"""Horizontal bars: one panel per quantity, one bar per label, with the value and what it is of the first label's."""

from collections.abc import Mapping

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sqviz.plots.template import Theme, template

Bars = Mapping[str, Mapping[str, float]]
"""Value by quantity (with its unit) and by label."""


def value_text(value: float, first: float) -> str:
    """What stands at the end of a bar: "38.9 (0.24 ×)"."""
    shown = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return shown if value == first or not first else f"{shown} ({value / first:.2f} ×)"


def bars(panels: Bars, title: str, *, theme: Theme = "either") -> go.Figure:
    """Panels side by side, labels downwards; a label has one colour in all panels."""
    labels = list(dict.fromkeys(label for values in panels.values() for label in values))
    colours = template(theme).layout.colorway
    figure = make_subplots(1, len(panels), subplot_titles=list(panels), shared_yaxes=True, horizontal_spacing=0.04)
    for column, (name, values) in enumerate(panels.items(), 1):
        first = next(iter(values.values()))
        figure.add_bar(
            x=[values[label] for label in labels],
            y=labels,
            orientation="h",
            marker_color=[colours[labels.index(label) % len(colours)] for label in labels],
            text=[value_text(values[label], first) for label in labels],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{x:.4g}<extra>" + name + "</extra>",
            showlegend=False,
            row=1,
            col=column,
        )
        figure.update_xaxes(range=[0, 1.5 * max(values.values())], nticks=4, row=1, col=column)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(template=template(theme), title=title, height=190 + 44 * len(labels), bargap=0.35)
    figure.update_layout(margin={"t": 84}).update_annotations(font_size=12)
    return figure

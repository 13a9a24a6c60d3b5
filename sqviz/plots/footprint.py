"""Stacked horizontal bars: one per model, made of its parts, with the sum at the end and a line at what fits."""

from collections.abc import Mapping

import plotly.graph_objects as go

from sqviz.plots.template import Theme, template, wrapped

Stacks = Mapping[str, Mapping[str, float]]
"""Size by label and by part."""


def sum_text(parts: Mapping[str, float]) -> str:
    """What stands at the end of a bar: the sum, to three digits or to the whole number."""
    total = sum(parts.values())
    return f"{total:,.0f}" if total >= 100 else f"{total:.3g}"


def stacked(stacks: Stacks, title: str, unit: str, *, limit: float | None = None, theme: Theme = "either") -> go.Figure:
    """Labels downwards, parts from left to right; `limit` is drawn as a line across all bars."""
    labels = list(stacks)
    lines = {label: wrapped(label, 26) for label in labels}
    title = wrapped(title)
    parts = list(dict.fromkeys(part for sizes in stacks.values() for part in sizes))
    colours = template(theme).layout.colorway
    figure = go.Figure()
    for place, part in enumerate(parts):
        figure.add_bar(
            x=[stacks[label].get(part, 0.0) for label in labels],
            y=labels,
            name=part,
            orientation="h",
            marker_color=colours[place % len(colours)],
            hovertemplate="%{y}: %{x:.4g} " + unit + "<extra>" + part + "</extra>",
        )
    sums = {label: sum(stacks[label].values()) for label in labels}
    for label in labels:
        figure.add_annotation(
            x=sums[label], y=label, text=sum_text(stacks[label]), xanchor="left", xshift=4, showarrow=False
        )
    if limit is not None:
        line = {"dash": "dash", "color": template(theme).layout.font.color}
        figure.add_vline(x=limit, line=line, annotation_text=f"{limit:g}", annotation_position="top")
    figure.update_xaxes(title=unit, range=[0, 1.15 * max([*sums.values(), limit or 0.0])])
    figure.update_yaxes(autorange="reversed", automargin=True, tickvals=labels, ticktext=list(lines.values()))
    figure.update_layout(template=template(theme), barmode="stack", bargap=0.35)
    figure.update_layout(title={"text": title, "x": 0.01, "xref": "container"})
    top = 46 + 24 * (1 + title.count("<br>"))
    return figure.update_layout(
        height=150 + top + sum(28 + 16 * (1 + line.count("<br>")) for line in lines.values()),
        margin={"t": top, "b": 90, "l": 20},
        legend={
            "orientation": "h",
            "xref": "container",
            "x": 0.01,
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "traceorder": "normal",
        },
    )

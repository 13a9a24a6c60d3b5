"""Which cells of both operands share a step (thesis Figure 3.1): X [token channel] beside Wᵀ [channel out]."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Int
from plotly.subplots import make_subplots

from sqviz.plots.template import Theme, template

StepMap = Int[np.ndarray, "row column"]
"""For each cell the number of the step that it is rounded by; −1 for all where nothing is rounded."""

Codes = Mapping[str, tuple[StepMap | None, StepMap | None]]
"""By scheme, the integers of X and Wᵀ."""

LIGHT, DARK = ("#dbe9f6", "#8ab8e0"), ("#fbe3d0", "#eda766")
"""Two shades each for activations (blue) and weights (orange); neighbours that differ do not share a step. Light enough
for dark numbers on all of them."""
CELL = 26
"""Pixels of a cell, downwards."""
PLAIN, INK = "#bdbdbd", "#1b1b1b"
"""Of cells that are not rounded, and of numbers in cells."""


def granularity_figure(
    pairs: Mapping[str, tuple[StepMap, StepMap]], title: str, codes: Codes | None = None, *, theme: Theme = "either"
) -> go.Figure:
    """A row per scheme: X on the left, Wᵀ on the right, cells of one step in one shade.

    Args:
        pairs: by title, the step of each cell of X [token channel] and of Wᵀ [channel out].
        title: over all.
        codes: by title, the integers that are written into the cells.
        theme: light, dark or either.
    """
    titles = [f"{side} · {name}" for name in pairs for side in ("X, tokens down", "Wᵀ, out channels across")]
    heights = [max(len(x), len(w)) for x, w in pairs.values()]
    pixels = sum(CELL * height + 58 for height in heights)
    figure = make_subplots(
        len(pairs),
        2,
        subplot_titles=titles,
        row_heights=heights,
        horizontal_spacing=0.08,
        vertical_spacing=min(0.3, 58 / pixels) if len(pairs) > 1 else 0,
    )
    for row, (name, pair) in enumerate(pairs.items(), 1):
        written = (None, None) if codes is None else codes[name]
        for column, (steps, shades, numbers) in enumerate(zip(pair, (LIGHT, DARK), written, strict=True), 1):
            of = int(steps.max()) + 1
            said = f"step %{{customdata}} of {of}" if of else "not rounded"
            figure.add_heatmap(
                z=shade(steps),
                customdata=steps + 1,
                colorscale=[[0, shades[0] if of else PLAIN], [1, shades[1]]],
                zmin=0,
                zmax=1,
                showscale=False,
                xgap=1,
                ygap=1,
                text=numbers,
                texttemplate=None if numbers is None else "%{text}",
                textfont={"color": INK, "size": 11},
                hovertemplate=f"row %{{y}}, column %{{x}}: {said}<extra></extra>",
                row=row,
                col=column,
            )
            figure.update_xaxes(showticklabels=False, ticks="", constrain="domain", row=row, col=column)
            figure.update_yaxes(showticklabels=False, ticks="", autorange="reversed", row=row, col=column)
    figure.update_layout(template=template(theme), title=title, height=110 + pixels)
    return figure.update_annotations(font_size=11)


def shade(steps: StepMap) -> StepMap:
    """0 or 1 for each cell: steps alternate along both directions, and a single one is all 0."""
    order = np.unique(steps, return_inverse=True)[1].reshape(steps.shape)
    groups = order % 2
    if steps.shape[0] > 1 and steps.shape[1] > 1 and len({*steps[0]}) > 1 and len({*steps[:, 0]}) > 1:
        across = np.unique(steps[0], return_inverse=True)[1] % 2
        down = np.unique(steps[:, 0], return_inverse=True)[1] % 2
        groups = (across[None] + down[:, None]) % 2
    return groups

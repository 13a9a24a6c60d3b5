"""Which cells of both operands share a step (thesis Figure 3.1): X [token channel] beside Wᵀ [channel out]."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from jaxtyping import Int
from plotly.subplots import make_subplots

from sqviz.plots.template import Theme, template

StepMap = Int[np.ndarray, "row column"]
"""For each cell the number of the step that it is rounded by."""

LIGHT, DARK = ("#dbe9f6", "#4c8cc4"), ("#fbe3d0", "#d98032")
"""Two shades each for activations (blue) and weights (orange); neighbours that differ do not share a step."""


def granularity_figure(
    pairs: Mapping[str, tuple[StepMap, StepMap]], title: str, *, theme: Theme = "either"
) -> go.Figure:
    """A row per scheme: X on the left, Wᵀ on the right, cells of one step in one shade.

    Args:
        pairs: by title, the step of each cell of X [token channel] and of Wᵀ [channel out].
        title: over all.
        theme: light, dark or either.
    """
    titles = [f"{name}: {side}" for name in pairs for side in ("X, tokens down", "Wᵀ, out channels across")]
    figure = make_subplots(len(pairs), 2, subplot_titles=titles, horizontal_spacing=0.08, vertical_spacing=0.14)
    for row, (x, w) in enumerate(pairs.values(), 1):
        for column, (steps, shades) in enumerate(((x, LIGHT), (w, DARK)), 1):
            figure.add_heatmap(
                z=shade(steps),
                customdata=steps + 1,
                colorscale=[[0, shades[0]], [1, shades[1]]],
                zmin=0,
                zmax=1,
                showscale=False,
                xgap=1,
                ygap=1,
                hovertemplate=f"%{{y}}, %{{x}}: step %{{customdata}} of {int(steps.max()) + 1}<extra></extra>",
                row=row,
                col=column,
            )
            figure.update_xaxes(showticklabels=False, constrain="domain", row=row, col=column)
            figure.update_yaxes(showticklabels=False, autorange="reversed", row=row, col=column)
    figure.update_layout(template=template(theme), title=title, height=90 + 190 * len(pairs))
    return figure.update_annotations(font_size=12)


def shade(steps: StepMap) -> StepMap:
    """0 or 1 for each cell: steps alternate along both directions, and a single one is all 0."""
    order = np.unique(steps, return_inverse=True)[1].reshape(steps.shape)
    groups = order % 2
    if steps.shape[0] > 1 and steps.shape[1] > 1 and len({*steps[0]}) > 1 and len({*steps[:, 0]}) > 1:
        across = np.unique(steps[0], return_inverse=True)[1] % 2
        down = np.unique(steps[:, 0], return_inverse=True)[1] % 2
        groups = (across[None] + down[:, None]) % 2
    return groups

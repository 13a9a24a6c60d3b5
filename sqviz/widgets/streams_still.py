"""Perplexity curves drawn without a browser."""

import numpy as np
from jaxtyping import Float

from sqviz.plots.streams import perplexity_range, thin
from sqviz.widgets.still import BLUE, GREEN, INK, ORANGE, PURPLE, Axis, Box, Still

WIDTH, HEIGHT = 760, 400
PLOT = Box(66, 74, 670, 270)
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, INK)


def draw_still(curves: dict[str, Float[np.ndarray, " position"]], title: str, subtitle: str) -> Still:
    """Perplexity against position, log scale; `curves` by label."""
    still = Still(WIDTH, HEIGHT, title, subtitle)
    lo, hi = perplexity_range(curves) or [0.0, 1.0]
    longest = max((len(values) for values in curves.values()), default=1)
    at_x, at_y = still.axes(PLOT, Axis(0, longest, "tokens read"), Axis(10**lo, 10**hi, "perplexity", log=True))
    left = PLOT.x
    for number, (label, values) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        positions, shown = thin(np.asarray(values), int(PLOT.width))
        still.line([(at_x(x), at_y(y)) for x, y in zip(positions, shown, strict=True)], colour=colour, width=1.2)
        still.text(left, PLOT.y - 20, label, colour=colour)
        left += 9.0 * len(label) + 18
    return still

"""Curves of streams drawn without a browser: perplexity against position, costs against cache size."""

import numpy as np
from jaxtyping import Float

from sqviz.plots.streams import Panels, perplexity_range, thin
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


def cost_still(panels: Panels, title: str, subtitle: str, x_title: str, *, log: bool = True) -> Still:
    """The picture of `sqviz.plots.streams.cost_curves`: panels below each other, one line per label."""
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    each = 150
    still = Still(WIDTH, 110 + (each + 50) * len(panels), title, subtitle)
    left = PLOT.x
    for label in labels if len(labels) > 1 else ():
        still.text(left, 50, label, colour=COLOURS[labels.index(label) % len(COLOURS)])
        left += 7.0 * len(label) + 24
    for row, (name, lines) in enumerate(panels.items()):
        points = [point for line in lines.values() for point in line]
        xs, ys = ([point[k] for point in points] for k in (0, 1))
        x = Axis(min(xs) if log else 0, max(xs), x_title if row == len(panels) - 1 else "", log=log)
        y = Axis(min(ys) / 1.3 if log else 0, max(ys) * (1.3 if log else 1.08), name, log=log)
        at_x, at_y = still.axes(Box(PLOT.x + 8, 78 + (each + 50) * row, PLOT.width, each), x, y)
        for label, line in lines.items():
            colour = COLOURS[labels.index(label) % len(COLOURS)]
            still.line([(at_x(x), at_y(y)) for x, y in line], colour=colour, width=1.4)
    return still

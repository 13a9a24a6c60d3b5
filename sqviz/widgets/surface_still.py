"""The 3-D surfaces as a picture without WebGL: a parallel projection, painted from back to front."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from sqviz.plots.pool import max_pool
from sqviz.plots.surface import Panel, log_levels
from sqviz.widgets.still import DIM, FAINT, INK, Axis, Box, Still, colour_map, number

ROWS, COLUMNS = 48, 128
Place = Callable[..., tuple[float, float]]
ALONG_CHANNELS, ALONG_ROWS = (0.66, -0.17), (0.34, 0.25)  # where a step along each axis goes, in widths of the box


def draw_surfaces(panels: Sequence[Panel], title: str) -> Still:
    """A picture with the panels two abreast, each on its own height scale."""
    rows = math.ceil(len(panels) / 2)
    picture = Still(880, 50 + 320 * rows, title, "height linear, colour logarithmic; maxima, so no outlier is lost")
    for i, panel in enumerate(panels):
        row, column = divmod(i, 2)
        _draw(picture, Box(58 + 430 * column, 60 + 320 * row, 370, 290), panel)
    return picture


def _draw(picture: Still, box: Box, panel: Panel) -> None:
    picture.text(box.x + box.width / 2, box.y, panel.title, size=12, anchor="ma")
    values = max_pool(panel.values, ROWS, COLUMNS)
    axis = Axis(0.0, max(float(values.max()), 1e-30))
    tall = box.height * 0.42  # points for the tallest value
    origin = (box.x, box.y + box.height * 0.70)

    def at(u: float, v: float, z: float = 0.0) -> tuple[float, float]:
        """The point of a place on the floor (both 0 to 1) and a height (0 to 1)."""
        x = origin[0] + (u * ALONG_CHANNELS[0] + v * ALONG_ROWS[0]) * box.width
        return x, origin[1] + (u * ALONG_CHANNELS[1] + v * ALONG_ROWS[1]) * box.width - z * tall

    for tick in axis.ticks(3):
        z = axis.fraction(tick)
        picture.line([at(0, 0, z), at(1, 0, z), at(1, 1, z)], colour=FAINT, width=0.5)
        picture.text(*_beside(at(0, 0, z), -5), number(tick), size=9, colour=DIM, anchor="rm")
    _quads(picture, values, at)
    channels, count = panel.values.shape[1], panel.values.shape[0] * panel.row_units
    for tick in Axis(0, channels).ticks(4):
        x, y = at(tick / channels, 1)
        picture.text(x + 2, y + 4, number(tick), size=9, colour=DIM, anchor="la")
    for tick in Axis(0, count).ticks(3):
        x, y = at(0, tick / count)
        picture.text(x - 4, y + 2, number(tick), size=9, colour=DIM, anchor="ra")
    picture.text(*_below(at(0.62, 1), 24), "input channel", size=10, colour=INK, anchor="ma")
    picture.text(*_below(at(0, 0.55), 24), panel.y_label, size=10, colour=INK, anchor="ra")


def _beside(point: tuple[float, float], by: float) -> tuple[float, float]:
    return point[0] + by, point[1]


def _below(point: tuple[float, float], by: float) -> tuple[float, float]:
    return point[0] - 10, point[1] + by


def _quads(picture: Still, values: Float[np.ndarray, "row column"], at: Place) -> None:
    """Cells as quadrilaterals, the farthest first: rows from the back, and in a row from the right."""
    colours = colour_map()[log_levels(values)]
    rows, columns = values.shape
    heights = values / max(float(values.max()), 1e-30)
    points = [
        [at(c / max(columns - 1, 1), r / max(rows - 1, 1), float(heights[r, c])) for c in range(columns)]
        for r in range(rows)
    ]
    for r in range(rows - 1):
        for c in reversed(range(columns - 1)):
            red, green, blue = colours[r : r + 2, c : c + 2].reshape(4, 3).max(0)
            corners = [points[r][c], points[r][c + 1], points[r + 1][c + 1], points[r + 1][c]]
            picture.polygon(corners, fill=f"#{red:02x}{green:02x}{blue:02x}")

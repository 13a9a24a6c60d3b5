"""Pictures about α drawn without a browser: what is lost against it."""

from collections.abc import Mapping

from sqviz.plots.alpha import NONE, TICKS, UNQUANTISED, AlphaLines, alpha_axis, lowest, place, span
from sqviz.widgets.still import BLUE, DIM, GREEN, INK, ORANGE, PURPLE, Axis, Box, Still

WIDTH, LEFT, EACH, GAP = 760, 74, 170, 46
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, INK)


class _Strengths(Axis):
    """The axis of α."""

    def ticks(self, count: int = 5) -> list[float]:
        """Those of the figure."""
        return list(TICKS)


def alpha_lines_still(lines: AlphaLines, references: Mapping[str, float], title: str, note: str) -> Still:
    """The picture of `sqviz.plots.alpha.alpha_lines`: panels below each other, one line per label."""
    still = Still(WIDTH, 116 + (EACH + GAP) * len(lines), title, note)
    _legend(still, list(next(iter(lines.values()))), bool(references))
    lo, hi = alpha_axis(lines)["range"]
    for row, (panel, by_label) in enumerate(lines.items()):
        values = span(lines, references, panel) or [1.0, 10.0]
        box = Box(LEFT, 82 + (EACH + GAP) * row, WIDTH - LEFT - 30, EACH)
        x = _Strengths(lo, hi, "migration strength α" if row == len(lines) - 1 else "")
        at_x, at_y = still.axes(box, x, Axis(min(values) / 1.15, max(values) * 1.15, panel, log=True))
        if lo < NONE:
            still.text(at_x(NONE), box.y + box.height + 6, "none", size=10, colour=DIM, anchor="ma")
        if panel in references:
            still.line([(box.x, at_y(references[panel])), (box.x + box.width, at_y(references[panel]))], colour=DIM)
        for number, points in enumerate(by_label.values()):
            colour = COLOURS[number % len(COLOURS)]
            placed = [(at_x(place(alpha)), at_y(value)) for alpha, value in points]
            still.line(placed[bool(points and points[0][0] is None) :], colour=colour, width=1.4)
            for px, py in placed:
                still.rectangle(Box(px - 2, py - 2, 4, 4), fill=colour)
            for alpha, value in lowest(points):
                star(still, at_x(place(alpha)), at_y(value), colour)
    return still


def star(still: Still, x: float, y: float, colour: str) -> None:
    """A four-pointed star."""
    corners = [(0, -8), (2, -2), (8, 0), (2, 2), (0, 8), (-2, 2), (-8, 0), (-2, -2)]
    still.polygon([(x + dx, y + dy) for dx, dy in corners], fill=colour, outline="#ffffff")


def _legend(still: Still, labels: list[str], reference: bool) -> None:
    left = float(LEFT)
    shown = [(label, COLOURS[number % len(COLOURS)]) for number, label in enumerate(labels)]
    for label, colour in [*shown, *([(UNQUANTISED, DIM)] if reference else [])]:
        still.line([(left, 62), (left + 14, 62)], colour=colour, width=2)
        still.text(left + 18, 62, label, colour=colour, anchor="lm")
        left += 7.0 * len(label) + 36

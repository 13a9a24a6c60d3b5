"""Horizontal bars drawn without a browser: the picture of `sqviz.plots.bars.bars`."""

from sqviz.plots.bars import Bars, value_text
from sqviz.widgets.still import BLUE, DIM, GREEN, INK, ORANGE, PURPLE, Box, Still

WIDTH, BAR, GAP = 760, 20, 12
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, INK)


def bars_still(panels: Bars, title: str, subtitle: str) -> Still:
    """Panels below each other, so that names and values have room."""
    labels = list(dict.fromkeys(label for values in panels.values() for label in values))
    each = 34 + (BAR + GAP) * len(labels)
    still = Still(WIDTH, 62 + each * len(panels), title, subtitle)
    left = 24 + 6.6 * max(len(label) for label in labels)
    room = WIDTH - left - 130
    for row, (name, values) in enumerate(panels.items()):
        top, first = 58 + each * row, next(iter(values.values()))
        still.text(left, top, name, colour=DIM)
        longest = max(values.values()) or 1.0
        for place, label in enumerate(labels):
            y = top + 20 + (BAR + GAP) * place
            width = max(1.0, room * values[label] / longest)
            still.rectangle(Box(left, y, width, BAR), fill=COLOURS[place % len(COLOURS)])
            still.text(left - 8, y + BAR / 2, label, anchor="rm")
            still.text(left + width + 6, y + BAR / 2, value_text(values[label], first), anchor="lm")
    return still

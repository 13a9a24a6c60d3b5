"""Stacked bars drawn without a browser: the picture of `sqviz.plots.footprint.stacked`."""

from sqviz.plots.footprint import Stacks, sum_text
from sqviz.widgets.still import BLUE, DIM, GREEN, INK, ORANGE, PURPLE, Box, Still

WIDTH, BAR, GAP, TOP = 760, 20, 12, 84
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, INK)


def stacked_still(stacks: Stacks, title: str, unit: str, *, limit: float | None = None) -> Still:
    """Labels downwards, parts from left to right, a line at `limit`."""
    parts = list(dict.fromkeys(part for sizes in stacks.values() for part in sizes))
    colours = {part: COLOURS[place % len(COLOURS)] for place, part in enumerate(parts)}
    still = Still(WIDTH, TOP + (BAR + GAP) * len(stacks) + 12, title, unit)
    x = 24.0
    for part, colour in colours.items():
        still.rectangle(Box(x, 54, 10, 10), fill=colour)
        still.text(x + 15, 59, part, anchor="lm")
        x += 6.6 * len(part) + 36
    left = 24 + 6.6 * max(len(label) for label in stacks)
    longest = max([sum(sizes.values()) for sizes in stacks.values()] + [limit or 0.0]) or 1.0
    scale = (WIDTH - left - 70) / longest
    for row, (label, sizes) in enumerate(stacks.items()):
        y, x = TOP + (BAR + GAP) * row, left
        still.text(left - 8, y + BAR / 2, label, anchor="rm")
        for part, size in sizes.items():
            still.rectangle(Box(x, y, scale * size, BAR), fill=colours[part])
            x += scale * size
        still.text(x + 6, y + BAR / 2, sum_text(sizes), anchor="lm")
    if limit is not None:
        at, bottom = left + scale * limit, TOP + (BAR + GAP) * len(stacks)
        still.line([(at, TOP - 6), (at, bottom)], colour=DIM)
        still.text(at, TOP - 8, f"{limit:g}", colour=DIM, anchor="ms")
    return still

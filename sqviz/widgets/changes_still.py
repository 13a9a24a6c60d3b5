"""Changes with their intervals drawn without a browser: the picture of `sqviz.plots.changes.changes`."""

from sqviz.plots.changes import Change, Changes, Verdict, extent
from sqviz.widgets.still import BLUE, DIM, FAINT, INK, ORANGE, PAPER, Axis, Box, Still, number

WIDTH, ROW, PANEL, TOP, R = 760, 24, 56, 78, 5
COLOURS: dict[Verdict, str] = {"better": BLUE, "worse": ORANGE, "not told apart from noise": INK}


def changes_still(panels: Changes, title: str, subtitle: str) -> Still:
    """Panels below each other, rows downwards in order."""
    count = sum(map(len, panels.values()))
    still = Still(WIDTH, TOP + ROW * count + PANEL * len(panels), title, subtitle)
    x = 24.0
    for verdict in COLOURS:
        _marker(still, x, 58, verdict)
        still.text(x + 12, 58, verdict, anchor="lm")
        x += 6.6 * len(verdict) + 44
    left = 30 + 6.6 * max((len(row.label) for rows in panels.values() for row in rows), default=0)
    top = float(TOP)
    for name, rows in panels.items():
        bottom = top + ROW * len(rows)
        axis = Axis(*extent(rows))

        def at(value: float, axis: Axis = axis) -> float:
            return left + (WIDTH - left - 24) * axis.fraction(value)

        still.line([(left, bottom), (WIDTH - 24, bottom)], colour=DIM)
        for tick in axis.ticks(6):
            still.line([(at(tick), top), (at(tick), bottom)], colour=FAINT, width=0.5)
            still.text(at(tick), bottom + 6, number(tick), size=10, colour=DIM, anchor="ma")
        still.line([(at(0), top), (at(0), bottom)], colour=DIM)
        still.text((left + WIDTH - 24) / 2, bottom + 20, name, colour=DIM, anchor="ma")
        for place, row in enumerate(rows):
            y = top + ROW * (place + 0.5)
            still.text(left - 10, y, row.label, anchor="rm")
            _interval(still, row, at(row.change), y, *(at(end) for end in (row.low, row.high) if end is not None))
        top = bottom + PANEL
    return still


def _interval(still: Still, row: Change, x: float, y: float, *ends: float) -> None:
    colour = COLOURS[row.verdict]
    if ends:
        still.line([(ends[0], y), (ends[-1], y)], colour=colour, width=1.5)
        for end in ends:
            still.line([(end, y - 4), (end, y + 4)], colour=colour, width=1.5)
    _marker(still, x, y, row.verdict)


def _marker(still: Still, x: float, y: float, verdict: Verdict) -> None:
    """A diamond, a square or an open circle, as in plotly's figure."""
    colour = COLOURS[verdict]
    if verdict == "better":
        still.polygon([(x - R - 1, y), (x, y - R - 1), (x + R + 1, y), (x, y + R + 1)], fill=colour)
    elif verdict == "worse":
        still.rectangle(Box(x - R, y - R, 2 * R, 2 * R), fill=colour)
    else:
        c = 0.4142 * R
        still.polygon(
            [(x - R, y - c), (x - c, y - R), (x + c, y - R), (x + R, y - c),
             (x + R, y + c), (x + c, y + R), (x - c, y + R), (x - R, y + c)],
            fill=PAPER, outline=colour,
        )  # fmt: skip

"""Step maps drawn without a browser: the picture of `sqviz.plots.granularity.granularity_figure`."""

from collections.abc import Mapping

from sqviz.plots.granularity import DARK, LIGHT, StepMap, shade
from sqviz.widgets.still import DIM, Box, Still

WIDTH, CELL, GAP = 760, 22, 2


def granularity_still(pairs: Mapping[str, tuple[StepMap, StepMap]], title: str) -> Still:
    """A row per scheme: X on the left, Wᵀ on the right."""
    rows = [max(len(x), len(w)) * CELL + 58 for x, w in pairs.values()]
    still = Still(WIDTH, 60 + sum(rows), title, "blue: X, tokens down and channels across; orange: Wᵀ, channels down")
    top = 64.0
    for (name, (x, w)), height in zip(pairs.items(), rows, strict=True):
        still.text(24, top, name, colour=DIM)
        for left, steps, shades in ((24.0, x, LIGHT), (WIDTH / 2 + 12, w, DARK)):
            for row, line in enumerate(shade(steps)):
                for column, which in enumerate(line):
                    box = Box(left + column * CELL, top + 16 + row * CELL, CELL - GAP, CELL - GAP)
                    still.rectangle(box, fill=shades[int(which)])
        top += height
    return still

"""Step maps drawn without a browser: the picture of `sqviz.plots.granularity.granularity_figure`."""

from collections.abc import Mapping

from sqviz.plots.granularity import DARK, LIGHT, PLAIN, Codes, StepMap, shade
from sqviz.widgets.still import DIM, Box, Still

CELL, GAP, LEFT = 22, 2, 24.0
WIDE = 34
"""Points of a cell across, with a number in it."""


def granularity_still(pairs: Mapping[str, tuple[StepMap, StepMap]], title: str, codes: Codes | None = None) -> Still:
    """A row per scheme: X on the left, Wᵀ on the right."""
    written = {name: (None, None) if codes is None else codes[name] for name in pairs}
    across = WIDE if any(one is not None for pair in written.values() for one in pair) else CELL
    second = LEFT + 40 + across * max(x.shape[1] for x, _ in pairs.values())
    width = max(760, round(second + LEFT + across * max(w.shape[1] for _, w in pairs.values())))
    rows = [max(len(x), len(w)) * CELL + 58 for x, w in pairs.values()]
    still = Still(width, 60 + sum(rows), title, "blue: X, tokens down and channels across; orange: Wᵀ, channels down")
    top = 64.0
    for (name, pair), height in zip(pairs.items(), rows, strict=True):
        still.text(LEFT, top, name, colour=DIM)
        for left, steps, shades, numbers in zip((LEFT, second), pair, (LIGHT, DARK), written[name], strict=True):
            plain = int(steps.max()) < 0
            for row, line in enumerate(shade(steps)):
                for column, which in enumerate(line):
                    box = Box(left + column * across, top + 18 + row * CELL, across - GAP, CELL - GAP)
                    still.rectangle(box, fill=PLAIN if plain else shades[int(which)])
                    if numbers is not None:
                        middle = box.x + box.width / 2, box.y + box.height / 2
                        still.text(*middle, str(numbers[row, column]).replace("-", "−"), size=10, anchor="mm")
        top += height
    return still

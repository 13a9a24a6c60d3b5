"""`PrecisionView`: a block as thesis Figure 3.3 draws it, coloured by precision, each operator to be clicked.

Everything travels at once as numbers, a few for each operator of each block; no kernel is asked again, so an exported
page can do all that the live view does. Below the block stand the errors of every operator in every layer.
"""

import math
from typing import Any

import numpy as np
import traitlets

from sqviz.plots.block import INPUT, Layout, lay_out
from sqviz.quant.precision_map import MappedOperator, PrecisionMap
from sqviz.widgets.still import BLUE, DIM, FAINT, INK, PAPER, Axis, Box, Still, colour_map, number
from sqviz.widgets.view import View

MEASURES = {
    "local": "its own output",
    "in_block": "the block's output",
    "in_model": "the next token, this block only",
    "everywhere": "the next token, all blocks",
}
"""Which error is shown, and of what."""
LEAST = 1e-9
"""Errors below this have the colour of this one."""


class PrecisionView(View):
    """The precision of every operator and what it costs; see `sqviz.precision_map`.

    Traits: `block` is the index of the one drawn, `operator` the name of the one explained, `measure` which error is
    shown: "local", "in_block", "in_model" or "everywhere".
    """

    _scripts = ("draw.js", "precision_block.js", "precision_strip.js", "precision.js")
    _styles = ("base.css", "precision.css")

    meta = traitlets.Dict().tag(sync=True)
    block = traitlets.Int(0).tag(sync=True)
    operator = traitlets.Unicode("").tag(sync=True)
    measure = traitlets.Enum(list(MEASURES), "in_block").tag(sync=True)

    def __init__(self, found: PrecisionMap, **state: Any) -> None:
        """From a map; `state` sets traits."""
        self.map = found
        blocks = [[_packed(one, found.everywhere.get(one.name, math.nan)) for one in ops] for ops in found.blocks]
        layouts = [lay_out({one.name: one.sources for one in ops}) for ops in found.blocks]
        measured = f"measured on {found.samples} × {found.length} tokens"
        ended = "" if found.complete else " · cancelled: what was not reached is blank"
        super().__init__(
            title=f"{found.model or 'Model'}: precision of every operator",
            meta={
                "note": f"{found.scheme.describe()} · {measured}{ended}",
                "blocks": blocks,
                "layouts": [_grid(layout) for layout in layouts],
                "labels": labels_of(found),
                "measures": [[key, words] for key, words in MEASURES.items()],
                "scales": {key: self._scale(key) for key in MEASURES},
                "together": _finite(found.together),
            },
            **{"operator": _first(found), **state},
        )

    @traitlets.validate("block")
    def _known_block(self, proposal: Any) -> int:
        last = len(self.map.blocks) - 1
        if not 0 <= proposal["value"] <= last:
            raise traitlets.TraitError(f"block={proposal['value']}: there are blocks 0 … {last}.")
        return int(proposal["value"])

    def value(self, one: MappedOperator, measure: str | None = None) -> float:
        """The error that is shown for an operator; NaN where there is none."""
        measure = self.measure if measure is None else measure
        return float(self.map.everywhere.get(one.name, math.nan) if measure == "everywhere" else getattr(one, measure))

    def _scale(self, measure: str) -> list[float]:
        """Smallest and largest error of all operators and blocks."""
        values = [max(self.value(one, measure), LEAST) for ops in self.map.blocks for one in ops]
        finite = [value for value in values if math.isfinite(value)]
        low, high = (min(finite), max(finite)) if finite else (LEAST, 1.0)
        return [low / 1.1, high * 1.1]

    def still(self) -> Still:
        """The block on the left, the errors of all layers on the right."""
        layout = lay_out({one.name: one.sources for one in self.map.blocks[self.block]})
        labels = list(labels_of(self.map))
        height = max(130 + layout.rows * 34, 150 + 17 * len(labels))
        picture = Still(900, height, self.title, self.meta["note"])
        _draw_block(picture, Box(12, 74, 430, height - 110), layout, self)
        _draw_strip(picture, Box(570, 74, 310, 17 * len(labels)), self)
        picture.text(12, 50, f"block {self.block} · in the boxes: error of {MEASURES[self.measure]}", size=11)
        picture.text(12, height - 22, "blue: INT8 · white: 16 bit, with what INT8 would cost in brackets", colour=DIM)
        return picture


def labels_of(found: PrecisionMap) -> dict[str, str]:
    """A short label for every operator of any block, each one only once."""
    titles = {one.name: one.title for ops in found.blocks for one in ops}
    shown: dict[str, str] = {}
    for name, title in titles.items():
        path, _, count = name.partition("#")
        if list(titles.values()).count(title) > 1:
            title = f"{title} {count or 1}" if "." not in path else ".".join(path.split(".")[-2:])
        shown[name] = title
    return shown


def _first(found: PrecisionMap) -> str:
    """What is explained to begin with: the costliest operator of the first block."""
    measured = [one for one in found.blocks[0] if math.isfinite(one.in_block) and one.quantised]
    return max(measured, key=lambda one: one.in_block).name if measured else found.blocks[0][0].name


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _packed(one: MappedOperator, everywhere: float) -> dict[str, Any]:
    """What precision.js needs to know of an operator."""
    return {
        "name": one.name,
        "title": one.title,
        "kind": one.kind,
        "precision": one.precision,
        "quantised": one.quantised,
        "reason": one.reason,
        "sources": list(one.sources),
        "operands": [[x.label, x.granularity, x.steps, _finite(x.largest)] for x in one.operands],
        "largest": _finite(one.largest),
        "local": _finite(one.local),
        "in_block": _finite(one.in_block),
        "in_model": _finite(one.in_model),
        "everywhere": _finite(everywhere),
    }


def _grid(layout: Layout) -> dict[str, Any]:
    return {
        "places": {name: list(place) for name, place in layout.places.items()},
        "lines": [[start, end, [list(corner) for corner in corners]] for start, end, corners in layout.lines],
        "columns": list(layout.columns),
        "rows": layout.rows,
    }


# --- without a browser ---


def _draw_block(picture: Still, box: Box, layout: Layout, view: PrecisionView) -> None:
    left, right = layout.columns
    wide, tall = min(108.0, box.width / (right - left)), 34.0
    at = lambda place: (box.x + (place[0] - left) * wide, box.y + (place[1] + 0.3) * tall)  # noqa: E731
    for _, _, corners in layout.lines:
        picture.line([at(corner) for corner in corners], colour=DIM, width=0.8)
    x, y = at(layout.places[INPUT])
    picture.rectangle(Box(x - 40, y - 9, 80, 18), fill=PAPER)
    picture.text(x, y, "residual stream", size=10, colour=DIM, anchor="mm")
    for one in view.map.blocks[view.block]:
        x, y = at(layout.places[one.name])
        half = wide / 2 - 3
        fill, ink = (BLUE, PAPER) if one.quantised else (PAPER, INK)
        picture.rectangle(Box(x - half, y - 13, 2 * half, 26), fill=fill, outline=DIM)
        if one.name == view.operator:
            picture.rectangle(Box(x - half - 2, y - 15, 2 * half + 4, 30), outline=INK)
        room = int(2 * half / 4.9)
        title = one.title if len(one.title) <= room else one.title[: room - 1] + "…"
        picture.text(x, y - 6, title, size=9.5, colour=ink, anchor="mm")
        picture.text(x, y + 6, shown(view.value(one), one.quantised), size=8.5, colour=ink, anchor="mm")


def shown(value: float, quantised: bool) -> str:
    """An error for people; in brackets where it is what quantising would cost."""
    if not math.isfinite(value):
        return "–"
    return number(value) if quantised else f"({number(value)})"


def _draw_strip(picture: Still, box: Box, view: PrecisionView) -> None:
    """A row per operator, a column per block, coloured by error."""
    labels, blocks = labels_of(view.map), view.map.blocks
    low, high = view.meta["scales"][view.measure]
    axis = Axis(low, high, log=True)
    picture.text(box.x, box.y - 16, f"error of {MEASURES[view.measure]}, by block", colour=DIM)
    colours = np.full((len(labels), len(blocks), 3), 245, np.uint8)
    for row, name in enumerate(labels):
        for column, ops in enumerate(blocks):
            one = next((one for one in ops if one.name == name), None)
            if one is not None and math.isfinite(view.value(one)):
                colours[row, column] = colour_map()[round(255 * axis.fraction(view.value(one)))]
        picture.text(box.x - 6, box.y + (row + 0.5) * 17, labels[name], size=10, anchor="rm")
    picture.pixels(box, colours)
    picture.rectangle(box, outline=FAINT)
    step = box.width / len(blocks)
    for block in range(0, len(blocks), max(1, math.ceil(len(blocks) / 10))):
        picture.text(box.x + (block + 0.5) * step, box.y + box.height + 4, str(block), size=10, anchor="ma")
    bar = Box(box.x, box.y + box.height + 26, box.width, 9)
    picture.pixels(bar, colour_map()[None])
    for value, anchor, x in ((axis.lo, "la", bar.x), (axis.hi, "ra", bar.x + bar.width)):
        picture.text(x, bar.y + 12, number(value), size=10, anchor=anchor)  # type: ignore[arg-type]

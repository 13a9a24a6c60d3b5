"""`AlphaMapView`: the strengths that a search has found, by kind of linear and block, and the candidates beside it.

A cell is a group of linears that share an input; its colour runs from α = 0 to 1. What is not smoothed is hatched, and
what a block does not have is left out. Everything travels as it is: there are a few hundred numbers.
"""

import math
import textwrap
from typing import Any

import traitlets

from sqviz.quant.found_alpha import FoundAlpha
from sqviz.widgets.still import DIM, FAINT, INK, Axis, Box, Still, colour_map, number
from sqviz.widgets.view import View

WIDTH, LEFT, ROW = 820, 150, 34
HATCH = 5.0
"""Points between the lines that say "not smoothed"."""

COLUMNS = {"divergence": "KL held, nats per token", "noise": "± to flat α", "searched": "KL searched, nats per token"}
"""Of the table of candidates: what is shown of a `Tried`, where any has it."""


class AlphaMapView(View):
    """α by kind and block; see `FoundAlpha.map`.

    Traits: `palette` "viridis" or "cividis".
    """

    _scripts = ("draw.js", "alpha_map.js")
    _styles = ("base.css", "alpha_map.css")

    meta = traitlets.Dict().tag(sync=True)
    palette = traitlets.Enum(["viridis", "cividis"], "viridis").tag(sync=True)

    def __init__(self, found: FoundAlpha, **state: Any) -> None:
        """From what a search has found; `state` sets traits."""
        self.found = found
        super().__init__(title=f"{found.model or 'Model'}: α of every input", meta=_meta(found), **state)

    def still(self) -> Still:
        """The map, its scale, and the candidates below."""
        kinds, blocks = self.meta["kinds"], self.meta["blocks"]
        tried = self.meta["tried"]
        note = textwrap.wrap(self.meta["note"], 125)
        top = 51 + 15 * max(1, len(note))
        bottom = top + ROW * len(kinds)
        picture = Still(WIDTH, bottom + 92 + 18 * (len(tried) + 2 if tried else 0), self.title)
        for line, words in enumerate(note):
            picture.text(12, 28 + 15 * line, words, colour=DIM)
        each = (WIDTH - LEFT - 24) / max(1, len(blocks))
        for row, kind in enumerate(kinds):
            picture.text(LEFT - 8, top + ROW * row + ROW / 2, kind, size=10, colour=DIM, anchor="rm")
        for cell in self.meta["cells"]:
            box = Box(LEFT + each * cell["column"], top + ROW * cell["row"], each - 1.5, ROW - 2)
            self._cell(picture, box, cell["alpha"])
        every = max(1, -(-len(blocks) // 16))
        for column, block in list(enumerate(blocks))[::every]:
            picture.text(LEFT + each * (column + 0.5), bottom + 4, str(block), size=10, colour=DIM, anchor="ma")
        picture.text(LEFT + (WIDTH - LEFT - 24) / 2, bottom + 20, "block", colour=DIM, anchor="ma")
        self._legend(picture, bottom + 46)
        _candidates(picture, tried, bottom + 92)
        return picture

    def _cell(self, picture: Still, box: Box, alpha: float | None) -> None:
        if alpha is None:
            hatch(picture, box)
            return
        red, green, blue = (int(part) for part in colour_map(self.palette)[round(255 * alpha)])
        picture.rectangle(box, fill=f"#{red:02x}{green:02x}{blue:02x}")
        if box.width > 17:
            light = 0.299 * red + 0.587 * green + 0.114 * blue > 140
            ink = INK if light else "#ffffff"
            picture.text(box.x + box.width / 2, box.y + box.height / 2, _short(alpha), size=9, colour=ink, anchor="mm")

    def _legend(self, picture: Still, top: float) -> None:
        bar, axis = Box(LEFT + 20, top, 200, 10), Axis(0, 1)
        picture.text(bar.x - 8, top + 5, "α", colour=DIM, anchor="rm")
        picture.pixels(bar, colour_map(self.palette)[None])
        for tick in axis.ticks():
            place = bar.x + bar.width * axis.fraction(tick)
            picture.text(place, top + 13, number(tick), size=10, colour=DIM, anchor="ma")
        hatch(picture, Box(bar.x + 250, top - 2, 22, 14))
        picture.text(bar.x + 278, top + 5, "not smoothed", colour=DIM, anchor="lm")


def hatch(picture: Still, box: Box) -> None:
    """Slanted lines in a frame: no colour at all."""
    picture.rectangle(box, outline=FAINT)
    at = HATCH
    while at < box.width + box.height:
        low = (box.x + max(0.0, at - box.height), box.y + min(at, box.height))
        high = (box.x + min(at, box.width), box.y + max(0.0, at - box.width))
        picture.line([low, high], colour="#9a9a9a", width=0.7)
        at += HATCH


def _candidates(picture: Still, tried: list[dict[str, Any]], top: float) -> None:
    if not tried:
        return
    shown = [name for name in COLUMNS if any(one[name] is not None for one in tried)]
    places = {name: LEFT + 260 + 150 * place for place, name in enumerate(shown)}
    picture.text(LEFT, top, "candidate", size=10, colour=DIM)
    for name, place in places.items():
        picture.text(place, top, COLUMNS[name], size=10, colour=DIM, anchor="ra")
    for row, one in enumerate(tried, 1):
        kept = "  ★ kept" if one["kept"] else ""
        picture.text(LEFT, top + 18 * row, one["name"] + kept)
        for name, place in places.items():
            if one[name] is not None:
                picture.text(place, top + 18 * row, number(one[name]), anchor="ra")


def _short(alpha: float) -> str:
    """Two decimals without the zero in front: ".45"."""
    return f"{alpha:.2f}".removeprefix("0").rstrip("0").rstrip(".") or "0"


def _meta(found: FoundAlpha) -> dict[str, Any]:
    """What alpha_map.js draws: the cells in order of execution, kinds as rows, blocks as columns."""
    places = {name: found.place(name) for name in found.alphas}
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    blocks = sorted({block for block, _ in places.values()})
    return {
        "kinds": kinds,
        "blocks": blocks,
        "cells": [
            {"name": name, "row": kinds.index(kind), "column": blocks.index(block), "alpha": found.alphas[name]}
            for name, (block, kind) in places.items()
        ],
        "tried": [
            {
                "name": one.name,
                "divergence": one.divergence if math.isfinite(one.divergence) else None,
                "noise": one.noise,
                "searched": one.searched,
                "kept": one.name == found.objective,
            }
            for one in found.tried
        ],
        "note": found.describe(),
    }

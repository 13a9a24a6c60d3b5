"""`AttentionView`: every layer and head as small multiples on one canvas, to sort, to zoom into and to open one by one.

What travels at once: a byte per cell (log or linear codes on one scale that all panels share), the share of attention
that each key gets, and the largest activation of each token. An opened head is fetched from the kernel token by token
if the maps were pooled and the model is at hand; an exported page shows what it carries.
"""

from typing import Any

import numpy as np
import traitlets
from jaxtyping import Float, UInt8

from sqviz.models.lm import LM
from sqviz.observe.attention import AttentionMaps, head_scores
from sqviz.plots.pool import max_pool
from sqviz.widgets.still import Box, Still, colour_map, number
from sqviz.widgets.view import View, float32_bytes

FLOOR = 1e-4
"""Probabilities below this have the colour of this one."""
LIMITS = (0.005, 0.995)
"""Quantiles of the logits between which the colours run."""
DETAIL = 1024
"""Most rows of an opened head."""
BLANK = 0


class AttentionView(View):
    """Attention of all layers and heads; see `AttentionMaps.heatmap`.

    Traits: `sort` ("layer" or "sink") orders the panels, `opened` is (layer, head) of the one shown large or empty,
    `span` the first and last token that are shown or empty, `palette` "viridis" or "cividis".
    """

    _scripts = ("draw.js", "attention_zoom.js", "attention_panels.js", "attention_profile.js", "attention.js")
    _styles = ("base.css",)

    meta = traitlets.Dict().tag(sync=True)
    cells = traitlets.Bytes().tag(sync=True)
    share = traitlets.Bytes().tag(sync=True)
    mass = traitlets.Bytes().tag(sync=True)
    entropy = traitlets.Bytes().tag(sync=True)
    norms = traitlets.Bytes().tag(sync=True)
    tokens = traitlets.List(traitlets.Unicode()).tag(sync=True)
    detail = traitlets.Dict().tag(sync=True)
    sort = traitlets.Enum(["layer", "sink"], "layer").tag(sync=True)
    opened = traitlets.List(traitlets.Int()).tag(sync=True)
    span = traitlets.List(traitlets.Int()).tag(sync=True)
    palette = traitlets.Enum(["viridis", "cividis"], "viridis").tag(sync=True)

    def __init__(self, maps: AttentionMaps, lm: LM | None = None, **state: Any) -> None:
        """From maps; `lm`, if it is at hand, gives opened heads token by token. `state` sets traits."""
        self.maps, self._lm = maps, lm
        scale = _scale(maps)
        what = "logits" if maps.logits else "probabilities"
        one = maps.sentences == 1
        over = f"{maps.length} tokens" if one else f"{maps.sentences} sentences of {maps.length} tokens"
        super().__init__(
            title=f"{maps.model or 'Model'}: attention {what}, {'of one text' if one else 'average'}",
            meta={
                "layers": maps.layers,
                "heads": maps.heads,
                "rows": maps.maps.shape[2],
                "cell": maps.cell,
                "length": maps.length,
                "logits": maps.logits,
                "scale": scale,
                "detailed": lm is not None and maps.cell > 1 and one,
                "note": f"{maps.layers} layers × {maps.heads} heads · {over}"
                + (f" · each cell the largest of {maps.cell} × {maps.cell} tokens" if maps.cell > 1 else ""),
            },
            cells=encode(maps.maps.numpy(), scale).tobytes(),
            share=float32_bytes(maps.share.mean(1)),
            mass=float32_bytes(maps.sink_mass()),
            entropy=float32_bytes(maps.entropy),
            norms=float32_bytes(maps.norms),
            tokens=list(maps.token_texts) if one else [f"token {at}" for at in range(maps.length)],
            **state,
        )
        self.observe(self._send_detail, names=["opened"])
        if self.opened:
            self._send_detail()

    def _send_detail(self, _change: Any = None) -> None:
        """Give the page the opened head token by token."""
        if not self.opened or not self.meta["detailed"]:
            self.detail = {}
            return
        layer, head = self.opened
        assert self._lm is not None
        try:
            scores = head_scores(self._lm, self.maps.tokens, layer, head, logits=self.maps.logits).numpy()
        except Exception as error:  # noqa: BLE001 - shown in the view, whatever it was
            self.detail = {"panel": [layer, head], "error": f"{type(error).__name__}: {error}"}
            return
        size = min(DETAIL, len(scores))
        scores = np.where(np.isfinite(scores) & (np.tri(len(scores)) > 0), scores, -np.inf)
        pooled = max_pool(scores, size, size)
        codes = encode(np.where(np.isfinite(pooled), pooled, np.nan), self.meta["scale"])
        self.detail = {"panel": [layer, head], "rows": size, "cells": codes.tobytes()}

    def page_state(self) -> dict[str, Any]:
        """The traits; a page has no kernel to ask for an opened head."""
        state = super().page_state()
        return state | {"detail": {}, "meta": state["meta"] | {"detailed": False}}

    def still(self) -> Still:
        """All panels in layer order: a row per layer, a column per head, several runs of layers side by side."""
        maps, scale = self.maps, self.meta["scale"]
        runs = max(1, round((maps.layers / maps.heads) ** 0.5))
        per_run = -(-maps.layers // runs)
        side = max(10, min(56, 820 // (maps.heads * runs) - 4))
        label, step = 22, side + 3
        width = max(460, 20 + runs * (label + maps.heads * step + 8))
        picture = Still(width, 96 + per_run * step, self.title, self.meta["note"])
        codes = np.frombuffer(self.cells, np.uint8).reshape(maps.layers, maps.heads, *maps.maps.shape[2:])
        colours = _colours(self.palette)
        for layer in range(maps.layers):
            run, row = divmod(layer, per_run)
            left, top = 12 + run * (label + maps.heads * step + 8), 48 + row * step
            picture.text(left + label - 5, top + side / 2, str(layer), size=9, anchor="rm")
            for head in range(maps.heads):
                box = Box(left + label + head * step, top, side, side)
                picture.pixels(box, colours[codes[layer, head]])
                picture.rectangle(box, outline="#d5d5d5")
        bar, at = Box(150, 60 + per_run * step, 180, 10), 60 + per_run * step
        picture.pixels(bar, colour_map(self.palette)[None])
        for place, value in ((bar.x, scale["lo"]), (bar.x + bar.width, scale["hi"])):
            picture.text(place, at + 14, number(value), size=10, anchor="ma")
        picture.text(bar.x - 10, at + 5, "logit" if maps.logits else "probability", size=10, anchor="rm")
        return picture


def _scale(maps: AttentionMaps) -> dict[str, Any]:
    """The scale of the codes: {lo, hi, log, below, above}; whether values beyond either end are there."""
    values = maps.maps.numpy()
    values = values[np.isfinite(values)]
    if not maps.logits:
        return {"lo": FLOOR, "hi": 1.0, "log": True, "below": bool((values < FLOOR).any()), "above": False}
    sample = values[:: max(1, len(values) // 1_000_000)]
    lo, hi = (float(found) for found in np.quantile(sample, LIMITS)) if len(sample) else (0.0, 1.0)
    hi = hi if hi > lo else lo + 1.0
    return {
        "lo": lo,
        "hi": hi,
        "log": False,
        "below": bool((values < lo).any()),
        "above": bool((values > hi).any()),
    }


def encode(values: Float[np.ndarray, "..."], scale: dict[str, Any]) -> UInt8[np.ndarray, "..."]:
    """Codes 1 … 255 from `lo` to `hi`, values beyond at the ends; 0 where there is no value (NaN)."""
    lo, hi = scale["lo"], scale["hi"]
    with np.errstate(invalid="ignore", divide="ignore"):
        at = np.log(np.maximum(values, lo) / lo) / np.log(hi / lo) if scale["log"] else (values - lo) / (hi - lo)
        codes = 1 + np.rint(254 * np.clip(at, 0, 1))
    return np.where(np.isnan(values), BLANK, np.nan_to_num(codes)).astype(np.uint8)


def _colours(palette: str) -> UInt8[np.ndarray, "256 3"]:
    """The colour of each code; blank cells are those of the paper, a little darker."""
    table = colour_map(palette)[np.clip(np.arange(-1, 255), 0, 254)].copy()
    table[BLANK] = (246, 246, 246)
    return table

"""`OutliersView`: the channel maxima of every layer as small multiples, to sort, and to open one by one.

What travels at once: max|X| and max|W| per channel of every group (float32) and which token holds each maximum. The
maps behind the heatmap of an opened layer are fetched from the kernel when it is opened; an exported page carries them
all, pooled further along tokens and outputs until they fit into `PAGE_MAP_BYTES`.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import traitlets

from sqviz.observe.magnitudes import GroupInfo, Magnitudes
from sqviz.plots.pool import max_pool, max_runs
from sqviz.widgets.heatmap import SCRIPTS, maps_of, pack
from sqviz.widgets.still import BLUE, DIM, FAINT, INK, ORANGE, Axis, Box, Still, number, rgb
from sqviz.widgets.view import View, float32_bytes

PAGE_MAP_BYTES = 8_000_000
OUTLIER_RATIO = 10.0
"""A channel whose maximum is above this many times the median channel's is drawn as an outlier; so in outliers.js."""


class OutliersView(View):
    """Channel maxima of all layers, side by side on one scale; see `Magnitudes.outliers`.

    Traits: `sort` ("layer", "absmax", "ratio" or "name") orders the tiles; `opened` is the name of the group shown
    large, "" for the overview.
    """

    _scripts = (*SCRIPTS, "outliers_detail.js", "outliers.js")
    _styles = ("base.css", "outliers.css")

    meta = traitlets.Dict().tag(sync=True)
    x_max = traitlets.Bytes().tag(sync=True)
    w_max = traitlets.Bytes().tag(sync=True)
    channel_token = traitlets.Bytes().tag(sync=True)
    tokens = traitlets.List(traitlets.Unicode()).tag(sync=True)
    details = traitlets.Dict().tag(sync=True)
    sort = traitlets.Enum(["layer", "absmax", "ratio", "name"], "layer").tag(sync=True)
    opened = traitlets.Unicode("").tag(sync=True)

    def __init__(self, magnitudes: Magnitudes, **state: Any) -> None:
        """From a capture; `state` sets traits. Most call `OutliersView.of`."""
        self.magnitudes = magnitudes
        inputs = [magnitudes.inputs[group.name] for group in magnitudes.groups]
        super().__init__(
            title=f"{magnitudes.model or 'Model'}: largest input of every channel, layer by layer",
            meta=_meta(magnitudes),
            x_max=b"".join(float32_bytes(stats.absmax) for stats in inputs),
            w_max=b"".join(float32_bytes(_weight_max(magnitudes, group)) for group in magnitudes.groups),
            channel_token=b"".join(np.asarray(stats.channel_token, "<i4").tobytes() for stats in inputs),
            tokens=list(magnitudes.token_texts),
            **state,
        )
        self.observe(self._send_details, names=["opened"])
        if self.opened:
            self._send_details()

    @classmethod
    def of(cls, magnitudes: Magnitudes, **state: Any) -> "OutliersView":
        """The overview of a capture. `state`: initial traits, such as `sort="ratio"`."""
        return cls(magnitudes, **state)

    def _send_details(self, _change: Any = None) -> None:
        """Give the page the maps of the opened group, in place of those of the one before."""
        self.details = {self.opened: self._details(self.opened)} if self.opened else {}

    def _details(self, name: str, pool: int = 1) -> dict[str, Any]:
        """The traits that show one group's maps; `pool` rows of them in one."""
        maps = maps_of(self.magnitudes, name)
        if pool > 1:
            x, w = (None if values is None else max_runs(values, pool) for values in (maps.x, maps.w))
            maps = dataclasses.replace(maps, x=x, w=w)
        packed = pack(maps)
        return {key: packed[key] for key in ("meta", "x_cells", "w_cells") if key in packed}

    def page_state(self) -> dict[str, Any]:
        """The traits, with the maps of all layers, pooled so that they fit into a page."""
        groups = [group for group in self.magnitudes.groups if len(self.magnitudes.inputs[group.name].map)]
        stats = [s for g in groups for s in (self.magnitudes.inputs[g.name], self.magnitudes.weights[g.name])]
        pool = math.ceil(sum(s.map.numel() for s in stats) / PAGE_MAP_BYTES)
        return super().page_state() | {"details": {group.name: self._details(group.name, pool) for group in groups}}

    def still(self) -> Still:
        """The overview in layer order: a row per block, a column per kind of input."""
        groups = self.magnitudes.groups
        kinds = list(dict.fromkeys(group.kind for group in groups))
        blocks = sorted({group.block for group in groups})
        fold = max(1, min(4, 8 // max(1, len(kinds)), math.ceil(len(blocks) / 4)))  # runs of blocks side by side
        per_run = math.ceil(len(blocks) / fold)
        width, height = 880, 78 + per_run * 46
        note = f"log scale, shared · orange: channels above {OUTLIER_RATIO:.0f} × their layer's median (line)"
        picture = Still(width, height, self.title, note)
        lo, hi = self.meta["scale"]
        axis = Axis(lo, hi, log=True)
        run_width = (width - 20) / fold
        tile = (run_width - 34) / len(kinds)
        for run in range(fold):
            for column, kind in enumerate(kinds):
                x = 12 + run * run_width + 26 + column * tile
                shown = kind if len(kind) < tile / 6 else kind.rpartition(".")[2]
                picture.text(x, 50, shown, size=9, colour=DIM)
        for group in groups:
            at = blocks.index(group.block)
            x = 12 + at // per_run * run_width
            y = 64 + at % per_run * 46
            picture.text(x + 20, y + 28, str(group.block), size=10, colour=DIM, anchor="rm")
            box = Box(x + 26 + kinds.index(group.kind) * tile, y + 12, tile - 8, 30)
            _draw_tile(picture, box, axis, np.asarray(self.magnitudes.inputs[group.name].absmax))
        return picture


def _draw_tile(picture: Still, box: Box, axis: Axis, absmax: np.ndarray) -> None:
    """Bars of channel maxima, max-pooled to pixels, the median as a line, and the largest in figures."""
    median = float(np.median(absmax))
    width, height = min(len(absmax), round(2 * box.width)), round(2 * box.height)
    peaks = max_pool(absmax[None], 1, width)[0]
    tall = np.array([axis.fraction(float(peak)) for peak in peaks]) * height  # [pixel]
    filled = np.arange(height, 0, -1)[:, None] <= tall  # [row pixel], row 0 on top
    outlying = (median > 0) & (peaks > OUTLIER_RATIO * median)
    raster = np.full((height, width, 3), 255, np.uint8)
    raster[filled] = rgb(BLUE)
    raster[filled & outlying] = rgb(ORANGE)
    raster[height - 1 - min(height - 1, int(axis.fraction(median) * height))] = rgb(INK)
    picture.pixels(box, raster)
    picture.line([(box.x, box.y + box.height), (box.x + box.width, box.y + box.height)], colour=FAINT)
    picture.text(box.x + box.width, box.y - 2, number(float(absmax.max())), size=9, anchor="rs")


def _weight_max(magnitudes: Magnitudes, group: GroupInfo) -> np.ndarray:
    """[channel] max |W| over the linears that read this input."""
    stats = [magnitudes.weights[name].channel_absmax for name in group.consumers]
    return np.asarray(torch.stack(stats).amax(0))


def _meta(magnitudes: Magnitudes) -> dict[str, Any]:
    """What outliers.js needs to know about each group, and the scale they share."""
    groups = [_group(magnitudes, group) for group in magnitudes.groups]
    maxima = np.concatenate([np.asarray(magnitudes.inputs[group.name].absmax) for group in magnitudes.groups])
    alive = maxima[maxima > 0]
    hi = float(alive.max()) if alive.size else 1.0
    lo = 10.0 ** math.floor(math.log10(min(float(np.quantile(alive, 0.02)) if alive.size else 1.0, hi / 10)))
    segments = "1 segment" if magnitudes.samples == 1 else f"{magnitudes.samples} segments"
    note = f"{len(magnitudes.tokens)} tokens in {segments} · {len(groups)} inputs · {len(maxima)} channels"
    return {"groups": groups, "scale": [lo, hi], "note": note, "length": magnitudes.length}


def _group(magnitudes: Magnitudes, group: GroupInfo) -> dict[str, Any]:
    stats = magnitudes.inputs[group.name]
    return {
        "name": group.name,
        "block": group.block,
        "kind": group.kind,
        "title": group.title or f"{group.block} · {group.kind}",
        "channels": len(stats.absmax),
        "ratio": stats.outlier_ratio,
        "fold": group.fold_kind,
        "reason": group.reason,
        "map": len(stats.map) > 0,
        "smooths": stats.expert_absmax is None,
        "top": [[top.value, top.channel, top.token, top.text, top.position] for top in stats.top],
    }

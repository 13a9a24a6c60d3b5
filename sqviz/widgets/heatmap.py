"""`HeatmapView`: |X| of one linear, token × channel, and its |W|, as a heatmap to zoom into; smoothed by α in the page.

What travels: uint8 log codes of the two maps and two float32 vectors of channel maxima. The page derives
s_j = max|X_j|^α / max|W_j|^(1−α) (thesis equation 3.4) and shifts each channel's codes, so the slider needs no kernel.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
import traitlets
from jaxtyping import Float

from sqviz.observe.magnitudes import Magnitudes
from sqviz.plots.pool import max_pool
from sqviz.quant.smooth import smoothing_scale
from sqviz.widgets.still import Axis, Box, Still, colour_map
from sqviz.widgets.view import View, code_range, decode_log, encode_log, float32_bytes

SCRIPTS = ("draw.js", "smoothing_formula.js", "cells.js", "heatmap_panel.js")


@dataclasses.dataclass(frozen=True, eq=False)
class Maps:
    """What the pictures of one linear are drawn from.

    Attributes:
        name: the linear.
        x: [bin channel] |X| of the first segment, max-pooled along tokens; None if no map was captured.
        w: [bin channel] |W|, max-pooled along output features; None likewise.
        x_max: [channel] max |X| over the whole calibration.
        w_max: [channel] max |W| over all linears that read the same input: what s is computed from.
        tokens: texts of the first segment.
        x_total, w_total: tokens, or output features, in all.
        one_scale: whether one s holds for every token. Not so for the inner input of fused experts: an s each.
    """

    name: str
    x: Float[np.ndarray, "bin channel"] | None
    w: Float[np.ndarray, "bin channel"] | None
    x_max: Float[np.ndarray, " channel"]
    w_max: Float[np.ndarray, " channel"]
    tokens: tuple[str, ...]
    x_total: int
    w_total: int
    one_scale: bool = True

    @property
    def x_units(self) -> int:
        """Tokens in one bin of `x`."""
        return math.ceil(self.x_total / len(self.x)) if self.x is not None else 1

    @property
    def w_units(self) -> int:
        """Output features in one bin of `w`."""
        return math.ceil(self.w_total / len(self.w)) if self.w is not None else 1

    def scale(self, alpha: float) -> Float[np.ndarray, " channel"]:
        """s [channel] at migration strength α."""
        return smoothing_scale(torch.from_numpy(self.x_max), torch.from_numpy(self.w_max), alpha).numpy()

    def operand(self, which: str, alpha: float | None = None) -> Float[np.ndarray, "bin channel"]:
        """|X| ("x") or |W| ("w"); with an α, smoothed: |X|/s or s·|W|."""
        values = self.x if which == "x" else self.w
        if values is None:
            raise ValueError(f"there is no map of {self.name} for operand {which!r}")
        if alpha is None or not self.one_scale:
            return values
        s = self.scale(alpha)
        return values / s if which == "x" else values * s


def _map(values: Any, peak: float) -> Float[np.ndarray, "bin channel"] | None:
    """A captured map as float32; what float16 could not hold (above 65504) is set to the peak."""
    if values is None or 0 in values.shape:
        return None
    return np.nan_to_num(np.asarray(values, dtype=np.float32), posinf=peak)


def maps_of(magnitudes: Magnitudes, layer: str | int) -> Maps:
    """Collect one linear's maps and maxima from a capture.

    Raises:
        NoSuchLayer: `layer` fits no linear of the capture.
    """
    group = magnitudes.group(layer)
    name = layer if isinstance(layer, str) and layer in magnitudes.weights else group.name
    stats, weights = magnitudes.inputs[name], magnitudes.weights[name]
    consumers = [magnitudes.weights[consumer].channel_absmax for consumer in group.consumers]
    return Maps(
        name=name,
        x=_map(stats.map, float(stats.absmax.max())),
        w=_map(weights.map, float(weights.channel_absmax.max())),
        x_max=np.asarray(stats.absmax, dtype=np.float32),
        w_max=np.asarray(torch.stack(consumers).amax(0), dtype=np.float32),
        tokens=tuple(magnitudes.token_texts),
        x_total=min(magnitudes.length, len(magnitudes.tokens)),
        w_total=len(weights.out_absmax),
        one_scale=stats.expert_absmax is None,
    )


class HeatmapView(View):
    """|X| over token × channel, |W| over output × channel; see `Magnitudes.heatmap`.

    The traits `operand` ("x" or "w"), `smoothed`, `alpha`, `log_colours`, `clip` and `palette` ("viridis" or "cividis")
    are the state of the controls: set them from Python and the picture follows; it works the other way round as well.
    """

    _scripts = (*SCRIPTS, "heatmap.js")

    meta = traitlets.Dict().tag(sync=True)
    x_cells = traitlets.Bytes().tag(sync=True)
    w_cells = traitlets.Bytes().tag(sync=True)
    x_max = traitlets.Bytes().tag(sync=True)
    w_max = traitlets.Bytes().tag(sync=True)
    tokens = traitlets.List(traitlets.Unicode()).tag(sync=True)
    operand = traitlets.Enum(["x", "w"], "x").tag(sync=True)
    smoothed = traitlets.Bool(False).tag(sync=True)
    alpha = traitlets.Float(0.5, min=0.0, max=1.0).tag(sync=True)
    log_colours = traitlets.Bool(True).tag(sync=True)
    clip = traitlets.Bool(False).tag(sync=True)
    palette = traitlets.Enum(["viridis", "cividis"], "viridis").tag(sync=True)

    def __init__(self, maps: Maps, *, model: str = "", **state: Any) -> None:
        """From `maps`; `state` sets traits. Most call `HeatmapView.of`."""
        if maps.x is None and maps.w is None:
            raise ValueError(f"there is no map of {maps.name}: capture with map_tokens > 0")
        self.maps = maps
        super().__init__(title=f"{maps.name}: input and weight magnitudes", **pack(maps, model), **state)

    @classmethod
    def of(cls, magnitudes: Magnitudes, name: str | int, **state: Any) -> "HeatmapView":
        """The heatmap of one linear of a capture.

        Args:
            magnitudes: the capture.
            name: the linear, or as in `Magnitudes.heatmap`.
            state: initial values of the controls, such as `smoothed=True, alpha=0.8`.

        Raises:
            NoSuchLayer: nothing was captured under that name.
        """
        return cls(maps_of(magnitudes, name), model=magnitudes.model, **state)

    def still(self) -> Still:
        """The whole map in the present state of the controls."""
        which = self.operand
        if getattr(self.maps, which) is None:  # as the page does: show the one there is
            which = "w" if which == "x" else "x"
        values = self.maps.operand(which, self.alpha if self.smoothed else None)
        sign = {"x": "|X|", "w": "|W|"}[which]
        label = {"x": "|X| / s", "w": "s · |W|"}[which] if self.smoothed else sign
        note = f"{label}{f' at α = {self.alpha:.2f}' if self.smoothed else ''} · {self.meta['note']}"
        picture = Still(820, 420, self.title, note)
        lo, hi = self._limits(which, float(values.max()))
        axis = Axis(lo if self.log_colours else 0.0, hi, label, self.log_colours)
        box = Box(70, 60, 640, 300)
        picture.pixels(box, paint(max_pool(values, int(box.height), int(box.width)), axis, self.palette))
        total, rows = (self.maps.x_total, "token") if which == "x" else (self.maps.w_total, "output feature")
        picture.axes(box, Axis(0, values.shape[1], "input channel"), Axis(0, total, rows), flip=True, grid=False)
        picture.colour_bar(Box(740, 76, 14, 270), axis, self.palette)
        return picture

    def _limits(self, which: str, peak: float) -> tuple[float, float]:
        """The colour scale, as heatmap_panel.js sets it: that of the plain values, widened to the peak shown."""
        codes = np.frombuffer(getattr(self, f"{which}_cells"), np.uint8)
        counts = np.bincount(codes, minlength=256)[1:].cumsum()
        at = [1 + int(np.searchsorted(counts, max(1.0, share * counts[-1]))) for share in (0.01, 0.999, 1.0)]
        low, high, most = decode_log(np.minimum(at, 255), *self.meta[which]["range"])
        full = max(most, peak) if self.smoothed else most
        limit = float(high if self.clip else full)
        return min(float(low), limit / 10), limit


def pack(maps: Maps, model: str = "") -> dict[str, Any]:
    """The traits that carry `maps` to heatmap.js."""
    packed: dict[str, Any] = {"x_max": float32_bytes(maps.x_max), "w_max": float32_bytes(maps.w_max)}
    packed["tokens"] = list(maps.tokens)
    parts = []
    meta: dict[str, Any] = {
        "name": maps.name,
        "model": model,
        "columns": len(maps.x_max),
        "smooths": maps.one_scale,
        "x": None,
        "w": None,
    }
    for key, values, units, total in (
        ("x", maps.x, maps.x_units, maps.x_total),
        ("w", maps.w, maps.w_units, maps.w_total),
    ):
        if values is None:
            continue
        span = code_range(values)
        meta[key] = {"rows": len(values), "range": list(span), "units": units, "total": total}
        packed[f"{key}_cells"] = encode_log(values, *span).tobytes()
        parts.append(f"{total} {'tokens' if key == 'x' else 'outputs'}" + (f" pooled by {units}" if units > 1 else ""))
    name = f"{model} · " if model else ""
    meta["note"] = f"{name}{len(maps.x_max)} input channels · {' · '.join(parts)}; maxima, so no outlier is lost"
    return packed | {"meta": meta}


def paint(values: Float[np.ndarray, "row column"], axis: Axis, palette: str = "viridis") -> np.ndarray:
    """Colours uint8 [row column 3] of magnitudes on a colour axis; what lies outside takes the colour of the end."""
    with np.errstate(divide="ignore"):
        if axis.log:
            at = (np.log10(values) - math.log10(axis.lo)) / ((math.log10(axis.hi) - math.log10(axis.lo)) or 1.0)
        else:
            at = (values - axis.lo) / ((axis.hi - axis.lo) or 1.0)
    return colour_map(palette)[np.clip(np.nan_to_num(at, neginf=0.0) * 255, 0, 255).round().astype(np.uint8)]

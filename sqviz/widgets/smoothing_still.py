"""The smoothing explorer as a still picture, for where no widget runs: |X/s|, channel maxima, and the error curve."""

import math

import numpy as np
import torch
from jaxtyping import Float

from sqviz.quant.error import ALPHAS
from sqviz.quant.granularity import PerChannel, PerGroup, PerToken
from sqviz.quant.quantize import levels
from sqviz.quant.schemes import Scheme
from sqviz.quant.smooth import smoothing_scale
from sqviz.widgets.smoothing_pack import unpack
from sqviz.widgets.still import BLUE, DIM, GREEN, INK, ORANGE, PAPER, Axis, Box, Still, colour_map, number
from sqviz.widgets.view import decode_log

WIDTH, HEIGHT = 860, 430
COLUMNS = 600
PALE_BLUE, PALE_ORANGE = "#a6cde4", "#f0c8ad"
BLANK = np.array([238, 238, 238], np.uint8)
MAP, LINES, CURVE = Box(66, 62, 440, 170), Box(66, 290, 440, 92), Box(584, 62, 250, 320)


def draw_still(
    picture: bytes, linear: str, alpha: float, scheme: Scheme, sweep: Float[np.ndarray, " column"], title: str
) -> Still:
    """The view at this α.

    Args:
        picture: the pack of the linear's group.
        linear: which of the group's consumers.
        alpha: migration strength.
        scheme: how both are quantised.
        sweep: errors at ALPHAS and, last, without smoothing; NaN where unknown.
        title: the first line.
    """
    header, arrays = unpack(picture)[0]
    s = smoothing_scale(torch.tensor(arrays["s_x"]), torch.tensor(arrays["s_w"]), alpha).numpy()
    place = [consumer["name"] for consumer in header["consumers"]].index(linear)
    still = Still(WIDTH, HEIGHT, title, f"{linear} · {scheme.describe()} · α = {alpha:.2f}")
    _map(still, header, arrays["x_map"], s, scheme)
    _lines(still, arrays["x_absmax"], arrays[f"w_absmax_{place}"], s)
    _curve(still, sweep, alpha)
    return still


def _pool(values: Float[np.ndarray, "*rows channel"], columns: int) -> Float[np.ndarray, "*rows column"]:
    """The largest of each run of channels, so that no outlier is lost."""
    channels = values.shape[-1]
    if channels <= columns:
        return values
    edges = np.floor(np.arange(columns) * channels / columns).astype(int)
    return np.maximum.reduceat(values, edges, axis=-1)


def _largest(x: Float[np.ndarray, "row channel"], scheme: Scheme) -> Float[np.ndarray, "row_or_1 channel_or_1"]:
    """For each value, the largest of those that share its quantisation step."""
    if isinstance(scheme.activation, PerToken):
        return x.max(1, keepdims=True)
    if isinstance(scheme.activation, PerChannel):
        return x.max(0, keepdims=True)
    if isinstance(scheme.activation, PerGroup):
        starts = np.arange(0, x.shape[1], scheme.activation.size)
        return np.maximum.reduceat(x, starts, axis=1).repeat(scheme.activation.size, axis=1)[:, : x.shape[1]]
    return x.max(keepdims=True)


def _map(still: Still, header: dict, codes: np.ndarray, s: np.ndarray, scheme: Scheme) -> None:
    """|X/s|, coloured as in the page: by the integer that a cell becomes, blank where that is 0."""
    still.text(MAP.x, MAP.y - 16, "|X/s|; colour: the integer it becomes, blank: 0", colour=DIM)
    channels, rows = header["channels"], header["rows"]
    if rows:
        x = decode_log(codes.reshape(rows, channels), *header["range"]) / s
        span = math.log10(2 * levels(scheme.bits)[1]) if scheme.activation else 3.0
        with np.errstate(divide="ignore", invalid="ignore"):
            level = 1 + np.log10(x / _largest(x, scheme)) / span
        level = _pool(np.nan_to_num(level, nan=-1.0, neginf=-1.0), COLUMNS)
        colours = colour_map()[np.clip(level * 255, 0, 255).astype(np.uint8)]
        still.pixels(MAP, np.where(level[..., None] < 0, BLANK, colours) if scheme.activation else colours)
    tokens = max(1, rows * header["tokens_per_row"])
    still.axes(MAP, Axis(0, channels, "input channel"), Axis(0, tokens, "token"), flip=True, grid=False)


def _lines(still: Still, x: np.ndarray, w: np.ndarray, s: np.ndarray) -> None:
    """Channel maxima before (pale) and after."""
    traces = [(x, PALE_BLUE, ""), (w, PALE_ORANGE, ""), (x / s, BLUE, "max|X/s|"), (w * s, ORANGE, "max|s·W|")]
    shown = np.concatenate([values for values, _, _ in traces])
    positive = shown[shown > 0]
    lo, hi = (float(np.quantile(positive, 0.005)), float(positive.max())) if positive.size else (0.1, 1.0)
    at_x, at_y = still.axes(LINES, Axis(0, len(x)), Axis(lo / 1.3, hi * 1.6, "largest", log=True))
    left = LINES.x
    for values, colour, label in traces:
        pooled = _pool(values, int(LINES.width))
        step = len(x) / len(pooled)
        still.line([(at_x((k + 0.5) * step), at_y(value)) for k, value in enumerate(pooled)], colour=colour, width=0.7)
        still.text(left, LINES.y - 18, label, colour=colour)
        left += 70 if label else 0
    still.text(left, LINES.y - 18, "pale: before smoothing", colour=DIM)


def _curve(still: Still, sweep: np.ndarray, alpha: float) -> None:
    still.text(CURVE.x, CURVE.y - 16, "output error against α", colour=DIM)
    errors = {a: 100 * e for a, e in zip(ALPHAS, sweep, strict=False) if math.isfinite(e) and e > 0}
    bare = 100 * float(sweep[-1])
    if not errors:
        still.rectangle(CURVE, outline=DIM)
        still.text(CURVE.x + CURVE.width / 2, CURVE.y + CURVE.height / 2, "not swept yet", colour=DIM, anchor="mm")
        return
    every = [*errors.values(), *([bare] if bare > 0 else [])]
    axis = Axis(min(every) / 1.3, max(every) * 1.3, "error, %", log=True)
    at_x, at_y = still.axes(CURVE, Axis(0, 1, "α"), axis)
    best = min(errors.values())
    inside = [a for a, e in errors.items() if e <= 1.1 * best]
    still.rectangle(
        Box(at_x(inside[0]), CURVE.y, max(2.0, at_x(inside[-1]) - at_x(inside[0])), CURVE.height), fill="#dff1ea"
    )
    if bare > 0:
        still.line([(CURVE.x, at_y(bare)), (CURVE.x + CURVE.width, at_y(bare))], colour=DIM, width=0.6)
        still.text(CURVE.x + CURVE.width - 2, at_y(bare) + 3, "unsmoothed", size=10, colour=DIM, anchor="ra")
    still.line([(at_x(a), at_y(e)) for a, e in errors.items()], colour=BLUE, width=1.6)
    still.line([(at_x(alpha), CURVE.y), (at_x(alpha), CURVE.y + CURVE.height)], colour=INK, width=1)
    now = math.exp(np.interp(alpha, list(errors), np.log(list(errors.values()))))
    still.rectangle(Box(at_x(alpha) - 3, at_y(now) - 3, 6, 6), fill=GREEN, outline=PAPER)
    still.text(CURVE.x + 8, CURVE.y + 4, f"α = {alpha:.2f}: {number(now)} %", colour=INK)

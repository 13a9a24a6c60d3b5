"""The smoothing explorer as a still picture, for where no widget runs: |X/s|, channel maxima, and the error curve."""

import math

import numpy as np
import torch
from jaxtyping import Float

from sqviz.quant.error import ALPHAS
from sqviz.quant.smooth import smoothing_scale
from sqviz.widgets.smoothing_pack import unpack
from sqviz.widgets.still import BLUE, DIM, GREEN, INK, ORANGE, PAPER, Axis, Box, Still, colour_map, number
from sqviz.widgets.view import decode_log

WIDTH, HEIGHT = 860, 430
COLUMNS = 600
DECADES = 3.0
MAP, LINES, CURVE = Box(66, 62, 440, 170), Box(66, 268, 440, 106), Box(584, 62, 250, 312)


def draw_still(
    picture: bytes, linear: str, alpha: float, sweep: Float[np.ndarray, " column"], title: str, subtitle: str
) -> Still:
    """The view at this α.

    Args:
        picture: the pack of the linear's group.
        linear: which of the group's consumers.
        alpha: migration strength.
        sweep: errors at ALPHAS and, last, without smoothing; NaN where unknown.
        title: first line; `subtitle` the second.
    """
    header, arrays = unpack(picture)[0]
    s = smoothing_scale(torch.tensor(arrays["s_x"]), torch.tensor(arrays["s_w"]), alpha).numpy()
    place = [consumer["name"] for consumer in header["consumers"]].index(linear)
    still = Still(WIDTH, HEIGHT, title, subtitle)
    _map(still, header, arrays["x_map"], s)
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


def _map(still: Still, header: dict, codes: np.ndarray, s: np.ndarray) -> None:
    still.text(MAP.x, MAP.y - 16, "|X/s|, colour over three decades from the largest", colour=DIM)
    channels, rows = header["channels"], header["rows"]
    if rows:
        values = _pool(decode_log(codes.reshape(rows, channels), *header["range"]) / s, COLUMNS)
        with np.errstate(divide="ignore"):
            level = 1 + np.log10(values / max(values.max(), 1e-30)) / DECADES
        still.pixels(MAP, colour_map()[np.clip(np.nan_to_num(level, neginf=0) * 255, 0, 255).astype(np.uint8)])
    tokens = max(1, rows * header["tokens_per_row"])
    still.axes(MAP, Axis(0, channels, "input channel"), Axis(0, tokens, "token"), flip=True, grid=False)


def _lines(still: Still, x: np.ndarray, w: np.ndarray, s: np.ndarray) -> None:
    after = [(x / s, BLUE, "max|X/s|"), (w * s, ORANGE, "max|s·W|")]
    shown = np.concatenate([x, w, after[0][0], after[1][0]])
    positive = shown[shown > 0]
    lo, hi = (float(np.quantile(positive, 0.005)), float(positive.max())) if positive.size else (0.1, 1.0)
    at_x, at_y = still.axes(LINES, Axis(0, len(x)), Axis(lo / 1.3, hi * 1.6, "largest", log=True))
    for values, colour, label in after:
        pooled = _pool(values, int(LINES.width))
        step = len(x) / len(pooled)
        still.line([(at_x((k + 0.5) * step), at_y(value)) for k, value in enumerate(pooled)], colour=colour, width=0.7)
        left = LINES.x + LINES.width - (130 if colour == BLUE else 60)
        still.text(left, LINES.y - 15, label, colour=colour)


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

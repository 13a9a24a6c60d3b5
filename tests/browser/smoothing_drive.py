"""What the browser tests of the smoothing explorer do with it, and what Python says it must then show."""

import json
import math
import time
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Locator, Page

from sqviz.quant.error import ALPHAS
from sqviz.quant.smooth import smoothing_scale
from sqviz.widgets.smoothing_pack import unpack
from sqviz.widgets.still import colour_map

LINEAR = "model.layers.1.mlp.gate_proj"
WAIT_MS = 60_000


def frame(page: Page) -> None:
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")


def canvases(page: Page) -> dict[str, Locator]:
    """x, maxima, w: the channel side; error, strip: the α side."""
    channels, curves = page.locator(".sm-channels canvas:not(.sm-legend canvas)"), page.locator(".sm-curves canvas")
    named = {name: channels.nth(place) for place, name in enumerate(("x", "maxima", "w"))}
    return named | {"error": curves.nth(0), "strip": curves.nth(1)}


def pixels(canvas: Locator) -> np.ndarray:
    """[row, column, RGBA] of a canvas."""
    read = """(canvas) => { const { width, height } = canvas;
        return [width, height, [...canvas.getContext('2d').getImageData(0, 0, width, height).data]]; }"""
    width, height, data = canvas.evaluate(read)
    return np.array(data, dtype=np.uint8).reshape(height, width, 4)


def error_shown(page: Page) -> str:
    return page.locator(".sm-reading .sm-big").nth(1).inner_text()


def press(page: Page, *keys: str) -> None:
    page.locator(".sm-range").focus()
    for key in keys:
        page.keyboard.press(key)
    frame(page)


def wait_for_hand(lab: Any, view: str, alpha: float) -> None:
    """Wait until the kernel's `view` stands at this α, at rest.

    The page holds a move back until the kernel has taken the one before it, and shows errors that arrived ahead of the
    hand; so an "exact" on the page does not mean that the kernel has heard of its last move.
    """
    wanted, until = [alpha, False], time.monotonic() + WAIT_MS / 1000
    while (heard := json.loads(lab.run(f"import json\nprint(json.dumps([{view}.alpha, {view}.moving]))"))) != wanted:
        assert time.monotonic() < until, f"the kernel heard {heard}, not {wanted}"
        lab.page.wait_for_timeout(50)


def drag_to(page: Page, node: Locator, part: float, left: float, right: float, steps: int = 6) -> None:
    """Drag on a slider or plot, whose α axis begins and ends at these distances from its edges, to α = `part`."""
    box = node.bounding_box()
    assert box
    x = lambda alpha: box["x"] + left + alpha * (box["width"] - left - right)  # noqa: E731
    y = box["y"] + box["height"] / 2
    now = float(page.locator(".sm-range").input_value())
    page.mouse.move(x(now), y)
    page.mouse.down()
    page.mouse.move(x(part), y, steps=steps)
    page.mouse.up()
    frame(page)


def expected_cells(pack: bytes, alpha: float) -> np.ndarray:
    """The colours [row column 3] of the |X/s| map under naive W8A8, from the definition."""
    header, arrays = unpack(pack)[0]
    lo, hi = header["range"]
    unit = 254 / (hi - lo)
    s = smoothing_scale(torch.tensor(arrays["s_x"]), torch.tensor(arrays["s_w"]), alpha).numpy()
    codes = arrays["x_map"].reshape(header["rows"], header["channels"]).astype(int)
    cells = np.where(codes > 0, codes + np.rint(-np.log10(s) * unit), -np.inf)
    span = math.log10(254) * unit
    level = np.clip(np.floor((cells - (cells.max() - span)) * 255 / span + 0.5), -1, 255)
    blank = np.array([[238, 238, 238]])
    return np.where(level[..., None] < 0, blank, colour_map()[np.maximum(level, 0).astype(int)])


def shown_cells(image: np.ndarray, rows: int, channels: int) -> np.ndarray:
    """The colour in the middle of each cell of the map; see CHANNEL_SIDE in smoothing_maps.js for the margins."""
    top, left, width, height = 4, 52, image.shape[1] - 64, image.shape[0] - 8
    y = (top + (np.arange(rows) + 0.5) * height / rows).astype(int)
    x = (left + (np.arange(channels) + 0.5) * width / channels).astype(int)
    return image[np.ix_(y, x)][..., :3]


def assert_map(page: Page, pack: bytes, alpha: float) -> None:
    header, _ = unpack(pack)[0]
    shown = shown_cells(pixels(canvases(page)["x"]), header["rows"], header["channels"]).astype(int)
    wanted = expected_cells(pack, alpha)
    # A code that lies on the edge of two colours, or of blank, may fall to either side.
    near = np.abs(shown - wanted).max(-1) <= 6
    assert near.mean() > 0.99


def accent(page: Page) -> list[int]:
    """The colour that the error curve is drawn in."""
    read = """() => { const context = document.createElement('canvas').getContext('2d');
        context.fillStyle = getComputedStyle(document.querySelector('.sm')).getPropertyValue('--sq-accent').trim();
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3); }"""
    return page.evaluate(read)


def curve_height(image: np.ndarray, alpha: float, colour: list[int]) -> float:
    """Where the error curve crosses this α, in pixels from the top."""
    x = round(52 + alpha * (image.shape[1] - 66))
    distance = np.abs(image[:, x, :3].astype(int) - colour).sum(-1)
    rows = np.flatnonzero(distance < 60)
    assert rows.size
    return float(rows.mean())


def assert_curve(page: Page, row: np.ndarray) -> None:
    """The curve's heights differ by the logarithms of Python's errors."""
    image, colour = pixels(canvases(page)["error"]), accent(page)
    errors = row[: len(ALPHAS)].astype(float)
    every = row[np.isfinite(row)].astype(float)
    lo, hi = every.min(), every.max()
    middle = math.sqrt(lo * hi)
    span = math.log10(max(hi * 1.25, middle * math.sqrt(10)) / min(lo / 1.25, middle / math.sqrt(10)))
    height = image.shape[0] - 34
    for k in (4, 8, 16):
        wanted = (math.log10(errors[12]) - math.log10(errors[k])) / span * height
        got = curve_height(image, ALPHAS[k], colour) - curve_height(image, ALPHAS[12], colour)
        assert got == pytest.approx(wanted, abs=2.5)

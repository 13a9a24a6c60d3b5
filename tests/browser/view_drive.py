"""What the browser tests of the views do with a canvas, and what Python says it holds."""

import base64
import io

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page

from sqviz.widgets.heatmap import HeatmapView
from sqviz.widgets.view import decode_log


def settle(page: Page) -> None:
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")


def pixels(canvas: Locator) -> np.ndarray:
    """[row column RGB] of a canvas."""
    url = canvas.evaluate("canvas => canvas.toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def tip(page: Page) -> str:
    return page.locator(".sqviz-tip:visible").inner_text()


def hover_cell(page: Page, canvas: Locator, row: float, column: float) -> str:
    """Hover over the middle of a cell and return what the tooltip says."""
    canvas.scroll_into_view_if_needed()
    frame, plot, view = canvas.bounding_box(), canvas.evaluate("c => c.plot"), canvas.evaluate("c => c.view()")
    assert frame
    x = frame["x"] + plot["x"] + (column + 0.5 - view["c0"]) / (view["c1"] - view["c0"]) * plot["width"]
    y = frame["y"] + plot["y"] + (row + 0.5 - view["r0"]) / (view["r1"] - view["r0"]) * plot["height"]
    page.mouse.move(x, y)
    settle(page)
    return tip(page)


def decoded(view: HeatmapView, which: str = "x") -> np.ndarray:
    meta = view.meta[which]
    codes = np.frombuffer(getattr(view, f"{which}_cells"), np.uint8).reshape(meta["rows"], -1)
    return decode_log(codes, *meta["range"])

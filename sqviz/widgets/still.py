"""`Still`: a small drawing surface for the pictures that stand in for a widget where none can run. No browser.

Coordinates are in points of the finished picture, origin top left. What is drawn is recorded (still_marks.py), then
written as a PNG of twice that resolution (still_png.py) or as an SVG (still_svg.py). A plot area is a `Box`; `axes`
frames it and returns the functions that map data to points.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache

import numpy as np
from jaxtyping import UInt8

from sqviz.widgets.still_marks import SCALE, Anchor, Box, Line, Mark, Pixels, Polygon, Rectangle, Text, TextUpwards
from sqviz.widgets.still_svg import svg

INK, DIM, FAINT, PAPER = "#1b1b1b", "#5a5a5a", "#d5d5d5", "#ffffff"
# Okabe and Ito's colours, told apart by the colour-blind.
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"

# Ten anchors of each map, as in plotly.colors.sequential and in draw.js; interpolated to 256.
MAPS = {
    "viridis": "440154 482878 3e4989 31688e 26828e 1f9e89 35b779 6ece58 b5de2b fde725",
    "cividis": "00224e 123570 3b496c 575d6d 707173 8a8678 a59c74 c3b369 e1cc55 fee838",
}


def have_pillow() -> bool:
    """Whether stills can be written as PNG here."""
    return importlib.util.find_spec("PIL") is not None


@cache
def colour_map(name: str = "viridis") -> UInt8[np.ndarray, "256 3"]:
    """256 colours from dark (small) to light (large)."""
    anchors = np.array([[int(code[i : i + 2], 16) for i in (0, 2, 4)] for code in MAPS[name].split()], dtype=float)
    at = np.linspace(0, len(anchors) - 1, 256)
    colours = [np.interp(at, np.arange(len(anchors)), anchors[:, i]) for i in range(3)]
    return np.stack(colours, 1).round().astype(np.uint8)


def rgb(colour: str) -> tuple[int, int, int]:
    """A colour such as "#0072b2" as three numbers."""
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis: its range, what it shows with its unit, and whether it is logarithmic."""

    lo: float
    hi: float
    label: str = ""
    log: bool = False

    def fraction(self, value: float) -> float:
        """Where a value lies, 0 at `lo` and 1 at `hi`, kept inside."""
        if self.log:
            lo, hi = math.log10(self.lo), math.log10(self.hi)
            at = (math.log10(max(value, self.lo)) - lo) / ((hi - lo) or 1.0)
        else:
            at = (value - self.lo) / ((self.hi - self.lo) or 1.0)
        return min(max(at, 0.0), 1.0)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the range: powers of ten on a log axis, else steps of 1, 2 or 5."""
        if self.log:
            first, last = math.ceil(math.log10(self.lo) - 1e-9), math.floor(math.log10(self.hi) + 1e-9)
            if last - first >= 2:
                return [10.0**e for e in range(first, last + 1, max(1, math.ceil((last - first) / count)))]
            steps = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
            inside = [step for step in steps if self.lo * (1 - 1e-9) <= step <= self.hi * (1 + 1e-9)]
            if len(inside) > max(count, 2) and last > first:
                return [10.0**first, 10.0**last]
            if len(inside) > 2:
                return inside
        span = (self.hi - self.lo) or 1.0
        rough = span / max(count, 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.lo / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.hi / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Three significant digits, with powers of ten where the number would be long. The twin of draw.js `number`."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e5 or size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    digits = max(0, 2 - math.floor(math.log10(size)))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


class Still:
    """A picture under construction, `width` × `height` points; `marks` is what has been drawn so far."""

    def __init__(self, width: int, height: int, title: str = "", subtitle: str = "") -> None:
        self.width, self.height, self.title = width, height, title
        self.marks: list[Mark] = []
        self.rectangle(Box(0, 0, width, height), fill=PAPER)
        self.text(12, 8, title, size=14)
        self.text(12, 28, subtitle, size=11, colour=DIM)

    def text(
        self, x: float, y: float, text: str, *, size: float = 11, colour: str = INK, anchor: Anchor = "la"
    ) -> None:
        """Text at a point; `anchor` as in Pillow: l, m, r then a (top), m, s (baseline)."""
        if text:
            self.marks.append(Text(x, y, text, size, colour, anchor))

    def text_upwards(self, x: float, y: float, text: str, *, size: float = 11, colour: str = DIM) -> None:
        """Text running upwards, centred on a point: the label of a vertical axis."""
        if text:
            self.marks.append(TextUpwards(x, y, text, size, colour))

    def line(self, points: Iterable[tuple[float, float]], *, colour: str = INK, width: float = 1.0) -> None:
        """A broken line through points."""
        self.marks.append(Line(tuple(points), colour, width))

    def rectangle(self, box: Box, *, fill: str | None = None, outline: str | None = None) -> None:
        """A rectangle, filled or outlined."""
        self.marks.append(Rectangle(box, fill, outline))

    def polygon(self, points: Sequence[tuple[float, float]], *, fill: str, outline: str | None = None) -> None:
        """A filled polygon."""
        self.marks.append(Polygon(tuple(points), fill, outline))

    def pixels(self, box: Box, colours: UInt8[np.ndarray, "row column 3"]) -> None:
        """A raster of colours stretched over a box, row 0 on top. Cells keep hard edges."""
        x, y = round(box.x * SCALE) / SCALE, round(box.y * SCALE) / SCALE
        width, height = (max(1, round(side * SCALE)) / SCALE for side in (box.width, box.height))
        self.marks.append(Pixels(Box(x, y, width, height), np.array(colours)))

    def axes(
        self, box: Box, x: Axis, y: Axis, *, flip: bool = False, grid: bool = True
    ) -> tuple[Callable[[float], float], Callable[[float], float]]:
        """Frame a box with two axes; returns the maps from data to points. `flip`: y grows downwards (token order)."""
        at_x = lambda value: box.x + box.width * x.fraction(value)  # noqa: E731
        at_y = lambda value: box.y + box.height * (y.fraction(value) if flip else 1 - y.fraction(value))  # noqa: E731
        bottom = box.y + box.height
        for tick in x.ticks():
            self.line([(at_x(tick), bottom), (at_x(tick), bottom + 4)], colour=DIM)
            self.text(at_x(tick), bottom + 6, number(tick), size=10, colour=DIM, anchor="ma")
        for tick in y.ticks(4):
            if grid:
                self.line([(box.x, at_y(tick)), (box.x + box.width, at_y(tick))], colour=FAINT, width=0.5)
            self.text(box.x - 5, at_y(tick), number(tick), size=10, colour=DIM, anchor="rm")
        self.line([(box.x, box.y), (box.x, bottom), (box.x + box.width, bottom)], colour=DIM)
        self.text(box.x + box.width / 2, bottom + 20, x.label, size=11, colour=DIM, anchor="ma")
        if y.label:
            self.text_upwards(box.x - 44, box.y + box.height / 2, y.label)
        return at_x, at_y

    def colour_bar(self, box: Box, axis: Axis, name: str = "viridis") -> None:
        """An upright bar of the colour map with its ticks on the right and its label above."""
        self.pixels(box, colour_map(name)[::-1][:, None, :])
        for tick in axis.ticks(5):
            y = box.y + box.height * (1 - axis.fraction(tick))
            self.text(box.x + box.width + 4, y, number(tick), size=10, colour=DIM, anchor="lm")
        self.text(box.x + box.width, box.y - 16, axis.label, size=10, colour=DIM, anchor="ma")

    def png(self) -> bytes:
        """The picture as a PNG, two pixels per point.

        Raises:
            ImportError: without Pillow, saying how to get it.
        """
        if not have_pillow():
            raise ImportError(
                "drawing a PNG needs Pillow: `pip install pillow`; to_html() and to_svg() work without it"
            )
        from sqviz.widgets.still_png import png

        return png(self.width, self.height, self.marks)

    def svg(self) -> str:
        """The picture as a self-contained SVG, one unit per point."""
        return svg(self.width, self.height, self.marks, self.title)

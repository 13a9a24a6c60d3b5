"""A `Still` as a self-contained SVG: text as text, rasters as pictures inside the file. Needs no Pillow."""

import base64
import math
import re
from collections.abc import Iterable
from xml.etree import ElementTree

from sqviz.widgets.png_bytes import png_bytes
from sqviz.widgets.still_marks import SCALE, Line, Mark, Pixels, Polygon, Rectangle, Text, TextUpwards

FONT = "DejaVu Sans, sans-serif"
# How far below the anchor the baseline is, in sizes of the font; written out because not every program that reads SVG
# knows `dominant-baseline`. Of DejaVu Sans, the font of the PNG: ascender 0.928, descender 0.236. Text upwards
# is centred on its ink, in which there may or may not be a descender: UPWARDS lies between.
BASELINE = {"a": 0.928, "m": 0.346, "s": 0.0}
UPWARDS = 0.31
ALIGNED = {"l": "start", "m": "middle", "r": "end"}
HAIRLINE = 1 / SCALE
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def svg(width: int, height: int, marks: Iterable[Mark], title: str = "") -> str:
    """An SVG of `width` × `height` points with these marks; `title` is what screen readers say.

    Characters that XML cannot hold, such as NUL, become U+FFFD.
    """
    root = ElementTree.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "xml:space": "preserve",
            "width": str(width),
            "height": str(height),
            "viewBox": f"0 0 {width} {height}",
            "role": "img",
            "font-family": FONT,
            "text-rendering": "geometricPrecision",
        },
    )
    if title:
        ElementTree.SubElement(root, "title").text = _legal(title)
    for mark in marks:
        root.append(_element(mark))
    ElementTree.indent(root, "")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _element(mark: Mark) -> ElementTree.Element:
    match mark:
        case Text(x, y, _, size, _, anchor):
            place = {"x": _number(x), "y": _number(y + BASELINE[anchor[1]] * size)}
            return _text(mark, place, ALIGNED[anchor[0]])
        case TextUpwards(x, y, _, size):
            place = {"transform": f"translate({_number(x)} {_number(y)}) rotate(-90)", "y": _number(UPWARDS * size)}
            return _text(mark, place, "middle")
        case Line(points, colour, width):
            line = {"points": _points(points), "fill": "none", "stroke": colour, "stroke-width": _number(width)}
            return ElementTree.Element("polyline", line | {"stroke-linejoin": "round"})
        case Rectangle(_, fill, outline):
            return ElementTree.Element("rect", _place(mark) | _paint(fill, outline))
        case Polygon(points, fill, outline):
            # Outlined in any case: neighbours that only touch would show the paper between them.
            return ElementTree.Element("polygon", {"points": _points(points)} | _paint(fill, outline or fill))
        case Pixels():
            return _image(mark)


def _text(mark: Text | TextUpwards, place: dict[str, str], aligned: str) -> ElementTree.Element:
    style = {"font-size": _number(mark.size), "fill": mark.colour, "text-anchor": aligned}
    element = ElementTree.Element("text", place | style)
    element.text = _legal(mark.text)
    return element


def _image(mark: Pixels) -> ElementTree.Element:
    """Cells keep hard edges; only those finer than a point are blended, where nearest ones would leave some out."""
    rows, columns, _ = mark.colours.shape
    coarse = columns <= mark.box.width and rows <= mark.box.height
    how = {"preserveAspectRatio": "none"} | ({"image-rendering": "pixelated"} if coarse else {})
    data = base64.b64encode(png_bytes(mark.colours)).decode("ascii")
    return ElementTree.Element("image", _place(mark) | how | {"href": f"data:image/png;base64,{data}"})


def _place(mark: Rectangle | Pixels) -> dict[str, str]:
    box = mark.box
    return {
        "x": _number(box.x),
        "y": _number(box.y),
        "width": _number(box.width),
        "height": _number(box.height),
    }


def _paint(fill: str | None, outline: str | None) -> dict[str, str]:
    painted = {"fill": fill or "none"}
    return painted | ({"stroke": outline, "stroke-width": _number(HAIRLINE)} if outline else {})


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{_number(x)},{_number(y)}" for x, y in points if math.isfinite(x) and math.isfinite(y))


def _number(value: float) -> str:
    """Hundredths of a point are enough."""
    return f"{round(value, 2):g}"


def _legal(text: str) -> str:
    return _ILLEGAL.sub("\ufffd", text)

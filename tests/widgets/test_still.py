"""Stills: the same marks as a PNG and as an SVG, which no text can break."""

import base64
import io
import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from sqviz.widgets.png_bytes import png_bytes
from sqviz.widgets.still import Axis, Box, Still, colour_map, number
from sqviz.widgets.still_marks import Anchor

SETTINGS = settings(deadline=None, derandomize=True, max_examples=200)
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = (
    "</text><script>alert(1)</script>",
    "]]><!-- & &amp; <?x?>",
    "NUL \0, bell \a, lone \ud800, \uffff",
    "🦙 two  spaces ",
    "\u202eשלום عالم",
    "\"' onload='alert(1)",
)


def pixels_of(still: Still) -> np.ndarray:
    return decoded(still.png())


def decoded(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return np.asarray(image)


def elements(still: Still, tag: str) -> list[ElementTree.Element]:
    return ElementTree.fromstring(still.svg()).findall(SVG + tag)


def raster_of(image: ElementTree.Element) -> np.ndarray:
    kind, data = image.attrib["href"].split(",")
    assert kind == "data:image/png;base64"
    return decoded(base64.b64decode(data))


def plot() -> Still:
    """One mark of each sort."""
    still = Still(300, 200, "title", "subtitle")
    box = Box(60, 60, 200, 100)
    still.pixels(box, np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    still.axes(box, Axis(0, 10, "channel"), Axis(1, 100, "token", log=True))
    still.colour_bar(Box(270, 60, 10, 100), Axis(0, 1, "share"))
    still.polygon([(10, 10), (20, 10), (20, 20)], fill="#123456")
    still.rectangle(Box(30, 30, 5, 5), fill="#654321", outline="#000000")
    return still


# ---- PNG -----------------------------------------------------------------------------------------------------------


def test_pixels_of_a_raster_land_where_they_belong() -> None:
    picture = Still(100, 60)
    raster = np.zeros((2, 2, 3), np.uint8)
    raster[0, 1] = (255, 0, 0)
    picture.pixels(Box(20, 10, 40, 40), raster)
    raster[:] = 77  # what was drawn stays as it was
    image = pixels_of(picture)
    assert image.shape == (120, 200, 3)
    assert tuple(image[2 * 15, 2 * 55]) == (255, 0, 0)
    assert tuple(image[2 * 45, 2 * 55]) == (0, 0, 0)
    assert tuple(image[2 * 5, 2 * 5]) == (255, 255, 255)


def test_a_still_is_drawn_the_same_twice() -> None:
    still = plot()
    assert still.png() == still.png() == plot().png()
    assert still.svg() == still.svg() == plot().svg()


@SETTINGS
@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=12).map(lambda shape: (*shape, 3))))
def test_the_small_encoder_writes_what_pillow_reads(colours: np.ndarray) -> None:
    np.testing.assert_array_equal(decoded(png_bytes(colours)), colours)
    np.testing.assert_array_equal(decoded(png_bytes(colours[::-1, ::2])), colours[::-1, ::2])


def test_a_png_has_pixels() -> None:
    with pytest.raises(ValueError, match="0 × 3 pixels"):
        png_bytes(np.zeros((0, 3, 3), np.uint8))


# ---- SVG -----------------------------------------------------------------------------------------------------------


def test_an_svg_has_the_size_the_paper_and_all_texts() -> None:
    root = ElementTree.fromstring(plot().svg())
    assert root.tag == SVG + "svg"
    assert (root.attrib["width"], root.attrib["height"], root.attrib["viewBox"]) == ("300", "200", "0 0 300 200")
    assert root.findtext(SVG + "title") == "title"
    paper = root.find(SVG + "rect")
    assert paper is not None
    assert paper.attrib == {"x": "0", "y": "0", "width": "300", "height": "200", "fill": "#ffffff"}
    texts = [text.text for text in root.findall(SVG + "text")]
    assert {"title", "subtitle", "channel", "token", "share", "0", "100"} <= set(texts)
    (upwards,) = (text for text in root.findall(SVG + "text") if "rotate(-90)" in text.attrib.get("transform", ""))
    assert upwards.text == "token"


def test_an_svg_loads_nothing() -> None:
    text = plot().svg().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|//|<script|<style|url\(", re.sub('data:image/png;base64,[^"]*', "", text))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(text: str) -> None:
    still = Still(300, 100, text, text)
    still.axes(Box(60, 60, 200, 20), Axis(0, 1, text), Axis(0, 1, text))
    root = ElementTree.fromstring(still.svg())
    assert {element.tag.removeprefix(SVG) for element in root} == {"title", "rect", "text", "polyline"}
    shown = re.sub("[\0\a\ud800\uffff]", "\ufffd", text)
    assert [element.text for element in root].count(shown) == 5
    still.svg().encode("utf-8")


@SETTINGS
@given(st.text(st.characters(exclude_categories=(), exclude_characters="\r"), min_size=1))
def test_any_text_comes_back_but_for_what_xml_forbids(text: str) -> None:
    (found,) = elements(_with_text(text), "text")
    assert found.text is not None
    for here, there in zip(text, found.text, strict=True):
        assert here == there or (there == "\ufffd" and not here.isprintable())


def _with_text(text: str) -> Still:
    still = Still(100, 50)
    still.text(10, 10, text)
    return still


@pytest.mark.parametrize("anchor", ["la", "ma", "ra", "lm", "mm", "rm", "ls", "ms", "rs"])
def test_text_stands_where_it_stands_in_the_png(anchor: Anchor) -> None:
    still = Still(100, 60)
    still.text(50, 30, "HEEH", size=12, anchor=anchor)
    rows, columns = np.nonzero(pixels_of(still).min(2) < 128)
    (text,) = elements(still, "text")
    assert float(text.attrib["y"]) == pytest.approx((rows.max() + 1) / 2, abs=0.8)
    at = {"start": columns.min(), "middle": (columns.min() + columns.max()) / 2, "end": columns.max()}
    assert float(text.attrib["x"]) == pytest.approx(at[text.attrib["text-anchor"]] / 2, abs=1.5)


def test_rasters_are_whole_and_lie_on_the_pixels_of_the_png() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (7, 11, 3), dtype=np.uint8)
    still = Still(100, 60)
    still.pixels(Box(10.13, 20.4, 33.2, 21.1), colours)
    (image,) = elements(still, "image")
    np.testing.assert_array_equal(raster_of(image), colours)
    x, y, width, height = (float(image.attrib[name]) for name in ("x", "y", "width", "height"))
    assert (x, y, width, height) == (10, 20.5, 33, 21)
    assert image.attrib["preserveAspectRatio"] == "none"
    drawn = pixels_of(still)[round(2 * y) : round(2 * (y + height)), round(2 * x) : round(2 * (x + width))]
    assert (drawn != 255).any(2).all()
    np.testing.assert_array_equal(drawn[0, 0], colours[0, 0])
    np.testing.assert_array_equal(drawn[-1, -1], colours[-1, -1])


@pytest.mark.parametrize(("columns", "rendering"), [(40, "pixelated"), (41, None)])
def test_cells_finer_than_a_point_are_blended_so_that_none_is_left_out(columns: int, rendering: str | None) -> None:
    still = Still(100, 60)
    still.pixels(Box(10, 10, 40, 10), np.zeros((3, columns, 3), np.uint8))
    (image,) = elements(still, "image")
    assert image.attrib.get("image-rendering") == rendering


def test_polygons_side_by_side_leave_no_gap() -> None:
    (polygon,) = elements(plot(), "polygon")
    assert polygon.attrib["stroke"] == polygon.attrib["fill"] == "#123456"


def test_points_that_are_nowhere_are_left_out() -> None:
    still = Still(100, 60)
    still.line([(1, 2.5), (3, math.nan), (math.inf, 4), (5, 6)])
    (line,) = elements(still, "polyline")
    assert line.attrib["points"] == "1,2.5 5,6"


# ---- axes and colours ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 100), [0, 20, 40, 60, 80, 100]),
        (Axis(0.02, 3000, log=True), [0.1, 1, 10, 100, 1000]),
        (Axis(2, 7, log=True), [2, 3, 4, 5, 6, 7]),
        (Axis(18, 700, log=True), [20, 50, 100, 200, 500]),
        (Axis(30, 8000, log=True), [100, 1000]),
    ],
)
def test_ticks_are_round(axis: Axis, ticks: list[float]) -> None:
    assert axis.ticks() == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "1"), (12.345, "12.3"), (0.05, "0.05"), (2010.4, "2010"), (123456, "1.23e5"), (0.000123, "1.23e-4")],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_the_colour_maps_grow_lighter_throughout() -> None:
    for name in ("viridis", "cividis"):
        light = colour_map(name) @ np.array([0.2126, 0.7152, 0.0722])
        assert np.all(np.diff(light) > -0.6), name
        assert light[-1] - light[0] > 150
    assert math.isclose(colour_map("viridis")[0, 0], 0x44)

"""What a `Still` is made of: marks in the order they are drawn. Coordinates and sizes in points, origin top left."""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import UInt8

SCALE = 2
"""Pixels per point of a PNG; lines without a width of their own are one such pixel wide."""
Anchor = Literal["la", "ma", "ra", "lm", "mm", "rm", "ls", "ms", "rs"]
"""What of a text lies on its point: l(eft), m(iddle), r(ight), then a(scender), m(iddle), s (baseline)."""


@dataclasses.dataclass(frozen=True)
class Box:
    """A plot area, in points."""

    x: float
    y: float
    width: float
    height: float


@dataclasses.dataclass(frozen=True)
class Text:
    """A line of text."""

    x: float
    y: float
    text: str
    size: float
    colour: str
    anchor: Anchor


@dataclasses.dataclass(frozen=True)
class TextUpwards:
    """A line of text that runs upwards, its middle on a point."""

    x: float
    y: float
    text: str
    size: float
    colour: str


@dataclasses.dataclass(frozen=True)
class Line:
    """A broken line through points."""

    points: tuple[tuple[float, float], ...]
    colour: str
    width: float


@dataclasses.dataclass(frozen=True)
class Rectangle:
    """A rectangle, filled or outlined or both."""

    box: Box
    fill: str | None
    outline: str | None


@dataclasses.dataclass(frozen=True)
class Polygon:
    """A filled polygon."""

    points: tuple[tuple[float, float], ...]
    fill: str
    outline: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels:
    """A raster stretched over a box, row 0 on top; the box lies on whole pixels of the PNG."""

    box: Box
    colours: UInt8[np.ndarray, "row column 3"]


Mark = Text | TextUpwards | Line | Rectangle | Polygon | Pixels

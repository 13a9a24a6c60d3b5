"""A `Still` as a PNG, drawn with Pillow at SCALE pixels per point. Import this only where there is Pillow."""

import io
from collections.abc import Iterable
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from sqviz.widgets.still_marks import SCALE, Line, Mark, Pixels, Polygon, Rectangle, Text, TextUpwards

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_FONTS = ("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "arial.ttf", "Arial Unicode.ttf", "segoeui.ttf")
_ASCII = str.maketrans(
    {"α": "alpha", "×": "x", "−": "-", "·": ".", "→": "->", "≤": "<=", "≥": ">=", "÷": "/", "≈": "~"}
)


def png(width: int, height: int, marks: Iterable[Mark]) -> bytes:
    """A PNG of `width` × `height` points with these marks."""
    image = Image.new("RGB", (width * SCALE, height * SCALE))
    draw = ImageDraw.Draw(image)
    for mark in marks:
        match mark:
            case Text():
                font, shown = _set(mark)
                draw.text((mark.x * SCALE, mark.y * SCALE), shown, font=font, fill=mark.colour, anchor=mark.anchor)
            case TextUpwards():
                _upwards(image, mark)
            case Line():
                draw.line(_scaled(mark.points), mark.colour, max(1, round(mark.width * SCALE)), joint="curve")
            case Rectangle(box):
                corners = _scaled([(box.x, box.y), (box.x + box.width, box.y + box.height)])
                draw.rectangle(corners, mark.fill, mark.outline)
            case Polygon():
                draw.polygon(_scaled(mark.points), mark.fill, mark.outline)
            case Pixels(box, colours):
                size = (round(box.width * SCALE), round(box.height * SCALE))
                raster = Image.fromarray(colours).resize(size, Image.Resampling.NEAREST)
                image.paste(raster, (round(box.x * SCALE), round(box.y * SCALE)))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=False, dpi=(96 * SCALE, 96 * SCALE))
    return buffer.getvalue()


@cache
def _font(size: float) -> tuple[Font, bool]:
    """A font of that size in points, and whether it has Greek and mathematical signs."""
    for name in _FONTS:
        try:
            return ImageFont.truetype(name, size * SCALE), True
        except OSError:
            continue
    return ImageFont.load_default(size * SCALE), False


def _set(mark: Text | TextUpwards) -> tuple[Font, str]:
    """The font of a text, and the text as far as that font has its letters."""
    font, complete = _font(mark.size)
    return font, mark.text if complete else mark.text.translate(_ASCII).encode("ascii", "replace").decode()


def _upwards(image: Image.Image, mark: TextUpwards) -> None:
    font, shown = _set(mark)
    left, top, right, bottom = font.getbbox(shown)
    patch = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4), 0)
    ImageDraw.Draw(patch).text((2 - left, 2 - top), shown, font=font, fill=255)
    patch = patch.rotate(90, expand=True)
    corner = (int(mark.x * SCALE - patch.width / 2), int(mark.y * SCALE - patch.height / 2))
    image.paste(mark.colour, (*corner, corner[0] + patch.width, corner[1] + patch.height), patch)


def _scaled(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x * SCALE, y * SCALE) for x, y in points]

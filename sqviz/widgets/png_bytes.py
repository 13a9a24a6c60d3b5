"""An array of colours as a PNG, with nothing but zlib: for pictures inside a page or an SVG."""

import struct
import zlib

import numpy as np
from jaxtyping import UInt8


def png_bytes(colours: UInt8[np.ndarray, "row column 3"]) -> bytes:
    """A PNG of one pixel per colour, red green blue, row 0 on top.

    Raises:
        ValueError: no pixels.
    """
    rows, columns, _ = colours.shape
    if not rows * columns:
        raise ValueError(f"{rows} × {columns} pixels: a PNG has at least one")
    header = struct.pack(">2I5B", columns, rows, 8, 2, 0, 0, 0)  # 8 bits per channel, RGB, not interlaced
    unfiltered = np.pad(colours.reshape(rows, -1), ((0, 0), (1, 0)))  # each row begins with its filter: 0 for none
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(unfiltered.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

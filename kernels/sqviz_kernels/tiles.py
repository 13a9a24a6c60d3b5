"""Which tiles of C a GPU's INT8 product may use: candidates per family of devices and number of rows, best guess first.

A tile has to fit: its operands into shared memory, `stages` times (`SHARED` bytes for one program), its sums into
registers. 128 × 256 sums take 8 warps: with 4, sm_80 spills thousands of registers. `python -m sqviz_kernels.aot`
compiles every candidate for its family without a GPU, and prints instruction, registers spilled and bytes shared; tests
hold those at what is allowed. Which one is fastest only a device can say: `triton_runtime` times them there.
"""

import functools
from typing import NamedTuple

import torch

FEW_ROWS = 16
"""Up to so many rows (tokens generated one at a time) the weight is read once whatever the tile: many narrow ones."""


class Tile(NamedTuple):
    """Rows, out channels and channels of a tile; warps that share it; tiles loaded ahead."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


SHARED = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx": 64 * 1024,
}
"""Bytes of shared memory that one program may have, per family."""

_NARROW = (Tile(16, 64, 128, 4, 4), Tile(16, 32, 256, 4, 3), Tile(16, 128, 128, 4, 3))
_SQUARE = (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 8, 3), Tile(64, 64, 128, 4, 3), Tile(128, 128, 128, 8, 2))
_LINEAR = {
    "sm_80": (_NARROW, (*_SQUARE, Tile(128, 256, 64, 8, 3))),
    "sm_86": (_NARROW, _SQUARE),
    "sm_90": (_NARROW, (Tile(128, 128, 128, 8, 3), Tile(128, 256, 128, 8, 3), Tile(64, 128, 128, 4, 4), _SQUARE[0])),
    "sm_100": (_NARROW, (Tile(128, 128, 128, 8, 3), Tile(128, 64, 128, 4, 4), Tile(64, 64, 128, 4, 3))),
    "sm_120": (_NARROW, _SQUARE),
    "gfx": ((Tile(16, 64, 128, 4, 2), Tile(32, 32, 128, 4, 2)), (Tile(128, 128, 64, 4, 2), Tile(64, 64, 64, 4, 2))),
}
_PRODUCT = {
    name: (
        (Tile(16, 64, 64, 4, 2), Tile(16, 128, 64, 4, 2)),
        (Tile(64, 64, 64, 4, 2), Tile(128, 64, 64, 4, 3 if name != "gfx" else 2)),
    )
    for name in SHARED
}


@functools.cache
def family(device: torch.device) -> str:
    """The row of the table for a device."""
    if device.type != "cuda":
        return "sm_80"  # the interpreter: any tile will do
    if torch.version.hip is not None:
        return "gfx"
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return "sm_80" if minor in (0, 7) else "sm_86"
    return {9: "sm_90", 10: "sm_100" if minor == 0 else "sm_90"}.get(major, "sm_120")


def linear_tiles(name: str, rows: int, large: bool = True) -> tuple[Tile, ...]:
    """Candidates for a linear of so many rows, on this family.

    Without `large` ones where the epilogue takes more registers: it divides by a step, or stores one element at a time.
    """
    found = _LINEAR[name][rows > FEW_ROWS]
    return found if large else tuple(tile for tile in found if tile.m * tile.n <= 128 * 128)


def product_tiles(name: str, rows: int) -> tuple[Tile, ...]:
    """Candidates for the products of attention, with so many queries sharing a key head."""
    return _PRODUCT[name][rows > FEW_ROWS]

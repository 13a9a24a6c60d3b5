"""How the Triton backend reaches a device: which kernels there are, which tile, one launch.

Tiles are timed on the first use of a shape class (rows rounded up to a power of two, out, channels, what is stored,
device), once per process. While a CUDA graph is recorded, and with `tune=False`, the first tile of the table is taken.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sqviz_kernels.gpu import GpuBackend
from sqviz_kernels.tiles import Tile, family

ALIGN = 16
"""Codes of a row are padded to a multiple of this: 16 bytes are one load."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What kernels read."""
_chosen: dict[tuple[Any, ...], Tile] = {}
"""The fastest tile of a table, per device and shape class."""


@functools.cache
def kernels() -> SimpleNamespace:
    """The kernels and their constants; imports triton."""
    from sqviz_kernels import triton_attention, triton_int8

    return SimpleNamespace(**{**vars(triton_int8), **vars(triton_attention)})


class Launcher(GpuBackend):
    """Chooses tiles and launches kernels.

    Args:
        tune: time the tiles of the table on the first use of a shape class; False: take the first.
        tiles: tiles to use instead of the table's.
    """

    def __init__(self, tune: bool = True, tiles: tuple[Tile, ...] = ()) -> None:
        self._tune, self._tiles = tune, tiles

    def family(self, device: torch.device) -> str:
        """The row of the table of tiles for a device."""
        return family(device)

    def tuned(
        self, device: torch.device, shape: tuple[Any, ...], table: tuple[Tile, ...], launch: Callable[[Tile], None]
    ) -> None:
        """Launch with the fastest tile of the table for this shape class, timed on the first use."""
        table = self._tiles or table
        key = (device, shape, table)
        if key not in _chosen and len(table) > 1:
            if not self._tune or device.type != "cuda" or torch.cuda.is_current_stream_capturing():
                return launch(table[0])
            _chosen[key] = min(table, key=lambda tile: _milliseconds(launch, tile))
        return launch(_chosen.get(key, table[0]))

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        args: dict[str, Any],
        constants: dict[str, Any],
        warps: int = 4,
        stages: int = 2,
    ) -> None:
        """Run a kernel on the device of its first argument; nothing where there is nothing to do.

        `enable_fp_fusion` would merge mul and add into one rounding.
        """
        if 0 in grid:
            return
        with torch.cuda.device_of(next(iter(args.values()))):
            kernel[grid](**args, **constants, num_warps=warps, num_stages=stages, enable_fp_fusion=False)


def _milliseconds(launch: Callable[[Tile], None], tile: Tile) -> float:
    """Time of one launch: the least of 3 rounds of 8, after 2 to compile and warm up."""
    for _ in range(2):
        launch(tile)
    rounds = []
    for _ in range(3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(8):
            launch(tile)
        stop.record()
        stop.synchronize()
        rounds.append(start.elapsed_time(stop) / 8)
    return min(rounds)


def power_of_two(size: int) -> int:
    """The smallest power of two that holds `size`."""
    return 1 << max(0, size - 1).bit_length()


def block(channels: int, least: int = 64, most: int = 2048) -> int:
    """How many channels of a row a program reads at once."""
    return min(max(power_of_two(channels), least), most)


def warps(block: int) -> int:
    """Warps for a block of a row: 16 channels a thread, 2 where the row is short."""
    return min(max(block // 512, 1), 8)


def stored(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a kernel stores, before torch casts: the interpreter cuts a bfloat16 off, and does not round."""
    exact = FLOATS[:2] if device.type == "cpu" else FLOATS
    return dtype if dtype in exact else torch.float32


def last_contiguous(t: Tensor) -> Tensor:
    """A tensor whose last stride is 1: itself if it is so."""
    return t if t.stride(-1) == 1 else t.contiguous()

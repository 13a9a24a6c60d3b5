"""The CPU backend that runs on any processor, exact everywhere: its product names no instruction (plain_tile.py).

Without a dot-product instruction INT8 makes 16 products with two instructions where float32 makes 8 with one: about as
fast, and a quarter of the memory, which is what a product of few rows waits for. Measured: see kernels/LOG.md.
"""

from typing import ClassVar

import torch
from jaxtyping import Float, Int, Int8
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz_kernels.backend import Codes, Packed
from sqviz_kernels.cpu import CpuBackend, launching, threads_for
from sqviz_kernels.cpu_loops import BF16, F32
from sqviz_kernels.plain_tile import CHUNK, SIDE, tiles_of, tiles_of_threads
from sqviz_kernels.spec import check_channels

WORTH_THREADS = 1 << 17
"""Products from which a second thread helps."""
_KINDS = {torch.float32: F32, torch.bfloat16: BF16}


class Plain(CpuBackend):
    """Codes int8 as they are; weights [out channel], both sides padded to whole tiles; see plain_tile.py."""

    name: ClassVar[str] = "plain"
    shift: ClassVar[int] = 0

    @classmethod
    def why_not(cls) -> str | None:
        """None: it runs wherever numba does."""
        return None

    def row_bytes(self, channels: int) -> int:
        """Whole chunks, at least one."""
        return max(1, -(-channels // CHUNK)) * CHUNK

    def pack(
        self,
        w: Int8[Tensor, "out channel"],
        step: Float[Tensor, " out_or_1"],
        bias: Float[Tensor, " out"] | None = None,
        gated: bool = False,
    ) -> Packed:
        """Zeros appended to whole tiles, and a step for each out channel."""
        out, channels = w.shape
        check_channels(channels)
        values = torch.zeros(-(-out // SIDE) * SIDE, self.row_bytes(channels), dtype=torch.int8)
        values[:out, :channels] = w
        scales = step.float().expand(out).contiguous()
        biases = None if bias is None else bias.float().contiguous()
        return Packed(values, step, biases, out, channels, (scales,), gated)

    def unpack(self, packed: Packed) -> Int8[Tensor, "out channel"]:
        """The codes."""
        return packed.values[: packed.out, : packed.channels]

    def rows(self, packed: Packed, which: Int[Tensor, " row"]) -> Int8[Tensor, "row channel"]:
        """The codes of some out channels."""
        return packed.values[: packed.out][which, : packed.channels]

    def linear(self, x: Codes, w: Packed, dtype: torch.dtype = torch.float32) -> Float[Tensor, "row out"]:
        """See `spec.linear`: bit-equal."""
        if dtype not in _KINDS:
            return self.linear(x, w).to(dtype)
        if x.channels != w.channels:
            raise SqvizError(f"X has {x.channels} channels, and the weight {w.channels}.")
        if x.values.dtype != torch.int8:
            raise SqvizError(
                f"codes are {x.values.dtype}, and backend='plain' reads int8. "
                "Quantise and pack with the backend that multiplies."
            )
        out = torch.empty(x.rows, w.out, dtype=dtype)
        arguments = (
            *(x.values.data_ptr(), x.values.stride(0), w.values.data_ptr(), w.values.stride(0), w.values.shape[1]),
            *(x.step.data_ptr(), 0 if len(x.step) == 1 else 4, w.extra[0].data_ptr()),
            *(0 if w.bias is None else w.bias.data_ptr(), out.data_ptr(), _KINDS[dtype], w.out * out.element_size()),
        )
        threads = threads_for(out.numel() * x.channels, WORTH_THREADS)
        if threads == 1:
            tiles_of(0, x.rows, 0, w.out, *arguments)
            return out
        with launching():
            tiles_of_threads(threads, x.rows, w.out, *arguments)
        return out

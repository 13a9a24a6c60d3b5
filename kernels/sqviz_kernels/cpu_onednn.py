"""The CPU backend on oneDNN's INT8 product (`torch._int_mm`), quantising before it and scaling after it fused by numba.

    codes     int8, row-major; weights [out channel], handed over as the transposed view that oneDNN reads fastest
              (5 times faster for one row than a [channel out] matrix, measured for 4096 × 4096)
    product   int32 sums in memory, then one pass: ((float32(sum) · Δ_x) · Δ_w) + bias, to float32 or bfloat16

What oneDNN does is right only where it has an instruction that sums int8 products in 32 bits. Below AVX-512 VNNI and
AVX-VNNI it multiplies with vpmaddubsw, which saturates at 16 bits, and says nothing: 127 · 127 + 127 · 127 comes out as
32767. torch looks at the processor and then takes a slow loop instead, but ONEDNN_MAX_CPU_ISA takes oneDNN past that
check. So `why_not` multiplies the extremes once, and this backend is refused where one sum is wrong.

`torch._int_mm` also returns garbage, silently, for operands whose strides do not say how far apart rows are: rows
expanded from one (stride 0), and [out 1] matrices that are contiguous (both strides 1). The codes here are always in
memory of their own, with rows of at least two bytes.

Left out: `onednn.qlinear_pointwise` for static per-tensor steps, which would scale inside of the product. It wants a
second, prepacked copy of every weight and uint8 codes around 128 (for int8 ones it falls into a reference loop, a
thousand times slower), and takes for [rows × channels × out], in µs of one core, against `_int_mm` alone:

    1×576×1536  45 : 20      16×576×1536  113 : 115      512×576×1536  2334 : 2137      512×4096×4096  41310 : 45308
"""

import functools
import os
from typing import ClassVar

import torch
from jaxtyping import Float, Int, Int8, Int32
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz_kernels.backend import Codes, Packed
from sqviz_kernels.cpu import CpuBackend, run, threads_for
from sqviz_kernels.cpu_loops import BF16, F32
from sqviz_kernels.cpu_scale import scale_rows, scale_rows_threads
from sqviz_kernels.spec import TOP, check_channels

_KINDS = {torch.float32: F32, torch.bfloat16: BF16}
_TRIED = ((1, 256, 32), (17, 255, 33), (64, 256, 64))
"""Sizes that the probe multiplies: one row, odd ones, and one that fills oneDNN's tiles."""


@functools.cache
def why_not_exact() -> str | None:
    """None if `torch._int_mm` multiplies the extremes exactly here, else what is wrong; tried once per process."""
    for rows, channels, out in _TRIED:
        for x, w in ((TOP, TOP), (TOP, -TOP), (-TOP, -TOP)):
            try:
                sums = torch._int_mm(
                    torch.full((rows, channels), x, dtype=torch.int8),
                    torch.full((out, channels), w, dtype=torch.int8).t(),
                )
            except (RuntimeError, NotImplementedError) as error:
                return f"this torch has no INT8 product for the processor ({str(error).splitlines()[0]}); use 'plain'"
            if bool((sums != x * w * channels).any()):
                isa = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
                cause = f"ONEDNN_MAX_CPU_ISA={isa} takes its VNNI away" if isa else "the processor seems to lack VNNI"
                fix = "unset that variable, or use backend='plain'" if isa else "use backend='plain', which is exact"
                return f"oneDNN's INT8 product saturates at 16 bits ({x} · {w} summed {channels} times): {cause}; {fix}"
    return None


class OneDnn(CpuBackend):
    """Codes int8 as they are; weights [out channel]; see the module."""

    name: ClassVar[str] = "onednn"
    shift: ClassVar[int] = 0

    @classmethod
    def why_not(cls) -> str | None:
        """None, or why oneDNN's sums cannot be trusted here."""
        return why_not_exact()

    def row_bytes(self, channels: int) -> int:
        """At least 2: with rows of one byte oneDNN cannot tell how far apart they are."""
        return max(2, channels)

    def pack(
        self,
        w: Int8[Tensor, "out channel"],
        step: Float[Tensor, " out_or_1"],
        bias: Float[Tensor, " out"] | None = None,
        gated: bool = False,
    ) -> Packed:
        """The codes as they are, in memory of their own, and a step for each out channel."""
        out, channels = w.shape
        check_channels(channels)
        values = torch.zeros(out, self.row_bytes(channels), dtype=torch.int8)
        values[:, :channels] = w
        scales = step.float().expand(out).contiguous()
        biases = None if bias is None else bias.float().contiguous()
        return Packed(values, step, biases, out, channels, (scales,), gated)

    def unpack(self, packed: Packed) -> Int8[Tensor, "out channel"]:
        """The codes."""
        return packed.values[:, : packed.channels]

    def rows(self, packed: Packed, which: Int[Tensor, " row"]) -> Int8[Tensor, "row channel"]:
        """The codes of some out channels."""
        return packed.values[which, : packed.channels]

    def linear(self, x: Codes, w: Packed, dtype: torch.dtype = torch.float32) -> Float[Tensor, "row out"]:
        """See `spec.linear`: bit-equal."""
        if dtype not in _KINDS:
            return self.linear(x, w).to(dtype)
        out = torch.empty(x.rows, w.out, dtype=dtype)
        sums = self._sums(x, w)
        arguments = (
            *(w.out, sums.data_ptr(), x.step.data_ptr(), 0 if len(x.step) == 1 else 4, w.extra[0].data_ptr()),
            *(0 if w.bias is None else w.bias.data_ptr(), out.data_ptr(), _KINDS[dtype], w.out * out.element_size()),
        )
        run(threads_for(out.numel()), scale_rows, scale_rows_threads, x.rows, *arguments)
        return out

    def _sums(self, x: Codes, w: Packed) -> Int32[Tensor, "row out"]:
        if x.channels != w.channels:
            raise SqvizError(f"X has {x.channels} channels, and the weight {w.channels}.")
        if x.values.dtype != torch.int8 or w.values.dtype != torch.int8:
            raise SqvizError(
                f"codes are {x.values.dtype} and {w.values.dtype}, and backend='onednn' reads int8. "
                "Quantise and pack with the backend that multiplies."
            )
        return torch._int_mm(x.values[:, : x.channels], w.values[:, : w.channels].t())

"""The vendor's INT8 product (cuBLASLt, or hipBLASLt on AMD, by `torch._int_mm`) between steps of plain torch.

    quantise    as `spec`, in torch operators
    product     torch._int_mm: int32 sums, exact; it demands more than 16 rows, channels and out divisible by 8
    epilogue    ((float32(sum) · Δ_x) · Δ_w) + bias: three operators, each rounded, so nothing is fused

Codes have at least 32 rows and a multiple of 8 channels, zeros in the padding; weights a multiple of 8 rows and
channels. The sums and each step of the epilogue pass through memory: the yardstick for kernels that spare that, and the
backend for GPUs that those do not support. Norms, gates and attention are composed as in the base class.

cuBLAS has returned wrong sums for some layouts, so each device is asked once for a product that is known.
"""

import functools
from typing import ClassVar

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from sqviz.errors import SqvizError, Unavailable
from sqviz_kernels import spec
from sqviz_kernels.backend import Codes, Packed
from sqviz_kernels.gpu import GpuBackend, padded, round_up, why_no_gpu
from sqviz_kernels.spec import Share

ALIGN = 8
"""Channels and out channels are padded to a multiple of this."""
LEAST_ROWS = 32
"""`torch._int_mm` refuses 16 rows and fewer on CUDA."""


class CublasLt(GpuBackend):
    """Products by the vendor's library, everything else in torch. See the module."""

    name: ClassVar[str] = "cublaslt"

    @classmethod
    def why_not(cls) -> str | None:
        """None if torch reaches a GPU, else why not and what would help."""
        return why_no_gpu()

    def pack(
        self,
        w: Int8[Tensor, "out channel"],
        step: Float[Tensor, " out_or_1"],
        bias: Float[Tensor, " out"] | None = None,
        gated: bool = False,
    ) -> Packed:
        """Pad a weight to multiples of 8. Raises `SqvizError` where an int32 could overflow."""
        out, channels = w.shape
        spec.check_channels(channels)
        values = padded(w, round_up(out, ALIGN), _channels(channels))
        return Packed(values, step.float(), None if bias is None else bias.float(), out, channels, gated=gated)

    def quantise(
        self,
        x: Float[Tensor, "row channel"],
        step: Float[Tensor, "1"] | None = None,
        share: Share = "token",
        divisor: Float[Tensor, " channel"] | None = None,
    ) -> Codes:
        """See `spec.quantise`; NaN instead of `NonFinite` (see `gpu`)."""
        rows, channels = x.shape
        value = x.float() if divisor is None else x.float() / divisor.float()
        finite = torch.isfinite(value).all(1)
        self.flag(x.device).logical_or_(~finite.all())
        value = torch.where(finite[:, None], value, 0.0)
        if step is None:
            most = value.abs().amax(1) if channels else value.new_zeros(rows)
            most = torch.where(finite, most, torch.nan)
            if share == "tensor":
                most = most.amax(0, keepdim=True) if rows else value.new_zeros(1)
            step = most / spec.TOP
            step = torch.where(step < spec.TINY, 0.0, step)
        else:
            step = torch.where(finite, step.float(), torch.nan)
        alive = (step > 0)[:, None]
        codes = (value / torch.where(alive, step[:, None], 1.0)).round_().clamp_(-spec.TOP, spec.TOP)
        codes = torch.where(alive, codes, 0.0).to(torch.int8)
        return Codes(padded(codes, max(rows, LEAST_ROWS), _channels(channels)), step, rows, channels)

    def product(self, x: Codes, w: Packed) -> Int32[Tensor, "row out"]:
        """The sums alone: see `spec.product`."""
        if x.channels != w.channels:
            raise SqvizError(f"x has {x.channels} channels and the weight {w.channels}: they must be the same.")
        if not x.rows or not w.out:
            return torch.zeros((x.rows, w.out), dtype=torch.int32, device=x.values.device)
        if not _exact(x.values.device):
            raise Unavailable(f"backend='cublaslt': torch._int_mm returns wrong sums on {x.values.device}.")
        values = padded(x.values, max(len(x.values), LEAST_ROWS), x.values.shape[1])  # a part of codes has fewer rows
        return torch._int_mm(values, w.values.t())[: x.rows, : w.out]

    def linear(self, x: Codes, w: Packed, dtype: torch.dtype = torch.float32) -> Float[Tensor, "row out"]:
        """See `spec.linear`."""
        return spec.scale(self.product(x, w), x.step, w.step, w.bias, dtype)


def _channels(channels: int) -> int:
    return max(round_up(channels, ALIGN), ALIGN)


@functools.cache
def _exact(device: torch.device) -> bool:
    """Whether the device gets a product right that no float16 and no int16 sum could."""
    x = torch.arange(-127, 128, dtype=torch.int8).repeat(2)[: 32 * 15].view(32, 15).repeat(1, 16)
    w = x[:24].flip(1).contiguous()
    w[0], w[1] = 127, -127
    sums = torch._int_mm(x.to(device), w.to(device).t())
    return torch.equal(sums.cpu(), spec.product(x, w))

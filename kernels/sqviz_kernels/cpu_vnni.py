"""The CPU backend that wins here: our own product for AVX-512 VNNI, with the whole epilogue inside (vnni_tile.py)."""

from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int8
from numba import config
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz_kernels import cpu_attention as kernel
from sqviz_kernels import vnni_tile as tile
from sqviz_kernels.backend import Codes, Packed
from sqviz_kernels.cpu import CpuBackend, launching, run, threads_for
from sqviz_kernels.spec import Share, check_channels, check_keys
from sqviz_kernels.vnni_tile import WIDE

HALF = WIDE // 2
WORTH_THREADS = 1 << 18
"""Products from which a second thread helps."""
_KINDS = {torch.float32: tile.F32, torch.bfloat16: tile.BF16}


class Vnni(CpuBackend):
    """Codes uint8 = code + 128; weights [panel, channel / 4, 32, 4] and −128 · Σ_k W̄; see vnni_tile.py."""

    name: ClassVar[str] = "vnni"
    shift: ClassVar[int] = 128

    @classmethod
    def why_not(cls) -> str | None:
        """None, or that the processor lacks the instruction."""
        if not tile.HAVE_VNNI:
            given = " (as NUMBA_CPU_FEATURES has it)" if config.CPU_FEATURES is not None else ""
            return f"the processor has no AVX-512 VNNI{given}; backend='plain' runs on any processor, without the speed"
        return None

    def row_bytes(self, channels: int) -> int:
        """A multiple of 64, and not one of 1024: rows a power of two apart would share few lines of the cache."""
        size = -(-channels // 64) * 64
        return size + 64 if size % 1024 == 0 else size

    def pack(
        self,
        w: Int8[Tensor, "out channel"],
        step: Float[Tensor, " out_or_1"],
        bias: Float[Tensor, " out"] | None = None,
        gated: bool = False,
    ) -> Packed:
        """Panels of 32 out channels; if gated, of 16 gates and 16 ups."""
        out, channels = w.shape
        check_channels(channels)
        order = _order(out, gated)
        rows = _pick(w, order)
        fours = max(1, -(-channels // 4))  # zeros, where there is no channel at all
        rows = torch.nn.functional.pad(rows, (0, 4 * fours - channels))
        values = rows.view(-1, WIDE, fours, 4).transpose(1, 2).contiguous()
        start = rows.sum(1, dtype=torch.int32) * -128
        scales, biases = _pick(step.float().expand(out), order), torch.zeros(len(order))
        if bias is not None:
            biases = _pick(bias.float(), order)
        return Packed(values, step, bias, out, channels, (start, scales, biases), gated)

    def unpack(self, packed: Packed) -> Int8[Tensor, "out channel"]:
        """The codes as they came."""
        rows = packed.values.transpose(1, 2).flatten(2).flatten(0, 1)[:, : packed.channels]
        order = _order(packed.out, packed.gated)
        w = rows.new_empty(packed.out, packed.channels)
        w[order[order >= 0]] = rows[order >= 0]
        return w

    def linear(self, x: Codes, w: Packed, dtype: torch.dtype = torch.float32) -> Float[Tensor, "row out"]:
        """See `spec.linear`: bit-equal."""
        if dtype not in _KINDS:
            return self.linear(x, w).to(dtype)
        out = torch.empty(x.rows, len(w.values) * WIDE, dtype=dtype)
        self._run(_KINDS[dtype], x, w, out)
        if w.gated:
            order = _order(w.out, gated=True)
            return out[:, order.argsort()[-w.out :]]
        return out if out.shape[1] == w.out else out[:, : w.out].contiguous()

    def rows(self, packed: Packed, which: Int[Tensor, " row"]) -> Int8[Tensor, "row channel"]:
        """The codes of some out channels."""
        if packed.gated:
            return self.unpack(packed)[which]
        return packed.values[which // WIDE, :, which % WIDE].flatten(1)[:, : packed.channels]

    def gated(self, x: Codes, gate_up: Packed, step: Float[Tensor, "1"] | None = None, share: Share = "token") -> Codes:
        """See `spec.gate_quantise`; the exponential differs from torch's by units in the last place."""
        if not gate_up.gated:
            raise SqvizError("this weight was packed without gated=True.")
        inner = torch.empty(x.rows, len(gate_up.values) * HALF)
        self._run(tile.GATE, x, gate_up, inner)
        return self._quantise(inner[:, : gate_up.out // 2], step, share)

    def attention(
        self,
        q: Float[Tensor, "batch head query dim"],
        k: Int8[Tensor, "batch kv_head key dim"],
        k_step: Float[Tensor, "batch kv_head key"],
        v: Int8[Tensor, "batch kv_head key dim_v"],
        v_step: Float[Tensor, "batch kv_head key"],
        scaling: float,
        causal_from: int | None = None,
        mask: Bool[Tensor, "#batch #head query key"] | Float[Tensor, "#batch #head query key"] | None = None,
    ) -> Float[Tensor, "batch head query dim_v"]:
        """See `spec.attention`; both products and the softmax in one pass. Raises as `Backend.attention` does."""
        batch, heads, queries, dims = q.shape
        kv_heads, keys, dims_v = k.shape[1], k.shape[2], v.shape[3]
        check_keys(keys)
        out = torch.empty(batch, heads, queries, dims_v, dtype=q.dtype if q.dtype in _KINDS else torch.float32)
        if not out.numel() or not keys:
            return out.zero_().to(q.dtype)
        if dims % 4:
            q, k = (torch.nn.functional.pad(t, (0, 4 - dims % 4)) for t in (q, k))
        codes = self._quantise(q.reshape(-1, q.shape[3]), None, "token")
        k, v, k_step, v_step = (_by_head(t) for t in (k, v, k_step.float(), v_step.float()))
        kind, mask = _mask(mask)
        strides = (
            (0, 0, 0)
            if mask is None
            else tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))[:3]
        )
        size = 0 if mask is None else mask.element_size()
        arguments = (
            (heads, heads // kv_heads, queries, keys, q.shape[3], dims_v),
            (codes.values.data_ptr(), codes.values.stride(0), codes.step.data_ptr()),
            (k.data_ptr(), k.stride(1), k.stride(2), k_step.data_ptr(), 4 * k_step.stride(1)),
            (v.data_ptr(), v.stride(1), v.stride(2), v_step.data_ptr(), 4 * v_step.stride(1)),
            *(np.float32(scaling), -1 if causal_from is None else causal_from),
            (kind, 0 if mask is None else mask.data_ptr(), *(size * stride for stride in strides)),
            (out.data_ptr(), _KINDS[out.dtype], dims_v * out.element_size()),
        )
        threads = threads_for(codes.rows * keys * dims, 4 * WORTH_THREADS)
        run(threads, kernel.heads_of, kernel.heads_of_threads, batch * kv_heads, *arguments)
        return out.to(q.dtype)

    def _run(self, kind: int, x: Codes, w: Packed, out: Tensor) -> None:
        if x.channels != w.channels:
            raise SqvizError(f"X has {x.channels} channels, and the weight {w.channels}.")
        start, scales, biases = w.extra
        panels, fours = w.values.shape[:2]
        arguments = (
            *(x.values.data_ptr(), x.values.stride(0), w.values.data_ptr(), fours, start.data_ptr()),
            *(x.step.data_ptr(), 0 if len(x.step) == 1 else 4, scales.data_ptr(), biases.data_ptr()),
            *(out.data_ptr(), out.stride(0) * out.element_size()),
        )
        threads = threads_for(x.rows * w.values.numel(), WORTH_THREADS)
        if threads == 1:
            tile.panels_of(kind, 0, x.rows, 0, panels, *arguments)
            return
        with launching():
            tile.panels_of_threads(threads, kind, x.rows, panels, *arguments)


def _order(out: int, gated: bool) -> Int[Tensor, " place"]:
    """Which row of the weight stands at each place of the panels; −1: padding."""
    if not gated:
        order = torch.full((-(-out // WIDE) * WIDE,), -1)
        order[:out] = torch.arange(out)
        return order
    inner = out // 2
    half = torch.full((-(-inner // HALF) * HALF,), -1)
    half[:inner] = torch.arange(inner)
    both = torch.stack([half, torch.where(half < 0, -1, half + inner)])  # [2 inner]
    return both.view(2, -1, HALF).transpose(0, 1).flatten()


def _pick(rows: Tensor, order: Int[Tensor, " place"]) -> Tensor:
    """The rows in this order, zeros for padding."""
    picked = rows.contiguous()[order.clamp(min=0)]
    picked[order < 0] = 0
    return picked


def _by_head(states: Tensor) -> Tensor:
    """Codes or steps whose heads lie at equal distances, through all sequences; a view of a longer buffer may stay."""
    even = states.shape[0] == 1 or states.stride(0) == states.shape[1] * states.stride(1)
    return states if even and states.stride(-1) == 1 else states.contiguous()


def _mask(mask: Tensor | None) -> tuple[int, Tensor | None]:
    """A mask as the kernel reads it, rows contiguous in themselves."""
    if mask is None:
        return kernel.NO_MASK, None
    mask = mask.float() if mask.dtype != torch.bool else mask
    return (kernel.BOOLEAN if mask.dtype == torch.bool else kernel.ADDED), mask if mask.stride(
        -1
    ) == 1 else mask.contiguous()

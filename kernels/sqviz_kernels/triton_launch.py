"""The Triton backend: lays out operands and launches the kernels of `triton_int8` and `triton_attention`.

Codes are kept as [row, channels rounded up to 16], zeros in the padding; so are packed weights. Rows of the input may
be strided, repeated (stride 0) or of any float dtype; an input whose channels are not contiguous is copied.

Nothing here waits for the device, so NaN and infinities are not raised but carried on as NaN: see `gpu`.
"""

import importlib.util
import os
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int8, Int32
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz_kernels import spec, triton_attend
from sqviz_kernels.backend import Codes, Packed
from sqviz_kernels.gpu import padded, round_up, why_no_gpu
from sqviz_kernels.spec import Norm, Share
from sqviz_kernels.tiles import Tile, linear_tiles
from sqviz_kernels.triton_runtime import ALIGN, FLOATS, Launcher, block, kernels, power_of_two, stored, warps


class Triton(Launcher):
    """INT8 on tensor cores, with quantisation fused into norms and gates."""

    name: ClassVar[str] = "triton"

    @classmethod
    def why_not(cls) -> str | None:
        """None if there is a GPU for which Triton has INT8 products, else the reason and what would help."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install 'sqviz[gpu]'"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return "TRITON_INTERPRET=1 is set: kernels would be interpreted on the CPU, for tests only; unset it"
        reason = why_no_gpu()
        if reason is None and torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            major, minor = torch.cuda.get_device_capability()
            return (
                f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}; Triton has INT8 products from "
                "8.0 (Ampere) on. The backends 'cublaslt' and 'numba-cuda' run there"
            )
        return reason

    # --- rows ---

    def pack(
        self,
        w: Int8[Tensor, "out channel"],
        step: Float[Tensor, " out_or_1"],
        bias: Float[Tensor, " out"] | None = None,
        gated: bool = False,
    ) -> Packed:
        """Pad the channels of a weight to 16. Raises `SqvizError` where an int32 could overflow."""
        out, channels = w.shape
        spec.check_channels(channels)
        bias = None if bias is None else bias.float().contiguous()
        values = padded(w, out, round_up(channels, ALIGN))
        return Packed(values, step.float().contiguous(), bias, out, channels, gated=gated)

    def quantise(
        self,
        x: Float[Tensor, "row channel"],
        step: Float[Tensor, "1"] | None = None,
        share: Share = "token",
        divisor: Float[Tensor, " channel"] | None = None,
    ) -> Codes:
        """See `spec.quantise`; NaN instead of `NonFinite` (see `gpu`)."""
        return self._rows("PLAIN" if divisor is None else "DIVIDED", x, divisor, None, 0.0, step, share)

    def norm_quantise(
        self,
        x: Float[Tensor, "row channel"],
        gain: Float[Tensor, " channel"],
        bias: Float[Tensor, " channel"] | None,
        eps: float,
        kind: Norm,
        step: Float[Tensor, "1"] | None = None,
        share: Share = "token",
        out: Float[Tensor, "row channel"] | None = None,
    ) -> Codes:
        """See `spec.norm_quantise`; `out` receives the normalised X. NaN instead of `NonFinite` (see `gpu`)."""
        kept = out
        if out is not None and (out.stride(-1) != 1 or stored(out.dtype, out.device) != out.dtype):
            kept = torch.empty_like(out, dtype=torch.float32, memory_format=torch.contiguous_format)
        codes = self._rows({"rms": "RMS", "layer": "LAYER"}[kind], x, gain, bias, eps, step, share, kept)
        if out is not None and kept is not None and kept is not out:
            out.copy_(kept)
        return codes

    def gated(self, x: Codes, gate_up: Packed, step: Float[Tensor, "1"] | None = None, share: Share = "token") -> Codes:
        """Codes of SiLU(gate) · up: one product, then one pass over its rows."""
        gate, up = self.linear(x, gate_up).chunk(2, 1)
        return self._rows("GATED", gate, up, None, 0.0, step, share)

    def gate_quantise(
        self,
        gate: Float[Tensor, "row channel"],
        up: Float[Tensor, "row channel"],
        step: Float[Tensor, "1"] | None = None,
        share: Share = "token",
    ) -> Codes:
        """See `spec.gate_quantise`; NaN instead of `NonFinite` (see `gpu`)."""
        if gate.stride() != up.stride() or gate.dtype != up.dtype or gate.stride(-1) != 1:
            gate, up = gate.float().contiguous(), up.float().contiguous()
        return self._rows("GATED", gate, up, None, 0.0, step, share)

    def _rows(
        self,
        source: str,
        x: Tensor,
        second: Tensor | None,
        third: Tensor | None,
        eps: float,
        step: Tensor | None,
        share: Share,
        kept: Tensor | None = None,
    ) -> Codes:
        """A step for a whole tensor is found first, then used as if given."""
        rows, channels = x.shape
        x = x if x.dtype in FLOATS else x.float()
        if x.stride(-1) != 1 and channels > 1:
            x = x.contiguous()
        values = x.new_empty((rows, round_up(channels, ALIGN)), dtype=torch.int8)
        if share == "tensor" and step is None:
            most = self._row_kernel("MAXIMA", source, x, second, third, eps, None, values)
            step = most.amax(0, keepdim=True) / spec.TOP if rows else most.new_zeros(1)
            step = torch.where(step < spec.TINY, 0.0, step)
            self._row_kernel("STATIC", source, x, second, third, eps, step, values, kept)
            return Codes(values, step, rows, channels)
        mode = "TOKEN" if step is None else "STATIC"
        steps = self._row_kernel(mode, source, x, second, third, eps, step, values, kept)
        return Codes(values, steps, rows, channels)

    def _row_kernel(
        self,
        mode: str,
        source: str,
        x: Tensor,
        second: Tensor | None,
        third: Tensor | None,
        eps: float,
        given: Tensor | None,
        values: Tensor,
        kept: Tensor | None = None,
    ) -> Float[Tensor, " row"]:
        """Launch `quantise_rows`: steps, or maxima; codes into `values`. Pointers that are not used may be any."""
        k = kernels()
        rows, channels = x.shape
        steps = x.new_empty(rows, dtype=torch.float32)
        if second is not None and source != "GATED":
            second = second.float().contiguous()
        args = {
            "x_ptr": x,
            "second_ptr": x if second is None else second,
            "third_ptr": x if third is None else third.float().contiguous(),
            "given_ptr": steps if given is None else given.float(),
            "codes_ptr": values,
            "step_ptr": steps,
            "flag_ptr": self.flag(x.device),
            "kept_ptr": steps if kept is None else kept,
            "channels": channels,
            "padded": values.shape[1],
            "stride_x": x.stride(0),
            "stride_codes": values.stride(0),
            "stride_kept": 0 if kept is None else kept.stride(0),
            "count": float(channels),
            "eps": float(eps),
        }
        size = block(channels)
        constants = {"SOURCE": getattr(k, source), "STEP": getattr(k, mode), "BLOCK": size}
        constants |= {"BIAS": third is not None, "KEEP": kept is not None}
        self.launch(k.quantise_rows, (rows,), args, constants, warps(size))
        return steps

    # --- products ---

    def linear(self, x: Codes, w: Packed, dtype: torch.dtype = torch.float32) -> Float[Tensor, "row out"]:
        """See `spec.linear`. Other dtypes than float32, float16 and bfloat16 are cast after the kernel."""
        y = x.values.new_empty((x.rows, w.out), dtype=stored(dtype, x.values.device))
        self._product("FLOATS", x, w, y, None, None)
        return y.to(dtype)

    def product(self, x: Codes, w: Packed) -> Int32[Tensor, "row out"]:
        """The sums alone: see `spec.product`."""
        sums = x.values.new_empty((x.rows, w.out), dtype=torch.int32)
        self._product("SUMS", x, w, sums, None, None)
        return sums

    def linear_requantise(self, x: Codes, w: Packed, step: Float[Tensor, "1"]) -> Codes:
        """Codes of the result for the next INT8 operator, under its static step: see `spec.requantise`.

        If anything is not finite, the step of all of them is NaN.
        """
        values = x.values.new_empty((x.rows, w.out), dtype=torch.int8)
        own = step.float().clone()
        self._product("CODES", x, w, values, step.float(), own)
        return Codes(padded(values, x.rows, round_up(w.out, ALIGN)), own, x.rows, w.out)

    def _product(self, out: str, x: Codes, w: Packed, c: Tensor, given: Tensor | None, own: Tensor | None) -> None:
        """Launch `linear_tiles` into C. Pointers that are not used may be any."""
        if x.channels != w.channels:
            raise SqvizError(f"x has {x.channels} channels and the weight {w.channels}: they must be the same.")
        k = kernels()
        args = {
            "a_ptr": x.values,
            "b_ptr": w.values,
            "c_ptr": c,
            "a_step_ptr": x.step,
            "b_step_ptr": w.step,
            "bias_ptr": w.step if w.bias is None else w.bias,
            "given_ptr": x.step if given is None else given,
            "own_ptr": x.step if own is None else own,
            "flag_ptr": self.flag(c.device),
            "M": x.rows,
            "N": w.out,
            "K": x.values.shape[1],
            "stride_am": x.values.stride(0),
            "stride_bn": w.values.stride(0),
        }
        each = {"A_ROWS": x.step.numel() > 1, "B_ROWS": w.step.numel() > 1, "BIAS": w.bias is not None}

        def launch(tile: Tile) -> None:
            grid = (-(-x.rows // tile.m) * -(-w.out // tile.n),)
            constants = {"OUT": getattr(k, out), **each, "BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": 8}
            self.launch(k.linear_tiles, grid, args, constants, tile.warps, tile.stages)

        shape = (power_of_two(x.rows), w.out, x.channels, out, c.dtype)
        large = out != "CODES" and w.out % ALIGN == 0
        self.tuned(c.device, shape, linear_tiles(self.family(c.device), x.rows, large), launch)

    # --- made of those ---

    def batched(
        self,
        a: Codes,
        b: Int8[Tensor, "outer inner out channel"],
        b_step: Float[Tensor, "outer inner out"] | None = None,
        scaling: float = 1.0,
    ) -> Float[Tensor, "outer inner row out"]:
        """See `spec.batched`: one launch."""
        return triton_attend.batched(self, a, b, b_step, scaling)

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
        """See `spec.attention`; a query that is not finite gets NaN (see `gpu`)."""
        return triton_attend.attention(self, q, k, k_step, v, v_step, scaling, causal_from, mask)

    def read_cache(
        self, codes: Int8[Tensor, "*rows channel"], step: Float[Tensor, "*rows"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "*rows channel"]:
        """code · step: what an INT8 cache of keys or values stands for."""
        return triton_attend.read_cache(self, codes, step, dtype)

    def sweep(
        self,
        x: Float[Tensor, "token channel"],
        w: Float[Tensor, "out channel"],
        y: Float[Tensor, "token out"],
        s: Float[Tensor, "alpha channel"],
        x_step: Float[Tensor, " alpha"] | None,
        w_step: Float[Tensor, " alpha"] | None,
    ) -> Float[Tensor, "alpha token"]:
        """See `spec.sweep`: quantise, product and error for each α; the float64 sums in another order."""
        k, y = kernels(), y.float().contiguous()
        found = y.new_zeros((len(s), len(y)), dtype=torch.float64)
        for index, factors in enumerate(s):
            x_own, w_own = (None if step is None else step[index : index + 1] for step in (x_step, w_step))
            codes = self.quantise(w.float() * factors, w_own)
            packed = Packed(codes.values, codes.step, None, codes.rows, codes.channels)
            z = self.linear(self.quantise(x, x_own, divisor=factors), packed)
            args = {"y_ptr": y, "z_ptr": z, "out_ptr": found[index], "channels": y.shape[1]}
            strides = {"stride_y": y.stride(0), "stride_z": z.stride(0)}
            self.launch(k.error_rows, (len(y),), args | strides, {"BLOCK": block(y.shape[1])})
        return found

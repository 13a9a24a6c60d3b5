"""What a backend is: codes in, codes and floats out, on whatever layout it likes best. See `spec` for the arithmetic.

A backend has to give `quantise`, `pack`, `unpack` and `linear`. The fused operations below are composed of those, and a
backend overrides the ones it fuses.

`torch.compile` does not look into any of them: a compiled model calls them as it runs. What it would see are addresses
of tensors; and with `torch._inductor.config.freezing` it takes an INT8 product followed by two scalings for a quantised
linear of its own, whose kernel for int8 activations is oneDNN's reference loop (measured: 302 ms in place of 0.14).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor
from torch.nn import functional as F

from sqviz_kernels import spec
from sqviz_kernels.spec import Norm, Share


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """A quantised matrix [row channel], in a backend's own layout.

    Attributes:
        values: the codes, possibly shifted, padded or reordered.
        step: float32 [row] (a step each) or [1] (one for all).
        rows, channels: the matrix's own size, without padding.
    """

    values: Tensor
    step: Float[Tensor, " row_or_1"]
    rows: int
    channels: int

    def take(self, which: Int[Tensor, " row"]) -> "Codes":
        """Some of the rows."""
        step = self.step if len(self.step) == 1 and self.rows != 1 else self.step[which]
        return Codes(self.values[which], step, len(which), self.channels)

    def part(self, start: int, rows: int) -> "Codes":
        """Rows that follow one another, as they lie."""
        step = self.step if len(self.step) == 1 and self.rows != 1 else self.step[start : start + rows]
        return Codes(self.values[start : start + rows], step, rows, self.channels)


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """The weight of a linear, stored once, in a backend's own layout.

    Attributes:
        values: the codes.
        step: float32 [out] or [1].
        bias: float32 [out], or None.
        out, channels: the matrix's own size, without padding.
        extra: further tensors that the layout needs.
        gated: the first half of the rows makes gates, the second half ups; for `Backend.gated`.
    """

    values: Tensor
    step: Float[Tensor, " out_or_1"]
    bias: Float[Tensor, " out"] | None
    out: int
    channels: int
    extra: tuple[Tensor, ...] = ()
    gated: bool = False


OPERATIONS = (
    *("pack", "unpack", "rows", "quantise", "plain_codes", "norm_quantise"),
    *("linear", "linear_requantise", "gated", "batched", "attention", "read_cache"),
)
"""What a backend computes: none of it is for torch.compile to look into."""


Operation = TypeVar("Operation", bound=Callable[..., Any])


def opaque(operation: Operation) -> Operation:
    """The operation, which a compiled function calls as it is and does not look into."""
    disabled: list[Callable[..., Any]] = []

    def call(*arguments: Any, **named: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return operation(*arguments, **named)
        if not disabled:
            disabled.append(torch.compiler.disable(operation, reason="INT8 kernels run outside of compiled graphs"))
        return disabled[0](*arguments, **named)

    call.__code__ = call.__code__.replace(
        co_name=operation.__name__
    )  # one of its own: torch counts recompilations of it
    return cast(Operation, functools.wraps(operation)(call))


class Backend:
    """Base of the backends. `why_not` says why one cannot run here."""

    name: ClassVar[str]
    device: ClassVar[str] = "cpu"
    """Device type of the tensors that it takes."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _hide_operations(cls)

    @classmethod
    def why_not(cls) -> str | None:
        """None if this backend runs on this machine, else the reason, in words, with what would help."""
        raise NotImplementedError

    def pack(
        self,
        w: Int8[Tensor, "out channel"],
        step: Float[Tensor, " out_or_1"],
        bias: Float[Tensor, " out"] | None = None,
        gated: bool = False,
    ) -> Packed:
        """Take over the codes of a weight, gate and up stacked if `gated`. Raises `SqvizError` if it is too wide."""
        raise NotImplementedError

    def unpack(self, packed: Packed) -> Int8[Tensor, "out channel"]:
        """The codes of a weight again, [out channel]."""
        raise NotImplementedError

    def rows(self, packed: Packed, which: Int[Tensor, " row"]) -> Int8[Tensor, "row channel"]:
        """The codes of some out channels, as an embedding tied to this weight reads them."""
        return self.unpack(packed)[which]

    def quantise(
        self,
        x: Float[Tensor, "row channel"],
        step: Float[Tensor, "1"] | None = None,
        share: Share = "token",
        divisor: Float[Tensor, " channel"] | None = None,
    ) -> Codes:
        """See `spec.quantise`. Raises `NonFinite`."""
        raise NotImplementedError

    def plain_codes(self, x: Float[Tensor, "row channel"]) -> tuple[Int8[Tensor, "row channel"], Float[Tensor, " row"]]:
        """Codes per row as `spec` lays them out, and their steps; for keys and values. Raises `NonFinite`."""
        return spec.quantise(x)

    def linear(self, x: Codes, w: Packed, dtype: torch.dtype = torch.float32) -> Float[Tensor, "row out"]:
        """See `spec.linear`."""
        raise NotImplementedError

    def linear_requantise(self, x: Codes, w: Packed, step: Float[Tensor, "1"]) -> Codes:
        """Codes of the result for the next INT8 operator, under its static step. See `spec.requantise`."""
        return self.quantise(self.linear(x, w), step)

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
        """See `spec.norm_quantise`; `out` receives the normalised X itself. Raises `NonFinite`."""
        y = spec.norm(x, gain, bias, eps, kind)
        if out is not None:
            out.copy_(y)
        return self.quantise(y, step, share)

    def gated(self, x: Codes, gate_up: Packed, step: Float[Tensor, "1"] | None = None, share: Share = "token") -> Codes:
        """Codes of SiLU(gate) · up from a weight packed as `gated`. See `spec.gate_quantise`. Raises `NonFinite`."""
        gate, up = self.linear(x, gate_up).chunk(2, 1)
        return self.quantise(F.silu(gate) * up, step, share)

    def batched(
        self,
        a: Codes,
        b: Int8[Tensor, "outer inner out channel"],
        b_step: Float[Tensor, "outer inner out"] | None = None,
        scaling: float = 1.0,
    ) -> Float[Tensor, "outer inner row out"]:
        """See `spec.batched`; the rows of A belong to the outer · inner matrices in turn. Here: one after another."""
        outer, inner, out = b.shape[:3]
        rows = a.rows // max(1, outer * inner)
        y, one = a.step.new_empty(outer, inner, rows, out), a.step.new_ones(1)
        for index in range(outer * inner):
            place = divmod(index, inner)
            packed = self.pack(b[place], one if b_step is None else b_step[place])
            y[place] = self.linear(a.part(index * rows, rows), packed)
        return y if b_step is None else y.mul_(scaling)

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
        """See `spec.attention`. Raises `NonFinite`, and `SqvizError` for more keys than an int32 can sum."""
        batch, heads, queries, _ = q.shape
        kv_heads, keys, dims_v = v.shape[1:]
        spec.check_keys(keys)
        if not q.numel() or not keys or not dims_v:
            return q.new_zeros(batch, heads, queries, dims_v)
        s = self.batched(self.quantise(q.flatten(0, 2)), k, k_step, scaling)
        p = spec.probabilities(s.view(batch, heads, queries, keys), causal_from, mask)
        p = p.view(batch, kv_heads, -1, keys) * v_step[:, :, None]
        o = self.batched(self.quantise(p.flatten(0, 2)), v.transpose(2, 3))
        return o.view(batch, heads, queries, dims_v).to(q.dtype)

    def read_cache(
        self, codes: Int8[Tensor, "*rows channel"], step: Float[Tensor, "*rows"], dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "*rows channel"]:
        """See `spec.read_cache`."""
        return spec.read_cache(codes, step, dtype)

    def __repr__(self) -> str:
        return f"<backend {self.name}>"

    def __deepcopy__(self, memo: Any) -> "Backend":
        return self  # a backend holds no state of a model's


def _hide_operations(kind: type[Backend]) -> None:
    for name in OPERATIONS:
        if name in kind.__dict__:
            setattr(kind, name, opaque(kind.__dict__[name]))


_hide_operations(Backend)

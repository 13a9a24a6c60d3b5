"""The definition of every INT8 operation here, in plain torch: rounding, ranges, order of scaling, layout.

    codes     int8 in ±127 (−128 is never made), row-major [row channel]
    step      Δ = max|x| / 127, float32; 0 where that is below the smallest normal float32, and then all codes are 0
    rounding  ⌈x / Δ⌋ by a true division, halves to even; values beyond a given (static) step saturate
    sums      int32, exact: |Σ| < 2³¹ as long as there are at most MAX_CHANNELS of them
    scaling   ((float32(sum) · Δ_x) · Δ_w) + bias, in this order, each operation rounded to float32, none contracted
    output    float32, rounded once more (to even) where another dtype is asked for

(thesis equations 3.1 and 3.2; a per-token step varies along rows, a per-channel one along out channels, and only those
can stand outside of the sum.) Backends are bit-equal to this wherever the arithmetic is integer or elementwise. Where
a float sum is involved (a norm's mean square, softmax) or an exponential, the order of summation is free; then codes
differ by at most one, in few places.

Input of any float dtype is widened, or for float64 narrowed, to float32 first. NaN and infinities are refused with
`NonFinite`: no step can represent them, and a saturated NaN would be a wrong number that looks like a right one.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int8, Int32
from torch import Tensor
from torch.nn import functional as F

from sqviz.errors import NonFinite, SqvizError

TOP = 127
"""The largest code."""
MAX_CHANNELS = (2**31 - 1) // (TOP * TOP)  # 133 144
"""Products of two codes that an int32 can sum whatever they are."""
TINY = torch.finfo(torch.float32).tiny
"""The smallest normal float32: steps below count as 0."""

Share = Literal["token", "tensor"]
"""What shares a dynamic step: one row, or all rows of one call."""
Norm = Literal["rms", "layer"]

# --- quantising ---


def quantise(
    x: Float[Tensor, "row channel"],
    step: Float[Tensor, "1"] | None = None,
    share: Share = "token",
    divisor: Float[Tensor, " channel"] | None = None,
) -> tuple[Int8[Tensor, "row channel"], Float[Tensor, " row_or_1"]]:
    """Codes of X, or of X / divisor, and their steps: the given static one, one per row, or one for all.

    Raises `NonFinite` for a NaN or an infinity.
    """
    value = x.float()
    if divisor is not None:
        value = value / divisor.float()
    return _codes(value, step, share)


def norm_quantise(
    x: Float[Tensor, "row channel"],
    gain: Float[Tensor, " channel"],
    bias: Float[Tensor, " channel"] | None,
    eps: float,
    kind: Norm,
    step: Float[Tensor, "1"] | None = None,
    share: Share = "token",
) -> tuple[Int8[Tensor, "row channel"], Float[Tensor, " row_or_1"]]:
    """Codes of RMSNorm(X) or LayerNorm(X) and their steps; smoothing is folded into `gain` and `bias` beforehand.

    RMSNorm: X / sqrt(mean(X²) + eps) · gain. LayerNorm: the same of X − mean(X). Raises `NonFinite`.
    """
    return _codes(norm(x, gain, bias, eps, kind), step, share)


def norm(
    x: Float[Tensor, "row channel"],
    gain: Float[Tensor, " channel"],
    bias: Float[Tensor, " channel"] | None,
    eps: float,
    kind: Norm,
) -> Float[Tensor, "row channel"]:
    """RMSNorm or LayerNorm in float32."""
    value = x.float()
    if kind == "layer":
        value = value - value.mean(-1, keepdim=True)
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps) * gain.float()
    return value if bias is None else value + bias.float()


def gate_quantise(
    gate: Float[Tensor, "row channel"],
    up: Float[Tensor, "row channel"],
    step: Float[Tensor, "1"] | None = None,
    share: Share = "token",
) -> tuple[Int8[Tensor, "row channel"], Float[Tensor, " row_or_1"]]:
    """Codes of SiLU(gate) · up, and their steps. Raises `NonFinite`."""
    return _codes(F.silu(gate.float()) * up.float(), step, share)


def _codes(
    value: Float[Tensor, "row channel"], step: Float[Tensor, "1"] | None, share: Share
) -> tuple[Int8[Tensor, "row channel"], Float[Tensor, " row_or_1"]]:
    if not bool(torch.isfinite(value).all()):
        raise NonFinite("the input of an INT8 product holds a NaN or an infinity, which no step can represent.")
    if step is not None:
        check_step(step)
    else:
        rows = value.abs().amax(1) if value.shape[1] else value.new_zeros(len(value))
        if share == "tensor":
            rows = rows.amax(0, keepdim=True) if len(rows) else value.new_zeros(1)
        step = rows / TOP
        step = torch.where(step < TINY, 0.0, step)
    safe = torch.where(step == 0, 1.0, step)
    codes = (value / safe[:, None]).round().clamp(-TOP, TOP)
    return torch.where(step[:, None] == 0, 0.0, codes).to(torch.int8), step


# --- products ---


def product(x: Int8[Tensor, "row channel"], w: Int8[Tensor, "out channel"]) -> Int32[Tensor, "row out"]:
    """X̄ W̄ᵀ, exact: summed in float64, which holds integers up to 2⁵³.

    Raises `SqvizError` if an int32 could overflow.
    """
    check_channels(x.shape[-1])
    return (x.double() @ w.double().T).to(torch.int32)


def check_channels(channels: int) -> None:
    """Raise `SqvizError` if the sum over so many channels could exceed an int32."""
    if channels > MAX_CHANNELS:
        raise SqvizError(
            f"{channels} channels: an int32 holds the sum of at most {MAX_CHANNELS} products of two codes in ±127. "
            "Leave this linear in floating point, or split it."
        )


def check_keys(keys: int) -> None:
    """Raise `SqvizError` if the sum of PV over so many keys could exceed an int32."""
    if keys > MAX_CHANNELS:
        raise SqvizError(
            f"{keys} keys: an int32 holds the sum of at most {MAX_CHANNELS} products of two codes in ±127. Let fewer "
            "keys be seen (`SinkCache` keeps some), or quantise with attention=False."
        )


def check_step(step: Float[Tensor, "1"]) -> None:
    """Raise `SqvizError` for a given (static) step that is negative, infinite or NaN. 0 is one: all codes are 0."""
    if not 0 <= step.item() < math.inf:
        raise SqvizError(
            f"step={step.item()}: a static step is max|x| / 127 of what was calibrated on, finite and ≥ 0."
        )


def scale(
    sums: Int32[Tensor, "row out"],
    x_step: Float[Tensor, " row_or_1"],
    w_step: Float[Tensor, " out_or_1"],
    bias: Float[Tensor, " out"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "row out"]:
    """The epilogue: ((sum · Δ_x) · Δ_w) + bias."""
    y = sums.float() * x_step[:, None] * w_step
    return (y if bias is None else y + bias.float()).to(dtype)


def requantise(y: Float[Tensor, "row out"], step: Float[Tensor, "1"]) -> Int8[Tensor, "row out"]:
    """Codes of a float32 result for the next INT8 operator, under its static step."""
    return _codes(y, step, "tensor")[0]


def linear(
    x: Int8[Tensor, "row channel"],
    x_step: Float[Tensor, " row_or_1"],
    w: Int8[Tensor, "out channel"],
    w_step: Float[Tensor, " out_or_1"],
    bias: Float[Tensor, " out"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "row out"]:
    """Y = diag(Δ_x) X̄ W̄ᵀ diag(Δ_w) + bias (thesis equation 3.2)."""
    return scale(product(x, w), x_step, w_step, bias, dtype)


# --- attention ---


def batched(
    a: Int8[Tensor, "outer inner row channel"],
    a_step: Float[Tensor, "outer inner row"],
    b: Int8[Tensor, "outer inner out channel"],
    b_step: Float[Tensor, "outer inner out"] | None = None,
    scaling: float = 1.0,
) -> Float[Tensor, "outer inner row out"]:
    """Products of many matrices: ((Ā B̄ᵀ · Δ_a) · Δ_b) · scaling, in this order; without Δ_b Ā B̄ᵀ · Δ_a alone.

    QKᵀ is one of a query head's (or of all that read one key head) rows with keys; PV one of probabilities with Vᵀ,
    whose steps have moved into the probabilities. Raises `SqvizError` if an int32 could overflow.
    """
    check_channels(a.shape[3])
    y = (a.double() @ b.double().transpose(2, 3)).float() * a_step[..., None]
    return y if b_step is None else y * b_step[:, :, None] * scaling


def probabilities(
    s: Float[Tensor, "batch head query key"], causal_from: int | None, mask: Tensor | None
) -> Float[Tensor, "batch head query key"]:
    """softmax(S + mask) over the keys that a query sees; zeros where it sees none. Arguments: see `attention`."""
    seen = torch.ones(s.shape[2:], dtype=torch.bool, device=s.device)
    if causal_from is not None:
        seen = seen.tril(causal_from)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        s, seen = s + mask.float(), seen & (mask > torch.finfo(mask.dtype).min)
    p = torch.softmax(s.masked_fill(~seen, -math.inf), -1)
    return torch.where(seen.any(-1, keepdim=True), p, 0.0)


def read_cache(
    codes: Int8[Tensor, "*rows channel"], step: Float[Tensor, "*rows"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "*rows channel"]:
    """code · step, in float32, rounded once more: what an INT8 cache of keys or values stands for."""
    return (codes.float() * step[..., None]).to(dtype)


def attention(
    q: Float[Tensor, "batch head query dim"],
    k: Int8[Tensor, "batch kv_head key dim"],
    k_step: Float[Tensor, "batch kv_head key"],
    v: Int8[Tensor, "batch kv_head key dim_v"],
    v_step: Float[Tensor, "batch kv_head key"],
    scaling: float,
    causal_from: int | None = None,
    mask: Bool[Tensor, "batch_or_1 head_or_1 query key"]
    | Float[Tensor, "batch_or_1 head_or_1 query key"]
    | None = None,
) -> Float[Tensor, "batch head query dim_v"]:
    """softmax(Q Kᵀ · scaling + mask) V with both products in integers (thesis Figure 3.3).

        S = ((Q̄ K̄ᵀ · Δ_q) · Δ_k) · scaling            Q̄ per token and head
        P = softmax(S)
        O = Q(P ∘ Δ_v) V̄ · Δ_p                         P ∘ Δ_v quantised per query and head

    Both products are `batched`.

    A step per token of V cannot stand outside of the sum over tokens; it moves into the probabilities before those are
    quantised. So keys and values may come from a cache that keeps one step per token and head.

    Args:
        q: queries, after positions were put in.
        k, k_step, v, v_step: codes and steps of keys and values; query head h reads key head h // (heads / kv_heads).
        scaling: usually 1 / sqrt(dim).
        causal_from: query i sees keys 0 … causal_from + i; None: all, as far as the mask lets it.
        mask: what else is hidden: False, or −inf; finite floats are added to S.

    A query that sees nothing gets zeros. Raises `NonFinite` for NaN and infinities, and `SqvizError` if an int32 could
    overflow: there may be at most MAX_CHANNELS keys.
    """
    batch, heads, queries, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    check_keys(keys)
    together = (batch, kv_heads, heads // kv_heads * queries)  # heads that share a key head are further rows
    codes, q_step = _codes(q.float().flatten(0, 2), None, "token")
    s = batched(codes.view(*together, -1), q_step.view(together), k, k_step, scaling)
    p = probabilities(s.view(batch, heads, queries, keys), causal_from, mask)
    p_codes, p_step = _codes((p.view(*together, keys) * v_step[:, :, None]).flatten(0, 2), None, "token")
    o = batched(p_codes.view(*together, keys), p_step.view(together), v.transpose(2, 3))
    return o.view(batch, heads, queries, -1).to(q.dtype)


# --- the sweep over α ---


def sweep(
    x: Float[Tensor, "token channel"],
    w: Float[Tensor, "out channel"],
    y: Float[Tensor, "token out"],
    s: Float[Tensor, "alpha channel"],
    x_step: Float[Tensor, " alpha"] | None,
    w_step: Float[Tensor, " alpha"] | None,
) -> Float[Tensor, "alpha token"]:
    """Σ over out channels of |Y − Q(X / s) Q(s·W)ᵀ|², per token, for the s of each α (thesis equation 3.4).

    Args:
        x, w: input and weight of one linear, before smoothing.
        y: X Wᵀ in float32.
        s: smoothing factors, one row per α.
        x_step, w_step: one step per α for the whole matrix; None: one per token, one per out channel.

    Float64 sums of float32 differences. Raises `NonFinite`.
    """
    found = []
    for index, factors in enumerate(s):
        given = (None if step is None else step[index : index + 1] for step in (x_step, w_step))
        x_codes, x_own = _codes(x.float() / factors, next(given), "token")
        w_codes, w_own = _codes(w.float() * factors, next(given), "token")
        found.append((linear(x_codes, x_own, w_codes, w_own) - y).double().square().sum(1))
    return torch.stack(found)

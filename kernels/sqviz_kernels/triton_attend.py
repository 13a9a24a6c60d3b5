"""Attention with INT8 products, and reading an INT8 key-value cache, as launches of the kernels of `triton_attention`.

    quantise Q    S = ((Q̄ K̄ᵀ · Δ_q) · Δ_k) · scaling    P̄, Δ_p of softmax(S) ∘ Δ_v    O = P̄ V̄ · Δ_p

Scores are kept for a portion of the queries at a time (`WORKSPACE` bytes), so memory stays bounded for long prompts.
"""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz_kernels.backend import Codes
from sqviz_kernels.gpu import round_up
from sqviz_kernels.spec import check_channels, check_keys
from sqviz_kernels.tiles import Tile, product_tiles
from sqviz_kernels.triton_runtime import (
    ALIGN,
    FLOATS,
    Launcher,
    block,
    kernels,
    last_contiguous,
    power_of_two,
    stored,
    warps,
)

WORKSPACE = 256 * 2**20
"""Bytes of scores and their codes that attention may hold at a time; one query of each head it always holds."""


def attention(
    backend: Launcher,
    q: Float[Tensor, "batch head query dim"],
    k: Int8[Tensor, "batch kv_head key dim"],
    k_step: Float[Tensor, "batch kv_head key"],
    v: Int8[Tensor, "batch kv_head key dim_v"],
    v_step: Float[Tensor, "batch kv_head key"],
    scaling: float,
    causal_from: int | None,
    mask: Tensor | None,
) -> Float[Tensor, "batch head query dim_v"]:
    """See `spec.attention`."""
    check_keys(k.shape[2])
    batch, heads, queries = q.shape[:3]
    out = q.new_empty((batch, heads, queries, v.shape[3]), dtype=stored(q.dtype, q.device))
    k, v, k_step, v_step = (last_contiguous(t) for t in (k, v, k_step.float(), v_step.float()))
    portion = max(1, WORKSPACE // max(1, 5 * batch * heads * round_up(k.shape[2], ALIGN)))
    for start in range(0, queries, portion):
        those = slice(start, start + portion)
        causal = None if causal_from is None else causal_from + start
        hidden = None if mask is None else mask[:, :, those]
        out[:, :, those] = _attend(backend, q[:, :, those], k, k_step, v, v_step, scaling, causal, hidden, out.dtype)
    return out.to(q.dtype)


def _attend(
    backend: Launcher,
    q: Tensor,
    k: Tensor,
    k_step: Tensor,
    v: Tensor,
    v_step: Tensor,
    scaling: float,
    causal_from: int | None,
    mask: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """One portion of the queries."""
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    together = (batch * kv_heads, heads // kv_heads * queries)
    x = backend.quantise(q.reshape(-1, dim))
    s = q.new_empty((*together, round_up(keys, ALIGN)), dtype=torch.float32)
    _batched(backend, x, k, k_step, s, scaling)
    p = _softmax(backend, s, v_step, queries, heads, causal_from, mask)
    o = q.new_empty((*together, v.shape[3]), dtype=dtype)
    _batched(backend, p, v.transpose(2, 3), None, o, 1.0)
    return o.view(batch, heads, queries, v.shape[3])


def batched(
    backend: Launcher,
    a: Codes,
    b: Int8[Tensor, "outer inner out channel"],
    b_step: Float[Tensor, "outer inner out"] | None,
    scaling: float,
) -> Float[Tensor, "outer inner row out"]:
    """See `spec.batched`."""
    outer, inner, out, channels = b.shape
    check_channels(channels)
    if a.channels != channels:
        raise SqvizError(f"a has {a.channels} channels and b {channels}: they must be the same.")
    rows = a.rows // max(1, outer * inner)
    wide = a.step.new_empty((outer * inner, rows, round_up(out, ALIGN)))
    steps = None if b_step is None else last_contiguous(b_step.float())
    own = Codes(a.values, a.step.expand(a.rows).contiguous(), a.rows, channels)
    _batched(backend, own, b, steps, wide, 1.0 if b_step is None else scaling)
    return wide[:, :, :out].unflatten(0, (outer, inner))


def _batched(
    backend: Launcher,
    a: Codes,
    b: Int8[Tensor, "outer inner N K"],
    b_step: Float[Tensor, "outer inner N"] | None,
    c: Float[Tensor, "batch row N"],
    scaling: float,
) -> None:
    """C = A Bᵀ with its steps; the rows of A belong to the outer · inner batches in turn."""
    outer, inner, n, depth = b.shape
    rows = c.shape[1]
    steps = b_step if b_step is not None else a.step.view(1, 1, -1)
    args = {
        "a_ptr": a.values,
        "b_ptr": b,
        "c_ptr": c,
        "a_step_ptr": a.step,
        "b_step_ptr": steps,
        "scaling": float(scaling),
        "M": rows,
        "N": n,
        "K": depth,
        "K_A": a.values.shape[1],
        "inner": inner,
        "stride_am": a.values.stride(0),
        "stride_bo": b.stride(0),
        "stride_bi": b.stride(1),
        "stride_bk": b.stride(3),
        "stride_bn": b.stride(2),
        "stride_so": steps.stride(0),
        "stride_si": steps.stride(1),
        "stride_cm": c.stride(1),
    }

    def launch(tile: Tile) -> None:
        grid = (-(-rows // tile.m) * -(-n // tile.n), outer * inner)
        constants = {"COLUMNS": b_step is not None, "BM": tile.m, "BN": tile.n, "BK": tile.k}
        backend.launch(kernels().batched_tiles, grid, args, constants, tile.warps, tile.stages)

    shape = (*map(power_of_two, (rows, n, depth)), outer * inner, c.dtype, b_step is None)
    backend.tuned(c.device, shape, product_tiles(backend.family(c.device), rows), launch)


def _softmax(
    backend: Launcher,
    s: Float[Tensor, "batch_kv row wide"],
    v_step: Float[Tensor, "batch kv_head key"],
    queries: int,
    heads: int,
    causal_from: int | None,
    mask: Tensor | None,
) -> Codes:
    """Codes of softmax(S) ∘ Δ_v, a step for each row."""
    k = kernels()
    outer, rows, wide = s.shape
    batch, kv_heads, keys = v_step.shape
    values, steps = s.new_empty((outer * rows, wide), dtype=torch.int8), s.new_empty(outer * rows)
    hidden, lowest, kind = s.view(1, 1, outer * rows, wide), 0.0, k.UNMASKED
    if mask is not None and mask.dtype == torch.bool:
        hidden, kind = mask.view(torch.int8).expand(batch, heads, queries, keys), k.BOOLEAN
    elif mask is not None:
        added = mask if mask.dtype in FLOATS else mask.float()
        hidden, kind = added.expand(batch, heads, queries, keys), k.ADDED
        lowest = torch.finfo(added.dtype).min
    args = {
        "s_ptr": s,
        "v_step_ptr": v_step,
        "mask_ptr": hidden,
        "codes_ptr": values,
        "step_ptr": steps,
        "flag_ptr": backend.flag(s.device),
        "keys": keys,
        "padded": wide,
        "queries": queries,
        "groups": heads // kv_heads,
        "kv_heads": kv_heads,
        "causal_from": causal_from or 0,
        "lowest": float(lowest),
        "stride_s": wide,
        "stride_codes": wide,
        "stride_vb": v_step.stride(0),
        "stride_vh": v_step.stride(1),
    } | dict(zip(("stride_mb", "stride_mh", "stride_mq", "stride_mk"), hidden.stride(), strict=True))
    size = block(keys)
    constants = {"CAUSAL": causal_from is not None, "MASK": kind, "BLOCK": size}
    backend.launch(k.softmax_rows, (rows, outer), args, constants, warps(size))
    return Codes(values, steps, outer * rows, keys)


def read_cache(
    backend: Launcher, codes: Int8[Tensor, "*rows channel"], step: Float[Tensor, "*rows"], dtype: torch.dtype
) -> Float[Tensor, "*rows channel"]:
    """code · step, rounded to dtype."""
    flat, steps = last_contiguous(codes.flatten(0, -2)), step.float().flatten().contiguous()
    rows, channels = flat.shape
    out = flat.new_empty((rows, channels), dtype=stored(dtype, flat.device))
    size = block(channels, 16, 512)
    height = 2048 // size
    args = {"codes_ptr": flat, "step_ptr": steps, "out_ptr": out, "rows": rows, "channels": channels}
    strides = {"stride_codes": flat.stride(0), "stride_out": out.stride(0)}
    grid = (-(-rows // height),)
    backend.launch(kernels().dequantise_rows, grid, args | strides, {"ROWS": height, "BLOCK": size})
    return out.view(codes.shape).to(dtype)

"""The INT8 products of attention in Triton, and reading an INT8 key-value cache (arithmetic: see `triton_int8`).

    batched_tiles       S = ((Q̄ K̄ᵀ · Δ_q) · Δ_k) · scaling, and O = P̄ V̄ · Δ_p
    softmax_rows        codes of softmax(S) ∘ Δ_v, and Δ_p
    dequantise_rows     codes · step

Heads that share a key head are further rows of one product, [batch·kv_head, group·query, dim]: keys are read once for
all of them. Keys and values are taken with their strides (a slice of a larger cache will do), their last stride 1.

Simplification: S and P pass through memory. The step of a row of P is only known once the whole row is; a kernel that
never stores S would have to compute it twice. The launcher takes queries in portions that bound the memory.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from sqviz_kernels.triton_int8 import LARGEST, sums_of_tile, to_code, to_step

# MASK: what hides keys beside causality
UNMASKED, BOOLEAN, ADDED = (tl.constexpr(i) for i in range(3))


@triton.jit
def batched_tiles(
    a_ptr,  # int8 [batch M stride_am], contiguous; columns from K on are 0
    b_ptr,  # int8 [outer inner ...], where batch = outer · inner
    c_ptr,  # [batch M stride_cm]
    a_step_ptr,  # float32 [batch M]
    b_step_ptr,  # COLUMNS: float32 [outer inner N]
    scaling,
    M,
    N,
    K,
    K_A,  # K with padding
    inner,
    stride_am,
    stride_bo,
    stride_bi,
    stride_bk,
    stride_bn,
    stride_so,
    stride_si,
    stride_cm,
    COLUMNS: tl.constexpr,  # (sum · Δ_a) · Δ_b · scaling instead of sum · Δ_a
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program per tile of C (axis 0) and batch (axis 1)."""
    pid, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    across = tl.cdiv(N, BN)
    m, n = pid // across * BM, pid % across * BN
    rm, rn = tl.arange(0, BM), tl.arange(0, BN)
    am, bn = m + rm < M, n + rn < N
    a = a_ptr + (batch * M + m) * stride_am
    b = b_ptr + batch // inner * stride_bo + batch % inner * stride_bi + n.to(tl.int64) * stride_bn
    acc = sums_of_tile(a, b, stride_am, stride_bk, stride_bn, rm, rn, am, bn, K_A, K, BK)
    y = acc.to(tl.float32) * tl.load(a_step_ptr + batch * M + m + rm, mask=am, other=0.0)[:, None]
    if COLUMNS:
        b_step = b_step_ptr + batch // inner * stride_so + batch % inner * stride_si + n + rn
        y = y * tl.load(b_step, mask=bn, other=0.0)[None, :] * scaling
    c = c_ptr + (batch * M + m) * stride_cm + rm[:, None] * stride_cm + (n + rn)[None, :]
    tl.store(c, y.to(c_ptr.dtype.element_ty), mask=am[:, None] & bn[None, :])


@triton.jit
def _scores(s_ptr, mask_ptr, at, seen, padded, stride_mk, lowest, MASK: tl.constexpr):
    """A block of S + mask, −inf where nothing is seen. S is read up to its padding: 16 bytes at once."""
    inside = at < seen
    s = tl.where(inside, tl.load(s_ptr + at, mask=at < padded, other=0.0), float("-inf"))
    if MASK == BOOLEAN:
        s = tl.where(tl.load(mask_ptr + at * stride_mk, mask=inside, other=0) != 0, s, float("-inf"))
    elif MASK == ADDED:
        added = tl.load(mask_ptr + at * stride_mk, mask=inside, other=float("-inf")).to(tl.float32)
        s = tl.where(added > lowest, s + added, float("-inf"))
    return s


@triton.jit(do_not_specialize=["keys", "causal_from", "queries"])
def softmax_rows(
    s_ptr,  # float32 [batch kv_head, group query, stride_s]
    v_step_ptr,  # float32 [batch kv_head key]
    mask_ptr,  # bool (as int8) or float [batch head query key]
    codes_ptr,  # int8, as s
    step_ptr,  # float32 [batch kv_head, group query]
    flag_ptr,
    keys,
    padded,
    queries,
    groups,
    kv_heads,
    causal_from,
    lowest,
    stride_s,
    stride_codes,
    stride_vb,
    stride_vh,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    CAUSAL: tl.constexpr,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """P ∘ Δ_v quantised, one program per query of a head. A row that holds NaN, or sees +inf, gets the step NaN."""
    within, outer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = outer * groups * queries + within
    batch, kv_head, query = outer // kv_heads, outer % kv_heads, within % queries
    s_ptr += row * stride_s
    codes_ptr += row * stride_codes
    v_step_ptr += batch * stride_vb + kv_head * stride_vh
    if MASK != UNMASKED:
        mask_ptr += batch * stride_mb + (kv_head * groups + within // queries) * stride_mh + query * stride_mq
    seen = keys
    if CAUSAL:
        seen = tl.minimum(keys, tl.maximum(causal_from + query + 1, 0))
    at = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    finite = tl.full([BLOCK], 1, tl.int32)
    for start in range(0, seen, BLOCK):
        s = _scores(s_ptr, mask_ptr, start + at, seen, padded, stride_mk, lowest, MASK)
        finite = tl.minimum(finite, (s <= LARGEST).to(tl.int32))
        top = tl.maximum(top, s)
    highest = tl.max(top, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, seen, BLOCK):
        total += tl.exp(_scores(s_ptr, mask_ptr, start + at, seen, padded, stride_mk, lowest, MASK) - highest)
    mass = tl.sum(total, 0)
    mass = tl.where(mass == 0.0, 1.0, mass)
    most = tl.zeros([BLOCK], tl.float32)
    for start in range(0, seen, BLOCK):
        s = _scores(s_ptr, mask_ptr, start + at, seen, padded, stride_mk, lowest, MASK)
        p = tl.div_rn(tl.exp(s - highest), tl.zeros_like(s) + mass)
        p *= tl.load(v_step_ptr + start + at, mask=start + at < seen, other=0.0)
        finite = tl.minimum(finite, (p <= LARGEST).to(tl.int32))
        most = tl.maximum(most, p)
    fine = tl.min(finite, 0) == 1
    step = to_step(tl.max(most, 0), fine)
    for start in range(0, padded, BLOCK):
        s = _scores(s_ptr, mask_ptr, start + at, seen, padded, stride_mk, lowest, MASK)
        p = tl.div_rn(tl.exp(s - highest), tl.zeros_like(s) + mass)
        p *= tl.load(v_step_ptr + start + at, mask=start + at < seen, other=0.0)
        tl.store(codes_ptr + start + at, to_code(tl.where(fine, p, 0.0), step), mask=start + at < padded)
    tl.store(flag_ptr, 1, mask=fine == 0)
    tl.store(step_ptr + row, step)


@triton.jit
def dequantise_rows(
    codes_ptr,
    step_ptr,
    out_ptr,
    rows,
    channels,
    stride_codes,
    stride_out,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """float32(code) · step of the row, rounded to the dtype of out. `ROWS` rows a program."""
    rm = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    step = tl.load(step_ptr + rm, mask=rm < rows, other=0.0)[:, None]
    codes, out = codes_ptr + rm.to(tl.int64)[:, None] * stride_codes, out_ptr + rm.to(tl.int64)[:, None] * stride_out
    for start in range(0, channels, BLOCK):
        at = start + tl.arange(0, BLOCK)[None, :]
        inside = (rm[:, None] < rows) & (at < channels)
        v = tl.load(codes + at, mask=inside, other=0).to(tl.float32) * step
        tl.store(out + at, v.to(out_ptr.dtype.element_ty), mask=inside)

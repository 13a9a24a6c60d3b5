"""INT8 kernels in Triton: one source for NVIDIA, AMD and the interpreter (TRITON_INTERPRET=1, on CPU tensors).

    quantise_rows       codes of X, X / divisor, SiLU(gate)·up, RMSNorm(X) or LayerNorm(X); a step per row or one given
    linear_tiles        ((float32(A Bᵀ) · Δ_a) · Δ_b) + bias, as int32, float32, float16, bfloat16 or codes again
    error_rows          Σ |Y − Z|² of each row, in float64

and in `triton_attention` the products of attention. `spec` defines the results; `triton_launch` lays out the operands.
What keeps a GPU bit-equal to the definition, and to the interpreter:

    division    tl.div_rn and tl.sqrt_rn, rounded as IEEE says; `/` compiles to an approximation on NVIDIA
    rounding    (v + 1.5·2²³) − 1.5·2²³ rounds a float32 below 2²² to a whole number, halves to even
    products    int32 sums are exact in any order; the epilogue is mul, mul, add, compiled without fusing them

Layout: channels are contiguous (last stride 1). Rows of codes are padded with zeros to 16 channels: 16 bytes are one
load. A row of any length is read in blocks, again for each pass: all but the first come from cache. Nothing
outside of a tensor is read: lanes beyond its edge are masked.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

TOP = tl.constexpr(127.0)
TINY = tl.constexpr(2.0**-126)  # the smallest normal float32
LARGEST = tl.constexpr((2.0 - 2.0**-23) * 2.0**127)  # the largest float32
MAGIC = tl.constexpr(1.5 * 2.0**23)

# SOURCE: what quantise_rows reads
PLAIN, DIVIDED, GATED, RMS, LAYER = (tl.constexpr(i) for i in range(5))
# STEP: a step for each row; the one given; or no codes, only max|x| of each row
TOKEN, STATIC, MAXIMA = (tl.constexpr(i) for i in range(3))
# OUT: what linear_tiles stores
SUMS, FLOATS, CODES = (tl.constexpr(i) for i in range(3))


@triton.jit
def to_code(v, step):
    """⌈v / step⌋ in ±127 for finite v; 0 where the step is 0 or NaN. Clamped first: rounding needs < 2²²."""
    alive = step > 0.0
    q = tl.div_rn(v, tl.zeros_like(v) + tl.where(alive, step, 1.0))
    q = tl.minimum(tl.maximum(q, -TOP), TOP)
    return tl.where(alive, (q + MAGIC) - MAGIC, 0.0).to(tl.int8)


@triton.jit
def to_step(most, finite):
    """max|x| / 127; 0 below the smallest normal float32; NaN if an element is not finite."""
    step = tl.div_rn(most, TOP)
    step = tl.where(step < TINY, 0.0, step)
    return tl.where(finite, step, float("nan"))


@triton.jit
def _centred(x_ptr, at, inside, mean):
    return tl.where(inside, tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - mean, 0.0)


@triton.jit
def _value(x_ptr, second_ptr, third_ptr, at, inside, mean, inverse, SOURCE: tl.constexpr, BIAS: tl.constexpr):
    """A block of what is to be quantised: float32, zeros outside."""
    v = _centred(x_ptr, at, inside, mean)
    if SOURCE == DIVIDED:
        v = tl.div_rn(v, tl.load(second_ptr + at, mask=inside, other=1.0).to(tl.float32))
    elif SOURCE == GATED:
        v = tl.div_rn(v, 1.0 + tl.exp(-v)) * tl.load(second_ptr + at, mask=inside, other=0.0).to(tl.float32)
    elif SOURCE >= RMS:
        v = v * inverse * tl.load(second_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            v = v + tl.load(third_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return v


@triton.jit
def _norm(x_ptr, channels, count, eps, SOURCE: tl.constexpr, BLOCK: tl.constexpr):
    """Mean (0 for RMSNorm) and 1 / sqrt(mean of squares + eps) of a row."""
    at = tl.arange(0, BLOCK)
    mean = 0.0
    if SOURCE == LAYER:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, channels, BLOCK):
            total += _centred(x_ptr, start + at, start + at < channels, 0.0)
        mean = tl.div_rn(tl.sum(total, 0), count)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        v = _centred(x_ptr, start + at, start + at < channels, mean)
        total += v * v
    return mean, tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(total, 0), count) + eps))


@triton.jit
def quantise_rows(
    x_ptr,  # float [row channel]
    second_ptr,  # DIVIDED: divisor [channel]; GATED: up, strides of x; RMS, LAYER: gain [channel]
    third_ptr,  # bias [channel]
    given_ptr,  # STATIC: the step
    codes_ptr,  # int8 [row padded]
    step_ptr,  # float32 [row]: the steps, or the maxima
    flag_ptr,  # int32, set where something is not finite
    kept_ptr,  # KEEP: float [row channel], receives what was quantised
    channels,
    padded,
    stride_x,
    stride_codes,
    stride_kept,
    count,  # channels, as a float
    eps,
    SOURCE: tl.constexpr,
    BIAS: tl.constexpr,
    STEP: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    codes_ptr += row * stride_codes
    if SOURCE == GATED:
        second_ptr += row * stride_x
    at = tl.arange(0, BLOCK)
    mean, inverse = 0.0, 1.0
    if SOURCE >= RMS:
        mean, inverse = _norm(x_ptr, channels, count, eps, SOURCE, BLOCK)
    finite = tl.full([BLOCK], 1, tl.int32)
    if STEP == STATIC:
        step = tl.load(given_ptr)
    else:
        most = tl.zeros([BLOCK], tl.float32)
        for start in range(0, channels, BLOCK):
            v = tl.abs(
                _value(x_ptr, second_ptr, third_ptr, start + at, start + at < channels, mean, inverse, SOURCE, BIAS)
            )
            finite = tl.minimum(finite, (v <= LARGEST).to(tl.int32))
            most = tl.maximum(most, v)
        step = to_step(tl.max(most, 0), tl.min(finite, 0) == 1)
    if STEP == MAXIMA:
        step = tl.where(tl.min(finite, 0) == 1, tl.max(most, 0), float("nan"))
    else:
        for start in range(0, padded, BLOCK):
            v = _value(x_ptr, second_ptr, third_ptr, start + at, start + at < channels, mean, inverse, SOURCE, BIAS)
            fine = tl.abs(v) <= LARGEST
            finite = tl.minimum(finite, fine.to(tl.int32))
            if KEEP:
                kept = v.to(kept_ptr.dtype.element_ty)
                tl.store(kept_ptr + row * stride_kept + start + at, kept, mask=start + at < channels)
            tl.store(codes_ptr + start + at, to_code(tl.where(fine, v, 0.0), step), mask=start + at < padded)
    broken = tl.min(finite, 0) == 0
    tl.store(flag_ptr, 1, mask=broken)
    tl.store(step_ptr + row, tl.where(broken, float("nan"), step))


@triton.jit
def sums_of_tile(a_ptr, b_ptr, stride_am, stride_bk, stride_bn, rm, rn, am, bn, K_A, K_B, BK: tl.constexpr):
    """Sums of one tile, int32 [BM, BN]; the pointers stand at its first row and column.

    Columns of A from K_A on are not read (nor rows of B from K_B on), and count as 0.
    """
    rk = tl.arange(0, BK)
    a = a_ptr + rm[:, None] * stride_am + rk[None, :]
    b = b_ptr + rn[None, :] * stride_bn + rk[:, None] * stride_bk
    acc = tl.zeros((rm.shape[0], rn.shape[0]), dtype=tl.int32)
    for k in range(0, K_A, BK):
        a_tile = tl.load(a, mask=am[:, None] & (rk[None, :] < K_A - k), other=0)
        b_tile = tl.load(b, mask=bn[None, :] & (rk[:, None] < K_B - k), other=0)
        acc = tl.dot(a_tile, b_tile, acc, out_dtype=tl.int32)
        a += BK
        b += BK * stride_bk
    return acc


@triton.jit
def _steps(step_ptr, at, inside, EACH: tl.constexpr):
    """Steps of the rows at `at`, or the one of all rows."""
    if EACH:
        return tl.load(step_ptr + at, mask=inside, other=0.0)
    return tl.load(step_ptr) + tl.zeros([at.shape[0]], tl.float32)


@triton.jit
def linear_tiles(
    a_ptr,  # int8 [M, K]
    b_ptr,  # int8 [N, K]
    c_ptr,  # [M, N] contiguous
    a_step_ptr,  # float32 [M] or [1]
    b_step_ptr,  # float32 [N] or [1]
    bias_ptr,  # float32 [N]
    given_ptr,  # CODES: float32 [1], the step of what is stored
    own_ptr,  # CODES: float32 [1], a copy of it, set to NaN where something is not finite
    flag_ptr,
    M,
    N,
    K,  # a multiple of 16, as are the strides
    stride_am,
    stride_bn,
    OUT: tl.constexpr,
    A_ROWS: tl.constexpr,  # a step for each row of A
    B_ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program per tile of C, `GROUP` tiles of rows sharing what they read of B while it is in cache."""
    pid = tl.program_id(0)
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * across) * GROUP
    height = min(down - first, GROUP)
    tile = pid % (GROUP * across)
    m, n = (first + tile % height) * BM, (tile // height) * BN
    rm, rn = tl.arange(0, BM), tl.arange(0, BN)
    am, bn = m + rm < M, n + rn < N
    a, b = a_ptr + m.to(tl.int64) * stride_am, b_ptr + n.to(tl.int64) * stride_bn
    acc = sums_of_tile(a, b, stride_am, 1, stride_bn, rm, rn, am, bn, K, K, BK)
    c = c_ptr + (m + rm).to(tl.int64)[:, None] * N + (n + rn)[None, :]
    inside = am[:, None] & bn[None, :]
    if OUT == SUMS:
        tl.store(c, acc, mask=inside)
    else:
        y = acc.to(tl.float32) * _steps(a_step_ptr, m + rm, am, A_ROWS)[:, None]
        y = y * _steps(b_step_ptr, n + rn, bn, B_ROWS)[None, :]
        if BIAS:
            y = y + tl.load(bias_ptr + n + rn, mask=bn, other=0.0)[None, :]
        if OUT == FLOATS:
            tl.store(c, y.to(c_ptr.dtype.element_ty), mask=inside)
        else:
            fine = tl.abs(y) <= LARGEST
            broken = tl.max(tl.max((inside & ~fine).to(tl.int32), 1), 0) == 1
            tl.store(c, to_code(tl.where(fine, y, 0.0), tl.load(given_ptr)), mask=inside)
            tl.store(own_ptr, float("nan"), mask=broken)
            tl.store(flag_ptr, 1, mask=broken)


@triton.jit
def error_rows(y_ptr, z_ptr, out_ptr, channels, stride_y, stride_z, BLOCK: tl.constexpr):
    """Σ |y − z|² of a row: the difference in float32, its square and the sum in float64."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, channels, BLOCK):
        inside = start + at < channels
        y = tl.load(y_ptr + row * stride_y + start + at, mask=inside, other=0.0)
        difference = (y - tl.load(z_ptr + row * stride_z + start + at, mask=inside, other=0.0)).to(tl.float64)
        total += difference * difference
    tl.store(out_ptr + row, tl.sum(total, 0))

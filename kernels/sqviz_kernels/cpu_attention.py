"""INT8 attention on the CPU: QKᵀ, softmax and PV of twelve queries at a time, with nothing between them in memory.

    for each sequence and key/value head:  pack K̄ into panels of 32 keys, V̄ into panels of 32 dims of 4 keys each
        for each query head that reads it, each 12 queries:
            S = Q̄ K̄ᵀ Δ_q Δ_k · scaling          as far as the last key that one of them sees
            U = e^(S − max S) ∘ Δ_v             P ∘ Δ_v without its denominator
            Ū = ⌈U / Δ_u⌋, Δ_u = max U / 127     in 0 … 127, so no 128 has to be added
            O = Ū V̄ · (Δ_u / Σ e^(S − max S))

which is `spec.attention` with the division by the softmax's denominator moved behind the last product. The products
are tiles of vnni_tile.py. For few queries (a cached step) packing would cost more than it saves: there keys are read as
they lie.

The arguments are addresses, strides in bytes and numbers, in tuples:

    shape   heads, query heads per key/value head, queries, keys, dims, dims of a value
    q       codes, from row to row, steps; rows are [sequence head query], codes are shifted by 128
    k, v    codes, from head to head, from token to token, steps, from head to head
    mask    kind, address, from sequence to sequence, from head to head, from query to query
    out     address, dtype, from row to row
"""

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.extending import intrinsic

from sqviz_kernels.cpu_loops import as_float, bytes_, floats, ints, write_row
from sqviz_kernels.vnni_tile import BYTES, F32, INTS, Emit, panels_of

_LOW = np.float32(-87)
_LOG2E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504088896341), np.float32(0.693359375), np.float32(-2.12194440e-4)
_C7, _C6, _C5, _C4, _C3, _C2 = (np.float32(1 / d) for d in (5040, 720, 120, 24, 6, 2))
_ONE, _NONE, _TOP = np.float32(1), np.float32(-np.inf), np.float32(127)
_TINY = np.float32(np.finfo(np.float32).tiny)
NO_MASK, BOOLEAN, ADDED = 0, 1, 2
ROWS = 12
FEW = 2
"""Queries up to which keys are read as they lie."""


@intrinsic
def _dot64(typing, q, k):
    """Σ over 64 dims of q · (k + 128), both given as addresses of int8 codes, q shifted by 128."""

    def generate(context, builder, signature, arguments):
        emit = Emit(builder)
        flip = ir.Constant(ir.VectorType(ir.IntType(32), 16), [ir.Constant(ir.IntType(32), -0x7F7F7F80)] * 16)
        query, key = (builder.xor(emit.load(address, INTS), flip) for address in arguments)
        if BYTES is not INTS:
            query, key = builder.bitcast(query, BYTES), builder.bitcast(key, BYTES)
        lanes = emit.call("llvm.x86.avx512.vpdpbusd.512", INTS, ir.Constant(INTS, None), key, query)
        return emit.call("llvm.vector.reduce.add.v16i32", ir.IntType(32), lanes)

    return types.int32(types.intp, types.intp), generate


@njit(nogil=True, error_model="numpy", inline="always")
def exp(x):
    """e^x for x ≤ 0, to about 2 ulp; below −87, 0."""
    n = np.rint(np.float32(max(x, _LOW) * _LOG2E))
    r = np.float32(np.float32(max(x, _LOW) - np.float32(n * _LN2_HIGH)) - np.float32(n * _LN2_LOW))
    p = np.float32(_C7 * r + _C6)
    p = np.float32(p * r + _C5)
    p = np.float32(p * r + _C4)
    p = np.float32(p * r + _C3)
    p = np.float32(p * r + _C2)
    p = np.float32(p * r + _ONE)
    p = np.float32(p * r + _ONE)
    value = np.float32(p * as_float(np.int32(np.int32(np.int32(n) + np.int32(127)) << np.int32(23))))
    return value if x > _LOW else np.float32(0)


@njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _exponentials(s, highest):
    """S becomes e^(S − highest), and its sum is returned."""
    total = np.float32(0)
    for i in range(len(s)):
        value = exp(np.float32(s[i] - highest))
        s[i] = value
        total += value
    return total


@njit(nogil=True, error_model="numpy", fastmath={"nnan", "nsz"})
def _maximum(s):
    most = _NONE
    for i in range(len(s)):
        most = max(most, s[i])
    return most


@njit(nogil=True, error_model="numpy")
def _masked(s, scaling, kind, mask, keys):
    """S · scaling, and the row of the mask on it."""
    if kind == NO_MASK:
        for i in range(keys):
            s[i] = s[i] * scaling
    elif kind == BOOLEAN:
        seen = carray(bytes_(mask), keys)
        for i in range(keys):
            s[i] = s[i] * scaling if seen[i] else _NONE
    else:
        added = carray(floats(mask), keys)
        for i in range(keys):
            s[i] = s[i] * scaling + added[i]


@njit(nogil=True, error_model="numpy")
def _weights(s, v_step, codes, keys):
    """Codes of U for one query from its S, and what the sums have to be multiplied by; 0 if it sees nothing."""
    row = s[:keys]
    highest = _maximum(row)
    if highest <= np.float32(-3e38):
        codes[:] = np.uint8(0)
        return np.float32(0)
    total = _exponentials(row, highest)
    most = np.float32(0)
    for i in range(keys):
        row[i] = row[i] * v_step[i]
    most = _maximum(row)
    step = np.float32(most / _TOP)
    if step < _TINY:
        codes[:] = np.uint8(0)
        return np.float32(0)
    for i in range(keys):
        codes[i] = np.uint8(np.int32(np.rint(np.float32(row[i] / step))))
    codes[keys:] = np.uint8(0)
    return np.float32(step / total)


@njit(nogil=True, error_model="numpy")
def _pack_keys(k, stride, keys, fours, packed, start):
    """K̄ [key][dim] as panels [key / 32][dim / 4][32][4], and −128 Σ_dim K̄."""
    panels = (keys + 31) // 32
    for p in range(panels):
        for j in range(32):
            key = 32 * p + j
            if key < keys:
                words, total = carray(ints(k + key * stride), fours), np.int32(0)
                for f in range(fours):
                    packed[(p * fours + f) * 32 + j] = words[f]
                row = carray(bytes_(k + key * stride), 4 * fours)
                for d in range(4 * fours):
                    total = np.int32(total + np.int32(np.int8(row[d])))
                start[key] = np.int32(total * np.int32(-128))
            else:
                for f in range(fours):
                    packed[(p * fours + f) * 32 + j] = np.int32(0)
                start[key] = np.int32(0)


@njit(nogil=True, error_model="numpy")
def _pack_values(v, stride, keys, dims, packed):
    """V̄ [key][dim] as panels [dim / 32][key / 4][32][4], zeros beyond the end."""
    fours, panels = (keys + 3) // 4, (dims + 31) // 32
    packed[: panels * fours * 128] = np.uint8(0)
    for key in range(keys):
        row = carray(bytes_(v + key * stride), dims)
        for p in range(panels):
            at = (p * fours + key // 4) * 128 + key % 4
            for j in range(min(32, dims - 32 * p)):
                packed[at + 4 * j] = row[32 * p + j]


@njit(nogil=True, error_model="numpy")
def _query(q, dims):
    """128 · Σ q̄, which the dot products with k̄ + 128 hold too much."""
    codes, total = carray(bytes_(q), dims), np.int32(0)
    for d in range(dims):
        total = np.int32(total + np.int32(np.int32(codes[d]) - np.int32(128)))
    return np.int32(total * np.int32(128))


@njit(nogil=True, error_model="numpy")
def _scores(q, q_step, k, k_stride, k_step, keys, dims, s):
    """S of one query, keys read as they lie."""
    whole = dims // 64 * 64
    query, too_much = carray(bytes_(q), dims), _query(q, whole)
    for key in range(keys):
        total, at = np.int32(-too_much), k + key * k_stride
        for d in range(0, whole, 64):
            total = np.int32(total + _dot64(q + d, at + d))
        if whole < dims:
            row = carray(bytes_(at), dims)
            for d in range(whole, dims):
                code = np.int32(np.int32(query[d]) - np.int32(128))
                total = np.int32(total + np.int32(code * np.int32(np.int8(row[d]))))
        s[key] = np.float32(np.float32(total) * q_step) * k_step[key]


@njit(nogil=True, error_model="numpy")
def _values(codes, scale, v, v_stride, keys, dims, sums, out):
    """O of one query, values read as they lie; those with code 0 are not read at all."""
    sums[:dims] = np.int32(0)
    for key in range(keys):
        code = np.int32(codes[key])
        if code:
            row = carray(bytes_(v + key * v_stride), dims)
            for d in range(dims):
                sums[d] = np.int32(sums[d] + np.int32(code * np.int32(np.int8(row[d]))))
    for d in range(dims):
        out[d] = np.float32(np.float32(sums[d]) * scale)


@njit(nogil=True, error_model="numpy", cache=True)
def few_of(first, stop, shape, q, k, v, scaling, causal, mask, out):
    """As `heads_of`, without packing."""
    heads, groups, queries, keys, dims, dims_v = shape
    (q_at, q_stride, q_step), (k_at, k_head, k_stride, k_step, k_step_head) = q, k
    v_at, v_head, v_stride, v_step, v_step_head = v
    (mask_kind, mask_at, mask_batch, mask_head, mask_row), (out_at, out_kind, out_stride) = mask, out
    s, codes = np.empty(keys, np.float32), np.empty(keys, np.uint8)
    sums, result = np.empty(dims_v, np.int32), np.empty(dims_v, np.float32)
    steps = carray(floats(q_step), stop * groups * queries)
    for kv in range(first, stop):
        key_scale = carray(floats(k_step + kv * k_step_head), keys)
        value_scale = carray(floats(v_step + kv * v_step_head), keys)
        for head in range(kv * groups, kv * groups + groups):
            to_mask = mask_at + (head // heads) * mask_batch + (head % heads) * mask_head
            for i in range(queries):
                row, seen = head * queries + i, keys if causal < 0 else min(keys, causal + i + 1)
                _scores(q_at + row * q_stride, steps[row], k_at + kv * k_head, k_stride, key_scale, seen, dims, s)
                _masked(s, scaling, mask_kind, to_mask + i * mask_row, seen)
                scale = _weights(s, value_scale, codes, seen)
                _values(codes, scale, v_at + kv * v_head, v_stride, seen, dims_v, sums, result)
                write_row(out_at + row * out_stride, out_kind, result)


@njit(nogil=True, error_model="numpy", cache=True)
def heads_of(first, stop, shape, q, k, v, scaling, causal, mask, out):
    """Key/value heads first … stop − 1 of all sequences, counted through."""
    heads, groups, queries, keys, dims, dims_v = shape
    (q_at, q_stride, q_step), (k_at, k_head, k_stride, k_step, k_step_head) = q, k
    v_at, v_head, v_stride, v_step, v_step_head = v
    (mask_kind, mask_at, mask_batch, mask_head, mask_row), (out_at, out_kind, out_stride) = mask, out
    if queries <= FEW:
        few_of(first, stop, shape, q, k, v, scaling, causal, mask, out)
        return
    fours, wide_v = dims // 4, (dims_v + 31) // 32 * 32
    keys_32, keys_4 = (keys + 31) // 32 * 32, (keys + 3) // 4 * 4
    packed_k, start = np.empty(keys_32 * fours, np.int32), np.empty(keys_32, np.int32)
    packed_v, zeros = np.empty(wide_v * keys_4, np.uint8), np.zeros(wide_v, np.int32)
    ones, none = np.ones(wide_v, np.float32), np.zeros(max(wide_v, keys_32), np.float32)
    scores, codes = np.empty((ROWS, keys_32), np.float32), np.empty((ROWS, keys_4), np.uint8)
    steps, result = np.empty(ROWS, np.float32), np.empty((ROWS, wide_v), np.float32)
    key_scale = np.zeros(keys_32, np.float32)
    for kv in range(first, stop):
        _pack_keys(k_at + kv * k_head, k_stride, keys, fours, packed_k, start)
        _pack_values(v_at + kv * v_head, v_stride, keys, dims_v, packed_v)
        key_scale[:keys] = carray(floats(k_step + kv * k_step_head), keys)
        value_scale = carray(floats(v_step + kv * v_step_head), keys)
        for head in range(kv * groups, kv * groups + groups):
            to_mask = mask_at + (head // heads) * mask_batch + (head % heads) * mask_head
            for begin in range(0, queries, ROWS):
                rows = min(ROWS, queries - begin)
                row = head * queries + begin
                last = keys if causal < 0 else min(keys, causal + begin + rows)
                panels, fours_v = (last + 31) // 32, (last + 3) // 4
                panels_of(
                    F32,
                    0,
                    rows,
                    0,
                    panels,
                    q_at + row * q_stride,
                    q_stride,
                    packed_k.ctypes.data,
                    fours,
                    start.ctypes.data,
                    q_step + 4 * row,
                    4,
                    key_scale.ctypes.data,
                    none.ctypes.data,
                    scores.ctypes.data,
                    4 * keys_32,
                )
                for r in range(rows):
                    seen = last if causal < 0 else min(keys, causal + begin + r + 1)
                    _masked(scores[r], scaling, mask_kind, to_mask + (begin + r) * mask_row, seen)
                    steps[r] = _weights(scores[r], value_scale, codes[r, : 4 * fours_v], seen)
                for p in range(wide_v // 32):
                    panels_of(
                        F32,
                        0,
                        rows,
                        0,
                        1,
                        codes.ctypes.data,
                        keys_4,
                        packed_v.ctypes.data + p * keys_4 * 32,
                        fours_v,
                        zeros.ctypes.data,
                        steps.ctypes.data,
                        4,
                        ones.ctypes.data,
                        none.ctypes.data,
                        result.ctypes.data + 128 * p,
                        4 * wide_v,
                    )
                for r in range(rows):
                    write_row(out_at + (row + r) * out_stride, out_kind, result[r, :dims_v])


@njit(nogil=True, parallel=True, error_model="numpy", cache=True)
def heads_of_threads(threads, count, shape, q, k, v, scaling, causal, mask, out):
    """All key/value heads, dealt out."""
    for t in prange(threads):
        heads_of(count * t // threads, count * (t + 1) // threads, shape, q, k, v, scaling, causal, mask, out)

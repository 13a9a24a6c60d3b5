"""The elementwise halves of the CPU backends, compiled by numba: norm, quantise, dequantise; rows dealt out to threads.

Each pass keeps one row in the first-level cache: (bfloat16 → float32,) norm, absmax, codes. Everything is addressed by
pointer and row stride in bytes, so that a call costs microseconds; the backends check dtypes and shapes before.

absmax is taken on the bits without the sign, as integers: NaN > infinity > every number there, nothing is lost, and
LLVM vectorises it (a float maximum it does not, without leave to ignore NaN). A kernel returns how many rows were not
finite. Only the mean square of a norm is summed in another order than spec's.
"""

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

F32, BF16 = 0, 1
"""Dtypes of floats in memory."""
NO_NORM, RMS, LAYER = 0, 1, 2
_WIDTH = (4, 2)
_INFINITY = np.int32(0x7F800000)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_TINY = np.float32(np.finfo(np.float32).tiny)
_TOP = np.float32(127)


def _pointer(kind):
    """A numba function that reads an address as a pointer to `kind`."""
    target = types.CPointer(kind)

    @intrinsic
    def pointer(typing, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(target))

        return target(types.intp), generate

    return pointer


floats, ints, shorts, bytes_ = (_pointer(kind) for kind in (types.float32, types.int32, types.uint16, types.uint8))


@intrinsic
def as_float(typing, bits):
    """The float32 with these bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def as_bits(typing, value):
    """The bits of a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], cgutils.int32_t)

    return types.int32(types.float32), generate


@njit(nogil=True, error_model="numpy", inline="always")
def bfloat(value):
    """The bits of a finite float32 rounded to bfloat16, halves to even."""
    bits = as_bits(value)
    odd = np.int32(np.int32(bits >> np.int32(16)) & np.int32(1))
    return np.uint16(np.int32(np.int32(bits + odd) + np.int32(0x7FFF)) >> np.int32(16))


@njit(nogil=True, error_model="numpy")
def read_row(address, kind, buffer):
    """One row of float32 or bfloat16 into a float32 buffer."""
    if kind == BF16:
        row = carray(shorts(address), len(buffer))
        for i in range(len(buffer)):
            buffer[i] = as_float(np.int32(np.int32(row[i]) << np.int32(16)))
    else:
        source = carray(floats(address), len(buffer))
        for i in range(len(buffer)):
            buffer[i] = source[i]


@njit(nogil=True, error_model="numpy")
def write_row(address, kind, row):
    """A float32 row into memory as float32 or bfloat16."""
    if kind == BF16:
        target = carray(shorts(address), len(row))
        for i in range(len(row)):
            target[i] = bfloat(row[i])
    else:
        place = carray(floats(address), len(row))
        for i in range(len(row)):
            place[i] = row[i]


@njit(nogil=True, error_model="numpy")
def absmax_bits(row):
    """The bits of max|x|; above those of infinity if there is a NaN."""
    bits = row.view(np.int32)
    most = np.int32(0)
    for i in range(len(bits)):
        most = max(most, np.int32(bits[i] & _MAGNITUDE))
    return most


@njit(nogil=True, error_model="numpy")
def step_of(bits, top=_TOP):
    """Δ from the bits of max|x|; `top` is the largest code."""
    step = np.float32(as_float(bits) / top)
    return np.float32(0) if step < _TINY else step


@njit(nogil=True, error_model="numpy")
def write_codes(row, step, address, shift, top=_TOP):
    """⌈x / Δ⌋ + shift as bytes, within ±top; shift 128 makes uint8 codes, 0 the bits of int8 ones."""
    codes = carray(bytes_(address), len(row))
    if step == 0:
        for i in range(len(row)):
            codes[i] = np.uint8(shift)
        return
    for i in range(len(row)):
        code = min(max(np.rint(np.float32(row[i] / step)), -top), top)
        codes[i] = np.uint8(np.int32(np.int32(code) + np.int32(shift)))


@njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _sum_squares(row):
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i] * row[i]
    return total


@njit(nogil=True, error_model="numpy", fastmath={"reassoc"})
def _sum(row):
    total = np.float32(0)
    for i in range(len(row)):
        total += row[i]
    return total


@njit(nogil=True, error_model="numpy")
def norm_row(row, norm, gain, bias, eps):
    """RMSNorm or LayerNorm of one row, in place."""
    count = np.float32(len(row))
    if norm == LAYER:
        mean = np.float32(_sum(row) / count)
        for i in range(len(row)):
            row[i] = row[i] - mean
    rstd = np.float32(np.float32(1) / np.sqrt(np.float32(_sum_squares(row) / count) + eps))
    for i in range(len(row)):
        row[i] = np.float32(row[i] * rstd) * gain[i]
    if bias.size:
        for i in range(len(row)):
            row[i] = row[i] + bias[i]


@njit(nogil=True, error_model="numpy", cache=True)
def quantise_rows(
    first,
    stop,
    x,
    x_stride,
    kind,
    channels,
    norm,
    gain,
    bias,
    eps,
    divisor,
    given,
    y,
    y_stride,
    codes,
    code_stride,
    shift,
    steps,
):
    """Rows first … stop − 1: norm if asked for, Y written if y is not 0, absmax, codes if codes is not 0.

    given: the static step; below 0: one per row. steps receives Δ per row (dynamic). Without codes: the bits of max|x|.
    Returns how many rows held a NaN or an infinity.
    """
    row, bad = np.empty(channels, np.float32), 0
    step_out = carray(floats(steps), stop)
    bits_out = carray(ints(steps), stop)
    g, b, d = (
        carray(floats(gain), channels),
        carray(floats(bias), channels if bias else 0),
        carray(floats(divisor), channels),
    )
    for r in range(first, stop):
        read_row(x + r * x_stride, kind, row)
        if norm:
            norm_row(row, norm, g, b, eps)
        if divisor:
            for i in range(channels):
                row[i] = row[i] / d[i]
        if y:
            write_row(y + r * y_stride, kind, row)
        most = absmax_bits(row)
        if most >= _INFINITY:
            bad += 1
            continue
        if not codes:
            bits_out[r] = most
            continue
        step = given
        if given < 0:
            step = step_of(most)
            step_out[r] = step
        write_codes(row, step, codes + r * code_stride, shift)
    return bad


@njit(nogil=True, parallel=True, error_model="numpy", cache=True)
def quantise_rows_threads(
    threads,
    rows,
    x,
    x_stride,
    kind,
    channels,
    norm,
    gain,
    bias,
    eps,
    divisor,
    given,
    y,
    y_stride,
    codes,
    code_stride,
    shift,
    steps,
):
    """All rows, dealt out."""
    bad = 0
    for t in prange(threads):
        bad += quantise_rows(
            rows * t // threads,
            rows * (t + 1) // threads,
            x,
            x_stride,
            kind,
            channels,
            norm,
            gain,
            bias,
            eps,
            divisor,
            given,
            y,
            y_stride,
            codes,
            code_stride,
            shift,
            steps,
        )
    return bad

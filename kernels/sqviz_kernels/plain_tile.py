"""The innermost loop of the INT8 product on any processor, and the threads around it: vectors of LLVM, no instruction.

A tile is 4 rows of X̄ times 4 rows of W̄, its 16 sums kept in registers of 8 int32 until all channels are summed:

    for each CHUNK = 16 channels:  widen 4 + 4 codes to 16 bits, 16 × (multiply, add neighbours in 32 bits, add)

which LLVM makes into whatever the processor has: pmaddwd and paddd with SSE2 or AVX2, vpdpwssd with AVX-512 VNNI.
Products of 16-bit numbers are summed in 32 bits there, so nothing can saturate; oneDNN without VNNI multiplies in 8
bits, sums in 16, and does. Written as a loop over 4 × 4 sums in numba, LLVM takes a 32-bit multiplication instead: half
the speed (512 × 576 × 1536 on one core of a Zen 4: 14.5 ms against 7.3; float32 9.4).

Both matrices are row-major int8 [row channel], rows padded to whole chunks; padding of W̄ is 0, of X̄ anything. The
epilogue runs tile by tile: ((float(sum) · Δ_x) · Δ_w) + bias, as `spec.scale` has it.
"""

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.extending import intrinsic

from sqviz_kernels.cpu_loops import BF16, bfloat, floats, shorts

SIDE = 4
"""Rows and out channels of a tile."""
CHUNK = 16
"""Channels at a time."""
_L2 = 1 << 18  # bytes of weight that stay in a core's second-level cache while all rows pass by

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_CODES, _SHORTS, _WIDE = (ir.VectorType(ir.IntType(bits), CHUNK) for bits in (8, 16, 32))
_SUMS = ir.VectorType(_I32, CHUNK // 2)


def _neighbours(b: ir.IRBuilder, products: ir.Value) -> ir.Value:
    """Sums of channels 0 and 1, 2 and 3, …"""
    halves = []
    for first in (0, 1):
        places = ir.Constant(_SUMS, [ir.Constant(_I32, at) for at in range(first, CHUNK, 2)])
        halves.append(b.shuffle_vector(products, ir.Constant(_WIDE, ir.Undefined), places))
    return b.add(*halves)


def _widened(b: ir.IRBuilder, row: ir.Value, channel: ir.Value) -> ir.Value:
    """A chunk of codes, through 16 bits, so that LLVM knows their products to fit pmaddwd."""
    codes = b.load(b.inttoptr(b.add(row, channel), _CODES.as_pointer()), align=1)
    return b.sext(b.sext(codes, _SHORTS), _WIDE)


def _all_sums(b: ir.IRBuilder, x: list[ir.Value], w: list[ir.Value], length: ir.Value) -> list[ir.Value]:
    """The sums of every row with every out channel, as vectors, after a loop over chunks."""
    entry, loop, done = b.basic_block, b.append_basic_block("channels"), b.append_basic_block("summed")
    b.branch(loop)
    b.position_at_end(loop)
    channel = b.phi(_I64)
    before = [b.phi(_SUMS) for _ in range(len(x) * len(w))]
    weights = [_widened(b, row, channel) for row in w]
    after = []
    for index, row in enumerate(x):
        codes = _widened(b, row, channel)
        for j, weight in enumerate(weights):
            pairs = _neighbours(b, b.mul(codes, weight, flags=["nsw"]))
            after.append(b.add(before[index * len(w) + j], pairs))
    following = b.add(channel, ir.Constant(_I64, CHUNK))
    channel.add_incoming(ir.Constant(_I64, 0), entry)
    channel.add_incoming(following, loop)
    for old, new in zip(before, after, strict=True):
        old.add_incoming(ir.Constant(_SUMS, None), entry)
        old.add_incoming(new, loop)
    b.cbranch(b.icmp_signed("<", following, length), loop, done)
    b.position_at_end(done)
    return after


def _tile(rows: int):
    """A numba function of addresses that stores the int32 sums [rows][SIDE]; length: channels, in whole chunks."""

    @intrinsic
    def tile(typing, x, x_stride, w, w_stride, length, sums):
        def generate(context, builder, signature, arguments):
            x, x_stride, w, w_stride, length, sums = arguments
            x, w = [x], [w]
            for _ in range(1, rows):
                x.append(builder.add(x[-1], x_stride))
            for _ in range(1, SIDE):
                w.append(builder.add(w[-1], w_stride))
            kind = ir.FunctionType(_I32, [_SUMS])
            reduce = builder.module.declare_intrinsic(f"llvm.vector.reduce.add.v{_SUMS.count}i32", (), kind)
            for index, lanes in enumerate(_all_sums(builder, x, w, length)):
                place = builder.add(sums, ir.Constant(_I64, 4 * index))
                builder.store(builder.call(reduce, [lanes]), builder.inttoptr(place, _I32.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return tile


_four, _one = _tile(SIDE), _tile(1)


@njit(nogil=True, error_model="numpy")
def _store(sums, step, w_step, bias, first, count, out, kind):
    """`count` sums of one row, from out channel `first` on, scaled and stored at `out`, the address of the row."""
    for j in range(count):
        n = first + j
        y = np.float32(np.float32(np.float32(sums[j]) * step) * w_step[n])
        if bias.size:
            y = np.float32(y + bias[n])
        if kind == BF16:
            carray(shorts(out), n + 1)[n] = bfloat(y)
        else:
            carray(floats(out), n + 1)[n] = y


@njit(nogil=True, error_model="numpy", cache=True)
def tiles_of(
    first, stop, left, right, x, x_stride, w, w_stride, length, x_step, step_stride, w_step, bias, out, kind, out_stride
):
    """Rows first … stop − 1 times out channels left … right − 1 (left a multiple of 4); all addresses are row 0's.

    step_stride: 4, or 0 where one step serves all rows. bias: 0 for none. kind: of the output, see cpu_loops.
    """
    sums = np.empty(SIDE * SIDE, np.int32)
    scales, biases = carray(floats(w_step), right), carray(floats(bias), right if bias else 0)
    group = max(1, _L2 // (w_stride * SIDE)) * SIDE
    for begin in range(left, right, group):
        row = first
        while row < stop:
            size = SIDE if stop - row >= SIDE else 1
            at = x + row * x_stride
            for n in range(begin, min(right, begin + group), SIDE):
                if size == SIDE:
                    _four(at, x_stride, w + n * w_stride, w_stride, length, sums.ctypes.data)
                else:
                    _one(at, x_stride, w + n * w_stride, w_stride, length, sums.ctypes.data)
                for i in range(size):
                    step = carray(floats(x_step + (row + i) * step_stride), 1)[0]
                    to = out + (row + i) * out_stride
                    _store(sums[SIDE * i : SIDE * i + SIDE], step, scales, biases, n, min(SIDE, right - n), to, kind)
            row += size


@njit(nogil=True, parallel=True, error_model="numpy", cache=True)
def tiles_of_threads(
    threads, rows, outs, x, x_stride, w, w_stride, length, x_step, step_stride, w_step, bias, out, kind, out_stride
):
    """All rows times all out channels, dealt out by rows where there are many, else by out channels."""
    tall, wide = (rows + SIDE - 1) // SIDE, (outs + SIDE - 1) // SIDE
    by_rows = tall >= 4 * threads
    for t in prange(threads):
        first, stop, left, right = 0, rows, 0, outs
        if by_rows:
            first, stop = tall * t // threads * SIDE, min(rows, tall * (t + 1) // threads * SIDE)
        else:
            left, right = wide * t // threads * SIDE, min(outs, wide * (t + 1) // threads * SIDE)
        tiles_of(
            first,
            stop,
            left,
            right,
            x,
            x_stride,
            w,
            w_stride,
            length,
            x_step,
            step_stride,
            w_step,
            bias,
            out,
            kind,
            out_stride,
        )

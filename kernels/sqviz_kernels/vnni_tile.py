"""The innermost loop of the INT8 product on processors with AVX-512 VNNI, and the threads around it.

A tile is ROWS rows of X̄ times WIDE = 32 rows of W̄, kept in 2·ROWS registers of 16 int32 until all channels are summed:

    for each four channels:  2 loads of W̄, one broadcast of X̄ per row, 2·ROWS × vpdpbusd (u8 · s8, 4 products per lane)

Layout of X̄: uint8 = code + 128, row-major, the row padded to a multiple of 4. Of W̄: int8 [panel, channel / 4, 32, 4],
so that a panel of 32 out channels is read front to back, for one row as for thousands. The sums start at
−128 · Σ_k W̄, which takes the 128 back out. vpdpbusd wraps at 2³² and does not saturate, so the result is exact whatever
happens on the way (the older vpmaddubsw saturates at 16 bits; that is the trap this file is about not falling into).

The epilogue runs on the registers: ((float(sum) · Δ_x) · Δ_w) + bias, as `spec.scale` has it, stored as float32, as
bfloat16, or for a panel of 16 gates and 16 ups as SiLU(gate) · up. No int32 matrix is ever written.

Measured on two cores of a Zen 4: see kernels/LOG.md.
"""

from llvmlite import binding, ir
from numba import config, njit, prange, types
from numba.extending import intrinsic

_FEATURES = binding.get_host_cpu_features().flatten() if config.CPU_FEATURES is None else config.CPU_FEATURES
HAVE_VNNI = "+avx512vnni" in _FEATURES.split(",")
"""Whether numba compiles for a processor with the instruction (it aborts the process where it cannot)."""
WIDE = 32
"""Out channels per panel."""
L2_BYTES = 1 << 18
"""Weight that stays in a core's second-level cache while all rows pass by."""
F32, BF16, GATE = 0, 1, 2
"""What the epilogue stores."""

_I8, _I16, _I32, _I64, _FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
INTS, _FLOATS, _SHORTS = ir.VectorType(_I32, 16), ir.VectorType(_FLOAT, 16), ir.VectorType(_I16, 16)
BYTES = ir.VectorType(_I8, 64) if binding.llvm_version_info[0] >= 22 else INTS  # what vpdpbusd takes


class Emit:
    """Short names for the instructions that a tile is made of."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.b = builder

    def at(self, base: ir.Value, offset: int) -> ir.Value:
        """An address some bytes further."""
        return self.b.add(base, ir.Constant(_I64, offset)) if offset else base

    def load(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        """What lies at an address, aligned or not."""
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=1)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        """Put it there."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=1)

    def spread(self, scalar: ir.Value, kind: ir.VectorType) -> ir.Value:
        """A vector of one number."""
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
        return self.b.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(INTS, None))

    def call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        """An intrinsic of LLVM's."""
        kind = ir.FunctionType(result, [a.type for a in arguments])
        return self.b.call(self.b.module.declare_intrinsic(name, (), kind), arguments)

    def floats(self, value: float) -> ir.Value:
        """16 times a constant."""
        return ir.Constant(_FLOATS, [ir.Constant(_FLOAT, value)] * 16)

    def ints(self, value: int) -> ir.Value:
        """16 times a constant."""
        return ir.Constant(INTS, [ir.Constant(_I32, value)] * 16)

    def fma(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x · y + z, rounded once."""
        return self.call("llvm.fma.v16f32", _FLOATS, x, y, z)

    def exp(self, x: ir.Value) -> ir.Value:
        """e^x to about 2 ulp for x ≤ 88; 0 far below: 2^n · polynomial(x − n·ln 2), Taylor to the seventh power."""
        x = self.call(
            "llvm.maxnum.v16f32",
            _FLOATS,
            self.call("llvm.minnum.v16f32", _FLOATS, x, self.floats(88.0)),
            self.floats(-87.0),
        )
        n = self.call("llvm.rint.v16f32", _FLOATS, self.b.fmul(x, self.floats(1.44269504088896341)))
        r = self.fma(n, self.floats(-0.693359375), x)
        r = self.fma(n, self.floats(2.12194440e-4), r)
        p = self.floats(1.0 / 5040)
        for divisor in (720, 120, 24, 6, 2, 1, 1):
            p = self.fma(p, r, self.floats(1.0 / divisor))
        power = self.b.shl(self.b.add(self.b.fptosi(n, INTS), self.ints(127)), self.ints(23))
        return self.b.fmul(p, self.b.bitcast(power, _FLOATS))

    def silu(self, x: ir.Value) -> ir.Value:
        """x / (1 + e^−x)."""
        return self.b.fdiv(x, self.b.fadd(self.floats(1.0), self.exp(self.b.fneg(x))))

    def bfloat(self, x: ir.Value) -> ir.Value:
        """The upper halves, rounded to even."""
        bits = self.b.bitcast(x, INTS)
        odd = self.b.and_(self.b.lshr(bits, self.ints(16)), self.ints(1))
        return self.b.trunc(self.b.lshr(self.b.add(self.b.add(bits, odd), self.ints(0x7FFF)), self.ints(16)), _SHORTS)


def _sums(emit: Emit, rows: int, x: ir.Value, stride: ir.Value, w: ir.Value, fours: ir.Value, start: ir.Value):
    """The int32 sums of a tile, [row][half], after a loop over four channels at a time."""
    b = emit.b
    first = [emit.load(emit.at(start, 64 * half), INTS) for half in (0, 1)]
    row = [x]
    for _ in range(1, rows):
        row.append(b.add(row[-1], stride))
    entry, loop, done = b.basic_block, b.append_basic_block("channels"), b.append_basic_block("summed")
    b.branch(loop)
    b.position_at_end(loop)
    four = b.phi(_I64)
    four.add_incoming(ir.Constant(_I64, 0), entry)
    sums = [[b.phi(INTS) for _ in (0, 1)] for _ in range(rows)]
    panel = b.add(w, b.shl(four, ir.Constant(_I64, 7)))
    weights = [emit.load(emit.at(panel, 64 * half), BYTES) for half in (0, 1)]
    along, new = b.shl(four, ir.Constant(_I64, 2)), []
    for index in range(rows):
        codes = emit.spread(emit.load(b.add(row[index], along), _I32), INTS)
        codes = codes if BYTES is INTS else b.bitcast(codes, BYTES)
        new.append(
            [
                emit.call("llvm.x86.avx512.vpdpbusd.512", INTS, sums[index][half], codes, weights[half])
                for half in (0, 1)
            ]
        )
    after = b.add(four, ir.Constant(_I64, 1))
    four.add_incoming(after, loop)
    for index in range(rows):
        for half in (0, 1):
            sums[index][half].add_incoming(first[half], entry)
            sums[index][half].add_incoming(new[index][half], loop)
    b.cbranch(b.icmp_signed("<", after, fours), loop, done)
    b.position_at_end(done)
    return new


def _tile(rows: int, kind: int):
    """A numba function of addresses that computes one tile and stores what `kind` says."""

    @intrinsic
    def tile(typing, x, x_stride, w, fours, start, x_step, step_stride, w_step, bias, out, out_stride):
        def generate(context, builder, signature, arguments):
            x, x_stride, w, fours, start, x_step, step_stride, w_step, bias, out, out_stride = arguments
            emit = Emit(builder)
            sums = _sums(emit, rows, x, x_stride, w, fours, start)
            scales = [emit.load(emit.at(w_step, 64 * half), _FLOATS) for half in (0, 1)]
            biases = [emit.load(emit.at(bias, 64 * half), _FLOATS) for half in (0, 1)]
            for index in range(rows):
                step = emit.spread(emit.load(x_step, _FLOAT), _FLOATS)
                y = []
                for half in (0, 1):
                    value = builder.fmul(builder.fmul(builder.sitofp(sums[index][half], _FLOATS), step), scales[half])
                    y.append(builder.fadd(value, biases[half]))
                if kind == GATE:
                    emit.store(builder.fmul(emit.silu(y[0]), y[1]), out)
                else:
                    for half in (0, 1):
                        stored = emit.bfloat(y[half]) if kind == BF16 else y[half]
                        emit.store(stored, emit.at(out, (32 if kind == BF16 else 64) * half))
                x_step, out = builder.add(x_step, step_stride), builder.add(out, out_stride)
            return context.get_dummy_value()

        address, size = types.uintp, types.intp
        return types.void(
            address, size, address, size, address, address, size, address, address, address, size
        ), generate

    return tile


_f12, _f4, _f1 = _tile(12, F32), _tile(4, F32), _tile(1, F32)
_b12, _b4, _b1 = _tile(12, BF16), _tile(4, BF16), _tile(1, BF16)
_g12, _g4, _g1 = _tile(12, GATE), _tile(4, GATE), _tile(1, GATE)


@njit(nogil=True, error_model="numpy", cache=True)
def panels_of(
    kind, first, stop, left, right, x, x_stride, w, fours, start, x_step, step_stride, w_step, bias, out, out_stride
):
    """Rows first … stop − 1 times panels left … right − 1; all addresses are those of row 0 and panel 0."""
    panel = fours * 4 * WIDE
    wide = 4 * WIDE if kind == F32 else 2 * WIDE
    group = max(1, L2_BYTES // panel)
    for begin in range(left, right, group):
        row = first
        while row < stop:
            size = 12 if stop - row >= 12 else (4 if stop - row >= 4 else 1)
            xs, step, to = x + row * x_stride, x_step + row * step_stride, out + row * out_stride
            for p in range(begin, min(right, begin + group)):
                ws, sums, scale, b, y = w + p * panel, start + 128 * p, w_step + 128 * p, bias + 128 * p, to + p * wide
                if kind == F32:
                    if size == 12:
                        _f12(xs, x_stride, ws, fours, sums, step, step_stride, scale, b, y, out_stride)
                    elif size == 4:
                        _f4(xs, x_stride, ws, fours, sums, step, step_stride, scale, b, y, out_stride)
                    else:
                        _f1(xs, x_stride, ws, fours, sums, step, step_stride, scale, b, y, out_stride)
                elif kind == BF16:
                    if size == 12:
                        _b12(xs, x_stride, ws, fours, sums, step, step_stride, scale, b, y, out_stride)
                    elif size == 4:
                        _b4(xs, x_stride, ws, fours, sums, step, step_stride, scale, b, y, out_stride)
                    else:
                        _b1(xs, x_stride, ws, fours, sums, step, step_stride, scale, b, y, out_stride)
                elif size == 12:
                    _g12(xs, x_stride, ws, fours, sums, step, step_stride, scale, b, y, out_stride)
                elif size == 4:
                    _g4(xs, x_stride, ws, fours, sums, step, step_stride, scale, b, y, out_stride)
                else:
                    _g1(xs, x_stride, ws, fours, sums, step, step_stride, scale, b, y, out_stride)
            row += size


@njit(nogil=True, parallel=True, error_model="numpy", cache=True)
def panels_of_threads(
    threads, kind, rows, panels, x, x_stride, w, fours, start, x_step, step_stride, w_step, bias, out, out_stride
):
    """All rows times all panels, dealt out by rows where there are many, else by panels."""
    by_rows, tiles = rows >= 24 * threads, (rows + 11) // 12
    for t in prange(threads):
        first, stop = (tiles * t // threads * 12, min(rows, tiles * (t + 1) // threads * 12)) if by_rows else (0, rows)
        left, right = (0, panels) if by_rows else (panels * t // threads, panels * (t + 1) // threads)
        panels_of(
            kind,
            first,
            stop,
            left,
            right,
            x,
            x_stride,
            w,
            fours,
            start,
            x_step,
            step_stride,
            w_step,
            bias,
            out,
            out_stride,
        )

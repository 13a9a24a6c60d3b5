"""INT8 on a GPU in two kernels that can be read: quantise per token, and a tiled product by dp4a, for numba.cuda.

    quantise_rows    one block of threads per row: max|x| by a tree in shared memory, then ⌈x / Δ⌋
    linear_tiles     one thread per element of C = A Bᵀ, one block per T × T tile; operands pass through shared memory

dp4a multiplies four pairs of bytes and adds them to an int32: a row of K codes is read as K/4 words. It runs on the
ordinary cores, not on the tensor cores, so this is for learning, and for GPUs that have no others; `triton_int8` is the
fast version of the same.

The same source runs without a GPU (NUMBA_ENABLE_CUDASIM=1, one operating-system thread per GPU thread, NumPy arrays);
there too a missing barrier gives wrong numbers. Exactness: the division is rounded as IEEE says, and `fadd` keeps the
compiler from merging the last multiplication and addition into one rounding.
"""

import importlib.util
import math
from typing import Any, ClassVar

import numba
import torch
from jaxtyping import Float, Int8
from numba import cuda, float32, int8, int32
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz_kernels import spec
from sqviz_kernels.backend import Codes, Packed
from sqviz_kernels.gpu import GpuBackend, padded, round_up, why_no_gpu
from sqviz_kernels.spec import Share

SIMULATED = bool(numba.config.ENABLE_CUDASIM)
# Shapes of shared memory must be numbers by the time the kernel is typed: `T * T` in place would only simulate.
T = 4 if SIMULATED else 16
THREADS = T * T
WIDTH = T + 1  # one column more than a tile has: threads that read a column then use different banks
MAGIC = 12582912.0  # 1.5 · 2²³: adding and taking it away rounds to a whole number, halves to even
LARGEST = 3.4028234663852886e38  # the largest float32
TINY = spec.TINY
BYTES = 4  # codes in an int32

if SIMULATED:

    def dp4a(a: Any, b: Any, total: Any) -> int:
        """What the instruction computes: total + Σ aᵢ bᵢ over the four signed bytes of a and b."""
        total = int(total)
        for i in range(BYTES):
            x, y = (int(word) >> 8 * i & 255 for word in (a, b))
            total += (x - 256 if x > 127 else x) * (y - 256 if y > 127 else y)
        return total

    def fadd(a: Any, b: Any) -> Any:
        """A float32 sum."""
        return a + b

else:
    from llvmlite import ir
    from numba.cuda.extending import intrinsic
    from numba.cuda.libdevice import fadd_rn as fadd  # type: ignore[no-redef]

    @intrinsic
    def dp4a(typing_context, a, b, total):
        """The instruction; numba has no name for it."""
        word = ir.IntType(32)

        def generate(context, builder, signature, arguments):
            code = ir.InlineAsm(ir.FunctionType(word, [word] * 3), "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r")
            return builder.call(code, arguments)

        return int32(int32, int32, int32), generate


@cuda.jit
def quantise_rows(x, given, codes, steps):
    """Codes [row channel] and steps [row] of x, float32 [row channel]; `given` is empty, or holds the step to use."""
    most = cuda.shared.array(THREADS, float32)
    row, thread, channels = cuda.blockIdx.x, cuda.threadIdx.x, x.shape[1]
    top = float32(0.0)
    for c in range(thread, channels, THREADS):
        magnitude = abs(x[row, c])
        top = max(top, magnitude if magnitude <= float32(LARGEST) else float32(math.inf))  # NaN becomes infinity too
    most[thread] = top
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if thread < half:
            most[thread] = max(most[thread], most[thread + half])
        cuda.syncthreads()
        half //= 2
    finite = most[0] <= float32(LARGEST)
    step = most[0] / float32(127.0)
    if given.size > 0:
        step = given[0]
    elif step < float32(TINY):
        step = float32(0.0)
    if thread == 0:
        steps[row] = step if finite else float32(math.nan)
    for c in range(thread, codes.shape[1], THREADS):
        code = float32(0.0)
        if c < channels and finite and step > float32(0.0):
            code = min(max(x[row, c] / step, float32(-127.0)), float32(127.0))
            code = (code + float32(MAGIC)) - float32(MAGIC)
        codes[row, c] = int8(code)


@cuda.jit
def linear_tiles(a, b, a_step, b_step, bias, c):
    """C = ((A Bᵀ · Δ_a) · Δ_b) + bias, float32 [row out]; codes are four to a word: A [row word], B [out word]."""
    a_tile = cuda.shared.array((T, WIDTH), int32)
    b_tile = cuda.shared.array((T, WIDTH), int32)
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    row, out = cuda.blockIdx.y * T + y, cuda.blockIdx.x * T + x
    b_row, words = cuda.blockIdx.x * T + y, a.shape[1]
    total = int32(0)
    for start in range(0, words, T):
        inside = start + x < words
        a_tile[y, x] = a[row, start + x] if inside and row < a.shape[0] else int32(0)
        b_tile[y, x] = b[b_row, start + x] if inside and b_row < b.shape[0] else int32(0)
        cuda.syncthreads()  # the tiles are whole
        for k in range(T):
            total = dp4a(a_tile[y, k], b_tile[x, k], total)
        cuda.syncthreads()  # everyone has read them
    if row < a.shape[0] and out < b.shape[0]:
        scaled = float32(total) * a_step[row if a_step.size > 1 else 0] * b_step[out if b_step.size > 1 else 0]
        c[row, out] = fadd(scaled, bias[out]) if bias.size > 0 else scaled


class NumbaCuda(GpuBackend):
    """The two kernels as a backend: NVIDIA only, compute capability 6.1 and later. See the module."""

    name: ClassVar[str] = "numba-cuda"

    @classmethod
    def why_not(cls) -> str | None:
        """None if numba can compile for a GPU that is there, else why not and what would help."""
        if importlib.util.find_spec("numba_cuda") is None:
            return "numba-cuda is not installed: pip install 'sqviz[gpu]'"
        if SIMULATED:
            return "NUMBA_ENABLE_CUDASIM=1 is set: kernels would be simulated on the CPU, for tests only; unset it"
        if torch.version.hip is not None:
            return (
                f"numba-cuda needs an NVIDIA GPU, and this torch ({torch.__version__}) is for AMD; 'triton' runs there"
            )
        return why_no_gpu()

    def pack(
        self,
        w: Int8[Tensor, "out channel"],
        step: Float[Tensor, " out_or_1"],
        bias: Float[Tensor, " out"] | None = None,
        gated: bool = False,
    ) -> Packed:
        """Pad the channels to 4. Raises `SqvizError` where an int32 could overflow."""
        out, channels = w.shape
        spec.check_channels(channels)
        bias = None if bias is None else bias.float().contiguous()
        values = padded(w, out, max(round_up(channels, BYTES), BYTES))
        return Packed(values, step.float().contiguous(), bias, out, channels, gated=gated)

    def quantise(
        self,
        x: Float[Tensor, "row channel"],
        step: Float[Tensor, "1"] | None = None,
        share: Share = "token",
        divisor: Float[Tensor, " channel"] | None = None,
    ) -> Codes:
        """See `spec.quantise`; NaN instead of `NonFinite` (see `gpu`)."""
        rows, channels = x.shape
        value = x.float().contiguous() if divisor is None else (x.float() / divisor.float()).contiguous()
        given = value.new_empty(0) if step is None else step.float()
        whole = share == "tensor" and step is None
        if whole:
            most = value.abs().amax().view(1) if value.numel() else value.new_zeros(1)
            given = torch.where(torch.isfinite(most), most / spec.TOP, torch.nan)
            given = torch.where(given < spec.TINY, 0.0, given)
        values = value.new_empty((rows, max(round_up(channels, BYTES), BYTES)), dtype=torch.int8)
        steps = value.new_empty(rows)
        self._launch(quantise_rows, rows, THREADS, value, given, values, steps)
        steps = given if whole else steps
        self.flag(x.device).logical_or_(steps.isnan().any())
        return Codes(values, steps, rows, channels)

    def linear(self, x: Codes, w: Packed, dtype: torch.dtype = torch.float32) -> Float[Tensor, "row out"]:
        """See `spec.linear`."""
        if x.channels != w.channels:
            raise SqvizError(f"x has {x.channels} channels and the weight {w.channels}: they must be the same.")
        y = x.step.new_empty((x.rows, w.out))
        bias = w.step.new_empty(0) if w.bias is None else w.bias
        a, b = (t.view(torch.int32) for t in (x.values, w.values))
        tiles = (math.ceil(w.out / T), math.ceil(x.rows / T))
        self._launch(linear_tiles, tiles, (T, T), a, b, x.step, w.step, bias, y)
        return y.to(dtype)

    def _launch(self, kernel: Any, blocks: Any, threads: Any, *tensors: Tensor) -> None:
        """Run a kernel on torch's current stream, after what torch has started and before what it will."""
        if not tensors[-1].numel():
            return
        if SIMULATED:
            kernel[blocks, threads](*(t.detach().numpy() for t in tensors))
            return
        with torch.cuda.device_of(tensors[0]):
            stream = cuda.external_stream(torch.cuda.current_stream().cuda_stream)
            kernel[blocks, threads, stream](*(cuda.as_cuda_array(t.detach()) for t in tensors))

"""`make gpu-check`: on a machine with a GPU, the kernels against their definition, then their times.

Runs tests/kernels/test_gpu.py, times every operation in the shapes of three models beside torch's matmul in bfloat16
and float16, and appends a dated table to kernels/LOG.md. Without a GPU it says that nothing was run, and returns 1.

Times are CUDA events around replays after a warm-up: the median of 20 rounds; a round is long enough for 2 ms. Operands
stay where they are, so a small weight is read from cache: a ratio here is one operator's, never a model's.
"""

import datetime
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from sqviz_kernels.backend import Backend
from sqviz_kernels.gpu_library import CublasLt
from sqviz_kernels.numba_cuda_int8 import NumbaCuda
from sqviz_kernels.triton_launch import Triton
from torch.nn import functional as F

HERE = Path(__file__).parent
MODELS = {
    "SmolLM2-135M": (576, 1536, 9, 3, 64, True),
    "OPT-6.7B": (4096, 16384, 32, 32, 128, False),
    "Llama-2-7B": (4096, 11008, 32, 32, 128, True),
}
"""Hidden and inner channels, heads, key heads, channels of a head, whether the MLP is gated."""
ROWS = (1, 16, 512, 4096)
"""Tokens of a call: one or a batch generated, a short and a long prompt."""


def microseconds(work: Callable[[], Any]) -> float:
    """Time of one call on the device."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    calls = max(1, min(200, int(2000 / max(1.0, _once(work, 1)))))
    return statistics.median(_once(work, calls) for _ in range(20))


def _once(work: Callable[[], Any], calls: int) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        work()
    stop.record()
    stop.synchronize()
    return 1000 * start.elapsed_time(stop) / calls


Row = tuple[str, str, int, str, float, float | None, float | None]
"""Model, operation, rows, backend, microseconds of INT8, of bfloat16, of float16."""


def _products(backend: Backend, model: str, rows: int) -> Iterator[Row]:
    """Linears: the product alone, with quantisation before, and torch's matmul."""
    hidden, inner, *_ = MODELS[model]
    for channels, out in ((hidden, hidden), (hidden, inner), (inner, hidden)):
        x = torch.randn(rows, channels, device="cuda", dtype=torch.bfloat16)
        w = torch.randint(-127, 128, (out, channels), dtype=torch.int8, device="cuda")
        packed, codes = backend.pack(w, torch.rand(out, device="cuda")), backend.quantise(x)
        dense = {dtype: (x.to(dtype), w.to(dtype)) for dtype in (torch.bfloat16, torch.float16)}
        bf16, fp16 = (microseconds(lambda pair=pair: F.linear(*pair)) for pair in dense.values())
        name = f"{channels}→{out}"
        alone = microseconds(lambda x=codes, w=packed: backend.linear(x, w, torch.bfloat16))
        both = microseconds(lambda x=x, w=packed: backend.linear(backend.quantise(x), w, torch.bfloat16))
        yield model, f"linear {name}", rows, backend.name, alone, bf16, fp16
        yield model, f"quantise + linear {name}", rows, backend.name, both, bf16, fp16


def _rows(backend: Backend, model: str, rows: int) -> Iterator[Row]:
    """Quantisation and what it is fused into, beside the same in bfloat16 without quantising."""
    hidden, inner, *_, gated = MODELS[model]
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
    gain, step = torch.rand(hidden, device="cuda", dtype=torch.bfloat16), torch.tensor([0.02], device="cuda")
    divisor = torch.rand(hidden, device="cuda") + 0.5
    rms = microseconds(lambda: F.rms_norm(x, (hidden,), gain, 1e-5))
    layer = microseconds(lambda: F.layer_norm(x, (hidden,), gain, gain, 1e-5))
    work: dict[str, tuple[Callable[[], Any], float | None]] = {
        "quantise per token": (lambda: backend.quantise(x), None),
        "quantise per tensor": (lambda: backend.quantise(x, share="tensor"), None),
        "quantise static": (lambda: backend.quantise(x, step), None),
        "quantise X / s": (lambda: backend.quantise(x, divisor=divisor), None),
        "RMSNorm + quantise": (lambda: backend.norm_quantise(x, gain, None, 1e-5, "rms"), rms),
        "LayerNorm + quantise": (lambda: backend.norm_quantise(x, gain, gain, 1e-5, "layer"), layer),
    }
    if gated:
        w = torch.randint(-127, 128, (2 * inner, hidden), dtype=torch.int8, device="cuda")
        packed, codes = backend.pack(w, torch.rand(2 * inner, device="cuda"), gated=True), backend.quantise(x)
        dense = w.bfloat16()

        def plain() -> torch.Tensor:
            gate, up = F.linear(x, dense).chunk(2, 1)
            return F.silu(gate) * up

        work["gated MLP, first half"] = (lambda: backend.gated(codes, packed), microseconds(plain))
    for name, (call, bf16) in work.items():
        yield model, name, rows, backend.name, microseconds(call), bf16, None


def _attention(backend: Triton, model: str, rows: int) -> Iterator[Row]:
    """Attention over 4096 keys (as many as queries, if more), and the read of that cache."""
    *_, heads, kv_heads, dim, _ = MODELS[model]
    keys = 4096
    q = torch.randn(1, heads, rows, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randint(-127, 128, (1, kv_heads, keys, dim), dtype=torch.int8, device="cuda") for _ in range(2))
    step = torch.rand(1, kv_heads, keys, device="cuda") * 0.02
    half, mask = k.bfloat16(), torch.ones(rows, keys, dtype=torch.bool, device="cuda").tril(keys - rows)
    dense = microseconds(lambda: F.scaled_dot_product_attention(q, half, half, mask, enable_gqa=True))
    work = microseconds(lambda: backend.attention(q, k, step, v, step, dim**-0.5, keys - rows))
    yield model, f"attention, {keys} keys", rows, backend.name, work, dense, None
    read = microseconds(lambda: backend.read_cache(k, step, torch.bfloat16))
    yield model, f"read {keys} keys of a cache", rows, backend.name, read, microseconds(half.clone), None


def _sweep(backend: Triton, model: str, rows: int) -> Iterator[Row]:
    hidden, *_ = MODELS[model]
    x, w = torch.randn(rows, hidden, device="cuda"), torch.randn(hidden, hidden, device="cuda")
    y, s = x @ w.T, torch.rand(11, hidden, device="cuda") + 0.5
    work = microseconds(lambda: backend.sweep(x, w, y, s, None, None))
    yield model, "sweep over 11 α", rows, backend.name, work, None, None


def measure() -> Iterator[Row]:
    """Every operation of every backend that runs here."""
    for kind in (Triton, CublasLt, NumbaCuda):
        if kind.why_not() is not None:
            print(f"{kind.name}: {kind.why_not()}")
            continue
        backend = kind()
        for model in MODELS:
            for rows in ROWS:
                yield from _products(backend, model, rows)
                yield from _rows(backend, model, rows)
                if isinstance(backend, Triton):
                    yield from _attention(backend, model, rows)
                    if rows == 512:
                        yield from _sweep(backend, model, rows)


def _text(row: Row) -> str:
    *names, int8, bf16, fp16 = row

    def beside(other: float | None) -> str:
        return "" if other is None else f"{other:.1f} ({other / int8:.2f} ×)"

    return f"| {' | '.join(map(str, names))} | {int8:.1f} | {beside(bf16)} | {beside(fp16)} |"


def main() -> int:
    """Test, measure, write down; 1 if there is no GPU or a test failed."""
    whys = {kind.name: kind.why_not() for kind in (Triton, CublasLt, NumbaCuda)}
    if all(whys.values()):
        print("Nothing was run and nothing was measured: no GPU backend can run on this machine.")
        for name, why in whys.items():
            print(f"  {name}: {why}")
        return 1
    tests = [sys.executable, "-m", "pytest", "-q", str(HERE.parent / "tests/kernels/test_gpu.py")]
    if subprocess.run(tests, cwd=HERE.parent, check=False).returncode:
        print("The tests failed: nothing was measured.")
        return 1
    import triton

    heads = ["model", "operation", "rows", "backend", "INT8 µs", "bfloat16 µs (× INT8)", "float16 µs (× INT8)"]
    lines = [
        f"\n## {datetime.date.today().isoformat()}: {torch.cuda.get_device_name()}\n",
        (
            f"`make gpu-check`; torch {torch.__version__}, triton {triton.__version__}, "
            f"Python {platform.python_version()}. Tests passed before. Medians of 20 rounds between CUDA events, "
            "operands in place.\n"
        ),
        f"| {' | '.join(heads)} |",
        f"|{' --- |' * len(heads)}",
    ]
    print("\n".join(lines))
    for row in measure():
        lines.append(_text(row))
        print(lines[-1], flush=True)
    with (HERE / "LOG.md").open("a") as log:
        log.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

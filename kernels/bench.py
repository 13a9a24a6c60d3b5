"""What INT8 costs and buys on this machine: operators, whole models, memory. Interleaved, medians, ratios.

    python kernels/bench.py operators           each operator beside fp32, bf16 and oneDNN's bare product
    python kernels/bench.py context decode      whole models in the form of the thesis's Figure 3.6 and Table 3.8, and
                                                their perplexity
    python kernels/bench.py memory              resident memory of each model in a process of its own
    python kernels/bench.py compiled            models under torch.compile, and torchao's (half an hour of compiling)
    python kernels/bench.py plot                kernels/results/*.csv as docs/pictures/int8.png
    python kernels/bench.py                     the first four, `make bench` runs this; rows go to kernels/results/*.csv

torchao and bitsandbytes take part where they are installed (pip install torchao bitsandbytes). "peak MB" is what one
call adds to the resident memory while it runs.

Beside each operator stands the share of the roofline it reaches: the larger of its weights' bytes over the measured
read bandwidth and its products over the measured INT8 peak, over the time it took.
"""

import argparse
import csv
import ctypes
import functools
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
from bench_peers import installed, peers, torchao
from sqviz_kernels.dispatch import backends, get
from torch.nn.functional import linear

import sqviz
from sqviz.quant.execute import ease_head

RESULTS = Path(__file__).parent / "results"
SHAPES = {  # name: (channels, out)
    "SmolLM2 qkv": (576, 960),
    "SmolLM2 o": (576, 576),
    "SmolLM2 gate+up": (576, 3072),
    "SmolLM2 down": (1536, 576),
    "OPT-6.7B / Llama-2 o": (4096, 4096),
    "OPT-6.7B fc1": (4096, 16384),
    "OPT-6.7B fc2": (16384, 4096),
    "Llama-2-7B gate+up": (4096, 22016),
    "Llama-2-7B down": (11008, 4096),
}
ROWS = (1, 16, 512)
CONTEXTS = ((4, 128), (4, 256), (4, 512), (4, 1024))
DECODES = ((1, 512), (1, 1024), (16, 512), (16, 1024))
SHOWN = ("fp32", "bf16", "torch dynamic INT8", "torchao", "recipe")
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "int8.png"
Work = dict[str, Callable[[], object]]


def interleaved(work: Work, rounds: int, least_seconds: float = 0.0) -> dict[str, float]:
    """Median seconds of each, all of them in every round; short ones are repeated within their turn."""
    repeats, found = {}, {name: [] for name in work}
    for name, call in work.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, min(50, int(least_seconds / max(1e-7, time.perf_counter() - start))))
    for _ in range(rounds):
        for name, call in work.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            found[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(values) for name, values in found.items()}


def peak(call: Callable[[], object]) -> float:
    """MB that a call adds to the resident memory while it runs; NaN where the system does not tell (not Linux)."""
    process, status = psutil.Process(), Path("/proc/self/status")
    gc.collect()
    try:
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        before = process.memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        call()
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    except OSError:
        return float("nan")
    return int(line.split()[1]) * 1024 / 1e6 - before / 1e6


def table(title: str, rows: list[dict[str, object]]) -> None:
    """Print rows and keep them as kernels/results/<title>.csv."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = [
        [f"{row.get(key, ''):.3g}" if isinstance(row.get(key), float) else str(row.get(key, "")) for key in columns]
        for row in rows
    ]
    widths = [max(len(key), *(len(line[i]) for line in shown)) for i, key in enumerate(columns)]
    print(f"\n{title}")
    for line in [columns, *shown]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))
    sys.stdout.flush()
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{title}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


# --- operators ---


def ceilings() -> tuple[float, float]:
    """Bytes per second that all threads read together, and INT8 operations per second on data in the first cache."""
    buffer = torch.ones(1 << 27, dtype=torch.int8).view(torch.int64)  # 128 MB, four times the third-level cache
    seconds = interleaved({"read": buffer.sum}, 9)["read"]
    backend = get("vnni")
    x, w = torch.randint(-9, 9, (24 * 96, 512), dtype=torch.int8), torch.randint(-9, 9, (64, 512), dtype=torch.int8)
    packed, codes = backend.pack(w, torch.ones(64)), backend.quantise(x.float())
    peak = interleaved({"peak": lambda: backend.linear(codes, packed)}, 15, 0.02)["peak"]
    return buffer.numel() * 8 / seconds, 2 * x.numel() * len(w) / peak


def operators(rounds: int) -> None:
    """One row per shape: microseconds, ratios and the share of the roofline."""
    running = [name for name, why in backends().items() if why is None and get(name).device == "cpu"]
    bandwidth, peak = ceilings() if "vnni" in running else (float("nan"), float("nan"))
    print(f"reads {bandwidth / 1e9:.1f} GB/s, INT8 {peak / 1e9:.0f} GOP/s in cache, {torch.get_num_threads()} threads")
    rows = []
    for name, (channels, out) in SHAPES.items():
        w = torch.randn(out, channels)
        step = w.abs().amax(1) / 127
        codes = (w / step[:, None]).round().to(torch.int8)
        half = w.bfloat16()
        packed = {each: get(each).pack(codes, step) for each in running if each != "plain" or channels < 4096}
        for count in ROWS:
            x = torch.randn(count, channels)
            xh, xc = x.bfloat16(), get(running[0]).plain_codes(x)[0]
            work: Work = {
                "fp32": lambda x=x, w=w: linear(x, w),
                "bf16": lambda x=xh, w=half: linear(x, w),
                "oneDNN bare": lambda x=xc, w=codes: torch._int_mm(x, w.t()),
            }
            for each, weight in packed.items():
                backend = get(each)
                work[each] = lambda b=backend, x=x, w=weight: b.linear(b.quantise(x), w)
            found = interleaved(work, rounds, 0.01)
            ours = found[running[0]]
            least = max(codes.numel() / bandwidth, 2 * count * codes.numel() / peak)
            rows.append(
                {"linear": name, "rows": count}
                | {f"{key} µs": 1e6 * value for key, value in found.items()}
                | {
                    "× fp32": found["fp32"] / ours,
                    "× bf16": found["bf16"] / ours,
                    "× oneDNN bare": found["oneDNN bare"] / ours,
                    "roofline": least / ours,
                }
            )
    table("operators", rows)


# --- whole models ---


def models() -> dict[str, sqviz.LM]:
    """The contenders, by name."""
    full, half = sqviz.load(), sqviz.load(dtype="bfloat16")
    ease_head(half.model)  # else its head takes 50 ms a row, which would be said to INT8's favour
    text = sqviz.text()
    magnitudes = sqviz.capture(full, text, samples=16, length=512)
    found = {"fp32": full, "bf16": half, **peers(full, half)}
    smoothed = sqviz.smooth(half, magnitudes, 0.5)
    for name, scheme in (("O1", sqviz.SMOOTHQUANT_O1), ("O2", sqviz.SMOOTHQUANT_O2), ("O3", sqviz.SMOOTHQUANT_O3)):
        found[name] = sqviz.quantize(smoothed, scheme, magnitudes, backend="auto", attention=True, head=True)
    recipe = sqviz.SMOOTHQUANT_LLAMA
    found["recipe"] = sqviz.quantize(smoothed, recipe, backend="auto", attention=True, head=True)
    found["recipe, 16-bit head"] = sqviz.quantize(smoothed, recipe, backend="auto", attention=True)
    found["recipe, linears only"] = sqviz.quantize(smoothed, recipe, backend="auto")
    return found


def quality(contenders: dict[str, sqviz.LM]) -> None:
    """Perplexity on text that was not calibrated on: what the speed costs."""
    held = sqviz.text().tokens(contenders["fp32"].tokenizer, limit=200_000)[-8 * 512 :]
    found = {name: sqviz.perplexity(lm, held) for name, lm in contenders.items()}
    table(
        "quality",
        [{"model": name, "perplexity": value, "× fp32": value / found["fp32"]} for name, value in found.items()],
    )


def context(contenders: dict[str, sqviz.LM], rounds: int) -> None:
    """The context stage: a prompt read at once, logits of the last token."""
    ids = sqviz.text().tokens(contenders["fp32"].tokenizer, limit=max(b * t for b, t in CONTEXTS))
    rows = []
    for batch, length in CONTEXTS:
        prompt = ids[: batch * length].view(batch, length)
        work: Work = {
            name: lambda m=lm.model, p=prompt: m(input_ids=p, use_cache=True, logits_to_keep=1)
            for name, lm in contenders.items()
        }
        rows += compared({"batch": batch, "tokens": length}, work, rounds)
    table("context", rows)


def decode(contenders: dict[str, sqviz.LM], rounds: int) -> None:
    """The decoding stage: one more token for each sequence, keys and values of the others cached."""
    ids = sqviz.text().tokens(contenders["fp32"].tokenizer, limit=max(b * t for b, t in DECODES))
    rows = []
    for batch, length in DECODES:
        work = {name: step(lm, ids[: batch * length].view(batch, length)) for name, lm in contenders.items()}
        rows += compared({"batch": batch, "tokens": length}, work, rounds)
        del work
        gc.collect()
    table("decode", rows)


def step(lm: sqviz.LM, prompt: torch.Tensor) -> Callable[[], object]:
    """One cached step after this prompt, which is undone each time. INT8 attention keeps INT8 keys and values."""
    from transformers import DynamicCache

    cache = sqviz.Int8Cache(lm) if lm.model.config._attn_implementation == "sqviz_int8" else DynamicCache()
    lm.model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = prompt[:, -1:]

    def once() -> None:
        lm.model(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return once


def compared(where: dict[str, object], work: Work, rounds: int) -> Iterator[dict[str, object]]:
    """A row per contender: milliseconds, how many times as fast as others, and memory that a call takes for itself."""
    seconds = interleaved(work, rounds)
    others = [name for name in ("fp32", "bf16", "torch dynamic INT8", "torchao") if name in seconds]
    for name, value in seconds.items():
        row = {**where, "model": name, "ms": 1000 * value}
        yield row | {f"× {other}": seconds[other] / value for other in others} | {"peak MB": peak(work[name])}


def compiled(rounds: int) -> None:
    """Both stages at 512 tokens under torch.compile: ours, bf16, and torchao's where it is installed."""
    torch._dynamo.config.recompile_limit = 64
    full, half = sqviz.load(), sqviz.load(dtype="bfloat16")
    ease_head(half.model)
    smoothed = sqviz.smooth(half, sqviz.capture(full, sqviz.text(), samples=4, length=512), 0.5)
    recipe = sqviz.quantize(smoothed, sqviz.SMOOTHQUANT_LLAMA, backend="auto", attention=True, head=True)
    contenders = {"fp32": full, "bf16": half, "recipe": recipe}
    contenders |= {f"{name}, compiled": lm.replace(model=torch.compile(lm.model)) for name, lm in contenders.items()}
    if "torchao" in installed():
        contenders["torchao, compiled"] = full.replace(model=torch.compile(torchao(full)))
    ids = sqviz.text().tokens(full.tokenizer, limit=4 * 512).view(4, 512)
    rows: list[dict[str, object]] = []
    for stage, batch in (("context", 4), ("decode", 1)):
        work: Work = {}
        for name, lm in contenders.items():
            start = time.perf_counter()
            read = functools.partial(lm.model, input_ids=ids, use_cache=True, logits_to_keep=1)
            work[name] = read if stage == "context" else step(lm, ids[:1])
            for _ in range(3):  # what is compiled for one length is compiled anew for any
                work[name]()
            print(f"{stage}, {name}: ready after {time.perf_counter() - start:.0f} s", flush=True)
        rows += compared({"stage": stage, "batch": batch, "tokens": 512}, work, rounds)
    table("compiled", rows)


def plot() -> None:
    """Milliseconds of each contender, as a picture for the README."""
    from sqviz.widgets.bars_still import bars_still

    panels: dict[str, dict[str, float]] = {}
    for stage, where, title in (
        ("context", ("4", "512"), "reading 4 × 512 tokens, ms"),
        ("decode", ("1", "512"), "one more token after 512, ms"),
    ):
        with (RESULTS / f"{stage}.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if (row["batch"], row["tokens"]) == where]
        panels[title] = {row["model"]: float(row["ms"]) for row in rows if row["model"] in SHOWN}
    still = bars_still(
        panels, "SmolLM2-135M on two threads of a CPU with AVX-512 VNNI", "kernels/bench.py; shorter is better"
    )
    PICTURE.write_bytes(still.png())


# --- memory ---

_MEASURE = """
import gc, psutil, sys, torch
import sqviz, sqviz.quant.checkpoint, transformers.models.llama.modeling_llama
import accelerate, ctypes
from sqviz.models.tiny import tiny
with torch.inference_mode():  # what code and compiled kernels take is not the model's
    small = sqviz.quantize(tiny("LlamaForCausalLM"), sqviz.SMOOTHQUANT_LLAMA, backend="auto", head=True)
    small.model(torch.tensor([[1, 2, 3]]))
def trim():
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
trim()
before = psutil.Process().memory_info().rss
kind, place = sys.argv[1:]
lm = sqviz.load_int8(place) if kind == "int8" else sqviz.load(dtype=kind)
for tensor in (*lm.model.parameters(), *lm.model.buffers()):
    tensor.view(-1)[:: 512].sum().item() if tensor.numel() else None  # files are mapped: have every page read
with torch.inference_mode():
    lm.model(torch.tensor([[1, 2, 3]]))
trim()
tensors = {id(t): t for t in (*lm.model.parameters(), *lm.model.buffers())}.values()
held = sum(t.numel() * t.element_size() for t in tensors)
print(psutil.Process().memory_info().rss - before, held)
"""


def memory() -> None:
    """Resident memory that a model adds to a process of its own, after one pass; and the bytes of its tensors."""
    half = sqviz.load(dtype="bfloat16")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"fp32": ("float32", ""), "bf16": ("bfloat16", "")}
        for name, head in (("INT8, 16-bit embedding and head", False), ("INT8, embedding and head too", True)):
            lm = sqviz.quantize(half, sqviz.SMOOTHQUANT_LLAMA, backend="auto", head=head)
            kinds[name] = ("int8", str(sqviz.save_int8(lm, Path(folder) / str(head))))
        for name, arguments in kinds.items():
            run = subprocess.run(
                [sys.executable, "-c", _MEASURE, *arguments], check=True, capture_output=True, text=True
            )
            resident, held = map(int, run.stdout.split()[-2:])
            rows.append({"model": name, "resident MB": resident / 1e6, "tensors MB": held / 1e6})
    for row in rows:
        row["resident / bf16"] = row["resident MB"] / rows[1]["resident MB"]
        row["tensors / bf16"] = row["tensors MB"] / rows[1]["tensors MB"]
    table("memory", rows)


@torch.inference_mode()
def main() -> None:
    """Run what was named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["operators", "context", "decode", "memory"])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    machine = psutil.virtual_memory().total / 2**30
    print(
        f"{time.strftime('%Y-%m-%d')}, {torch.get_num_threads()} threads, {machine:.0f} GiB, torch {torch.__version__}"
    )
    if "operators" in given.what:
        operators(3 * given.rounds)
    if {"context", "decode"} & set(given.what):
        contenders = models()
        quality(contenders)
        if "context" in given.what:
            context(contenders, given.rounds)
        if "decode" in given.what:
            decode(contenders, 3 * given.rounds)
    if "memory" in given.what:
        memory()
    if "compiled" in given.what:
        compiled(given.rounds)
    if "plot" in given.what:
        plot()


if __name__ == "__main__":
    main()

"""Capture time beside a bare forward pass over the same segments, all in one run, interleaved.

    python benchmarks/capture.py [--segments 4] [--length 512] [--rounds 7] [--threads 2]

What is compared, per round in turn, on the embedded model:
    bare        the model as it is, logits and all: the unit
    body        the same without the head, which capture leaves out
    capture     sqviz.capture: all statistics of all inputs and weights
    absmax      what smoothquant's calibration does: max|x| per channel in a hook on every linear, and nothing else
    keep        the obvious way: keep every input of every group, and take the same statistics with torch at the end
The machine may be shared: a ratio is the median over rounds of time / bare's time in the same round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import sqviz
from sqviz.models.linears import linear_names
from sqviz.models.lm import LM
from sqviz.observe.hooks import body, watch
from sqviz.observe.magnitudes import QUANTILES


def bare(model: torch.nn.Module, segments: Tensor) -> None:
    with torch.inference_mode():
        for ids in segments:
            model(ids[None], use_cache=False)


def absmax_only(lm: LM, segments: Tensor) -> dict[str, Tensor]:
    scales: dict[str, Tensor] = {}

    def hook(_: torch.nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        largest = args[0].flatten(0, -2).abs().amax(0)
        scales[name] = torch.maximum(scales[name], largest) if name in scales else largest

    handles = [
        lm.model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: hook(m, args, name))
        for name in linear_names(lm)
    ]
    try:
        bare(lm.model, segments)
    finally:
        for handle in handles:
            handle.remove()
    return scales


def keep_everything(lm: LM, segments: Tensor) -> dict[str, tuple[Tensor, ...]]:
    kept: dict[str, list[Tensor]] = {}
    with watch(lm, lambda group, x: kept.setdefault(group.name, []).append(x.clone())):
        bare(body(lm), segments)
    result = {}
    for name in list(kept):
        x = torch.cat(kept.pop(name))
        magnitude = x.abs()
        order = magnitude.sort(0).values
        ranks = [min(len(x) - 1, int(level * len(x))) for level in QUANTILES]
        result[name] = (x.amin(0), x.amax(0), magnitude.mean(0), order[ranks], magnitude.argmax(0), magnitude.amax(1))
    return result


def measure(lm: LM, segments: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds per round by name, taken in turn; one round before is thrown away (compilation, page faults)."""
    count, length = segments.shape
    ways: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(lm.model, segments),
        "body": lambda: bare(body(lm), segments),
        "capture": lambda: sqviz.capture(lm, segments.flatten(), samples=count, length=length, progress=False),
        "absmax": lambda: absmax_only(lm, segments),
        "keep": lambda: keep_everything(lm, segments),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], unit: str = "bare") -> dict[str, float]:
    """Median over rounds of each way's time over the unit's in the same round."""
    return {
        name: statistics.median(took / base for took, base in zip(times, seconds[unit], strict=True))
        for name, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of torch; default: its own choice"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lm = sqviz.load()
    segments = torch.stack(list(sqviz.text().segments(lm.tokenizer, given.length, given.segments)))
    seconds = measure(lm, segments, given.rounds)
    times = ratios(seconds)
    print(
        f"capture beside a bare forward pass: {lm.name}, {given.segments} × {given.length} tokens, "
        f"{torch.get_num_threads()} threads, {given.rounds} rounds interleaved"
    )
    print(f"{'':10s} {'s per segment':>14s} {'× bare':>8s}")
    for name, took in seconds.items():
        print(f"{name:10s} {statistics.median(took) / given.segments:14.3f} {times[name]:8.2f}", flush=True)


if __name__ == "__main__":
    main()

"""What a step of an endless stream costs, beside a dense cache and beside recomputation; everything interleaved.

    python -m benchmarks streaming          or      python benchmarks/streaming.py [--sizes 256 1024] [--rounds 15]

Per token and cache size: a step of `Sinks(4, size − 4)`, a step with transformers' DynamicCache that holds as many
keys, and a pass over `size` tokens (`Recompute`, what a window without a cache costs). Then tokens per second of the
two exact methods of `streaming_perplexity`, and steps early and late in a long stream.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import psutil
import torch
from transformers import DynamicCache

import sqviz
from sqviz.streaming.feed import Feed, last_logits_only

Step = Callable[[int], None]


def filled(lm: sqviz.LM, ids: torch.Tensor, policy: sqviz.Sinks) -> sqviz.SinkCache:
    """A cache after a text."""
    feed = Feed(lm, ids, policy)
    for _ in feed.passes():
        pass
    assert feed.cache is not None
    return feed.cache


def stepper(lm: sqviz.LM, ids: torch.Tensor, cache: object) -> Step:
    """One decode step; a dense cache is cut back, so that it stays as long as it is."""

    def step(turn: int) -> None:
        given = ids[turn % len(ids)].view(1, 1)
        lm.model(input_ids=given, past_key_values=cache, use_cache=True)
        if isinstance(cache, DynamicCache):
            cache.crop(-1)

    return step


def timed(steps: dict[str, Step], rounds: dict[str, int]) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(max(rounds.values())):
        for name, step in steps.items():
            if turn < rounds[name]:
                start = time.perf_counter()
                step(turn)
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


@torch.inference_mode()
def per_size(lm: sqviz.LM, ids: torch.Tensor, size: int, rounds: int) -> None:
    """One row: milliseconds per token, and what they are of a dense step."""
    text = ids[: size + 64]
    sinks, dense = filled(lm, text, sqviz.Sinks(4, size - 4)), DynamicCache()
    lm.model(input_ids=text[None, : size - 1], past_key_values=dense, use_cache=True, **last_logits_only(lm))

    def recompute(turn: int) -> None:
        lm.model(input_ids=text[None, turn : turn + size], use_cache=False, **last_logits_only(lm))

    steps = {"sinks": stepper(lm, ids, sinks), "dense": stepper(lm, ids, dense), "recompute": recompute}
    for step in steps.values():
        step(0)
    found = timed(steps, {"sinks": rounds, "dense": rounds, "recompute": max(3, rounds // 4)})
    ms = {name: 1000 * seconds for name, seconds in found.items()}
    print(
        f"{size:6d} {ms['sinks']:9.1f} {ms['dense']:9.1f} {ms['recompute']:11.1f} {ms['sinks'] / ms['dense']:13.2f} "
        f"{ms['recompute'] / ms['sinks']:17.1f} {sinks.bytes / 1e6:12.1f}",
        flush=True,
    )
    sinks.close()


def methods(lm: sqviz.LM, ids: torch.Tensor, rounds: int) -> None:
    """Tokens per second of both methods at Sinks(4, 1020), beyond the point where the cache is full."""
    policy, block = sqviz.Sinks(4, 1020), 512
    speeds: dict[str, list[float]] = {"tokens": [], "parallel": []}
    caches = {name: filled(lm, ids[:1280], policy) for name in speeds}
    with torch.inference_mode():
        step = stepper(lm, ids, caches["tokens"])
        for turn in range(rounds):
            start = time.perf_counter()
            for k in range(8):
                step(turn + k)
            speeds["tokens"].append(8 / (time.perf_counter() - start))
            feed = Feed(lm, ids[turn * block : (turn + 1) * block], policy, block, caches["parallel"])
            start = time.perf_counter()
            for _ in feed.passes():
                pass
            speeds["parallel"].append(block / (time.perf_counter() - start))
    slow, fast = (statistics.median(speeds[name]) for name in ("tokens", "parallel"))
    print(f"\nSinks(4, 1020): tokens {slow:.1f} tokens/s, parallel {fast:.1f} tokens/s: {fast / slow:.1f} ×")


def along(lm: sqviz.LM, ids: torch.Tensor, positions: tuple[int, int]) -> None:
    """Steps early and late in one stream, and the memory of the process."""
    policy, process, rows = sqviz.Sinks(4, 252), psutil.Process(), []
    feed = Feed(lm, ids[: positions[1]], policy)
    wanted = list(positions)
    for before, _ in feed.passes():
        if wanted and before >= wanted[0] - feed.block:
            assert feed.cache is not None
            step = stepper(lm, ids, feed.cache)
            with torch.inference_mode():
                seconds = timed({"step": step}, {"step": 40})["step"]
            rows.append((wanted.pop(0), 1000 * seconds, process.memory_info().rss / 1e6))
    for position, ms, megabytes in rows:
        print(f"after {position:8,d} tokens: {ms:6.1f} ms per step, {megabytes:7.0f} MB resident")
    print(f"late / early: {rows[-1][1] / rows[0][1]:.3f} × time, {rows[-1][2] / rows[0][2]:.3f} × memory")
    feed.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=(256, 1024, 4096))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--positions", type=int, nargs=2, default=(5_000, 100_000))
    given = parser.parse_args()
    lm = sqviz.load()
    ids = sqviz.text().tokens(lm.tokenizer, limit=max(given.positions[1], max(given.sizes) + 64))
    print(f"{lm}, {torch.get_num_threads()} threads; milliseconds per token, medians\n")
    head = ("sinks", "dense", "recompute", "sinks/dense", "recompute/sinks", "cache MB")
    print(
        f"{'cache':>6s} "
        + " ".join(f"{name:>{width}s}" for name, width in zip(head, (9, 9, 11, 13, 17, 12), strict=True))
    )
    for size in given.sizes:
        per_size(lm, ids, size, given.rounds)
    methods(lm, ids, max(3, given.rounds // 4))
    along(lm, ids, tuple(given.positions))


if __name__ == "__main__":
    main()

"""What a step of an endless stream costs, beside a dense cache and beside recomputation; everything interleaved.

    python -m benchmarks streaming          or      python -m benchmarks.streaming [--sizes 256 1024] [--rounds 15]

Per token and cache size (thesis Figure 4.8): a step of `Sinks(4, size − 4)`, one with transformers' DynamicCache that
holds as many keys, a pass over `size` tokens (a window that is recomputed), and steps of attention_sinks 0.4.0 in an
environment of its own (peer.py). Then tokens per second of the two exact methods of `streaming_perplexity`, and steps
early and late in one stream.
"""

import argparse
import statistics
import time

import psutil
import torch

import sqviz
from benchmarks.peer import Peer
from benchmarks.peer_process import Unavailable
from sqviz.evaluation.stream_cost import POLICIES, interleaved, steps_at
from sqviz.streaming.feed import Feed

HEAD = ("sinks", "dense", "recomputed", "sinks/dense", "recomputed/sinks", "peer", "its dense", "peer/its dense")


@torch.inference_mode()
def per_size(lm: sqviz.LM, ids: torch.Tensor, size: int, rounds: int, peer: Peer | None) -> None:
    """One row: milliseconds per token, and what they are of a dense step."""
    with steps_at(lm, ids, size, 4) as (steps, _):
        turns = dict.fromkeys(steps, rounds) | {"window, recomputed": max(3, rounds // 4)}
        theirs: dict[str, list[float]] = {"peer": [], "its dense": []}
        if peer is not None:
            kept, plain = peer.fill(size)
            assert kept == plain == size, f"attention_sinks attends to {kept} and {plain} keys, not {size}"
            steps |= {
                "peer": lambda turn: theirs["peer"].append(peer.step(turn)),
                "its dense": lambda turn: theirs["its dense"].append(peer.dense(turn)),
            }
            turns |= dict.fromkeys(theirs, rounds)
        seconds = interleaved(steps, turns, lm.device)
    ms = {name: 1000 * value for name, value in seconds.items()}
    ms |= {name: 1000 * statistics.median(values[1:]) for name, values in theirs.items() if values}
    ours, dense, slow = (ms[name] for name in POLICIES)
    row = f"{size:6d} {ours:9.1f} {dense:9.1f} {slow:11.1f} {ours / dense:12.2f} {slow / ours:17.1f}"
    if peer is not None:
        row += f" {ms['peer']:9.1f} {ms['its dense']:10.1f} {ms['peer'] / ms['its dense']:15.2f}"
    print(row, flush=True)


def methods(lm: sqviz.LM, ids: torch.Tensor, rounds: int) -> None:
    """Tokens per second of both methods at Sinks(4, 1020), beyond the point where the cache is full."""
    policy, block, steps = sqviz.Sinks(4, 1020), 512, 8
    speeds: dict[str, list[float]] = {"tokens": [], "parallel": []}
    feeds = {name: read(lm, ids[:1280], policy) for name in speeds}
    for turn in range(rounds):
        for name, tokens, size in (("tokens", steps, 1), ("parallel", block, block)):
            feed = Feed(lm, ids[turn * block :][:tokens], policy, size, feeds[name].cache)
            start = time.perf_counter()
            for _ in feed.passes():
                pass
            speeds[name].append(tokens / (time.perf_counter() - start))
    slow, fast = (statistics.median(speeds[name]) for name in ("tokens", "parallel"))
    print(
        f"\nSinks(4, 1020): tokens {slow:.1f} tokens/s, parallel {fast:.1f} tokens/s: {fast / slow:.1f} ×", flush=True
    )
    for feed in feeds.values():
        feed.close()


@torch.inference_mode()
def along(lm: sqviz.LM, ids: torch.Tensor, early: int, late: int, rounds: int) -> None:
    """Steps after `early` tokens and after `late`, in turns; memory of the process at both places."""
    policy, process = sqviz.Sinks(4, 252), psutil.Process()
    streams = {"early": read(lm, ids[:early], policy)}
    resident = {}
    long = Feed(lm, ids[:late], policy)
    for before, _ in long.passes():
        if before >= early - long.block:
            resident.setdefault("early", process.memory_info().rss)
    streams["late"], resident["late"] = long, process.memory_info().rss

    def step(name: str):
        cache = streams[name].cache
        return lambda turn: lm.model(input_ids=ids[turn].view(1, 1), past_key_values=cache, use_cache=True)

    seconds = interleaved({name: step(name) for name in streams}, dict.fromkeys(streams, rounds), lm.device)
    print()
    for name, tokens in (("early", early), ("late", late)):
        print(f"after {tokens:8,d} tokens: {1000 * seconds[name]:6.1f} ms per step, {resident[name] / 1e6:7.0f} MB")
    time_ratio, memory = (found["late"] / found["early"] for found in (seconds, resident))
    print(f"late / early: {time_ratio:.3f} × time, {memory:.3f} × resident memory", flush=True)
    for feed in streams.values():
        feed.close()


def read(lm: sqviz.LM, ids: torch.Tensor, policy: sqviz.Sinks) -> Feed:
    """A stream after a text."""
    feed = Feed(lm, ids, policy)
    for _ in feed.passes():
        pass
    return feed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=(256, 512, 1024, 2048, 4096))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--positions", type=int, nargs=2, default=(5_000, 100_000))
    given = parser.parse_args()
    lm = sqviz.load()
    ids = sqviz.text().tokens(lm.tokenizer, limit=max(given.positions[1], max(given.sizes) + 64))
    try:
        peer: Peer | None = Peer(lm)
    except Unavailable as why:
        print(f"without attention_sinks: {why}")
        peer = None
    print(f"{lm}, {torch.get_num_threads()} threads; milliseconds per token, medians of {given.rounds}\n")
    widths = (9, 9, 11, 12, 17, 9, 10, 15)[: len(HEAD) if peer else 5]
    print(f"{'keys':>6s} " + " ".join(f"{name:>{width}s}" for name, width in zip(HEAD, widths, strict=False)))
    for size in given.sizes:
        per_size(lm, ids, size, given.rounds, peer)
    if peer is not None:
        peer.close()
    methods(lm, ids, max(3, given.rounds // 4))
    along(lm, ids, *given.positions, 3 * given.rounds)


if __name__ == "__main__":
    main()

"""How long `LinearProbe` takes to answer: the work behind one move of the α slider.

    python benchmarks/error.py [--rounds 15]

Three linears of the embedded model on 512 tokens of text, and a synthetic one of 4096 × 11008 (both ways round) on 512
random tokens with outlier channels. Median and 95th percentile of the wall time per answer, at a different α each time.
`coarse` is asked while the slider moves, `exact` when it rests; `matmul` is the float32 product X Wᵀ alone, for scale.
Last, the whole curve: the exact errors at 21 values of α in one sweep, and the definition evaluated at each in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import sqviz
from sqviz.models.linears import weight
from sqviz.observe.hooks import activations
from sqviz.quant.error import LinearProbe, output_error

TOKENS = 512
EMBEDDED = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
SYNTHETIC = ((4096, 11008), (11008, 4096))
SCHEMES = (sqviz.SMOOTHQUANT_O3, sqviz.W8A8, sqviz.SMOOTHQUANT_LLAMA, sqviz.ZEROQUANT)


def linears() -> Iterator[tuple[str, Tensor, Tensor]]:
    lm = sqviz.load()
    names = [f"model.layers.28.{kind}" for kind in EMBEDDED]
    tokens = next(sqviz.text().segments(lm.tokenizer, TOKENS, 1))
    seen = activations(lm, tokens, names)
    for name in names:
        yield name, seen[name], weight(lm, name).detach()
    generator = torch.Generator().manual_seed(0)
    for out, channels in SYNTHETIC:
        x = torch.randn(TOKENS, channels, generator=generator)
        x[:, ::1000] *= 60
        yield f"synthetic {out} × {channels}", x, torch.randn(out, channels, generator=generator) / channels**0.5


def timed(ask: Callable[[float], object], rounds: int) -> str:
    ask(0.5)
    milliseconds = []
    for k in range(rounds):
        start = time.perf_counter()
        ask((k + 0.5) / rounds)
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return f"{statistics.median(milliseconds):7.1f} {sorted(milliseconds)[int(0.95 * (rounds - 1))]:7.1f}"


def curves(rounds: int) -> None:
    """21 values of α for the linears of the embedded model."""
    alphas = [k / 20 for k in range(21)]
    print(f"\n{'the curve, 21 values of α':60s} {'one sweep':>15s} {'one by one':>11s} {'largest difference':>20s}")
    for name, x, w in linears():
        if "synthetic" in name:
            continue
        x_absmax, w_absmax = x.abs().amax(0), w.abs().amax(0)
        for scheme in (sqviz.SMOOTHQUANT_O3, sqviz.SMOOTHQUANT_LLAMA):
            probe = LinearProbe(x, w, x_absmax, w_absmax, scheme)
            mine = timed(lambda _, probe=probe: probe.sweep(alphas, exact=True), rounds)
            start = time.perf_counter()
            known = [output_error(x, w, probe.scale(a), scheme, (-x_absmax, x_absmax)).frobenius for a in alphas]
            slow = 1e3 * (time.perf_counter() - start)
            off = (probe.sweep(alphas, exact=True) - torch.tensor(known)).abs().max().item()
            print(f"{name:36s} {scheme.name:23s} {mine} {slow:11.1f} {off:20.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(f"{torch.get_num_threads()} threads; milliseconds, median and p95 of {rounds}\n")
    print(f"{'':40s} {'coarse':>15s} {'exact':>15s} {'error at α=.5, coarse and exact':>40s}")
    for name, x, w in linears():
        x_absmax, w_absmax = x.abs().amax(0), w.abs().amax(0)
        start = time.perf_counter()
        probe = LinearProbe(x, w, x_absmax, w_absmax, sqviz.W8A8)
        opened = 1e3 * (time.perf_counter() - start)
        product = timed(lambda _, x=x, w=w: x @ w.T, rounds)
        print(f"{name}, {tuple(w.shape)}: opened in {opened:.0f} ms, matmul {product}")
        for scheme in SCHEMES:
            mine = probe.with_scheme(scheme)
            coarse, exact = timed(mine.coarse, rounds), timed(mine.exact, rounds if w.numel() < 1e7 else 3)
            known = output_error(x, w, probe.scale(0.5), scheme, (-x_absmax, x_absmax)).frobenius
            values = f"{mine.coarse(0.5).frobenius:.5f} {mine.exact(0.5).frobenius:.5f} (definition {known:.5f})"
            print(f"  {scheme.name:38s} {coarse} {exact}  {values:>40s}", flush=True)
    curves(rounds)


if __name__ == "__main__":
    main()

"""What INT8 costs the embedded model in perplexity, naive and smoothed: thesis Tables 3.3 and 3.6 on a small Llama.

    python benchmarks/perplexity.py [--segments 16] [--samples 32] [--length 512] [--alphas 0.5 0.6 …] [--threads 2]

Calibration reads `samples` segments of documents that are not scored; one segment of each of `segments` other documents
is scored. "norm" smooths the inputs of attention and MLP (thesis), "all" also those of o_proj and down_proj. Everything
is simulated; the table says how far each perplexity is above float32's on the same tokens.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

import sqviz
from sqviz.corpus.segments import as_tokens
from sqviz.models.lm import LM
from sqviz.quant.schemes import Scheme

ALPHAS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85)
NAIVE = {
    "per-tensor dynamic (W8A8)": sqviz.W8A8,
    "per-tensor static": sqviz.SMOOTHQUANT_O3,
    "per-tensor / per-token": sqviz.SMOOTHQUANT_O1,
    "per-channel / per-token": sqviz.SMOOTHQUANT_LLAMA,
    "group-wise / per-token (ZeroQuant)": sqviz.ZEROQUANT,
}
SMOOTHED = {
    "O1": sqviz.SMOOTHQUANT_O1,
    "O2": sqviz.SMOOTHQUANT_O2,
    "O3": sqviz.SMOOTHQUANT_O3,
    "per-channel / per-token": sqviz.SMOOTHQUANT_LLAMA,
}


def split(lm: LM, segments: int, length: int) -> tuple[list[str], Tensor]:
    """Documents to calibrate on, and one segment out of each of `segments` other documents, spread over the corpus."""
    documents = list(sqviz.text())
    places = [round((k + 0.5) * len(documents) / segments) for k in range(segments)]
    held = [as_tokens(lm, documents[place], 2 * length)[-length:] for place in places]
    return [document for k, document in enumerate(documents) if k not in places], torch.cat(held)


class Table:
    """Scores models and prints a row each."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.tokens, self.length, self.reference = tokens, length, 0.0

    def row(self, label: str, lm: LM) -> float:
        start = time.perf_counter()
        value = sqviz.perplexity(lm, self.tokens, self.length)
        self.reference = self.reference or value
        change = f"{value / self.reference - 1:+9.2%}"
        print(f"{label:58s} {value:10.3f} {change}   {time.perf_counter() - start:5.0f} s", flush=True)
        return value


def quantised(lm: LM, scheme: Scheme, magnitudes: sqviz.Magnitudes) -> LM:
    return sqviz.quantize(lm, scheme, magnitudes if scheme.static else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=16, help="documents to score, one segment each")
    parser.add_argument("--samples", type=int, default=32, help="segments to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens per segment")
    parser.add_argument("--alphas", type=float, nargs="+", default=ALPHAS)
    parser.add_argument("--folds", nargs="+", default=("norm", "all"), choices=("norm", "all"))
    parser.add_argument("--naive", action=argparse.BooleanOptionalAction, default=True, help="the unsmoothed rows too")
    parser.add_argument("--schemes", nargs="+", default=tuple(SMOOTHED), choices=tuple(SMOOTHED))
    parser.add_argument("--capture", type=Path, help="file to keep the calibration in; read if it is there")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lm = sqviz.load()
    documents, tokens = split(lm, arguments.segments, arguments.length)
    if arguments.capture and arguments.capture.exists():
        magnitudes = sqviz.Magnitudes.load(arguments.capture)
    else:
        magnitudes = sqviz.capture(lm, documents, samples=arguments.samples, length=arguments.length)
        if arguments.capture:
            magnitudes.save(arguments.capture)
    print(
        f"{lm}\n{len(tokens)} tokens scored in segments of {arguments.length}; {len(magnitudes.tokens)} to calibrate\n"
    )
    print(f"{'':58s} {'perplexity':>10s} {'change':>9s}")
    table = Table(tokens, arguments.length)
    table.row("float32", lm)
    for label, scheme in NAIVE.items() if arguments.naive else ():
        table.row(f"naive, {label}", quantised(lm, scheme, magnitudes))
    for folds in arguments.folds:
        for alpha in arguments.alphas:
            smoothed = sqviz.smooth(lm, magnitudes, alpha, folds=folds)
            for label in arguments.schemes:
                table.row(f"smoothed α={alpha:g} {folds}, {label}", quantised(smoothed, SMOOTHED[label], magnitudes))


if __name__ == "__main__":
    main()

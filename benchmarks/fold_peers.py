"""Does smoothing alone keep the logits? llm-compressor's SmoothQuantModifier beside sqviz, on every tiny model.

    python -m benchmarks.fold_peers [name …]

Smoothing moves numbers between tensors, no more: whatever it does to the logits beyond rounding is a wrong fold. Both
smooth the inputs of attention and MLP by what their table of architectures says, α = 0.5, in float32. "change" is
max|Δ logits| / max|logits|. The models are random (`sqviz.models.tiny`), with outliers planted. Written to
benchmarks/results/fold_peers.csv.
"""

import argparse
from typing import Any

import pandas
import torch

import sqviz
from benchmarks.peer_process import PeerProcess, Unavailable, model_folder
from benchmarks.schemes import RESULTS
from benchmarks.smoothing_peers import NEEDS
from sqviz.errors import CannotFold
from sqviz.models.tiny import TINY, tiny
from sqviz.quant.equivalence import check_equivalence

WRONG = 1e-3
"""A change beyond rounding in float32."""


def theirs(peer: PeerProcess, name: str) -> dict[str, Any]:
    try:
        answer = peer.ask(fold=name)
    except Unavailable as error:
        return {"peer": "refused", "peer_says": str(error).split(": ", 2)[-1][:120]}
    versions = ", ".join(f"{package} {number}" for package, number in answer["versions"].items())
    said = "wrong" if answer["change"] > WRONG else "exact" if answer["touched"] else "nothing smoothed"
    return {"peer": said, "peer_change": float(f"{answer['change']:.2g}"), "versions": versions}


def ours(name: str) -> dict[str, Any]:
    lm = tiny(name)
    tokens = torch.arange(3 * 48).mul(37).remainder(128).add(3)
    magnitudes = sqviz.capture(lm, tokens, length=48, progress=False)
    try:
        after = sqviz.smooth(lm, magnitudes, 0.5, check=False)
    except CannotFold as error:
        return {"sqviz": "refused", "sqviz_says": str(error)[:120]}
    change = check_equivalence(lm, after, tolerance=float("inf"))
    return {"sqviz": "wrong" if change > WRONG else "exact", "sqviz_change": float(f"{change:.2g}")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=TINY, help="ids of tiny models")
    given = parser.parse_args()
    torch.set_num_threads(1)
    peer = PeerProcess("llmcompressor", NEEDS["llmcompressor"], model_folder(sqviz.load()))
    try:
        rows = [{"model": name, **theirs(peer, name), **ours(name)} for name in given.names]
    finally:
        peer.close()
    table = pandas.DataFrame(rows)
    table.to_csv(RESULTS / "fold_peers.csv", index=False)
    print(table.drop(columns=["versions", "peer_says", "sqviz_says"], errors="ignore").to_string(index=False))


if __name__ == "__main__":
    main()

"""Thesis Table 3.3 on the embedded model, and what each relaxation of O1, O2, O3 and of the Llama recipe buys.

    python -m benchmarks.schemes [--samples 512] [--segments 16] [--searched] [--latency]

Scored is one segment of 512 tokens out of each of 16 documents, spread over the embedded addresses; calibration and
searches read other documents. Rows are kept in benchmarks/results/schemes, so a run that was stopped goes on where it
was; the table is written to benchmarks/results/schemes.csv. Quantisation is simulated, latency is that of the executed
model.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

import sqviz
from sqviz.corpus.segments import as_tokens
from sqviz.evaluation.method_table import MethodTable
from sqviz.models.lm import LM

RESULTS = Path(__file__).parent / "results"
LENGTH = 512
LOST_MOST = ("*.2.mlp.down_proj", "*.29.mlp.down_proj")
"""Two linears of the embedded model with which per-tensor weights lose most."""
SMOOTHED = (sqviz.SMOOTHQUANT_O1, sqviz.SMOOTHQUANT_O2, sqviz.SMOOTHQUANT_O3, sqviz.SMOOTHQUANT_LLAMA)


def split(lm: LM, segments: int, length: int = LENGTH) -> tuple[list[str], Tensor]:
    """Documents to calibrate on, and one segment out of each of `segments` other documents, spread over the corpus."""
    documents = list(sqviz.text())
    places = [round((k + 0.5) * len(documents) / segments) for k in range(segments)]
    held = [as_tokens(lm, documents[place], 2 * length)[-length:] for place in places]
    return [document for k, document in enumerate(documents) if k not in places], torch.cat(held)


def methods(searched: bool) -> list[sqviz.Method]:
    """The thesis's rows, then the frontier of each level of SmoothQuant."""
    rows = list(sqviz.table_3_2())
    for scheme in SMOOTHED:
        single = LOST_MOST if isinstance(scheme.weight, sqviz.PerTensor) else ()
        rows += sqviz.frontier(scheme, floating=single)[1:]
    rows = list({row.key(): row for row in reversed(rows)}.values())[::-1]  # O1 with finer weights is the recipe
    rows.insert(1, sqviz.Method("kept sinks", kept_sinks=True))
    return [row for row in rows if searched or row.alpha != "auto"]


def shown(table: MethodTable) -> None:
    """One line per finished row."""
    row = table.rows[-1]
    score = "" if row.evaluation is None else f"{row.evaluation['perplexity'].value:10.3f}"
    print(f"{row.name:62s} {score} {row.error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=16, help="documents to score, one segment each")
    parser.add_argument("--samples", type=int, default=512, help="segments to calibrate on")
    parser.add_argument(
        "--searched", action="store_true", help="also the rows that search α, a quarter of an hour each"
    )
    parser.add_argument("--latency", action="store_true", help="also time the executed models: on an idle machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lm = sqviz.load()
    documents, held = split(lm, given.segments)
    table = sqviz.compare(
        lm,
        methods(given.searched),
        text=held,
        calibration=documents,
        samples=given.samples,
        latency=given.latency,
        folder=RESULTS / "schemes",
        on_row=shown,
        progress=False,
    )
    print(table)
    table.to_frame().round(3).to_csv(RESULTS / "schemes.csv")


if __name__ == "__main__":
    main()

"""Thesis Table 3.3 on the embedded model, and what each relaxation of O1, O2, O3 and of the Llama recipe buys.

    python -m benchmarks.schemes [--samples 512] [--segments 16] [--searched] [--latency]

Scored is one segment of 512 tokens out of each of 16 documents, spread over the embedded addresses; calibration and
searches read other documents. Rows are kept in benchmarks/results/schemes, so a run that was stopped goes on where it
was; the table is written to benchmarks/results/schemes.csv, what the candidates of each search came to on segments that
no search has seen, to objectives.csv, and how what was kept does on the scored text, to searched.csv. Quantisation is
simulated, latency is that of the executed model.
"""

import argparse
from pathlib import Path

import pandas
import torch
from torch import Tensor

import sqviz
from sqviz.corpus.segments import as_tokens
from sqviz.errors import SqvizError
from sqviz.evaluation.method_runner import Runner
from sqviz.evaluation.method_table import MethodTable
from sqviz.models.lm import LM
from sqviz.quant.divergence import Divergence

RESULTS = Path(__file__).parent / "results"
LENGTH = 512
LOST_MOST = ("*.2.mlp.down_proj", "*.29.mlp.down_proj")
"""Two linears of the embedded model with which per-tensor weights lose most."""
LEVELS = (sqviz.SMOOTHQUANT_O1, sqviz.SMOOTHQUANT_O2, sqviz.SMOOTHQUANT_O3)


def split(lm: LM, segments: int, length: int = LENGTH) -> tuple[list[str], Tensor]:
    """Documents to calibrate on, and one segment out of each of `segments` other documents, spread over the corpus."""
    documents = list(sqviz.text())
    places = [round((k + 0.5) * len(documents) / segments) for k in range(segments)]
    held = [as_tokens(lm, documents[place], 2 * length)[-length:] for place in places]
    return [document for k, document in enumerate(documents) if k not in places], torch.cat(held)


def methods(searched: bool) -> list[sqviz.Method]:
    """The thesis's rows, then the frontier of each level of SmoothQuant; α is searched for all but the recipe."""
    rows = list(sqviz.table_3_2())
    for scheme in LEVELS:
        rows += sqviz.frontier(scheme, floating=LOST_MOST)[1:]
    recipe = sqviz.SMOOTHQUANT_LLAMA
    rows += [row for row in sqviz.frontier(recipe)[1:] if row.alpha != "auto"]
    rows.append(sqviz.Method(f"{recipe.name}, all folds, α = 0.6", recipe, 0.6, folds="all"))
    clipped = recipe.replace(weight_clip=sqviz.LeastError())
    rows.append(sqviz.Method(f"{recipe.name}, all folds, clipped", clipped, 0.5, folds="all"))
    rows = list({row.key(): row for row in reversed(rows)}.values())[::-1]  # O1 with finer weights is the recipe
    rows.insert(1, sqviz.Method("kept sinks", kept_sinks=True))
    return [row for row in rows if searched or row.alpha != "auto"]


def objectives(rows: list[sqviz.Method]) -> pandas.DataFrame:
    """The candidates of the last search for each scheme: KL(p ‖ p̂) in nats per token, and which of them was kept."""
    names = {row.scheme.as_code(): row.name for row in rows if row.scheme is not None and row.alpha == "auto"}
    frames = {}
    for path in sorted((RESULTS / "schemes").glob("*.json"), key=lambda path: path.stat().st_mtime):
        try:
            found = sqviz.FoundAlpha.load(path)
        except SqvizError:
            continue  # a row of the table
        if found.scheme in names:
            frames[found.scheme] = found.tried_to_frame().reset_index().assign(method=names[found.scheme])
    return pandas.concat(frames.values()).set_index(["method", "candidate"]).sort_index(level=0, sort_remaining=False)


def on_scored_text(
    lm: LM, table: MethodTable, rows: list[sqviz.Method], runner: Runner, text: Tensor
) -> pandas.DataFrame:
    """Searched strengths beside a flat 0.5 with the same folds, paired by segment: KL in nats per token; perplexity."""
    divergence = Divergence(runner.kept(lm), text.view(-1, LENGTH))
    by_name = {row.name: row for row in rows}
    found = {}
    for level in LEVELS:
        pair = [f"{level.name}, clipped, kept sinks, {how}" for how in ("folds of outliers", "α searched")]
        flat, searched = (
            divergence.each(by_name[name].apply(lm, runner.captured, keep=runner.kept, search=runner.searched))
            for name in pair
        )
        reference, evaluation = (table[name].evaluation for name in pair)
        assert reference is not None
        assert evaluation is not None
        change = evaluation.against(reference)["perplexity"]
        found[level.name] = {
            "KL, flat 0.5": float(flat.mean()),
            "KL, searched": float(searched.mean()),
            "± 95 % of the difference": 1.96 * float((searched - flat).std()) / len(flat) ** 0.5,
            "perplexity, searched / flat": change.change,
            "from": change.low,
            "to": change.high,
        }
    return pandas.DataFrame.from_dict(found, orient="index").rename_axis("method")


def shown(table: MethodTable) -> None:
    """One line per finished row."""
    row = table.rows[-1]
    score = "" if row.evaluation is None else f"{row.evaluation['perplexity'].value:10.3f}"
    print(f"{row.name:62s} {score} {row.error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=16, help="documents to score, one segment each")
    parser.add_argument("--samples", type=int, default=512, help="segments to calibrate on")
    parser.add_argument("--searched", action="store_true", help="also the rows that search α, half an hour each")
    parser.add_argument("--latency", action="store_true", help="also time the executed models: on an idle machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lm = sqviz.load()
    documents, held = split(lm, given.segments)
    rows = methods(given.searched)
    table = sqviz.compare(
        lm,
        rows,
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
    if given.searched:
        objectives(rows).round(4).to_csv(RESULTS / "objectives.csv")
        runner = Runner(lm, documents, given.samples, LENGTH, RESULTS / "schemes", sqviz.CancelToken())
        scored = on_scored_text(lm, table, rows, runner, held).round(4)
        print(scored.to_string())
        scored.to_csv(RESULTS / "searched.csv")


if __name__ == "__main__":
    main()

"""A table of methods without a model: scores of made-up items, for the tests of its sheet and its views."""

import torch

from sqviz.evaluation.method_table import MethodRow, MethodTable
from sqviz.evaluation.result import Evaluation
from sqviz.evaluation.scores import score

ITEMS = 16
# name, what, perplexity against the first, accuracy, MB, milliseconds
ROWS = (
    ("none", "unquantised", 1.0, 0.62, 269.0, None),
    ("W8A8", "W8 per-tensor, A8 per-tensor, dynamic", 2.1, 0.31, 162.9, 31.0),
    ("LLM.int8()", "W8 per-channel, A8 per-token, dynamic, channels ≥ 6 in 16 bit", 1.016, 0.61, 163.5, None),
    ("SmoothQuant-O3", "α = 0.5; W8 per-tensor, A8 per-tensor, static", 2.28, 0.3, 162.9, 29.0),
    ("SmoothQuant-Llama", "α = 0.5; W8 per-channel, A8 per-token, dynamic", 1.0185, 0.62, 163.5, 33.0),
    ("kept sinks", "kept sinks; unquantised", 0.997, 0.63, 269.0, None),
)


def evaluation(ratio: float, accuracy: float, seed: int) -> Evaluation:
    """Scores of items of which those of all methods share most of their spread."""
    shared, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    nll = 511 * (torch.log(torch.tensor(32.0 * ratio)) + 0.2 * torch.randn(ITEMS, generator=shared))
    nll = nll + 511 * 0.03 * (ratio != 1) * torch.randn(ITEMS, generator=own)
    hard = torch.rand(200, generator=shared)
    right = (hard + 0.02 * torch.randn(200, generator=own) < accuracy).double()
    weights = torch.full((ITEMS,), 511.0)
    more = {"content": "same", "seconds": 1.0}
    return Evaluation(
        "made up",
        (
            score("perplexity", "perplexity", nll, weights, **more),
            score("perplexity", "bits_per_byte", nll / 0.6931, 4.2 * weights, **more),
            score("hellaswag", "acc", right, **more),
        ),
    )


def table(rows: int = len(ROWS), *, failing: bool = True, timed: bool = True) -> MethodTable:
    """The first so many rows; `failing`: one more that the model cannot have."""
    made = [
        MethodRow(
            name,
            what,
            evaluation(ratio, accuracy, place),
            int(1e6 * size),
            milliseconds if timed else None,
            97.0 if timed and milliseconds else None,
        )
        for place, (name, what, ratio, accuracy, size, milliseconds) in enumerate(ROWS[:rows])
    ]
    if failing:
        why = "model.layers.0.mlp.experts: channels kept in floating point are not known for fused experts; skip= it"
        made.append(
            MethodRow("fused experts", "W8 per-channel, A8 per-token", None, 163_500_000, None, None, error=why)
        )
    missing = tuple(name for name, *_ in ROWS[rows:])
    return MethodTable("made up", tuple(made), missing)

"""What models cost side by side: reading a prompt, one more token, and memory (thesis Figure 3.6, Table 3.8).

    sqviz.model_cost({"float32": lm, "INT8": int8})

The context stage reads a prompt and wants the logits of its last token; a decoding step reads one more token with the
keys and values of the prompt cached. All models take turns, so that a busy machine is busy for all of them; times are
medians. A model with INT8 attention keeps its keys and values as INT8, any other in transformers' own cache. Memory is
that of parameters and buffers, each tensor once.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int64
from torch import Tensor

from sqviz.corpus.segments import Text, as_tokens
from sqviz.corpus.source import text as source
from sqviz.errors import SqvizError, TextTooShort
from sqviz.models.lm import LM
from sqviz.models.logits import logits_of
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.quant.int8_attention import uses
from sqviz.shown import Shown

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from sqviz.widgets.still import Still


@dataclasses.dataclass(frozen=True)
class ModelCostRow:
    """One model.

    Attributes:
        name: what it was called.
        context: milliseconds of the context stage.
        step: milliseconds of one more token.
        bytes: memory of its parameters and buffers.
    """

    name: str
    context: float
    step: float
    bytes: int


@dataclasses.dataclass(frozen=True)
class ModelCost(Shown):
    """All rows, and what was read.

    Attributes:
        rows: one per model; the first is what the others are compared with.
        batch, length: sequences, and tokens in each.
        device: where.
    """

    rows: tuple[ModelCostRow, ...]
    batch: int
    length: int
    device: str

    def to_frame(self) -> "pandas.DataFrame":
        """One row per model, with how many times as fast as the first it is."""
        import pandas

        first = self.rows[0]
        return pandas.DataFrame(
            [
                {
                    "model": row.name,
                    "context, ms": row.context,
                    "× faster": first.context / row.context,
                    "one more token, ms": row.step,
                    "× faster ": first.step / row.step,
                    "weights, MB": row.bytes / 1e6,
                    "of the first": row.bytes / first.bytes,
                }
                for row in self.rows
            ]
        ).set_index("model")

    @property
    def panels(self) -> dict[str, dict[str, float]]:
        """What `figure` shows: value by quantity and model."""
        return {
            "reading the prompt, ms": {row.name: row.context for row in self.rows},
            "one more token, ms": {row.name: row.step for row in self.rows},
            "weights, MB": {row.name: row.bytes / 1e6 for row in self.rows},
        }

    def figure(self) -> "plotly.graph_objects.Figure":
        """A bar per model for each quantity."""
        from sqviz.plots.bars import bars

        return bars(self.panels, self._title)

    def still(self) -> "Still":
        """The picture of `figure`, drawn without a browser."""
        from sqviz.widgets.bars_still import bars_still

        return bars_still(self.panels, self._title, "medians, all models in turns; shorter is better")

    def __repr__(self) -> str:
        return f"{self._title}\n{self.to_frame().round(2).to_string()}"

    @property
    def _title(self) -> str:
        return f"Cost of a model · {self.batch} × {self.length} tokens on {self.device}"


@torch.inference_mode()
def model_cost(
    models: Mapping[str, LM],
    text: Text | None = None,
    *,
    batch: int = 1,
    length: int = 512,
    rounds: int = 5,
    cancel: CancelToken | None = None,
    progress: bool = True,
) -> ModelCost:
    """Measure models in turns.

    Args:
        models: by name; the first is what the others are compared with. All on one device.
        text: what is read: a str, a text source, or token ids [token]; the embedded corpus by default.
        batch: sequences.
        length: tokens in each.
        rounds: turns that each model gets; steps get three times as many.
        cancel: stops between two turns.
        progress: show a progress bar.

    Raises:
        SqvizError: no models, models on different devices, or numbers below 1.
        TextTooShort: the text has fewer than batch · length tokens.
        Cancelled: stopped through `cancel`.
    """
    if not models or len({lm.device for lm in models.values()}) != 1:
        raise SqvizError("models: give at least one, all on the same device, such as {'float32': lm, 'INT8': int8}")
    if min(batch, length, rounds) < 1:
        raise SqvizError(f"batch={batch}, length={length}, rounds={rounds}: whole numbers from 1 are allowed")
    first = next(iter(models.values()))
    ids = as_tokens(first, source() if text is None else text, limit=batch * length)
    if len(ids) < batch * length:
        raise TextTooShort(f"the text has {len(ids)} tokens, and {batch} × {length} are to be read")
    prompt = ids[: batch * length].view(batch, length).to(first.device)
    reads, steps = ({name: make(lm, prompt) for name, lm in models.items()} for make in (_read, _step))
    with progress_bar(4 * rounds * len(models), "measuring", unit="turns", cancel=cancel, show=progress) as bar:
        context = _in_turns(reads, rounds, first.device, bar.step)
        step = _in_turns(steps, 3 * rounds, first.device, bar.step)
    rows = tuple(ModelCostRow(name, context[name], step[name], _bytes(lm)) for name, lm in models.items())
    return ModelCost(rows, batch, length, str(first.device))


def _read(lm: LM, prompt: Int64[Tensor, "batch token"]) -> Callable[[], object]:
    only = logits_of(lm, 1)
    return lambda: lm.model(input_ids=prompt, use_cache=True, **only)


def _step(lm: LM, prompt: Int64[Tensor, "batch token"]) -> Callable[[], object]:
    """One more token after the prompt, taken back each time."""
    from transformers import DynamicCache

    from sqviz.quant.int8_cache import Int8Cache

    cache = Int8Cache(lm) if uses(lm) else DynamicCache()
    lm.model(input_ids=prompt, past_key_values=cache, use_cache=True, **logits_of(lm, 1))

    def once() -> None:
        lm.model(input_ids=prompt[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return once


def _in_turns(
    work: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, done: Callable[[], None]
) -> dict[str, float]:
    """Median milliseconds of each; the first call of each does not count."""
    found: dict[str, list[float]] = {name: [] for name in work}
    for call in work.values():
        call()
    for _ in range(rounds):
        for name, call in work.items():
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            found[name].append(1000 * (time.perf_counter() - start))
            done()
    return {name: statistics.median(values) for name, values in found.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bytes(lm: LM) -> int:
    tensors = {id(tensor): tensor for tensor in (*lm.model.parameters(), *lm.model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

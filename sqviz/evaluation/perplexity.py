"""Perplexity over independent segments (thesis Tables 3.3, 3.6 and 3.7; smoothquant's ppl_eval).

The tokens are cut into non-overlapping segments of `length`, the tail is dropped. Each segment is scored on its own,
with no token added: its first token is given, the other length − 1 are predicted.

    perplexity = exp( Σ −ln p(token | tokens before it in its segment) / number of predicted tokens )

Logits are taken as the model gives them, scaling and soft caps included. Those of one forward pass are held at a time,
in the model's dtype (length × vocabulary); they are widened to float32 a few positions at a time. Sums are float64.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from sqviz.corpus.segments import Text, as_segments, as_tokens
from sqviz.errors import NonFinite, SqvizError
from sqviz.models.lm import LM
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar

POSITIONS = 128
"""Positions whose logits are widened to float32 at a time."""


def perplexity(
    lm: LM,
    tokens: Text,
    length: int = 512,
    *,
    batch: int = 1,
    cancel: CancelToken | None = None,
    progress: bool = False,
) -> float:
    """exp of the mean negative log-likelihood (in nats) of all predicted tokens.

    Args:
        lm: the model, quantised or not.
        tokens: a 1-D LongTensor of ids, or text (a string, `sqviz.text(…)`, a list of strings, a path); all of it is
            scored.
        length: tokens per segment, at least 2.
        batch: segments per forward pass. Leave it at 1 for a model quantised with dynamic per-tensor steps, which would
            otherwise span the batch: segments would no longer be scored on their own.
        cancel: stops the work between two forward passes.
        progress: show a progress bar.

    Raises:
        TextTooShort: fewer tokens than one segment.
        NonFinite: the model gave NaN, or an infinite logit for a token that occurs.
        SqvizError: a bad length or batch, or what `as_tokens` refuses; `NoTokenizer` for text without a tokenizer.
        Cancelled: stopped through `cancel`.
    """
    ids = as_tokens(lm, tokens)
    total, count = 0.0, 0
    scores = segment_nll(lm, ids, length, batch=batch, cancel=cancel)
    with progress_bar(len(ids) // length, "perplexity", unit="segments", cancel=cancel, show=progress) as bar:
        for nll in scores:
            total += float(nll.double().sum())
            count += nll.numel()
            bar.step()
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf  # exp(710) is beyond float64


def segment_nll(
    lm: LM, tokens: Text, length: int = 512, *, batch: int = 1, cancel: CancelToken | None = None
) -> Iterator[Float[Tensor, " predicted"]]:
    """Segment by segment, −ln p (nats, float32, on the CPU) of its length − 1 predicted tokens.

    Arguments and errors as `perplexity`; bad arguments raise at once, before the first segment is asked for.
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 2:
        raise SqvizError(f"length={length!r}: a segment has at least 2 tokens, one given and one predicted.")
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise SqvizError(f"batch={batch!r}: a number of segments per forward pass, at least 1, is allowed.")
    segments = as_segments(lm, as_tokens(lm, tokens), None, length)
    return _scored(lm, segments, batch, cancel)


def _scored(
    lm: LM, segments: Iterator[Int64[Tensor, " token"]], batch: int, cancel: CancelToken | None
) -> Iterator[Float[Tensor, " predicted"]]:
    rows: list[Tensor] = []
    for segment in segments:
        rows.append(segment)
        if len(rows) == batch:
            yield from _forward(lm, torch.stack(rows), cancel)
            rows = []
    if rows:
        yield from _forward(lm, torch.stack(rows), cancel)


def _forward(
    lm: LM, ids: Int64[Tensor, "batch token"], cancel: CancelToken | None
) -> Iterator[Float[Tensor, " predicted"]]:
    """One forward pass, then −ln p of each row. Gradient mode is never changed while the caller holds the thread."""
    if cancel is not None:
        cancel.check("perplexity")
    ids = ids.to(lm.device)
    with torch.no_grad():
        logits = lm.model(input_ids=ids, use_cache=False).logits  # [batch token vocabulary]
        nll = [token_nll(row, targets) for row, targets in zip(logits, ids, strict=True)]
    del logits
    for row in nll:
        if not bool(torch.isfinite(row).all()):
            raise NonFinite(
                f"{lm.name} gave NaN or infinite logits, so there is no perplexity. Load it in float32 or bfloat16, "
                "and check what was done to it last."
            )
        yield row.cpu()


def token_nll(logits: Float[Tensor, "token vocabulary"], ids: Int64[Tensor, " token"]) -> Float[Tensor, " predicted"]:
    """−ln p of tokens 1 … from the logits at the position before each."""
    last = len(ids) - 1
    parts = [
        cross_entropy(logits[start:stop].float(), ids[start + 1 : stop + 1], reduction="none")
        for start in range(0, last, POSITIONS)
        for stop in [min(start + POSITIONS, last)]
    ]
    return torch.cat(parts)

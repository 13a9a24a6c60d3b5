"""What functions that take "text" accept: a string, a source, a list of strings, a path, or token ids."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from sqviz.corpus.source import TextSource, check_segments, text, too_short
from sqviz.errors import NoTokenizer, SqvizError
from sqviz.models.lm import LM

Text = str | os.PathLike[str] | TextSource | list[str] | Tensor


def as_tokens(lm: LM, given: Text, limit: int | None = None) -> Int64[Tensor, " token"]:
    """Token ids on the CPU: of a text in document order without special tokens, or ids as they are; the first `limit`.

    Raises:
        NoTokenizer: text for a model without a tokenizer.
        SqvizError: ids that are not a 1-D integer tensor, or lie outside the vocabulary.
    """
    if isinstance(given, Tensor):
        return _checked_ids(lm, given)[:limit]
    return _source(given).tokens(_tokenizer(lm), limit)


def as_segments(
    lm: LM, given: Text, samples: int | None, length: int, seed: int = 0
) -> Iterator[Int64[Tensor, " token"]]:
    """Up to `samples` segments of `length` token ids; a source's documents shuffled by `seed`, ids in their own order.

    Raises:
        TextTooShort: not even one segment.
        SqvizError: a length beyond what the model can take, and as `as_tokens`.
    """
    check_segments(length, samples)
    longest = getattr(lm.config, "max_position_embeddings", None)
    if isinstance(longest, int) and length > longest:
        raise SqvizError(f"length={length} is more than the {longest} positions that {lm.name} was made for")
    if not isinstance(given, Tensor):
        return _source(given).segments(_tokenizer(lm), length, samples, seed)
    ids = _checked_ids(lm, given)
    if len(ids) < length:
        raise too_short("of token ids", len(ids), length)
    return iter(ids[: len(ids) // length * length].view(-1, length)[:samples])


def _source(given: Any) -> TextSource:
    if isinstance(given, TextSource):
        return given
    if isinstance(given, str):
        return TextSource(given if len(given) <= 60 else f"{given[:57]}…", lambda: [given])
    if isinstance(given, os.PathLike) or (isinstance(given, list | tuple) and given and isinstance(given[0], str)):
        return text(given)
    raise SqvizError(
        f"text must be a string, sqviz.text(…), a list of strings, a path, or a 1-D tensor of token ids; got "
        f"{type(given).__name__}. For a list of ids write torch.tensor(ids)"
    )


def _tokenizer(lm: LM) -> Any:
    if lm.tokenizer is None:
        raise NoTokenizer(
            f"{lm.name} has no tokenizer, so it cannot take text: give a 1-D torch.LongTensor of token ids, or a "
            "tokenizer: sqviz.wrap(model, tokenizer)"
        )
    return lm.tokenizer


def _checked_ids(lm: LM, ids: Tensor) -> Int64[Tensor, " token"]:
    if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise SqvizError(
            f"token ids must be a 1-D integer tensor, not {tuple(ids.shape)} of {ids.dtype}. One sequence of a batch "
            "is ids[0]"
        )
    if ids.numel() == 0:
        raise too_short("of token ids", 0, 1)
    low, high = int(ids.min()), int(ids.max())
    size = lm.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if low < 0 or high >= size:
        raise SqvizError(f"token ids must lie in 0 … {size - 1} for {lm.name}; these reach from {low} to {high}")
    return ids.to("cpu", torch.int64)

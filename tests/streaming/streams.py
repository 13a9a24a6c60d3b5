"""What the tests of streaming share: models, texts, how a text is fed in chunks, how far two results are apart."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from sqviz.models.lm import LM
from sqviz.models.tiny import TINY, tiny
from sqviz.quant.equivalence import _NoFloat32
from sqviz.streaming.cache import SinkCache
from sqviz.streaming.policies import Policy
from sqviz.streaming.positions import Rotary, frequencies, scheme_of

STREAMED = tuple(name for name in TINY if not name.startswith(("OPT", "GPT2")))
"""Ids of tiny models whose positions can be counted inside the cache."""
LIMIT = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest max|Δ logits| / max|logits|."""


def model(name: str, dtype: torch.dtype = torch.float32, **overrides) -> LM:
    """A tiny model; its sliding window, where it has one, is wider than the caches of the tests."""
    if any(kind in name for kind in ("Mistral", "Gemma", "Cohere2")):
        overrides = {"sliding_window": 64, **overrides}
    lm = tiny(name, dtype=dtype, **overrides)
    if dtype == torch.float64:
        lm.model.config._experts_implementation = "eager"  # the grouped product has no float64
        if "GPTJ" in name:
            _widen_table(lm)
    return lm


@contextlib.contextmanager
def exact(dtype: torch.dtype) -> Iterator[None]:
    """No gradients, and in float64 no casts to float32 inside transformers."""
    with torch.no_grad(), _NoFloat32() if dtype == torch.float64 else contextlib.nullcontext():
        yield


def text(length: int, seed: int = 0) -> Tensor:
    """[token]; without the special ids 0, 1, 2."""
    return torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(seed))


def feed(lm: LM, cache: SinkCache, ids: Tensor, chunks: Sequence[int] | None = None, **kwargs) -> Tensor:
    """Logits [token vocabulary] of a text [token], or [batch token vocabulary] of a batch; one chunk by default."""
    batch = ids if ids.ndim == 2 else ids[None]
    parts = batch.split(list(chunks or [batch.shape[1]]), 1)
    with torch.no_grad():
        found = [lm.model(input_ids=part, past_key_values=cache, use_cache=True, **kwargs).logits for part in parts]
    logits = torch.cat(found, 1)
    return logits if ids.ndim == 2 else logits[0]


def error(got: Tensor, expected: Tensor) -> float:
    """max|Δ| / max|expected|."""
    assert got.shape == expected.shape
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def chunkings(longest: int = 40, total: int = 40) -> st.SearchStrategy[list[int]]:
    """Sizes of the chunks that a text is fed in."""
    sizes = st.one_of(st.just(1), st.integers(1, longest))
    return st.lists(sizes, min_size=1, max_size=12).map(lambda found: _cut(found, total))


def expected_size(policy: Policy, seen: int) -> int:
    """How many keys are held after so many tokens."""
    return seen if policy.recent is None else min(seen, policy.sinks + policy.recent)


def _cut(sizes: list[int], total: int) -> list[int]:
    while sum(sizes) > total:
        sizes = sizes[:-1] or [total]
    return sizes


def _widen_table(lm: LM) -> None:
    """GPT-J's angles, which transformers computes in float32 once for all, in float64."""
    scheme = scheme_of(lm)
    assert isinstance(scheme, Rotary)
    with exact(torch.float64):
        omega = frequencies(lm, scheme, 0)
    for block in lm.model.transformer.h:
        angle = torch.arange(len(block.attn.embed_positions))[:, None] * omega
        block.attn.embed_positions = torch.cat([angle.sin(), angle.cos()], 1)

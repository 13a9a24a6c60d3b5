"""A lane: one text read, or written, under one policy, step by step; the policy may change between two steps.

What the live view runs side by side. A step of `Reading` is a decode step of `streaming_perplexity(method="tokens")`; a
step of `Writing` is one of `stream_generate`.
"""

import abc
import dataclasses
import time
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from sqviz.models.lm import LM
from sqviz.observe.pieces import token_texts
from sqviz.streaming.generate import stream_generate
from sqviz.streaming.policies import Policy
from sqviz.streaming.reader import CacheView, reader


@dataclasses.dataclass(frozen=True)
class LaneStep:
    """One token of a lane.

    Attributes:
        position: its column in the stream.
        token: its id.
        text: how it reads.
        nll: −ln p of the token in nats, given what the policy keeps of all before it.
        top: the most probable tokens at its place as (text, probability).
        cache: what was kept when it was predicted.
        seconds: of the pass that predicted it.
    """

    position: int
    token: int
    text: str
    nll: float
    top: tuple[tuple[str, float], ...]
    cache: CacheView
    seconds: float


class Lane(abc.ABC):
    """See the module's docstring."""

    policy: Policy

    @abc.abstractmethod
    def step(self) -> LaneStep | None:
        """The next token; None at the end. Raises what the model raises, and can then be tried again."""

    @abc.abstractmethod
    def change(self, policy: Policy) -> None:
        """Go on under another policy of the same kind (cached, or recomputed)."""

    @abc.abstractmethod
    def close(self) -> None:
        """Take the lane's hooks off the model."""


class Reading(Lane):
    """A text that is read: each token is predicted from what the policy keeps."""

    def __init__(self, lm: LM, ids: Int64[Tensor, " token"], policy: Policy, alternatives: int = 5) -> None:
        """Start at the first token. Raises `SqvizError` for a policy that the model's positions do not allow."""
        self._lm, self._ids, self.policy, self._alternatives = lm, ids, policy, alternatives
        self._reader = reader(lm, policy, None, 1)
        self._read: list[int] = ids[:1].tolist()  # grows with the stream: a text may be far longer than what is read

    def step(self) -> LaneStep | None:
        """See `Lane`."""
        if len(self._read) >= len(self._ids):
            return None
        began = time.perf_counter()
        logits = self._reader.read(self._read, lambda: False)
        assert logits is not None
        chances = logits.float().log_softmax(-1)
        token, position = int(self._ids[len(self._read)]), len(self._read)
        best = chances.topk(min(self._alternatives, len(chances)))
        texts = token_texts(self._lm.tokenizer, [token, *best.indices.tolist()])
        top = tuple(zip(texts[1:], best.values.exp().tolist(), strict=True))
        seconds = time.perf_counter() - began
        self._read.append(token)
        return LaneStep(position, token, texts[0], -float(chances[token]), top, self._reader.view(), seconds)

    def change(self, policy: Policy) -> None:
        """See `Lane`."""
        self._reader.change(policy)
        self.policy = policy

    def close(self) -> None:
        """See `Lane`."""
        if self._reader.cache is not None:
            self._reader.cache.close()


class Writing(Lane):
    """A text that the model writes; `options` as for `stream_generate`."""

    def __init__(self, lm: LM, prompt: Any, policy: Policy, **options: Any) -> None:
        """Raises what `stream_generate` raises."""
        self.policy = policy
        self._lm, self._stream = lm, stream_generate(lm, prompt, policy, **options)

    def step(self) -> LaneStep | None:
        """See `Lane`."""
        found = next(self._stream, None)
        if found is None:
            return None
        texts = token_texts(self._lm.tokenizer, [found.token, *(token for token, _, _ in found.top)])
        top = tuple((text, chance) for text, (_, _, chance) in zip(texts[1:], found.top, strict=True))
        return LaneStep(found.position, found.token, texts[0], found.nll, top, found.cache, found.seconds)

    def change(self, policy: Policy) -> None:
        """See `Lane`."""
        self._stream.change(policy)
        self.policy = policy

    def close(self) -> None:
        """See `Lane`."""
        self._stream.close()


def trained_context(lm: LM) -> int | None:
    """How many positions the model was trained with, where its configuration says so."""
    found = getattr(lm.config, "max_position_embeddings", None)
    return found if isinstance(found, int) else None

"""How the next token is chosen from logits: by transformers' own processors, in the order of its `generate()`."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sqviz.errors import NonFinite, SqvizError
from sqviz.models.lm import LM


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Parameters of `generate()`, with the meaning they have there.

    Attributes:
        temperature: divides the scores.
        top_k: how many of the most probable tokens are left; 0 for all.
        top_p: the most probable tokens are left that have this much probability together.
        do_sample: draw a token. Otherwise the most probable one is taken and the three above do nothing.
        repetition_penalty: divides positive scores, and multiplies negative ones, of all tokens that were read.
        seed: of the draws.
    """

    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    do_sample: bool = False
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not _number(self.temperature) or not 0 < self.temperature < math.inf:
            raise SqvizError(
                f"temperature={self.temperature!r}: a number above 0 is allowed. The most probable token is taken with "
                "do_sample=False"
            )
        if self.top_k is not None and (not _whole(self.top_k) or self.top_k < 0):
            raise SqvizError(f"top_k={self.top_k!r}: a number of tokens is allowed, 0 for all of them.")
        if not _number(self.top_p) or not 0 <= self.top_p <= 1:
            raise SqvizError(f"top_p={self.top_p!r}: a probability is allowed, 1.0 for all tokens.")
        if not _number(self.repetition_penalty) or not 0 < self.repetition_penalty < math.inf:
            raise SqvizError(
                f"repetition_penalty={self.repetition_penalty!r}: a number above 0 is allowed, 1.0 for none."
            )
        if not _whole(self.seed):
            raise SqvizError(f"seed={self.seed!r}: a whole number is allowed.")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One chosen token; nll (nats) and probabilities are those of the model, before any parameter changed them."""

    token: int
    nll: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses tokens one after the other. Its draws come from a generator of its own."""

    def __init__(self, lm: LM, sampling: Sampling, alternatives: int) -> None:
        if not _whole(alternatives) or alternatives < 0:
            raise SqvizError(f"alternatives={alternatives!r}: a number of tokens is allowed, 0 for none.")
        self._lm, self._sampling, self._alternatives = lm, sampling, alternatives
        self._generator = torch.Generator(lm.device).manual_seed(sampling.seed)
        self._processors = _processors(sampling)
        self._read: Bool[Tensor, " vocabulary"] | None = None  # all that a penalty has to know, however long the text
        if sampling.repetition_penalty != 1:
            size = lm.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
            self._read = torch.zeros(size, dtype=torch.bool, device=lm.device)

    def note(self, ids: Iterable[int]) -> None:
        """These tokens are part of the text."""
        if self._read is not None:
            self._read[torch.tensor(list(ids), dtype=torch.long, device=self._read.device)] = True

    @torch.no_grad()
    def choose(self, logits: Float[Tensor, " vocabulary"]) -> Choice:
        """The next token.

        Raises:
            NonFinite: NaN or infinite logits.
        """
        scores = logits.to(self._lm.device, torch.float32, copy=True)[None]
        if not bool(scores.isfinite().all()):
            raise NonFinite(
                f"{self._lm.name} gave NaN or infinite logits, so there is no next token. Load it in float32 or "
                "bfloat16, and check what was done to it last."
            )
        read = torch.zeros(0, dtype=torch.long) if self._read is None else self._read.nonzero().flatten()
        changed = self._processors(read[None], scores)
        if self._sampling.do_sample:
            drawn = torch.multinomial(changed.softmax(-1), 1, generator=self._generator)
            token = int(drawn)
        else:
            token = int(changed.argmax(-1))
        known = scores[0].log_softmax(-1)
        top = known.topk(min(self._alternatives, len(known)))
        pairs = zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
        return Choice(token, -float(known[token]), tuple(pairs))


def _processors(sampling: Sampling) -> Any:
    from transformers.generation import logits_process as known

    chain = known.LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(known.RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    if sampling.do_sample:
        if sampling.temperature != 1:
            chain.append(known.TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            chain.append(known.TopKLogitsWarper(int(sampling.top_k)))
        if sampling.top_p < 1:
            chain.append(known.TopPLogitsWarper(float(sampling.top_p)))
    return chain


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

"""Generate text token by token under a policy (thesis §4.3), for as long as one likes.

    for step in sqviz.stream_generate(lm, "Once upon a time", Sinks(4, 252), max_tokens=100):
        print(step.text, end="")

The stream can be cancelled and gone on with, iterated with `async for`, and given the next turn of a chat (stream.py).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sqviz.errors import NoTokenizer, SqvizError
from sqviz.models.lm import LM
from sqviz.progress import CancelToken
from sqviz.streaming.policies import Policy, Sinks
from sqviz.streaming.reader import CacheView, reader
from sqviz.streaming.sampling import Sampler, Sampling
from sqviz.streaming.stream import Ends, Stream, StreamStep
from sqviz.streaming.turns import Prompt

if TYPE_CHECKING:
    from sqviz.streaming.cache import SinkCache

__all__ = ["CacheView", "Stream", "StreamStep", "stream_generate"]

_SINKS = Sinks()


def stream_generate(
    lm: LM,
    prompt: Prompt,
    policy: Policy = _SINKS,
    *,
    max_tokens: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float = 1.0,
    do_sample: bool = False,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    eos: Sequence[int] | None = None,
    alternatives: int = 5,
    cache: "SinkCache | None" = None,
    cancel: CancelToken | None = None,
    chunk: int = 256,
) -> Stream:
    """Text that goes on from a prompt, token by token: greedily, or drawn at random with `do_sample=True`.

    The parameters that choose tokens mean what they mean in transformers' `generate()`. A turn ends after `max_tokens`,
    with one of the model's end tokens, with a stop string, or never.

    Args:
        lm: the model, quantised or not.
        prompt: text (with the special tokens that the tokenizer begins with), a 1-D LongTensor of ids, or messages
            {"role": …, "content": …} for the tokenizer's chat template.
        policy: what is kept; `Sinks(4, 252)` by default.
        max_tokens: most tokens of a turn; None without a limit.
        temperature, top_k, top_p, do_sample, repetition_penalty, seed: see `sqviz.streaming.sampling.Sampling`. The
            global random state is left alone.
        stop: the turn ends with the token that completes one of these strings; the string is part of the text.
        eos: ids that end a turn; None for the model's own, () for none.
        alternatives: how many tokens each step's `top` holds.
        cache: go on from what this `SinkCache` has read, under its policy.
        cancel: ends the iteration between two tokens, like `Stream.cancel`, once.
        chunk: tokens of the prompt read in one pass.

    Raises:
        NoTokenizer: text, messages or stop strings for a model without a tokenizer.
        SqvizError: an empty prompt, a bad parameter, messages without a chat template, a policy that the model's
            positions do not allow, or a cache that was made for another model or is closed.
        NonFinite: while iterating: NaN or infinite logits.
    """
    for name, value in (("max_tokens", max_tokens), ("chunk", chunk)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise SqvizError(f"{name}={value!r}: a number of tokens, at least 1, is allowed.")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    ends = Ends(max_tokens, frozenset(_eos(lm) if eos is None else eos), stops)
    if stops and lm.tokenizer is None:
        raise NoTokenizer(f"{lm.name} has no tokenizer, so it cannot look for {stops!r}: leave stop out")
    sampling = Sampling(temperature, top_k, top_p, do_sample, repetition_penalty, seed)
    sampler = Sampler(lm, sampling, alternatives)
    read = reader(lm, policy, cache, chunk)
    if cache is not None and policy not in (_SINKS, cache.policy):
        raise SqvizError(f"the cache keeps {cache.policy}, not {policy}. Leave the policy out, or set cache.policy")
    return Stream(lm, read, sampler, prompt, ends, cancel, owned=cache is None)


def _eos(lm: LM) -> list[int]:
    """The model's end tokens."""
    known = getattr(lm.model, "generation_config", None) or lm.config
    given = getattr(known, "eos_token_id", None)
    return [] if given is None else [given] if isinstance(given, int) else list(given)

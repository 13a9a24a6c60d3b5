"""Attention sinks kept in full precision before everything that an integer model reads: `keep_sinks`.

A causal model pours attention into its first tokens (thesis §4.2), and the same tokens carry its largest activations:
at the input of SmolLM2-135M's layer 28 down_proj the first token reaches 2000 where no other reaches 100. One static
step for a whole tensor (thesis Table 3.2, O3) then has to span them. Here some tokens of our own choice stand in front
of every text. Their keys and values are computed once, by the model in full precision, and kept; what follows attends
to them instead of making a sink of its own first token, and never passes them through a quantised linear.

    lm = sqviz.keep_sinks(lm)                        # the tokens are chosen by trying
    m = sqviz.capture(lm, text)                      # calibration sees what comes after them
    q = sqviz.quantize(sqviz.smooth(lm, m, 0.5, folds="outliers"), sqviz.SMOOTHQUANT_O3, m)

The model is used as before: token ids in, logits of these ids out; caches hold the kept keys and values in front, so
positions and masks count from there. Simplification: a cache that holds codes quantises the kept ones as any others.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sqviz.corpus.segments import Text, as_segments
from sqviz.errors import SqvizError
from sqviz.models.linears import groups
from sqviz.models.lm import LM, share
from sqviz.observe.hooks import body, watch
from sqviz.quant.plain import check_floating

NOTABLE = 0.95
"""What the largest inputs fall to if they fall at all."""

MOST = 4
"""How many sinks are tried at most: as many as StreamingLLM keeps (thesis §4.3)."""


class KeptSinks:
    """Mixed into the class that runs the blocks: keys and values of some tokens stand in front of every sequence.

    Attributes:
        sink_tokens: int64 [sink], the ids of the kept tokens.
        sink_states: keys and values [1 head sink dim] of each layer, as buffers `sink_key_0`, `sink_value_0`, ….
    """

    def forward(self, input_ids: Tensor | None = None, *rest: Any, **given: Any) -> Any:
        """The model's own, on a cache that begins with the sinks."""
        if rest:
            raise SqvizError("a model with kept sinks takes its further arguments by keyword only.")
        model = cast(Any, self)
        embeds = given.get("inputs_embeds")
        batch = (input_ids if input_ids is not None else embeds).shape[0]  # type: ignore[union-attr]
        count = len(model.sink_tokens)
        cache = given.get("past_key_values")
        if cache is None:
            cache = given["past_key_values"] = _cache_of(model)
        if cache.get_seq_length() == 0:
            _begin(model, cache, batch)
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        if isinstance(mask, Tensor):
            if mask.ndim != 2:
                raise SqvizError(f"attention_mask has {mask.ndim} dimensions: with kept sinks [batch token] is needed.")
            given["attention_mask"] = torch.cat([mask.new_ones(batch, count), mask], 1)
        if positions is not None:
            given["position_ids"] = positions + count
        return super().forward(input_ids, **given)  # type: ignore[misc]


def keep_sinks(lm: LM, tokens: Int64[Tensor, " sink"] | Sequence[int] | None = None, text: Text | None = None) -> LM:
    """A model that reads everything behind kept attention sinks. `lm` stays as it was; all weights are shared.

    Args:
        lm: the model, not quantised yet.
        tokens: ids of the tokens to keep; None: chosen by `choose_sinks`.
        text: what they are chosen on; by default the embedded addresses.

    Raises:
        SqvizError: no tokens, ids outside the vocabulary, or a model that keeps sinks or is quantised already.
    """
    if sinks_of(lm) is not None:
        raise SqvizError(f"{lm.name} keeps sinks already. Call keep_sinks on the model it was made from.")
    check_floating(lm, "keep sinks in front of")
    ids = choose_sinks(lm, text) if tokens is None else torch.as_tensor(tokens, dtype=torch.int64)
    size = lm.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    if ids.ndim != 1 or not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= size:
        raise SqvizError(f"tokens={ids.tolist()}: at least one id in 0 … {size - 1} is needed.")
    after = lm.replace(model=share(lm.model), note=f"{lm.note}, {len(ids)} kept sinks".removeprefix(", "))
    stack = cast(Any, _stack(after))
    stack.__class__ = _class(cast(Hashable, type(stack)))
    stack.register_buffer("sink_tokens", ids.to(lm.device), persistent=False)
    refresh(after)
    return after


def sinks_of(lm: LM) -> Int64[Tensor, " sink"] | None:
    """The ids of the tokens that a model keeps as sinks, or None."""
    stack = _stack(lm)
    return cast(Any, stack).sink_tokens if isinstance(stack, KeptSinks) else None


def refresh(lm: LM) -> None:
    """Compute the kept keys and values anew, in place: for a copy whose weights were rescaled."""
    if sinks_of(lm) is None:
        return
    stack = cast(Any, _stack(lm))
    for layer, (key, value) in enumerate(_states(stack)):
        stack.register_buffer(f"sink_key_{layer}", key, persistent=False)
        stack.register_buffer(f"sink_value_{layer}", value, persistent=False)


def begun_cache(lm: LM, batch: int) -> Any:
    """A cache that holds the kept keys and values of a model and nothing else; None for a model without kept sinks."""
    if sinks_of(lm) is None:
        return None
    cache = _cache_of(_stack(lm))
    _begin(_stack(lm), cache, batch)
    return cache


def choose_sinks(lm: LM, text: Text | None = None, samples: int = 8, length: int = 96) -> Int64[Tensor, " sink"]:
    """The tokens behind which a text has the smallest outliers, found greedily.

    Tried are the tokens that the model's tokenizer names (beginning and end of a text) and those that carry the
    largest inputs of a linear in `text`. One is added after the other, MOST at most, as long as the largest inputs,
    averaged over all linears, fall by a twentieth; of those that do so about equally, the one behind which the model
    reads `text` best.

    From the second on, inputs are also looked at while `text` is begun by each of the tried tokens: one that follows
    nothing but itself sees what the kept one saw, and becomes a sink once more. Two different ones kept prevent it.

    Raises `SqvizError` as `capture` does for the text.
    """
    from sqviz.corpus.source import text as source

    segments = torch.stack(list(as_segments(lm, source() if text is None else text, samples, length)))
    tried = _candidates(lm, segments)
    begun = segments[:1].repeat(len(tried), 1)
    begun[:, 0] = tried
    kept, best = torch.empty(0, dtype=torch.int64), math.inf
    while len(kept) < MOST:
        others = begun if len(kept) else begun[:0]
        if len(kept) == 1:
            best = _behind(lm, segments, others, kept)[0]
        found = [(*_behind(lm, segments, others, torch.cat([kept, one])), one) for one in tried.split(1)]
        least = min(height for height, _, _ in found)
        if least > NOTABLE * best:
            break
        _, _, one = min((one for one in found if one[0] <= least / NOTABLE), key=lambda one: one[1])
        kept, best = torch.cat([kept, one]), least
    return kept


def _candidates(lm: LM, segments: Int64[Tensor, "segment token"], most: int = 6) -> Int64[Tensor, " token"]:
    """Named tokens, then those that most often carry the largest input of a linear."""
    named = [getattr(lm.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")]
    named += [getattr(lm.config, name, None) for name in ("bos_token_id", "eos_token_id")]
    carriers: dict[int, int] = {}

    def see(group: Any, x: Float[Tensor, "token channel"]) -> None:
        if len(x) == segments.numel():
            token = int(segments.flatten()[int(x.abs().amax(1).argmax())])
            carriers[token] = carriers.get(token, 0) + 1

    with torch.no_grad(), watch(lm, see):
        body(lm)(segments.to(lm.device), use_cache=False)
    often = sorted(carriers, key=lambda token: -carriers[token])
    ids = dict.fromkeys([*(token for token in named if isinstance(token, int)), *often])
    return torch.tensor(list(ids)[:most], dtype=torch.int64)


def _behind(
    lm: LM, segments: Int64[Tensor, "segment token"], others: Int64[Tensor, "other token"], kept: Int64[Tensor, " sink"]
) -> tuple[float, float]:
    """Behind some kept tokens: the mean over linears of max|X|, in all texts; nats per token of the segments."""
    tallest: list[float] = []
    ids = torch.cat([segments, others])
    ids = torch.cat([kept.expand(len(ids), -1), ids], 1).to(lm.device)

    def see(group: Any, x: Float[Tensor, "row channel"]) -> None:
        rows = x if len(x) != ids.numel() else x.unflatten(0, ids.shape)[:, len(kept) :]
        tallest.append(float(rows.abs().amax()))

    with torch.no_grad(), watch(lm, see, groups(lm)):
        logits = lm.model(ids, use_cache=False).logits[: len(segments), len(kept) : -1].float()
    nll = nn.functional.cross_entropy(logits.flatten(0, 1), ids[: len(segments), len(kept) + 1 :].flatten())
    return sum(tallest) / len(tallest), float(nll)


# --- keys and values ---


def _stack(lm: LM) -> nn.Module:
    """The module that runs the blocks, which model and head share: OPT's decoder, Llama's model."""
    return lm.model.get_submodule(lm.arch.blocks.rpartition(".")[0])


@functools.cache
def _class(kind: Hashable) -> type:
    """The class `kind`, with kept sinks, under its own name: transformers looks up by it what a class can record."""
    base = cast(type, kind)
    return type(base.__name__, (KeptSinks, base), {"__module__": base.__module__, "__qualname__": base.__qualname__})


def _cache_of(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config.get_text_config(decoder=True))


def _states(stack: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the sinks in each layer, by the model's own forward pass without kept sinks."""
    forward: Callable[..., Any] = super(KeptSinks, stack).forward
    cache = _cache_of(stack)
    with torch.no_grad():
        forward(stack.sink_tokens[None], past_key_values=cache, use_cache=True)
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


def _begin(model: Any, cache: Any, batch: int) -> None:
    """Put the kept keys and values into an empty cache."""
    layer = 0
    while hasattr(model, f"sink_key_{layer}"):
        key, value = getattr(model, f"sink_key_{layer}"), getattr(model, f"sink_value_{layer}")
        cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)
        layer += 1

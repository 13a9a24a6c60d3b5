"""StreamingLLM the slow and obvious way: no cache, no turning, no mask tricks.

Every attention module is given, for each token t, exactly the hidden states of the tokens that t keeps, as a text of
its own with positions 0, 1, 2 …; the last row of its output is the output at t. Keys and values of earlier tokens are
those that the model computed when it read them, because the hidden states are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sqviz.models.lm import LM

ATTENTION = {
    "BloomForCausalLM": "self_attention",
    "FalconForCausalLM": "self_attention",
    "MptForCausalLM": "attn",
    "GPTNeoXForCausalLM": "attention",
    "GPTJForCausalLM": "attn",
}


def kept(t: int, sinks: int, recent: int | None, chosen: Sequence[int] | None = None) -> list[int]:
    """The tokens that the query at t sees."""
    first = 0 if recent is None else max(0, t - recent + 1)
    at = list(range(sinks)) if chosen is None else sorted(chosen)[:sinks]
    return [j for j in at if j < first] + list(range(first, t + 1))


def reference(lm: LM, ids: Tensor, sinks: int, recent: int | None, chosen: Sequence[int] | None = None) -> Tensor:
    """Logits [token vocabulary] of one text."""
    return seeing(lm, ids, [kept(t, sinks, recent, chosen) for t in range(len(ids))])


@torch.no_grad()
def seeing(lm: LM, ids: Tensor, keeps: list[list[int]]) -> Tensor:
    """Logits [token vocabulary] of one text, given which tokens each of its tokens sees."""
    attentions = [
        block.get_submodule(ATTENTION.get(lm.arch.name, "self_attn"))
        for block in lm.model.get_submodule(lm.arch.blocks).children()
    ]
    told = _told(lm, attentions, {len(keep) for keep in keeps}, ids)
    originals = [module.forward for module in attentions]
    try:
        for layer, module in enumerate(attentions):
            module.forward = _slow(originals[layer], keeps, {n: calls[layer] for n, calls in told.items()})
        return lm.model(input_ids=ids[None], use_cache=False).logits[0]
    finally:
        for module in attentions:
            del module.forward


def _told(lm: LM, attentions: list[nn.Module], lengths: set[int], ids: Tensor) -> dict[int, list[dict[str, Any]]]:
    """What each attention module is told beside hidden states when the model reads a text of these lengths."""
    told = {}
    for length in lengths:
        calls: list[dict[str, Any]] = []
        hooks = [
            module.register_forward_pre_hook(lambda _, __, kwargs, calls=calls: calls.append(kwargs), with_kwargs=True)
            for module in attentions
        ]
        try:
            lm.model(input_ids=ids[None, :length], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        told[length] = calls
    return told


def _slow(original: Any, keeps: list[list[int]], told: dict[int, dict[str, Any]]) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        texts = {name: kwargs[name] for name in ("hidden_states",) if name in kwargs}
        rows, rest = [], None
        for keep in keeps:
            mine = {**told[len(keep)], **{name: x[:, keep] for name, x in texts.items()}}
            output = original(*(x[:, keep] for x in args), **mine)
            rows.append(output[0][:, -1:])
            rest = output[1:]
        return (torch.cat(rows, 1), *rest)

    return forward

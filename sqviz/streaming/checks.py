"""What a `SinkCache` refuses: policies a model cannot follow, batches it has no bias for, padding that is not left."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz.models.lm import LM
from sqviz.quant.kept_sinks import sinks_of
from sqviz.streaming.plan import State
from sqviz.streaming.policies import Cached, Recompute, capacity, chosen_by
from sqviz.streaming.positions import Alibi, Scheme


def check_policy(lm: LM, policy: Any, limit: int | None) -> None:
    """Raise `SqvizError` for a policy without a cache, or one with more keys than the model has angles for or sees."""
    if isinstance(policy, Recompute) or not hasattr(policy, "sinks"):
        raise SqvizError(f"{policy!r} keeps no cache; Dense(), Window(n) and Sinks(s, r) do")
    if sinks_of(lm) is not None:
        raise SqvizError(
            f"{lm.name} keeps sinks of its own in front of every text, and {policy} would count its positions without "
            "them. Stream the model that it was made from."
        )
    size, config = capacity(policy), lm.config
    if limit is not None and size is not None and size > limit:
        raise SqvizError(f"{policy} needs {size} positions and {lm.name} has angles for {limit}")
    kinds = getattr(config, "layer_types", None) or []
    slides = "sliding_attention" in kinds or (not kinds and getattr(config, "use_sliding_window", True))
    window = getattr(config, "sliding_window", None) if slides else None
    if window is not None and size is not None and size > window:
        raise SqvizError(
            f"layers of {lm.name} see {window} tokens at most (sliding_window), which would hide the sinks of "
            f"{policy}. Use a cache of {window} keys or fewer: sqviz.Sinks(4, {max(1, window - 4)})"
        )


def check_rows(scheme: Scheme, policy: Cached, rows: int, pads: Tensor | None) -> None:
    """Raise `SqvizError` for a batch whose rows would need a bias each, which MPT's attention cannot take."""
    if not isinstance(scheme, Alibi) or scheme.form != "mpt":
        return
    if pads is not None:
        raise SqvizError("MPT's bias has no batch dimension: run texts of different lengths one at a time")
    if rows > 1 and chosen_by(policy)[0] is not None:
        raise SqvizError("MPT's bias has no batch dimension: choose sinks by token id one text at a time")


def padding(state: State, mask: Any, new: int) -> Int[Tensor, " row"] | None:
    """Padding columns on the left, as the mask of the first chunk tells them; None without.

    Raises `SqvizError` for padding elsewhere, and for later masks that do not agree.
    """
    known = state.pads
    if mask is None:
        return known
    if getattr(mask, "ndim", 0) != 2:
        raise SqvizError("a SinkCache makes its own attention masks; give it the [batch, token] padding mask or none")
    latest = mask[:, -new:].bool().cpu()
    if state.seen:
        agrees = bool(latest.all())
        if mask.shape[1] == state.seen + new:
            told = mask.shape[1] - mask.bool().sum(-1).cpu()
            agrees &= torch.equal(told, (torch.zeros_like(told) if known is None else known))
        if not agrees:
            raise SqvizError("padding between the tokens of a stream is not possible; pad the first chunk on the left")
        return known
    pads = (~latest).sum(-1)
    if not torch.equal(latest, torch.arange(new)[None] >= pads[:, None]) or not bool(latest[:, -1].all()):
        raise SqvizError("pad on the left (tokenizer.padding_side = 'left'): a stream goes on at its right end")
    return pads if bool(pads.any()) else None

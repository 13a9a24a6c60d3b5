"""What a forward pass takes beside weights and cache: an estimate, by a formula.

Alive at the same time, in elements per token, within the attention or the MLP of a block:

    4 · hidden                     embeddings of the tokens, input of the block, residual stream, its normed copy
    Σ out of its linears           queries, keys and values; gate and up, or fc1
    + channels of the last one     what o_proj or down_proj reads

The peak is the largest over all blocks. Gate and up of one fused linear stay until their product is made, half of them
again on top of act(gate); a mixture's routed experts count once for each expert that a token goes to, with the copy of
the token that is gathered for it; MLA puts queries and keys together from two parts each. Where attention is not fused,
scores, masked scores and probabilities come on top: 3 · heads · length. After the last block: 4 · hidden and the
logits, of the last token or of all.

For models that transformers computes with fused attention and an activation that is one operation this is what its
forward pass takes, to a few per cent (`tests/evaluation/test_footprint.py`). Left out: what an activation written as
several operations makes (GPT-2's gelu_new), masks, the workspace of a library, and whatever an allocator keeps. An INT8
kernel writes the codes of an input in place of its normed copy, at half the size; that is not subtracted.
"""

import collections
from fractions import Fraction
from typing import Any

from sqviz.evaluation.kv_bytes import Heads
from sqviz.evaluation.weight_bytes import Linear, Weights

STREAMS = 4
SCORES = 3


def widths(weights: Weights, config: Any, heads: Heads, devices: int) -> dict[str, int]:
    """Elements per token and device that each part of a block ("self_attn", "mlp", …) makes, by its path."""
    share = Fraction(heads.held(devices), heads.keys)
    chosen = getattr(config, "num_experts_per_tok", None) or 1
    per_name: dict[str, int] = collections.defaultdict(int)  # blocks may differ: the widest counts
    for linear, _ in weights.linears:
        if not linear.router:
            width = _width(linear, devices, share, chosen, weights.hidden)
            per_name[linear.name] = max(width, per_name[linear.name])
    found: dict[str, int] = collections.defaultdict(int)
    for name, width in per_name.items():
        found[name.rpartition(".")[0]] += width
        if name.endswith("kv_b_proj"):
            found[name.rpartition(".")[0]] += 2 * heads.queries // devices * heads.key_dim
    return dict(found)


def activation_bytes(
    weights: Weights,
    config: Any,
    heads: Heads,
    batch: int,
    length: int,
    itemsize: int,
    devices: int = 1,
    *,
    probabilities: bool = False,
    all_logits: bool = False,
) -> int:
    """The estimated peak of reading `batch` sequences of `length` tokens, in bytes per device."""
    tokens = batch * length
    parts = {part: tokens * width for part, width in widths(weights, config, heads, devices).items()}
    if probabilities:
        attention = next((part for part in parts if "att" in part), "attention")
        parts[attention] = parts.get(attention, 0) + SCORES * tokens * heads.queries // devices * length
    logits = (tokens if all_logits else batch) * -(-weights.vocabulary // devices)
    return itemsize * (STREAMS * weights.hidden * tokens + max([*parts.values(), logits]))


def _width(linear: Linear, devices: int, share: Fraction, chosen: int, hidden: int) -> int:
    rows, channels = linear.held(devices, share)
    if linear.split == "channels":
        width = channels
    else:
        width = rows * 3 // 2 if linear.name.endswith("gate_up_proj") else rows
        width += hidden if linear.copies > 1 else 0
    return chosen * width if linear.copies > 1 else width

"""Attention of one query in floating point, for models that execute their linears in integers and not their attention.

torch's kernel for the CPU multiplies one bfloat16 row with the keys several times slower than a few rows at once (torch
2.13, 512 keys of 3 heads for 9 query heads of 64, one thread: 0.38 and 0.05 ms; for a batch of 16, 6.5 and 1.1 ms), and
that was most of a cached step. But query heads that share a key head are rows of one product:

    [batch head 1 dim]  →  [batch kv_head group dim]

the same sums; keys and values are read once, and never repeated where there is a mask. Where each head has keys of its
own, its row is given twice. Everything else goes to transformers' own sdpa: prompts, GPUs, compiled models, and what
happens while a `TorchFunctionMode` watches, which expects the shapes of the model.
"""

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import _get_current_function_mode

NAME = "sqviz_sdpa"
_THEIRS = ("position_bias", "cache", "softcap", "output_attentions")
"""What only transformers' function knows how to take, or to refuse."""
SDPA = ("sdpa", NAME)
"""Names of attention that calls torch's `scaled_dot_product_attention`."""


def use(model: nn.Module) -> None:
    """Let a copy of a model that computes its attention with sdpa take this one."""
    if model.config._attn_implementation == "sdpa" and getattr(model, "_supports_attention_backend", False):  # type: ignore[union-attr]
        _register()
        model.config._attn_implementation = NAME  # type: ignore[union-attr]


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch kv_head key dim"],
    value: Float[Tensor, "batch kv_head key dim_v"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[Float[Tensor, "batch query head dim_v"], None]:
    """What transformers calls: one query as rows of its key heads, anything else as sdpa does it."""
    groups = query.shape[1] // key.shape[1]
    alone = query.shape[2] == 1 and query.device.type == "cpu" and not dropout and not _theirs(rest)
    gains = groups > 1 or query.dtype != torch.float32
    if not alone or not gains or _watched():
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **rest)
    rows, mask = query.unflatten(1, (-1, groups)).squeeze(3), attention_mask
    if mask is not None and mask.shape[1] != 1:
        mask = mask.unflatten(1, (-1, groups)).squeeze(3)
    if groups == 1:
        rows = rows.expand(-1, -1, 2, -1)
    out = scaled_dot_product_attention(rows, key, value, mask, scale=scaling)[:, :, :groups]
    return out.flatten(1, 2)[:, None], None


def _watched() -> bool:
    """Whether someone looks at torch's functions as they are called."""
    return torch.compiler.is_compiling() or _get_current_function_mode() is not None


def _theirs(rest: dict[str, Any]) -> bool:
    return any(rest.get(name) is not None and rest[name] is not False for name in _THEIRS)

"""INT8 attention in a model: both batched products of codes, after positions were put into queries and keys.

transformers lets a model's attention be computed by a function of one's own, registered under a name in its
configuration; `sqviz_int8` is ours. It quantises queries, keys and values per token and head (or takes keys and values
from a cache that holds codes) and calls the backend; norms, softmax and rotary positions stay floats (thesis Figure
3.3). Masks are those that transformers makes for sdpa.
"""

import functools
from typing import Any, cast

from jaxtyping import Float, Int8
from sqviz_kernels import spec
from sqviz_kernels.backend import Backend, opaque
from sqviz_kernels.dispatch import best
from torch import Tensor, nn

from sqviz.errors import SqvizError
from sqviz.models.lm import LM

NAME = "sqviz_int8"
_REFUSED = {
    "attn_logit_softcapping": "it caps the logits of its attention between the products and the softmax",
    "alibi": "it adds positions to the logits of its attention (ALiBi)",
}


def obstacle(lm: LM) -> str:
    """Why a model's attention cannot be computed in INT8, in words; "" if it can."""
    if not getattr(lm.model, "_supports_attention_backend", False):
        return "transformers computes its attention inside of the model, where no other can be put"
    return next((words for key, words in _REFUSED.items() if getattr(lm.config, key, None)), "")


def use(lm: LM, model: nn.Module, backend: Backend | None) -> None:
    """Let a shared copy of `lm.model` compute its attention in INT8: on a backend, or acted out by `spec`.

    Raises `SqvizError` for a model that computes its attention itself.
    """
    if why := obstacle(lm):
        raise SqvizError(
            f"attention=True: {type(model).__name__} cannot have INT8 attention: {why}. Use attention=False."
        )
    _register()
    for module in model.modules():
        if hasattr(module, "scaling") and hasattr(module, "layer_idx"):
            module.__dict__["_sqviz_backend"] = backend
    model.config._attn_implementation = NAME  # type: ignore[union-attr]


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@opaque
def attention(
    module: nn.Module,
    query: Float[Tensor, "batch head query dim"],
    key: Float[Tensor, "batch kv_head key dim"],
    value: Float[Tensor, "batch kv_head key dim_v"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[Float[Tensor, "batch query head dim_v"], None]:
    """What transformers calls in place of sdpa. Raises `NonFinite`."""
    for name in ("softcap", "position_bias", "s_aux"):
        if rest.get(name) is not None:
            raise SqvizError(f"INT8 attention knows no {name}; quantise this model with attention=False.")
    backend = cast(Backend | None, module.__dict__.get("_sqviz_backend"))
    causal_from = None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal and query.shape[2] > 1:
        causal_from = 0
    elif attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
    scaling = query.shape[3] ** -0.5 if scaling is None else scaling
    keys, values = (codes_of(states, backend) for states in (key, value))
    compute = spec.attention if backend is None else backend.attention
    out = compute(query, *keys, *values, scaling, causal_from, attention_mask)
    return out.transpose(1, 2).contiguous(), None


def codes_of(
    states: Float[Tensor, "batch head token dim"], backend: Backend | None
) -> tuple[Tensor, Float[Tensor, "batch head token"]]:
    """Codes and steps per token and head: those that a cache holds, or made now. Raises `NonFinite`."""
    if hasattr(states, "_sqviz_steps"):
        return states, steps_of(states)
    rows = states.reshape(-1, states.shape[3])
    codes, steps = spec.quantise(rows) if backend is None else backend.plain_codes(rows)
    return codes.view(states.shape), steps.view(states.shape[:3])


def with_steps(
    codes: Int8[Tensor, "batch head token dim"], steps: Float[Tensor, "batch head token"]
) -> Int8[Tensor, "batch head token dim"]:
    """Codes that carry their steps, as a cache gives them to the attention."""
    codes._sqviz_steps = steps  # type: ignore[attr-defined]
    return codes


def steps_of(codes: Int8[Tensor, "batch head token dim"]) -> Float[Tensor, "batch head token"]:
    """The steps that codes carry."""
    return cast(Tensor, codes._sqviz_steps)  # type: ignore[attr-defined]


def uses(lm: LM) -> bool:
    """Whether the model computes its attention in INT8."""
    return lm.model.config._attn_implementation == NAME  # type: ignore[union-attr]


def uses_codes(lm: LM) -> bool:
    """Whether the model's attention takes codes from a cache. MLA caches latents, which are not its keys yet."""
    latents = bool(getattr(lm.config, "kv_lora_rank", None))
    return uses(lm) and not latents


def backend_of(lm: LM) -> Backend | None:
    """Who computes the model's INT8 attention; the best for its device where it has none."""
    for module in lm.model.modules():
        if "_sqviz_backend" in module.__dict__:
            return cast(Backend | None, module.__dict__["_sqviz_backend"])
    return best(lm.device)

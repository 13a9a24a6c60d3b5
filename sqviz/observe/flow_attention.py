"""What `scaled_dot_product_attention` computes, operator by operator: QKᵀ, softmax, PV."""

import dataclasses
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

BIAS = "@bias"
"""What a tensor carries that has positions added to logits in it (ALiBi)."""

if TYPE_CHECKING:
    from sqviz.observe.flow import Flow


@dataclasses.dataclass(frozen=True, eq=False)
class Attended:
    """The arguments of one call."""

    query: Float[Tensor, "batch head query dim"]
    key: Float[Tensor, "batch kv_head key dim"]
    value: Float[Tensor, "batch kv_head key dim_v"]
    mask: Tensor | None
    causal: bool
    scale: float

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> "Attended":
        """With the arguments as torch names them; there is no dropout in a model that is not trained."""
        del dropout_p, enable_gqa
        return cls(query, key, value, attn_mask, is_causal, query.shape[-1] ** -0.5 if scale is None else scale)

    def hidden(self, lowest: float) -> Tensor:
        """Where a query may not look: bool [… query key]. Float masks below `lowest` hide too."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        hidden = torch.zeros(queries, keys, dtype=torch.bool, device=self.query.device)
        if self.causal:
            hidden = ~torch.ones_like(hidden).tril()
        if self.mask is not None:
            mask = self.mask[..., :keys]
            hidden = hidden | (~mask if mask.dtype == torch.bool else mask < lowest)
        return hidden


def attend(given: Attended, lowest: float, flow: "Flow") -> tuple[Float[Tensor, "batch head query dim_v"], bool]:
    """The result, and whether `flow` was given another one for an operator on the way. In float32 at least.

    Queries that see nothing get zeros.
    """
    query, key, value = given.query, given.key, given.value
    sources = [flow.origin((one,)) for one in (query, key, value)]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    times = query.shape[1] // key.shape[1]
    q, k, v = query.to(wide), key.repeat_interleave(times, 1).to(wide), value.repeat_interleave(times, 1).to(wide)
    hidden = given.hidden(lowest)
    logits = (q @ k.transpose(-1, -2) * given.scale).masked_fill(hidden, -torch.inf)
    logits, first = flow.found("qk", "product", (q, k, given.scale), logits, sources[0] | sources[1])
    before = flow.origin((logits,))
    if given.mask is not None and given.mask.dtype != torch.bool:
        added = given.mask[..., : k.shape[2]].to(wide).masked_fill(hidden, 0)
        logits, biased = logits + added, bool(added.any())
        before = before | ({BIAS} if biased else set())
    shares = torch.nan_to_num(logits.masked_fill(hidden, -torch.inf).softmax(-1))
    shares, second = flow.found("softmax", "softmax", (logits,), shares, before)
    result, third = flow.found("pv", "product", (shares, v), shares @ v, flow.origin((shares,)) | sources[2])
    made, result = flow.origin((result,)), result.to(query.dtype)
    flow.keep(result, made)
    return result, first or second or third

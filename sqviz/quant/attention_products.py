"""The two products of attention from codes, one without the other: `spec.attention` in two halves (thesis Figure 3.3).

    scores    S = ((Q̄ K̄ᵀ · Δ_q) · Δ_k) · factor         queries and keys per token and head
    mix       O = Q(P ∘ Δ_v) V̄ · Δ_p                     values per token and head; their steps move into P

Any leading axes, heads among them; in float32.
"""

from jaxtyping import Float, Int8
from sqviz_kernels import spec
from torch import Tensor


def scores(
    query: Float[Tensor, "*head query dim"], key: Float[Tensor, "*head key dim"], factor: float = 1.0
) -> Float[Tensor, "*head query key"]:
    """Q Kᵀ · factor from codes. Raises `NonFinite`."""
    s = spec.batched(*_codes(query), *_codes(key), factor)
    return s.view(*query.shape[:-1], key.shape[-2])


def mix(
    share: Float[Tensor, "*head query key"], value: Float[Tensor, "*head key dim"]
) -> Float[Tensor, "*head query dim"]:
    """P V from codes. Raises `NonFinite`."""
    spec.check_keys(value.shape[-2])
    v, v_step = _codes(value)
    p = share.float().reshape(1, -1, *share.shape[-2:]) * v_step[:, :, None]
    o = spec.batched(*_codes(p), v.transpose(2, 3))
    return o.view(*share.shape[:-1], value.shape[-1])


def _codes(
    states: Float[Tensor, "*head row dim"],
) -> tuple[Int8[Tensor, "1 head row dim"], Float[Tensor, "1 head row"]]:
    codes, steps = spec.quantise(states.reshape(-1, states.shape[-1]))
    return codes.view(1, -1, *states.shape[-2:]), steps.view(1, -1, states.shape[-2])

"""The block-parallel form with one set of sinks for all queries of a block: fewer keys, the same numbers.

plan.py gives each query of a block sinks of its own, which any attention can run, at the price of n·s more keys. Where
the model calls `scaled_dot_product_attention`, the queries can be turned instead: for its sinks, query i is turned to
its place inside the cache, p_i, and meets them at places 0, 1, 2 …; for the recent keys it stays as it is. To have both
in one softmax, the scores of the sinks are computed beforehand and handed over in s more dimensions,

    [q_i ; R(p_i − index_i) q_i · S]  ·  [k_j ; 0]        = q_i · k_j                  recent key j
    [q_i ; R(p_i − index_i) q_i · S]  ·  [0 ; e_m]        = R(p_i − index_i) q_i · S_m  sink m

so that one call does it, for any kernel behind it. The queries are taken a few at a time, each lot with the keys that
it can see at all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sqviz.errors import SqvizError
from sqviz.quant.step_attention import SDPA
from sqviz.streaming.positions import Rotary, angles, turn

if TYPE_CHECKING:
    from sqviz.streaming.cache import SinkCache

LOT = 256
"""Queries per call."""


def applies(cache: "SinkCache") -> bool:
    """Whether the model's attention is one that can be run in this way."""
    rotary = isinstance(cache.scheme, Rotary) and cache.scheme.tensor == "keys" and bool(cache.scheme.module)
    return rotary and cache.lm.config._attn_implementation in SDPA


class SharedSinks(TorchFunctionMode):
    """Inside the `with` block, the attention of a pass over this cache is computed as the module's docstring says."""

    def __init__(self, cache: "SinkCache") -> None:
        super().__init__()
        self._cache, self._layer = cache, 0

    def __enter__(self) -> "SharedSinks":
        self._cache.share, self._layer = True, 0
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._cache.share = False
        super().__exit__(kind, error, trace)
        if kind is None and self._layer not in (0, len(self._cache.layers)):
            raise SqvizError(f"{self._layer} of {len(self._cache.layers)} layers of {self._cache.lm.name} used sdpa")

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called for every torch function of the pass."""
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or not self._cache.shared:
            return func(*args, **kwargs)
        self._layer += 1
        return self._attend(*args, **kwargs)

    def _attend(
        self,
        query: Float[Tensor, "batch head query dim"],
        key: Float[Tensor, "batch head key dim"],
        value: Float[Tensor, "batch head key dim"],
        attn_mask: Float[Tensor, "batch 1 query key"],
        scale: float | None = None,
        **_: Any,
    ) -> Float[Tensor, "batch head query dim"]:
        now, dim = self._cache.now, query.shape[-1]
        count, scale = now.taken, dim**-0.5 if scale is None else scale
        scores = self._turned(query) @ key[:, :, :count].transpose(-1, -2)
        query = torch.cat([query, scores.to(query.dtype)], -1)
        key = pad(key, (0, count))
        key[:, :, :count] = pad(torch.eye(count, dtype=key.dtype, device=key.device), (dim, 0))
        width = max(dim + count, value.shape[-1])
        query, key, wide = (pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
        parts = []
        for first in range(0, now.new, LOT):
            stop = min(first + LOT, now.new)
            near = slice(count + now.lows[first], count + now.start - now.window + stop)
            keys, values = (torch.cat([x[:, :, :count], x[:, :, near]], 2) for x in (key, wide))
            mask = attn_mask[:, :, first:stop]
            mask = torch.cat([mask[..., :count], mask[..., near]], -1)
            lot = scaled_dot_product_attention(query[:, :, first:stop], keys, values, attn_mask=mask, scale=scale)
            parts.append(lot[..., : value.shape[-1]])
        return torch.cat(parts, 2)

    def _turned(self, query: Tensor) -> Tensor:
        """The queries at their places inside the cache."""
        cache, now = self._cache, self._cache.now
        omega = cache.layers[self._layer - 1].omega
        if omega is None:
            return query
        assert now.targets is not None
        by = angles(-now.targets[:, None, :, 0].to(query.device), omega, query.dtype)  # [row 1 query pair]
        assert isinstance(cache.scheme, Rotary)
        return turn(query, by, cache.scheme.pairs)

"""A mixture's fused experts in integers: one packed product per expert and direction."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from sqviz_kernels.backend import Codes, opaque
from torch import Tensor, nn
from torch.nn.functional import linear

from sqviz.quant.plain import Integer
from sqviz.quant.w8a8 import Product, Site


class Stack(nn.Module):
    """The products of fused experts, one per expert.

    Attributes:
        products: one per expert.
        sites: how the input is quantised: one for all, or one per expert.
    """

    def __init__(self, sites: Sequence[Site], products: Sequence[Product]) -> None:
        super().__init__()
        self.sites, self.products = nn.ModuleList(sites), nn.ModuleList(products)

    @property
    def weight(self) -> Float[Tensor, "expert out channel"]:
        """Ŵ of all experts in float32, made anew at every look."""
        products = cast(Sequence[Product], self.products)
        return torch.stack([p.codes().float() * p.step.expand(p.out)[:, None] for p in products])


class W8A8Experts(Integer, nn.Module):
    """Fused gated experts, one after the other, both products in integers.

    Attributes:
        gate_up_proj, down_proj: the weights; one that is skipped stays a parameter [expert out channel].
        is_silu: the gate is SiLU(gate) · up, which the kernels fuse.
    """

    def __init__(self, original: Any, gate_up: Stack | nn.Parameter, down: Stack | nn.Parameter, is_silu: bool) -> None:
        super().__init__()
        self.num_experts, self.act_fn, self.is_silu = original.num_experts, original.act_fn, is_silu
        self.gate_up_proj, self.down_proj = gate_up, down
        self._gate = type(original)._apply_gate  # reads act_fn, and in some classes limits kept beside it
        for name, value in vars(original).items():
            if isinstance(value, int | float) and not name.startswith("_") and not hasattr(self, name):
                setattr(self, name, value)

    @opaque
    def forward(
        self,
        hidden: Float[Tensor, "token channel"],
        choice: Int[Tensor, "token slot"],
        share: Float[Tensor, "token slot"],
    ) -> Float[Tensor, "token channel"]:
        """Each token through the experts in `choice`, weighted by `share`. Raises `NonFinite`."""
        out = torch.zeros_like(hidden)
        codes = None
        if isinstance(self.gate_up_proj, Stack):
            codes = cast(Site, self.gate_up_proj.sites[0]).carried(hidden).codes
        for expert in choice.unique().tolist():
            if expert >= self.num_experts:  # dropped by expert parallelism
                continue
            token, slot = (choice == expert).nonzero(as_tuple=True)
            inner = self._inner(expert, hidden[token] if codes is None else codes.take(token), hidden.dtype)
            y = self._outer(expert, inner, hidden.dtype) * share[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    def _inner(self, expert: int, x: Tensor | Codes, dtype: torch.dtype) -> Tensor | Codes:
        """What the second product reads: codes where nothing has to be a float in between."""
        front, back = self.gate_up_proj, self.down_proj
        if not isinstance(front, Stack) or not isinstance(x, Codes):
            return self._gate(self, linear(cast(Tensor, x), cast(Tensor, front)[expert]))
        product = cast(Product, front.products[expert])
        if product.gated and isinstance(back, Stack):
            site = cast(Site, back.sites[expert % len(back.sites)])
            return product.backend.gated(x, product.packed, site.step, site.share)
        return self._gate(self, product.backend.linear(x, product.packed, dtype))

    def _outer(self, expert: int, inner: Tensor | Codes, dtype: torch.dtype) -> Float[Tensor, "token channel"]:
        back = self.down_proj
        if not isinstance(back, Stack):
            return linear(cast(Tensor, inner), back[expert])
        product = cast(Product, back.products[expert])
        if isinstance(inner, Tensor):
            inner = cast(Site, back.sites[expert % len(back.sites)]).carried(inner).codes
        return product.backend.linear(inner, product.packed, dtype)

"""`ScaledLinear`: a linear that divides its input by s at run time, where no earlier layer can absorb the division.

Y = (X diag(s)⁻¹)(diag(s) Wᵀ) as in thesis eq. 3.3, at the cost of one elementwise division per call (the thesis's
"extra scaling"). The module keeps the place and the name of the linear it replaces and is an `nn.Linear`.
"""

from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sqviz.errors import CannotFold
from sqviz.models.folds import wide
from sqviz.models.linears import holder, weight


class ScaledLinear(nn.Linear):
    """A linear with weight diag(s)·W that divides its input by s first.

    Attributes:
        input_scale: s [channel], a buffer in the model's dtype.
    """

    input_scale: Tensor

    def __init__(
        self, new_weight: Float[Tensor, "out channel"], bias: Tensor | None, s: Float[Tensor, " channel"]
    ) -> None:
        out, channels = new_weight.shape
        super().__init__(channels, out, bias=False, device="meta", dtype=new_weight.dtype)
        self.weight = nn.Parameter(new_weight, requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.register_buffer("input_scale", s)

    def forward(self, input: Float[Tensor, "*batch channel"]) -> Float[Tensor, "*batch out"]:
        """(input / s) · (W·diag(s))ᵀ + bias."""
        return F.linear(input / self.input_scale, self.weight, self.bias)

    def extra_repr(self) -> str:
        """What nn.Linear shows, and that the input is divided."""
        return f"{super().extra_repr()}, input divided by s"


def divide_online(model: nn.Module, name: str, s: Float[Tensor, " channel"]) -> Float[Tensor, " channel"]:
    """Replace the linear `name` of a shared copy by a `ScaledLinear`; one that is scaled already is scaled further.

    Returns:
        s as it is stored, in the model's dtype: the weight is multiplied by the very same numbers.

    Raises:
        CannotFold: `name` is not a linear layer of its own (a router, or experts fused into one tensor).
    """
    module, attribute = holder(model, name)
    old = weight(model, name).detach()
    if not (isinstance(module, nn.Linear) or hasattr(module, "nf")) or attribute != "weight":
        raise CannotFold(
            f"{name} is not a linear layer of its own but part of {type(module).__name__}, so its input cannot be "
            "divided at run time; leave it out of alpha, or pass folds='all' if an earlier linear can absorb s"
        )
    before = module.input_scale if isinstance(module, ScaledLinear) else torch.ones_like(s)
    total = (s * wide(before)).to(old.dtype)
    applied = wide(total) / wide(before)
    new = (wide(old) * applied).to(old.dtype)
    bias = cast(Tensor | None, module.bias)
    model.set_submodule(name, ScaledLinear(new, None if bias is None else bias.detach(), total))
    return applied

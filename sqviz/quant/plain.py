"""Whether a module is a plain linear, X Wᵀ + b, found out by trying."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sqviz.quant.scaled_linear import ScaledLinear


def is_plain(module: nn.Module, matrix: Float[Tensor, "out channel"], bias: Tensor | None) -> bool:
    """Whether the module computes X Wᵀ + b and nothing else; `ScaledLinear`'s division is known."""
    forward = type(module).forward
    if forward in (nn.Linear.forward, ScaledLinear.forward):
        return True
    if not isinstance(module, nn.Linear) and not hasattr(module, "nf"):  # nf: transformers' Conv1D
        return False
    x = torch.linspace(-1, 1, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)[None]
    with torch.no_grad():
        expected, got = nn.functional.linear(x, matrix, bias), module(x)
    return isinstance(got, Tensor) and bool(torch.allclose(got, expected, rtol=1e-2, atol=1e-3))

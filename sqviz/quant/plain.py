"""Whether a module is what quantised modules stand for: a plain linear, X Wᵀ + b, found by trying; gated experts."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sqviz.errors import SqvizError
from sqviz.models.lm import LM
from sqviz.quant.scaled_linear import ScaledLinear


class Integer:
    """Marks modules that compute in integers, really or acted out: their weights cannot be rescaled any more."""


def check_floating(lm: LM, what: str) -> None:
    """Raise `SqvizError` if a linear of the model is quantised; `what` is what cannot be done to it."""
    for name, module in lm.model.named_modules():
        if isinstance(module, Integer):
            raise SqvizError(
                f"{name} is quantised already: {what} the model that it was made from, then quantise that."
            )


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


def check_experts(module: Any, path: str) -> None:
    """Raise `SqvizError` unless these are gated experts with weights [expert out channel] and no bias."""
    plain = getattr(module, "has_gate", False) and hasattr(type(module), "_apply_gate")
    if not plain or module.is_transposed or module.has_bias or getattr(module, "has_post_expert_norm", False):
        raise SqvizError(
            f"{path}: the inside of {type(module).__name__} cannot be quantised; known are gated experts with "
            f"weights [expert out channel] and no bias. Leave them in floating point: skip={path + '.*'!r}."
        )

"""The modules that a simulated model is made of: quantise the input, multiply by the quantised weight (equation 3.2).

Both operands come back from their integers to the model's dtype before the product, which is summed in floating point.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from sqviz.quant.calibration import Grid
from sqviz.quant.granularity import Granularity
from sqviz.quant.plain import Integer
from sqviz.quant.quantize import fake_quantize
from sqviz.quant.schemes import Scheme


class InputQuantizer(nn.Module):
    """Quantises the input of one linear: with the static `grid` (step, zero point) if given, else with its own.

    A dynamic step reaches no further than `ceiling`.
    """

    step: Tensor | None
    zero: Tensor | None

    def __init__(self, scheme: Scheme, name: str, grid: Grid | None = None, ceiling: float | None = None) -> None:
        super().__init__()
        assert scheme.activation is not None
        self.granularity: Granularity = scheme.activation
        self.bits, self.symmetric, self.name, self.ceiling = scheme.bits, scheme.symmetric, name, ceiling
        step, zero = (None, None) if grid is None else grid
        self.register_buffer("step", step, persistent=False)
        self.register_buffer("zero", zero, persistent=False)

    def forward(self, x: Float[Tensor, "*rows channel"]) -> Float[Tensor, "*rows channel"]:
        """X̂, in the dtype of X. Raises `NonFinite` naming the linear."""
        return fake_quantize(
            x,
            self.granularity,
            self.bits,
            self.symmetric,
            self.step,
            zero=self.zero,
            clip=self.ceiling,
            of="activation",
            name=f"the input of {self.name}",
        )

    def extra_repr(self) -> str:
        """For printing a model."""
        reach = "" if self.ceiling is None else f" up to {self.ceiling:.4g}"
        return f"{self.granularity}, bits={self.bits}, {'dynamic' if self.step is None else 'static'}{reach}"


class SimulatedLinear(Integer, nn.Module):
    """Y = X̂ Ŵᵀ + b, in floating point.

    Attributes:
        weight: Ŵ [out channel], already quantised; in this layout whatever the original's was.
        bias: b [out] or None, the original's own tensor.
        smoothing: s [channel] by which x is divided first (online smoothing), or None.
        quantizer: makes X̂ from X / s; None leaves it in floating point.
    """

    bias: Tensor | None
    smoothing: Tensor | None

    def __init__(
        self,
        weight: Float[Tensor, "out channel"],
        bias: Tensor | None,
        quantizer: InputQuantizer | None,
        smoothing: Float[Tensor, " channel"] | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = _frozen(weight)
        self.register_parameter("bias", bias if bias is None or isinstance(bias, nn.Parameter) else _frozen(bias))
        self.register_buffer("smoothing", smoothing)
        self.quantizer = quantizer

    def forward(self, x: Float[Tensor, "*rows channel"]) -> Float[Tensor, "*rows out"]:
        """[… channel] → [… out]."""
        if self.smoothing is not None:
            x = x / self.smoothing
        if self.quantizer is not None:
            x = self.quantizer(x)
        return linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """For printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class MixedLinear(SimulatedLinear):
    """LLM.int8(): input channels that reach `threshold` are multiplied in floating point, the others as X̂ Ŵᵀ.

    Y = X[:, O] W[:, O]ᵀ + X̂[:, ¬O] Ŵ[:, ¬O]ᵀ + b,    O = channels j with max_t |X_tj| ≥ threshold

    over all tokens of the forward pass, as in Dettmers et al. 2022, §3.2. Steps of X̂ are those of the other channels
    only; those of Ŵ span all channels, for it is quantised once and O is not known before.

    Attributes:
        original: W [out channel], the tensor of the model it was made from.
        threshold: 6.0 in the paper.
    """

    def __init__(
        self,
        original: Float[Tensor, "out channel"],
        weight: Float[Tensor, "out channel"],
        bias: Tensor | None,
        quantizer: InputQuantizer,
        threshold: float,
        smoothing: Float[Tensor, " channel"] | None = None,
    ) -> None:
        super().__init__(weight, bias, quantizer, smoothing)
        self.original, self.threshold = _frozen(original), threshold

    def forward(self, x: Float[Tensor, "*rows channel"]) -> Float[Tensor, "*rows out"]:
        """[… channel] → [… out]. Raises `NonFinite` naming the linear."""
        assert self.quantizer is not None
        if self.smoothing is not None:
            x = x / self.smoothing
        kept = x.flatten(0, -2).abs().amax(0) >= self.threshold if x.numel() else x.new_zeros(x.shape[-1]).bool()
        y = linear(self.quantizer(x.masked_fill(kept, 0)), self.weight, self.bias)
        if not bool(kept.any()):
            return y
        return y + linear(x[..., kept], self.original[:, kept])


class SimulatedExperts(Integer, nn.Module):
    """Fused gated experts, one expert after the other, both products simulated.

    Attributes:
        gate_up_proj: [expert 2·inner channel] and down_proj: [expert channel inner], quantised unless skipped.
        outer: makes X̂ of the first product, for all experts; None leaves it in floating point.
        inner: one quantiser per expert for the input of the second product, or None.
    """

    def __init__(
        self,
        original: Any,
        gate_up: Float[Tensor, "expert up channel"],
        down: Float[Tensor, "expert channel inner"],
        outer: InputQuantizer | None,
        inner: Sequence[InputQuantizer] | None,
    ) -> None:
        super().__init__()
        self.num_experts = original.num_experts
        self.act_fn = original.act_fn
        self.gate_up_proj, self.down_proj = _frozen(gate_up), _frozen(down)
        self.outer = outer
        self.inner = None if inner is None else nn.ModuleList(inner)
        self._gate = type(original)._apply_gate  # reads act_fn, and in some classes limits kept beside it
        for name, value in vars(original).items():
            if isinstance(value, int | float) and not name.startswith("_") and not hasattr(self, name):
                setattr(self, name, value)

    def forward(
        self,
        hidden: Float[Tensor, "token channel"],
        choice: Int[Tensor, "token slot"],
        share: Float[Tensor, "token slot"],
    ) -> Float[Tensor, "token channel"]:
        """Each token through the experts in `choice`, weighted by `share`."""
        x = hidden if self.outer is None else self.outer(hidden)
        out = torch.zeros_like(hidden)
        for expert in choice.unique().tolist():
            if expert >= self.num_experts:  # dropped by expert parallelism
                continue
            token, slot = (choice == expert).nonzero(as_tuple=True)
            inner = self._gate(self, linear(x[token], self.gate_up_proj[expert]))
            if self.inner is not None:
                inner = self.inner[expert](inner)
            y = linear(inner, self.down_proj[expert]) * share[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def _frozen(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)

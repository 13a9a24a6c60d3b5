"""Making a model that acts integers out in floating point: each linear becomes a module of simulated.py."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sqviz.errors import SqvizError
from sqviz.models.linears import experts, weight
from sqviz.models.lm import LM
from sqviz.quant.calibration import Calibration
from sqviz.quant.plain import check_experts, is_plain
from sqviz.quant.quantize import fake_quantize
from sqviz.quant.scaled_linear import ScaledLinear
from sqviz.quant.schemes import Scheme
from sqviz.quant.simulated import InputQuantizer, MixedLinear, SimulatedExperts, SimulatedLinear


class Simulator:
    """Makes the simulated module for each linear of one model."""

    def __init__(self, lm: LM, scheme: Scheme, calibration: Calibration) -> None:
        self.lm, self.scheme, self.calibration = lm, scheme, calibration

    def build(self, name: str, path: str, skipped: set[str]) -> nn.Module:
        """The module for the linear `name`, or for the fused experts at `path`."""
        module = self.lm.model.get_submodule(path)
        if isinstance(module, SimulatedLinear | SimulatedExperts):
            raise SqvizError(f"{name} is quantised already. Quantise the model it was made from instead.")
        if path != name:
            return self._experts(module, path, skipped)
        smoothing = module.input_scale if isinstance(module, ScaledLinear) else None
        bias: Any = getattr(module, "bias", None)
        if not is_plain(module, weight(self.lm, name), bias):
            raise SqvizError(
                f"{name} is a {type(module).__name__}, which sqviz cannot simulate. Leave it in floating point: "
                f"skip={[name]!r}."
            )
        quantizer = self._quantizers(name)[0]
        if self.scheme.outliers is not None and quantizer is not None:
            original = weight(self.lm, name).detach()
            return MixedLinear(original, self._weight(name), bias, quantizer, self.scheme.outliers, smoothing)
        return SimulatedLinear(self._weight(name), bias, quantizer, smoothing)

    def _experts(self, module: Any, path: str, skipped: set[str]) -> nn.Module:
        check_experts(module, path)
        if self.scheme.outliers is not None:
            raise SqvizError(
                f"{path}: channels of fused experts cannot be kept in floating point (outliers={self.scheme.outliers})."
                f" Leave these linears as they are: skip={path + '.*'!r}."
            )
        up, down = f"{path}.gate_up_proj", f"{path}.down_proj"
        outer = None if up in skipped else self._quantizers(up)[0]
        inner = [None] if down in skipped else self._quantizers(down)
        if len(inner) == 1:
            inner = inner * module.num_experts
        return SimulatedExperts(
            module,
            module.gate_up_proj if up in skipped else self._weight(up),
            module.down_proj if down in skipped else self._weight(down),
            outer,
            None if inner[0] is None else [one for one in inner if one is not None],
        )

    def _weight(self, name: str) -> Float[Tensor, "*expert out channel"]:
        """Ŵ; for fused experts each expert's on its own."""
        original, count = weight(self.lm, name).detach(), experts(self.lm, name)
        matrices = original.unflatten(0, (count, -1)) if count else original[None]
        if self.scheme.weight is None:
            return matrices if count else original
        new = torch.stack(
            [
                fake_quantize(
                    matrix,
                    self.scheme.weight,
                    self.scheme.bits_of_weights,
                    self.scheme.symmetric,
                    clip=self.calibration.weight_clip(name, matrix, index if count else None),
                    of="weight",
                    name=f"the weight of {name}",
                )
                for index, matrix in enumerate(matrices)
            ]
        )
        return new if count else new[0]

    def _quantizers(self, name: str) -> list[InputQuantizer | None]:
        """One quantiser of the input of `name`, or one per expert where experts have smoothing factors of their own."""
        if self.scheme.activation is None:
            return [None]
        if self.scheme.static:
            return [InputQuantizer(self.scheme, name, grid) for grid in self.calibration.grids(name)]
        return [InputQuantizer(self.scheme, name, ceiling=ceiling) for ceiling in self.calibration.ceilings(name)]

"""Static steps from calibration: the recorded extrema of a linear's input, as they are in the model at hand."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz.models.linears import weight
from sqviz.models.lm import LM
from sqviz.quant.quantize import step_and_zero
from sqviz.quant.schemes import Scheme

if TYPE_CHECKING:
    from sqviz.observe.magnitudes import InputStats, Magnitudes

Grid = tuple[Tensor, Tensor | None]
"""A step and a zero point (None: symmetric)."""


def static_grids(lm: LM, scheme: Scheme, magnitudes: "Magnitudes", name: str) -> list[Grid]:
    """Static steps (and zero points) of the input of a linear; one, or one per fused expert with an input of its own.

    From the recorded extrema, and what was folded in since. Raises `SqvizError` if the magnitudes are another model's.
    """
    stats = magnitudes.inputs.get(name)
    channels = weight(lm, name).shape[1]
    if stats is None or stats.minimum.shape[-1] != channels:
        held = "nothing" if stats is None else f"{stats.minimum.shape[-1]} channels"
        raise SqvizError(
            f"magnitudes of {magnitudes.model} hold {held} for {name}, which has {channels} channels: they come "
            "from another model. Capture them from this one: sqviz.capture(lm, text)."
        )
    now, then = lm.scales.get(name), magnitudes.scales.get(name)
    since = torch.ones(1, channels)
    if now is not None:
        since = since * now.float().cpu().reshape(-1, channels)  # [1 channel] or [expert channel]
    if then is not None:
        since = since / then.float().cpu().reshape(-1, channels)
    low, high = _bounds(stats)
    assert scheme.activation is not None
    grids: list[Grid] = []
    for extrema in torch.stack(torch.broadcast_tensors(low / since, high / since), 1):  # [2 channel] each
        bounds = scheme.activation.extrema(extrema, "activation")
        step, zero = step_and_zero(*bounds, scheme.bits, scheme.symmetric)
        grids.append((step.to(lm.device), None if zero is None else zero.to(lm.device)))
    return grids


def _bounds(stats: "InputStats") -> tuple[Float[Tensor, "expert_or_1 channel"], Float[Tensor, "expert_or_1 channel"]]:
    """The recorded minimum and maximum per channel: one row, or one per fused expert with an input of its own.

    An expert that calibration sent no token takes the extrema over all experts.
    """
    low, high = stats.minimum[None].float(), stats.maximum[None].float()
    if stats.expert_absmax is None:
        return low, high
    idle = torch.zeros(len(stats.expert_absmax), dtype=torch.bool)
    if stats.expert_tokens is not None:
        idle = stats.expert_tokens == 0
    reach = torch.where(idle[:, None], stats.absmax, stats.expert_absmax)
    return torch.maximum(low, -reach), torch.minimum(high, reach)

"""What a quantised model takes from calibration: static steps of its inputs, and where ranges are cut off.

Static steps come from the recorded extrema of a linear's input, as they are in the model at hand: max|X/s| is
max|X|/s channel by channel, so a capture from before smoothing serves. A quantile of X/s is not to be had that way;
schemes that clip by quantiles take a second pass, after smoothing, as the thesis's own calibration does (§3.4.1).
"""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz.models.linears import Group, folded_scales, groups, weight
from sqviz.models.lm import LM
from sqviz.progress import CancelToken
from sqviz.quant.clipping import ClipTokens, ClipValues, activation_clip, weight_clip
from sqviz.quant.quantize import step_and_zero
from sqviz.quant.rows import SEGMENTS, Rows, sample_rows
from sqviz.quant.schemes import Scheme

if TYPE_CHECKING:
    from sqviz.observe.magnitudes import InputStats, Magnitudes

Grid = tuple[Tensor, Tensor | None]
"""A step and a zero point (None: symmetric)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Steps and clips of one model under one scheme. Computed as they are asked for.

    Attributes:
        lm: the model that is quantised.
        scheme: how.
        magnitudes: the capture; None where the scheme needs none.
        cancel: stops the pass that looks at inputs.
        rows: inputs of this model's linears, where they are known; else some are taken when they are needed.
    """

    lm: LM
    scheme: Scheme
    magnitudes: "Magnitudes | None" = None
    cancel: CancelToken | None = None
    rows: Rows | None = None

    def __post_init__(self) -> None:
        if not self.scheme.needs_calibration:
            return
        if self.magnitudes is None:
            what = "static" if self.scheme.static else "one whose ranges are clipped"
            raise SqvizError(
                f"{self.scheme!r} is {what}: its steps come from calibration. Give the magnitudes: "
                "m = sqviz.capture(lm, text); sqviz.quantize(lm, scheme, m). Or use static=False, clip=None, "
                "weight_clip=None."
            )

    def grids(self, name: str) -> list[Grid | None]:
        """Step and zero point of the input of a linear: one, or one per fused expert; [None] for a dynamic scheme."""
        if not self.scheme.static or self.scheme.activation is None:
            return [None]
        assert self.magnitudes is not None
        if self.scheme.clip is None:
            return list(static_grids(self.lm, self.scheme, self.magnitudes, name))
        most = self._clipped(name)
        top = 2 ** (self.scheme.bits - 1) - 1
        return [(torch.full((1, 1), one / top, device=self.lm.device), None) for one in most]

    def ceilings(self, name: str) -> list[float | None]:
        """The largest magnitude that dynamic steps of a linear's input reach: one, or one per fused expert."""
        if self.scheme.static or self.scheme.clip is None:
            return [None]
        return list(self._clipped(name))

    def weight_clip(
        self, name: str, matrix: Float[Tensor, "out channel"], expert: int | None = None
    ) -> Float[Tensor, "*step"] | None:
        """Where the range of a weight is cut off, shaped as its steps; None: nowhere."""
        if self.scheme.weight_clip is None:
            return None
        assert self.scheme.weight is not None
        rows = self._rows.of(self._groups[name], expert)
        return weight_clip(matrix, rows, self.scheme.weight, self.scheme.bits_of_weights)

    def _clipped(self, name: str) -> list[float]:
        """The largest magnitude that each step of the input of `name` represents."""
        assert self.magnitudes is not None
        group = self._groups[name]
        stats = self.magnitudes.inputs.get(group.name)
        bounds = static_grids(self.lm, self.scheme, self.magnitudes, name)  # also checks whose magnitudes these are
        top = 2 ** (self.scheme.bits - 1) - 1
        match self.scheme.clip:
            case ClipTokens(share):
                self._require_second_pass(group)
                assert stats is not None
                highest = stats.token_absmax.sort(descending=True).values
                most = float(highest[min(len(highest) - 1, math.floor(share * len(highest)))])
            case ClipValues(quantile):
                from sqviz.observe.magnitudes import QUANTILES

                self._require_second_pass(group)
                assert stats is not None
                most = float(stats.tensor_quantiles[QUANTILES.index(quantile)])
            case _:
                weights = torch.cat([weight(self.lm, other).detach() for other in group.consumers])
                if len(bounds) > 1:
                    matrices = weights.unflatten(0, (len(bounds), -1))
                    each = zip(bounds, matrices, range(len(bounds)), strict=True)
                    return [
                        activation_clip(float(grid[0]) * top, self._rows.of(group, e), w, self.scheme.bits)
                        for grid, w, e in each
                    ]
                most = activation_clip(float(bounds[0][0]) * top, self._rows.of(group), weights, self.scheme.bits)
        return [min(most, float(step) * top) for step, _ in bounds]

    def _require_second_pass(self, group: Group) -> None:
        """Raise `SqvizError` unless the capture was made of a model smoothed as this one is."""
        assert self.magnitudes is not None
        now, then = folded_scales(self.lm).get(group.name), self.magnitudes.scales.get(group.name)
        ones = torch.ones(())
        now, then = (ones if s is None else s.float().cpu() for s in (now, then))
        if not torch.allclose(now.expand(torch.broadcast_shapes(now.shape, then.shape)), then, rtol=1e-4):
            raise SqvizError(
                f"{self.scheme.clip!r} takes quantiles of what flows into {group.name} after smoothing, and the "
                "magnitudes are from before. Capture again: m2 = sqviz.capture(smoothed, text), then "
                "sqviz.quantize(smoothed, scheme, m2)."
            )

    @functools.cached_property
    def _groups(self) -> dict[str, Group]:
        return {name: group for group in groups(self.lm) for name in group.consumers}

    @functools.cached_property
    def _rows(self) -> Rows:
        """Inputs of every linear over the first calibration segments."""
        if self.rows is not None:
            return self.rows
        assert self.magnitudes is not None
        segments = self.magnitudes.tokens.view(-1, self.magnitudes.length)[:SEGMENTS]
        return sample_rows(self.lm, segments, cancel=self.cancel)


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

"""`show_granularity`: which numbers of X and W share a step size under a scheme, drawn (thesis Figure 3.1)."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz.quant.granularity import Granularity, Kind
from sqviz.quant.schemes import (
    SMOOTHQUANT_LLAMA,
    SMOOTHQUANT_O1,
    SMOOTHQUANT_O2,
    Scheme,
)
from sqviz.shown import Shown

if TYPE_CHECKING:
    import numpy as np
    import plotly.graph_objects

    from sqviz.widgets.still import Still


@dataclasses.dataclass(frozen=True, eq=False)
class GranularityPicture(Shown):
    """Step maps of some schemes.

    Attributes:
        pairs: by what the scheme is called, for each cell of X [token channel] and of Wᵀ [channel out] the number of
            its step; all 0 where the operand is not quantised.
    """

    pairs: dict[str, tuple["np.ndarray", "np.ndarray"]]

    @property
    def steps(self) -> dict[str, tuple[int, int]]:
        """How many steps X and W have, by scheme."""
        return {name: (int(x.max()) + 1, int(w.max()) + 1) for name, (x, w) in self.pairs.items()}

    def figure(self) -> "plotly.graph_objects.Figure":
        """X beside Wᵀ, a row per scheme."""
        from sqviz.plots.granularity import granularity_figure

        return granularity_figure(self.pairs, _TITLE)

    def still(self) -> "Still":
        """The picture of `figure`, drawn without a browser."""
        from sqviz.widgets.granularity_still import granularity_still

        return granularity_still(self.pairs, _TITLE)

    def __repr__(self) -> str:
        return "\n".join(f"{name}: {x} steps for X, {w} for W" for name, (x, w) in self.steps.items())


_TITLE = "Neighbouring cells of one shade share a step"


def show_granularity(
    schemes: Sequence[Scheme] = (SMOOTHQUANT_O2, SMOOTHQUANT_O1, SMOOTHQUANT_LLAMA),
    *,
    tokens: int = 6,
    channels: int = 8,
    out: int = 6,
) -> GranularityPicture:
    """Draw which numbers share a step.

    Args:
        schemes: rows; by default per-tensor, per-token, and per-token with per-channel weights.
        tokens, channels, out: size of the drawn X [token channel] and W [out channel].

    Raises:
        SqvizError: no scheme, or a size below 1.
    """
    if not schemes or min(tokens, channels, out) < 1:
        raise SqvizError(
            f"schemes={schemes!r}, tokens={tokens}, channels={channels}, out={out}: at least one of each is needed."
        )
    return GranularityPicture(
        {
            scheme.describe(): (
                step_map(scheme.activation, (tokens, channels), "activation").numpy(),
                step_map(scheme.weight, (out, channels), "weight").T.numpy(),
            )
            for scheme in schemes
        }
    )


def step_map(granularity: Granularity | None, shape: tuple[int, int], of: Kind) -> Int[Tensor, "row channel"]:
    """For each cell of a matrix the number of its step."""
    if granularity is None:
        return torch.zeros(shape, dtype=torch.int64)
    steps = granularity.step_shape(shape, of)
    numbers = torch.arange(steps[0] * steps[1]).view(steps)
    return granularity.spread(numbers, shape[1]).expand(shape)

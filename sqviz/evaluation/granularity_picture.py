"""`show_granularity`: which numbers of X and W share a step size under a scheme, drawn (thesis Figure 3.1).

Given an X or a W, the picture also says what each of their numbers becomes: its integer.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz.quant.granularity import Granularity, Kind
from sqviz.quant.quantize import quantize_tensor
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
            its step; all −1 where the operand is not quantised.
        codes: by the same, the integer of each cell; None for an operand that was not given or is not quantised.
    """

    pairs: dict[str, tuple["np.ndarray", "np.ndarray"]]
    codes: dict[str, tuple["np.ndarray | None", "np.ndarray | None"]]

    @property
    def steps(self) -> dict[str, tuple[int, int]]:
        """How many steps X and W have, by scheme; 0 for an operand that is not quantised."""
        return {name: (int(x.max()) + 1, int(w.max()) + 1) for name, (x, w) in self.pairs.items()}

    def figure(self) -> "plotly.graph_objects.Figure":
        """X beside Wᵀ, a row per scheme."""
        from sqviz.plots.granularity import granularity_figure

        return granularity_figure(self.pairs, self._title, self.codes)

    def still(self) -> "Still":
        """The picture of `figure`, drawn without a browser."""
        from sqviz.widgets.granularity_still import granularity_still

        return granularity_still(self.pairs, self._title, self.codes)

    def __repr__(self) -> str:
        return "\n".join(f"{name}: steps for X: {x}, for W: {w}" for name, (x, w) in self.steps.items())

    @property
    def _title(self) -> str:
        numbers = any(code is not None for pair in self.codes.values() for code in pair)
        shades = "Neighbouring cells of one shade share a step"
        return f"{shades}; the numbers are the integers" if numbers else shades


MOST = 32
"""Rows and channels that can be drawn."""


def show_granularity(
    schemes: Sequence[Scheme] = (SMOOTHQUANT_O2, SMOOTHQUANT_O1, SMOOTHQUANT_LLAMA),
    *,
    x: Float[Tensor, "token channel"] | None = None,
    w: Float[Tensor, "out channel"] | None = None,
    tokens: int = 6,
    channels: int = 8,
    out: int = 6,
) -> GranularityPicture:
    """Draw which numbers share a step, and what numbers become.

    Args:
        schemes: rows; by default per-tensor, per-token, and per-token with per-channel weights.
        x, w: matrices, at most 32 × 32. Their integers under each scheme are written into the cells; steps are those of
            the matrix itself, also under a static scheme.
        tokens, channels, out: size of the drawn X [token channel] and W [out channel] where none is given.

    Raises:
        SqvizError: no scheme, a size below 1 or above 32, or matrices that do not fit together; `NonFinite`.
    """
    for name, matrix in (("x", x), ("w", w)):
        if matrix is not None and matrix.ndim != 2:
            raise SqvizError(f"{name} has the shape {tuple(matrix.shape)}: a matrix is needed, [row channel].")
    if x is not None and w is not None and x.shape[1] != w.shape[1]:
        raise SqvizError(f"x {tuple(x.shape)} and w {tuple(w.shape)} do not fit: both end in the input channel.")
    tokens, out = tokens if x is None else len(x), out if w is None else len(w)
    given = x if x is not None else w
    channels = channels if given is None else given.shape[1]
    if not schemes or not all(1 <= size <= MOST for size in (tokens, channels, out)):
        raise SqvizError(
            f"schemes={schemes!r}, tokens={tokens}, channels={channels}, out={out}: at least one of each is needed, "
            f"and at most {MOST} rows or channels can be drawn."
        )
    return GranularityPicture(
        {
            scheme.describe(): (
                step_map(scheme.activation, (tokens, channels), "activation").numpy(),
                step_map(scheme.weight, (out, channels), "weight").T.numpy(),
            )
            for scheme in schemes
        },
        {
            scheme.describe(): (
                _codes(scheme, scheme.activation, x, "activation", scheme.bits),
                _codes(scheme, scheme.weight, w, "weight", scheme.bits_of_weights),
            )
            for scheme in schemes
        },
    )


def _codes(
    scheme: Scheme, granularity: Granularity | None, matrix: Float[Tensor, "row channel"] | None, of: Kind, bits: int
) -> "np.ndarray | None":
    """The integers of a matrix; of a weight transposed, as it is drawn."""
    if granularity is None or matrix is None:
        return None
    found = quantize_tensor(matrix.float(), granularity, bits, scheme.symmetric, of=of, name=of).values
    return (found.T if of == "weight" else found).cpu().numpy()


def step_map(granularity: Granularity | None, shape: tuple[int, int], of: Kind) -> Int[Tensor, "row channel"]:
    """For each cell of a matrix the number of its step; −1 without steps."""
    if granularity is None:
        return torch.full(shape, -1)
    steps = granularity.step_shape(shape, of)
    numbers = torch.arange(steps[0] * steps[1]).view(steps)
    return granularity.spread(numbers, shape[1]).expand(shape)

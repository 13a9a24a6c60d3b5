"""Where a range is cut off so that what remains is rounded more finely, as values for `Scheme`.

    value                for                       the largest magnitude that a step still represents
    ClipTokens(0.02)     activations               what 98 % of the calibration tokens stay below (the thesis clips the
                                                   top 2 % of tokens for GLM-130B, §3.4.2)
    ClipValues(0.999)    activations               what 99.9 % of all calibrated values stay below
    LeastError()         activations,              the share of the maximum with the least error of the linear's output
                         weights                   (Outlier Suppression's token-wise clipping, its coarse stage)

What lies beyond saturates. A dynamic step is clipped to the same magnitude: Δ = min(max|X|, clip) / 127. `LeastError`
takes, over some calibration tokens t (rows.py: the largest of each segment are among them) and shares c of a grid, the
c with the least

    mean_t ‖ŷ_t(c) − y_t‖² / ‖y_t‖²,      y = x Wᵀ

each token relative to its own output, so that a sink token with outputs a thousand times larger does not decide alone.
"""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz.observe.magnitudes import QUANTILES
from sqviz.quant.granularity import Granularity

SHARES = tuple(0.85**k for k in range(30))
"""Shares of the maximum that `LeastError` tries, from all of it downwards, until the error is HOPELESS."""

HOPELESS = 4.0
"""How many times the least error so far ends the search."""


@dataclasses.dataclass(frozen=True)
class ClipTokens:
    """Static steps for all calibration tokens but the `share` with the largest values."""

    share: float = 0.02

    def __post_init__(self) -> None:
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 <= self.share < 1:
            raise SqvizError(f"ClipTokens(share={self.share!r}): a share of the tokens in [0, 1) is allowed.")


@dataclasses.dataclass(frozen=True)
class ClipValues:
    """Static steps that reach up to a quantile of |x| over all calibrated values; one of those a capture keeps."""

    quantile: float = 0.999

    def __post_init__(self) -> None:
        if self.quantile not in QUANTILES:
            raise SqvizError(f"ClipValues(quantile={self.quantile!r}): a capture keeps {QUANTILES}; one of these.")


@dataclasses.dataclass(frozen=True)
class LeastError:
    """The range with the least error of the linear's output."""


Clip = ClipTokens | ClipValues | LeastError


def weight_clip(
    w: Float[Tensor, "out channel"], rows: Float[Tensor, "row channel"], granularity: Granularity, bits: int = 8
) -> Float[Tensor, "*step"]:
    """The largest magnitudes, shaped as the steps, with which Ŵ makes the least error of X Wᵀ.

    A step per tensor is chosen for all outputs together, a step per out channel for each by itself.

    Args:
        w: the weight.
        rows: some inputs X of the linear; none leaves every weight as it is.
        granularity: `PerTensor()` or `PerChannel()`.
        bits: of the weight.
    """
    w = w.float()
    low, high = granularity.extrema(w, "weight")
    most = torch.maximum(-low, high)
    if not len(rows):
        return most
    y = rows.float() @ w.T
    size, top, new = _size(y), 2 ** (bits - 1) - 1, torch.empty_like(w)

    def error(share: float) -> Float[Tensor, "*step"]:
        step = most * (share / top)
        torch.div(w, torch.where(step == 0, 1.0, step), out=new).round_().clamp_(-top, top).mul_(step)
        relative = (rows.float() @ new.T).sub_(y).square_().div_(size)  # [row out]
        return (relative.mean(0) if most.numel() > 1 else relative.sum(1).mean()).reshape(most.shape)

    return most * _best(error)


def activation_clip(
    most: float, rows: Float[Tensor, "row channel"], weights: Float[Tensor, "out channel"], bits: int = 8
) -> float:
    """The largest magnitude with which a static per-tensor X̂ makes the least error of X Wᵀ.

    Args:
        most: max|X| of the whole calibration.
        rows: some inputs X.
        weights: those of all linears that read X, one under the other.
        bits: of the activation.
    """
    if not len(rows) or most == 0:
        return most
    x, w = rows.float(), weights.float()
    y = x @ w.T
    size = _size(y)[:, 0]
    top = 2 ** (bits - 1) - 1

    def error(share: float) -> Float[Tensor, ""]:
        step = most * share / top
        new = (x / step).round_().clamp_(-top, top).mul_(step)
        relative = (new @ w.T - y).square().sum(1) / size
        return relative.mean()

    return most * float(_best(error))


def _size(y: Float[Tensor, "row out"]) -> Float[Tensor, "row 1"]:
    """‖y_t‖²; 1 for a token whose output is 0."""
    size = y.square().sum(1, keepdim=True)
    return torch.where(size == 0, 1.0, size)


def _best(error: Callable[[float], Tensor]) -> Tensor:
    """The share with the least error, element by element; the largest of equals."""
    least = error(1.0)
    best = torch.ones_like(least)
    for share in SHARES[1:]:
        now = error(share)
        best = torch.where(now < least, share, best)
        least = torch.minimum(now, least)
        if bool((now > HOPELESS * least).all()):
            break
    return best

"""Some tokens and some rows of W that stand for all of them, so that the error of a product can be estimated at once.

What stands out is taken for certain: the tokens with the largest values and the rows with the largest outputs, where a
few elements carry most of the norm. The rest is drawn without replacement, each drawn one counting (left) / (drawn)
times; a sum of squares over the sample is then an unbiased estimate of the whole.

The error is spread evenly and such an estimate of it is good. ‖Y‖ is not: it hangs on few tokens and few rows. It is
estimated from all tokens on the sampled rows, corrected by what all rows make of the sampled tokens.
"""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

CERTAIN_TOKENS = 16
FEWEST_ROWS = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Tokens and rows of W that are multiplied, and what their product is.

    Attributes:
        x, w: the tokens [token channel] and the rows [out channel].
        y: X Wᵀ in float32.
        norm: ‖Y‖ over all tokens and rows, not only these.
        token_weight: how many tokens each stands for, itself included; None: nothing is left out.
        row_weight: the same for the rows; both or neither.
    """

    x: Float[Tensor, "token channel"]
    w: Float[Tensor, "out channel"]
    y: Float[Tensor, "token out"]
    norm: float
    token_weight: Float[Tensor, " token"] | None = None
    row_weight: Float[Tensor, " out"] | None = None

    @property
    def sampled(self) -> bool:
        """Whether anything was left out."""
        return self.token_weight is not None

    def norm_squared(self, difference: Float[Tensor, "token some"], rows: slice = slice(None)) -> float:
        """Σ |difference|², each element counted as often as it stands for others; `rows` says which rows these are."""
        if self.token_weight is None or self.row_weight is None:
            return float(torch.linalg.vector_norm(difference, dim=1).double().square().sum())
        return float(_weighted(difference, self.token_weight, self.row_weight[rows]))


def everything(
    x: Float[Tensor, "token channel"], w: Float[Tensor, "out channel"], y: Float[Tensor, "token out"]
) -> Part:
    """All tokens and all rows."""
    return Part(x, w, y, float(torch.linalg.vector_norm(y, dim=1).double().norm()))


def sample(
    x: Float[Tensor, "token channel"], w: Float[Tensor, "out channel"], tokens: int, weights: int, seed: int
) -> tuple[Part, Part | None]:
    """A part of at most `tokens` tokens and of whole rows with about `weights` weights (FEWEST_ROWS rows at least).

    Returns the part, and the whole of it where all rows are taken, because that is known then.
    """
    generator = torch.Generator().manual_seed(seed)
    token, token_weight = _choose(x.abs().amax(1), tokens, min(CERTAIN_TOKENS, tokens), generator)
    count = max(FEWEST_ROWS, weights // w.shape[1])
    if count >= len(w):
        whole = everything(x, w, x @ w.T)
        if len(token) == len(x):
            return whole, whole
        return Part(x[token], w, whole.y[token], whole.norm, token_weight, w.new_ones(len(w))), whole
    some = x[token]
    by_token = some @ w.T  # [sampled token, out]: which rows carry the output
    row, row_weight = _choose(torch.linalg.vector_norm(by_token, dim=0), count, count // 4, generator)
    by_row = x @ w[row].T  # [token, sampled row]
    y = by_token[:, row]
    squares = _weighted(by_row, x.new_ones(len(x)), row_weight)
    seen = _weighted(y, token_weight, row_weight)
    if seen > 0:
        squares = squares * _weighted(by_token, token_weight, w.new_ones(len(w))) / seen
    return Part(some, w[row], y, float(squares.sqrt()), token_weight, row_weight), None


def _weighted(
    y: Float[Tensor, "token out"], token_weight: Float[Tensor, " token"], row_weight: Float[Tensor, " out"]
) -> Float[Tensor, ""]:
    return (token_weight @ y.square()).double() @ row_weight.double()


def _choose(
    size: Float[Tensor, " item"], count: int, certain: int, generator: torch.Generator
) -> tuple[Int[Tensor, " chosen"], Float[Tensor, " chosen"]]:
    """Indices of `count` items in ascending order, the `certain` largest among them, and how many each stands for."""
    if count >= len(size):
        return torch.arange(len(size), device=size.device), torch.ones_like(size)
    order = size.cpu().argsort(descending=True)
    rest = order[certain:]
    drawn = rest[torch.randperm(len(rest), generator=generator)[: count - certain]]
    chosen = torch.cat([order[:certain], drawn])
    weight = torch.ones(count)
    weight[certain:] = len(rest) / max(1, len(drawn))
    ascending = chosen.argsort()
    return chosen[ascending].to(size.device), weight[ascending].to(size)

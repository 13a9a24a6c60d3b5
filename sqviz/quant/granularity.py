"""How many step sizes a matrix gets, as values (thesis Figure 3.1, Table 3.2).

Both operands of a linear Y = X Wᵀ end in the input channel: the activation X is [… token channel], the weight W is
[… out channel]. A granularity says over which elements one step size Δ is shared:

    value          activation [token channel] → step     weight [out channel] → step
    PerTensor()    [1 1]                                 [1 1]
    PerToken()     [token 1]                             not allowed
    PerChannel()   [1 channel]  simulation only          [out 1]
    PerGroup(n)    [token ⌈channel / n⌉]                  [out ⌈channel / n⌉]

Per-channel means the *out* channel for a weight and the *input* channel for an activation (Table 3.1, where it serves
as a yardstick only: a step that varies along the inner dimension cannot be pulled out of an integer product). Because
the word means two things, whoever hands a bare tensor and `PerChannel()` says which it is: `of="weight"` or
`of="activation"`. The last group of `PerGroup` is smaller where the channels do not divide; nothing is padded.
"""

import dataclasses
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sqviz.errors import SqvizError

Kind = Literal["activation", "weight"]


class Granularity:
    """Base of `PerTensor`, `PerToken`, `PerChannel` and `PerGroup`: which elements share a step size."""

    def step_shape(self, shape: tuple[int, ...], of: Kind | None = None) -> tuple[int, ...]:
        """The shape of the steps of a tensor of this shape. Raises `SqvizError` where the granularity cannot apply."""
        dims = self._shared(len(shape), of)
        return tuple(1 if dim in dims else size for dim, size in enumerate(shape))

    def extrema(
        self, x: Float[Tensor, "*rows channel"], of: Kind | None = None
    ) -> tuple[Float[Tensor, "*step"], Float[Tensor, "*step"]]:
        """The smallest and the largest value of each slice that shares a step, shaped as `step_shape`; 0 if empty."""
        shape = self.step_shape(tuple(x.shape), of)
        if x.numel() == 0:
            return x.new_zeros(shape), x.new_zeros(shape)
        return self._extrema(x, of)

    def spread(self, step: Float[Tensor, "*step"], channels: int) -> Float[Tensor, "*rows channel_or_1"]:
        """The steps in a shape that broadcasts against a tensor with this many channels."""
        return step

    def _extrema(self, x: Tensor, of: Kind | None) -> tuple[Tensor, Tensor]:
        dims = self._shared(x.ndim, of)
        return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)

    def _shared(self, ndim: int, of: Kind | None) -> tuple[int, ...]:
        """The dimensions along which a step is shared."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class PerTensor(Granularity):
    """One step for the whole matrix: [… channel] → [… 1 1]."""

    def _shared(self, ndim: int, of: Kind | None) -> tuple[int, ...]:
        return tuple(range(ndim))


@dataclasses.dataclass(frozen=True)
class PerToken(Granularity):
    """One step per token (row) of an activation: [… token channel] → [… token 1]."""

    def _shared(self, ndim: int, of: Kind | None) -> tuple[int, ...]:
        if of == "weight":
            raise SqvizError(
                "PerToken() is for activations: a weight has no tokens. "
                "For one step per row of a weight use PerChannel()."
            )
        return (ndim - 1,)


@dataclasses.dataclass(frozen=True)
class PerChannel(Granularity):
    """One step per out channel of a weight, [out channel] → [out 1]; per input channel of an activation, → [1 channel].

    The second exists for simulation only (thesis Table 3.1).
    """

    def _shared(self, ndim: int, of: Kind | None) -> tuple[int, ...]:
        if of is None:
            raise SqvizError(
                "PerChannel() means one step per out channel of a weight and one per input channel of an activation: "
                "say which tensor this is with of='weight' or of='activation'."
            )
        return (ndim - 1,) if of == "weight" else tuple(range(ndim - 1))


@dataclasses.dataclass(frozen=True)
class PerGroup(Granularity):
    """One step per row and group of `size` input channels: [… channel] → [… ⌈channel / size⌉] (ZeroQuant's group-wise).

    Attributes:
        size: channels that share a step; the last group is smaller where the channels do not divide.
    """

    size: int

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise SqvizError(f"PerGroup(size={self.size!r}): size is a number of channels, at least 1.")

    def step_shape(self, shape: tuple[int, ...], of: Kind | None = None) -> tuple[int, ...]:
        """[… channel] → [… ⌈channel / size⌉]."""
        return (*shape[:-1], -(-shape[-1] // self.size))

    def spread(self, step: Float[Tensor, "*rows group"], channels: int) -> Float[Tensor, "*rows channel"]:
        """[… group] → [… channel]: every channel gets the step of its group."""
        return step.repeat_interleave(self.size, dim=-1)[..., :channels]

    def _extrema(self, x: Tensor, of: Kind | None) -> tuple[Tensor, Tensor]:
        whole = x.shape[-1] // self.size * self.size
        parts = []
        if whole:
            parts.append(x[..., :whole].unflatten(-1, (-1, self.size)))  # [… group size]
        if whole < x.shape[-1]:
            parts.append(x[..., None, whole:])  # [… 1 rest]
        return torch.cat([part.amin(-1) for part in parts], -1), torch.cat([part.amax(-1) for part in parts], -1)

"""How a layer of a `SinkCache` keeps its keys, and its values: as the model gave them, or as INT8.

A `Store` is one buffer [batch head index dim] with the operations that a stream needs. `Int8Store` keeps a code per
value and one step per token and head, a quarter of float32: what W8A8 models need beside INT8 weights once texts are
long. `CodeStore` is the same for a model with INT8 attention, which multiplies the codes as they lie.
"""

import torch
from jaxtyping import Float, Int, Int8
from sqviz_kernels.backend import Backend
from torch import Tensor

from sqviz.quant.granularity import PerToken
from sqviz.quant.int8_attention import codes_of, steps_of, with_steps
from sqviz.quant.quantize import quantize_tensor

Rows = Int[Tensor, " row"]


class Store:
    """Keys or values, as they are."""

    def __init__(self, like: Float[Tensor, "batch head _ dim"], length: int) -> None:
        """An empty buffer of `length` slots for tensors such as `like`."""
        self.values = zeros(like, length)

    @property
    def length(self) -> int:
        """Slots."""
        return self.values.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read."""
        return self.values.dtype

    @property
    def tensors(self) -> list[Tensor]:
        """What lies in memory."""
        return [self.values]

    def write(self, start: int, states: Float[Tensor, "batch head token dim"]) -> None:
        """Fill the slots from `start` on."""
        self.values[:, :, start : start + states.shape[2]] = states

    def read(self, start: int, stop: int) -> Float[Tensor, "batch head slot dim"]:
        """The slots from `start` up to `stop`; the caller may write to them, and nowhere else."""
        return self.values[:, :, start:stop]

    def attended(self, start: int, stop: int) -> Tensor:
        """The slots from `start` up to `stop` as the model's attention wants them, [batch head slot dim]."""
        return self.read(start, stop)

    def put(self, sinks: Float[Tensor, "batch head sink dim"], found: Tensor) -> None:
        """Write sinks into the first slots of what `attended` gave."""
        found[:, :, : sinks.shape[2]] = sinks

    def join(self, sinks: Float[Tensor, "batch head sink dim"], found: Tensor) -> Tensor:
        """Sinks, and after them what `attended` gave."""
        return torch.cat([sinks.to(self.dtype), found], 2)

    def copy(self, start: int, other: "Store", first: int, stop: int) -> None:
        """Fill the slots from `start` on with those from `first` up to `stop` of another store of the same kind."""
        for mine, its in zip(self.tensors, other.tensors, strict=True):
            mine[:, :, start : start + stop - first] = its[:, :, first:stop]

    def pick(self, rows: Rows, slots: Rows) -> Float[Tensor, "row head dim"]:
        """One slot of each of some rows."""
        return self.values[rows, :, slots]

    def empty(self, length: int) -> "Store":
        """A new one of another length, of the same kind."""
        return Store(self.values, length)

    def reorder(self, rows: Rows) -> None:
        """Take the rows in another order."""
        self.values = self.values.index_select(0, rows.to(self.values.device))

    def load(self, tensors: list[Tensor]) -> None:
        """Take over what `tensors` of another one of the same kind gave."""
        (self.values,) = tensors


class Int8Store(Store):
    """Keys or values as INT8, symmetric, one step per token and head; `read` gives them in the model's dtype."""

    def __init__(self, like: Float[Tensor, "batch head _ dim"], length: int, dtype: torch.dtype | None = None) -> None:
        """An empty buffer; `dtype` of what is read, that of `like` by default."""
        self._dtype = like.dtype if dtype is None else dtype
        wide = torch.float64 if self._dtype == torch.float64 else torch.float32
        self.codes = zeros(like, length, torch.int8)
        self.steps = zeros(like[..., :1], length, wide)

    @property
    def length(self) -> int:
        """Slots."""
        return self.codes.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Of what is read."""
        return self._dtype

    @property
    def tensors(self) -> list[Tensor]:
        """What lies in memory."""
        return [self.codes, self.steps]

    def write(self, start: int, states: Float[Tensor, "batch head token dim"]) -> None:
        """Fill the slots from `start` on. Raises `NonFinite` for NaN or infinities."""
        found = quantize_tensor(states, PerToken(), name="a key or value")
        here = slice(start, start + states.shape[2])
        self.codes[:, :, here], self.steps[:, :, here] = found.values, found.step

    def read(self, start: int, stop: int) -> Float[Tensor, "batch head slot dim"]:
        """The slots from `start` up to `stop`, a copy."""
        return (self.codes[:, :, start:stop] * self.steps[:, :, start:stop]).to(self._dtype)

    def pick(self, rows: Rows, slots: Rows) -> Float[Tensor, "row head dim"]:
        """One slot of each of some rows."""
        return self.codes[rows, :, slots] * self.steps[rows, :, slots]

    def empty(self, length: int) -> "Int8Store":
        """A new one of another length."""
        return Int8Store(self.codes, length, self._dtype)

    def reorder(self, rows: Rows) -> None:
        """Take the rows in another order."""
        rows = rows.to(self.codes.device)
        self.codes, self.steps = self.codes.index_select(0, rows), self.steps.index_select(0, rows)

    def load(self, tensors: list[Tensor]) -> None:
        """Take over what `tensors` of another one of the same kind gave."""
        self.codes, self.steps = tensors


class CodeStore(Int8Store):
    """An `Int8Store` whose codes the model's attention takes; placed sinks are quantised anew, they are few."""

    def __init__(
        self,
        like: Float[Tensor, "batch head _ dim"],
        length: int,
        dtype: torch.dtype | None = None,
        backend: Backend | None = None,
    ) -> None:
        """An empty buffer; the backend quantises, as its own attention would."""
        super().__init__(like, length, dtype)
        self._backend = backend

    def write(self, start: int, states: Float[Tensor, "batch head token dim"]) -> None:
        """Fill the slots from `start` on. Raises `NonFinite` for NaN or infinities."""
        codes, steps = codes_of(states, self._backend)
        here = slice(start, start + states.shape[2])
        self.codes[:, :, here], self.steps[:, :, here, 0] = codes, steps

    def attended(self, start: int, stop: int) -> Int8[Tensor, "batch head slot dim"]:
        """The codes themselves, with their steps."""
        return with_steps(self.codes[:, :, start:stop], self.steps[:, :, start:stop, 0])

    def put(self, sinks: Float[Tensor, "batch head sink dim"], found: Tensor) -> None:
        """Write the codes of sinks into the first slots of what `attended` gave."""
        codes, steps = codes_of(sinks, self._backend)
        found[:, :, : sinks.shape[2]] = codes
        steps_of(found)[:, :, : sinks.shape[2]] = steps

    def join(self, sinks: Float[Tensor, "batch head sink dim"], found: Tensor) -> Int8[Tensor, "batch head slot dim"]:
        """Codes of sinks, and after them what `attended` gave."""
        codes, steps = codes_of(sinks, self._backend)
        return with_steps(torch.cat([codes, found], 2), torch.cat([steps.to(self.steps.dtype), steps_of(found)], 2))

    def empty(self, length: int) -> "CodeStore":
        """A new one of another length."""
        return CodeStore(self.codes, length, self._dtype, self._backend)


def zeros(like: Float[Tensor, "batch head _ dim"], length: int, dtype: torch.dtype | None = None) -> Tensor:
    """[batch head length dim], to be written to inside of inference mode and outside of it."""
    dtype = like.dtype if dtype is None else dtype
    with torch.inference_mode(False):
        return torch.zeros(*like.shape[:2], length, like.shape[3], dtype=dtype, device=like.device)

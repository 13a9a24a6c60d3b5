"""What the Triton backend would launch, written down without a device: for `aot`, which compiles it.

The operations are called on a `Recorder` with tensors that have shapes and no contents (torch's "meta" device). What
Triton would specialise on is read off the arguments, as its launcher does: pointers aligned to 16 bytes, integers
divisible by 16, integers that are 1.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sqviz_kernels.backend import Codes, Packed
from sqviz_kernels.tiles import Tile
from sqviz_kernels.triton_launch import Triton

META = torch.device("meta")
_POINTERS = {
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


@dataclasses.dataclass
class Launch:
    """One kernel as it would be launched: what Triton compiles."""

    operation: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]
    warps: int
    stages: int

    @property
    def tile(self) -> Tile | None:
        """The tile of a product, None for a kernel of rows."""
        if "BM" not in self.constants:
            return None
        m, n, k = (self.constants[name] for name in ("BM", "BN", "BK"))
        return Tile(m, n, k, self.warps, self.stages)

    @property
    def identity(self) -> str:
        """Equal for launches that compile to the same code."""
        constants = {name: getattr(value, "value", value) for name, value in self.constants.items()}
        return repr((self.kernel.__name__, self.signature, constants, self.aligned, self.warps, self.stages))


class Recorder(Triton):
    """The Triton backend of a family of GPUs that writes down what it would launch, with every tile of the table.

    It takes tensors on torch's "meta" device.
    """

    def __init__(self, family: str, tiles: tuple[Tile, ...] = (), every: bool = True) -> None:
        super().__init__(tune=False, tiles=tiles)
        self._name, self._every, self.operation = family, every, ""
        self.launches: dict[str, Launch] = {}

    def flag(self, device: torch.device) -> Tensor:
        """A flag without contents."""
        return torch.empty(1, dtype=torch.int32, device=META)

    def family(self, device: torch.device) -> str:
        """The family given."""
        return self._name

    def tuned(self, device: Any, shape: Any, table: tuple[Tile, ...], launch: Callable[[Tile], None]) -> None:
        """Launch with every tile."""
        table = self._tiles or table
        for tile in table if self._every else table[:1]:
            launch(tile)

    def launch(
        self, kernel: Any, grid: Any, args: dict[str, Any], constants: dict[str, Any], warps: int = 4, stages: int = 2
    ) -> None:
        """Write it down."""
        signature, constants, aligned = {}, dict(constants), []
        for parameter in kernel.params:
            name = parameter.name
            if name in constants:
                signature[name] = "constexpr"
                continue
            value = args[name]
            if isinstance(value, Tensor):
                signature[name] = _POINTERS[value.dtype]
                aligned.append(name)  # torch aligns what it allocates
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1 and not parameter.do_not_specialize:
                signature[name], constants[name] = "constexpr", 1
            else:
                signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    aligned.append(name)
        found = Launch(self.operation, kernel, signature, constants, aligned, warps, stages)
        self.launches.setdefault(found.identity, found)


# --- the operations, in shapes of real models ---


def _codes(rows: int, channels: int, one: bool = False) -> Codes:
    return Codes(_empty(torch.int8, rows, channels), _empty(torch.float32, 1 if one else rows), rows, channels)


def _weight(out: int, channels: int, bias: bool = False) -> Packed:
    step = _empty(torch.float32, out)
    return Packed(_empty(torch.int8, out, channels), step, step if bias else None, out, channels)


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _attention(backend: Triton, queries: int, keys: int, heads: int, kv_heads: int, dim: int) -> None:
    q = _empty(torch.float16, 1, heads, queries, dim)
    k, step = _empty(torch.int8, 1, kv_heads, keys, dim), _empty(torch.float32, 1, kv_heads, keys)
    backend.attention(q, k, step, k, step, dim**-0.5, causal_from=keys - queries)


HALF, FLOAT = torch.float16, torch.float32
OPERATIONS: dict[str, Callable[[Triton], Any]] = {
    "quantise": lambda b: b.quantise(_empty(HALF, 512, 4096)),
    "quantise, static": lambda b: b.quantise(_empty(HALF, 512, 4096), _empty(FLOAT, 1)),
    "quantise, divided": lambda b: b.quantise(_empty(HALF, 512, 4096), divisor=_empty(FLOAT, 4096)),
    "rms norm": lambda b: b.norm_quantise(_empty(HALF, 512, 576), _empty(HALF, 576), None, 1e-5, "rms"),
    "layer norm": lambda b: b.norm_quantise(
        _empty(HALF, 512, 4096), _empty(HALF, 4096), _empty(HALF, 4096), 1e-5, "layer", out=_empty(HALF, 512, 4096)
    ),
    "linear": lambda b: b.linear(_codes(512, 4096), _weight(16384, 4096, bias=True), HALF),
    "linear, static": lambda b: b.linear(_codes(512, 576, one=True), _weight(1536, 576), torch.bfloat16),
    "linear, decode": lambda b: b.linear(_codes(8, 4096), _weight(11008, 4096), HALF),
    "linear, odd out": lambda b: b.linear(_codes(512, 4096), _weight(50257, 4096), HALF),
    "linear to codes": lambda b: b.linear_requantise(_codes(512, 4096), _weight(4096, 4096), _empty(FLOAT, 1)),
    "linear to sums": lambda b: b.product(_codes(512, 4096), _weight(4096, 4096)),
    "gated": lambda b: b.gated(_codes(512, 576), _weight(3072, 576)),
    "attention": lambda b: _attention(b, 512, 512, 9, 3, 64),
    "attention, decode": lambda b: _attention(b, 1, 1023, 32, 8, 128),
    "cache read": lambda b: b.read_cache(_empty(torch.int8, 1, 3, 512, 64), _empty(FLOAT, 1, 3, 512), HALF),
    "sweep": lambda b: b.sweep(
        _empty(HALF, 512, 576), _empty(HALF, 1536, 576), _empty(FLOAT, 512, 1536), _empty(FLOAT, 1, 576), None, None
    ),
}


def record(
    family: str, operations: Iterable[str] = (), tiles: tuple[Tile, ...] = (), every: bool = True
) -> list[Launch]:
    """What these operations (all, if none are named) launch on a family of GPUs, each kernel once."""
    recorder = Recorder(family, tiles, every)
    for name in operations or OPERATIONS:
        recorder.operation = name
        OPERATIONS[name](recorder)
    return list(recorder.launches.values())

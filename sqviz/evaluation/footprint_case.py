"""What `footprint` counts: a model by its configuration (`Measured`), and the work that it is counted for (`Case`)."""

import dataclasses
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from sqviz.errors import SqvizError
from sqviz.evaluation.activation_bytes import activation_bytes
from sqviz.evaluation.kv_bytes import Heads, cache_bytes, cached, heads_of
from sqviz.evaluation.published import PUBLISHED, published
from sqviz.evaluation.weight_bytes import WeightBytes, Weights, weights_of
from sqviz.models.explain import explained
from sqviz.models.lm import LM
from sqviz.models.load import DTYPES, HUB_ID
from sqviz.quant.schemes import Scheme

KV_BITS = (2, 3, 4, 5, 6, 7, 8, 16)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is read, on how many devices, and how.

    Attributes:
        batch, length: sequences, and tokens in each.
        devices: over how many tensor parallelism splits the model.
        dtype: of weights that are not quantised, of activations, and of the cache unless `kv_bits` says otherwise.
        kv_bits: bits of cached keys and values: 2 to 8, with a float32 step per token and head, or 16; None: `dtype`.
        latents: MLA caches its latents, as transformers 5.23 does; False: keys and values of every head.
        head: lm_head is INT8 too, and a tied embedding reads its rows (`sqviz.quantize(…, head=True)`).
        probabilities: attention is not fused: it makes its scores and probabilities.
        all_logits: the logits of all tokens are made, not those of the last.

    Raises `SqvizError` naming the field, its value and what is allowed.
    """

    batch: int = 1
    length: int = 2048
    devices: int = 1
    dtype: str | torch.dtype = "float16"
    kv_bits: int | None = None
    latents: bool = True
    head: bool = False
    probabilities: bool = False
    all_logits: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "length", "devices"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SqvizError(f"{name}={value!r}: a whole number from 1 is allowed")
        if self.dtype_name not in DTYPES:
            raise SqvizError(f"dtype={self.dtype!r} is not one of {', '.join(map(repr, DTYPES))}")
        if self.kv_bits is not None and (isinstance(self.kv_bits, bool) or self.kv_bits not in KV_BITS):
            raise SqvizError(f"kv_bits={self.kv_bits!r}: 2 to 8, 16, or None for those of dtype")

    @property
    def dtype_name(self) -> str:
        """The dtype as "float16"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return int(getattr(torch, self.dtype_name).itemsize)

    @property
    def bits_of_cache(self) -> int:
        """`kv_bits`, or those of the dtype."""
        return self.kv_bits or 8 * self.itemsize


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model by its configuration.

    Attributes:
        name: what it is called.
        config: the transformers configuration of the text model.
        weights: its parameters, counted.
        heads: of its attention.
        differs: what the configuration has otherwise than the model; "" if nothing.
    """

    name: str
    config: Any
    weights: Weights
    heads: Heads
    differs: str = ""

    def bytes(self, scheme: Scheme | None, case: Case) -> tuple[WeightBytes, int, int]:
        """Bytes on the fullest device: of weights, of keys and values, of activations. Raises `SqvizError`."""
        self._check(case)
        share = Fraction(self.heads.held(case.devices), self.heads.keys)
        weights = self.weights.bytes(scheme, case.itemsize, case.devices, share, head=case.head)
        layers = cached(self.config, latents=case.latents)
        cache = cache_bytes(layers, self.heads, case.batch, case.length, case.bits_of_cache, case.devices)
        activations = activation_bytes(
            self.weights,
            self.config,
            self.heads,
            case.batch,
            case.length,
            case.itemsize,
            case.devices,
            probabilities=case.probabilities,
            all_logits=case.all_logits,
        )
        return weights, cache, activations

    def notes(self, case: Case) -> tuple[str, ...]:
        """What to know about these numbers."""
        found = [f"{self.name} is counted in {self.differs}."] if self.differs else []
        if not self.weights.known:
            found.append(f"{self.name} has no row in ARCHS: its linears were told by their type.")
        if self._positions and case.length > self._positions:
            found.append(f"{case.length} tokens are more than the {self._positions} positions that {self.name} knows.")
        return tuple(found)

    @property
    def _positions(self) -> int | None:
        names = ("max_position_embeddings", "max_seq_len")
        return next((getattr(self.config, name) for name in names if getattr(self.config, name, None)), None)

    def _check(self, case: Case) -> None:
        if case.devices not in self.heads.fitting():
            raise SqvizError(
                f"devices={case.devices}: {self.name} has {self.heads.queries} heads, which tensor parallelism splits "
                f"evenly; allowed are {', '.join(map(str, self.heads.fitting()))}"
            )
        if self.weights.learned_positions and self._positions and case.length > self._positions:
            raise SqvizError(
                f"length={case.length}: {self.name} learned a vector for each of {self._positions} positions and has "
                "none for more. Give a shorter length, and a larger batch for more tokens"
            )


def resolve(source: Any) -> Measured:
    """The model that a configuration, an `LM`, a folder, a hub id or a published name means; built on the meta device.

    Raises:
        SqvizError: none of these; near names are listed.
        UnknownArchitecture, DownloadError: see `sqviz.footprint`.
    """
    name, config, differs = _found(source)
    config = config.get_text_config()
    return Measured(name, config, weights_of(config), heads_of(config), differs)


def _found(source: Any) -> tuple[str, Any, str]:
    if isinstance(source, LM):
        return source.name, source.config, ""
    if isinstance(source, str) and source.strip().lower().replace(" ", "-") in PUBLISHED:
        row = published(source)
        return row.title, row.config(), row.differs
    if isinstance(source, str | os.PathLike):
        return Path(source).name, _read(source), ""
    if isinstance(source, torch.nn.Module) or not hasattr(source, "get_text_config"):
        raise SqvizError(
            "footprint takes a transformers configuration, an LM, a folder, a hub id or the name of a published model, "
            f"not a {type(source).__name__}. A transformers model has its configuration in model.config"
        )
    return getattr(source, "_name_or_path", "") or type(source).__name__, source, ""


def _read(source: str | os.PathLike[str]) -> Any:
    """The configuration in a folder or of a hub id. No weight is read, and no code that comes with a model is run."""
    from transformers import AutoConfig

    path = Path(source).expanduser()
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        raise SqvizError(
            f"{str(source)!r} is no folder with a config.json. For a single file: sqviz.footprint(sqviz.load(FILE))"
        )
    if not path.is_dir() and (not isinstance(source, str) or "/" not in source or not HUB_ID.fullmatch(source)):
        published(str(source))  # raises, with near names
    with explained(str(source)):
        return AutoConfig.from_pretrained(str(source), trust_remote_code=False)

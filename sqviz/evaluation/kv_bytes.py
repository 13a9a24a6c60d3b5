"""What keys and values take, from a configuration alone.

Per token and layer, in elements, with heads H, key/value heads G and head size d:

    MHA, GQA, MQA    2 · G · d                              (G = H, fewer, 1)
    MLA              kv_lora_rank + qk_rope_head_dim        latents, shared by all heads (DeepSeek-V2, arXiv:2405.04434)
    MLA in full      H · (qk_nope_head_dim + qk_rope_head_dim + v_head_dim)

A layer with a sliding window of w holds min(length, w) tokens. transformers 5.23 caches MLA's latents, holds w − 1
tokens between two steps, and repeats the keys of Falcon's newer decoder for every query head, which is not counted
here. Cached as INT8 (`sqviz.Int8Cache`) each token has one float32 step per head, for keys and for values.

Tensor parallelism splits the query heads evenly, in order; a device holds the key/value heads that its own query heads
read, so that with fewer of them than devices several devices hold the same head. Latents lie on every device.
"""

import dataclasses
from typing import Any

from sqviz.errors import SqvizError

STEP_BYTES = 4
"""A step is a float32."""

_WINDOWED = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}


@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads of an attention.

    Attributes:
        queries: heads of queries.
        keys: heads of keys and values; a divisor of `queries`.
        key_dim, value_dim: size of a head's key and value.
    """

    queries: int
    keys: int
    key_dim: int
    value_dim: int

    def held(self, devices: int) -> int:
        """Key/value heads on the device that holds most of them."""
        each, group = self.queries // devices, self.queries // self.keys
        firsts = range(0, self.queries, each)
        return max((first + each - 1) // group - first // group + 1 for first in firsts)

    def fitting(self) -> list[int]:
        """Numbers of devices over which the query heads can be split."""
        return [count for count in range(1, self.queries + 1) if self.queries % count == 0]


@dataclasses.dataclass(frozen=True)
class Cached:
    """What one layer keeps of each token.

    Attributes:
        rows: (heads, elements of each) of keys and of values, or of MLA's two latents.
        window: tokens that it keeps, or None for all.
        latent: the same on every device.
    """

    rows: tuple[tuple[int, int], tuple[int, int]]
    window: int | None = None
    latent: bool = False

    def bytes(self, batch: int, length: int, bits: int, held: int) -> int:
        """Bytes on a device that holds this many key/value heads; below 16 bits with a step per token and head."""
        tokens = batch * min(length, self.window or length)
        steps = STEP_BYTES if bits < 16 else 0
        return sum(
            tokens * (heads if self.latent else held) * (-(-dim * bits // 8) + steps) for heads, dim in self.rows
        )


def heads_of(config: Any) -> Heads:
    """The heads of a transformers configuration, whichever words it has for them.

    Raises:
        SqvizError: it does not say, or differs from layer to layer.
    """
    queries = _number(config, "num_attention_heads")
    if getattr(config, "kv_lora_rank", None):
        nope, rope = _number(config, "qk_nope_head_dim"), _number(config, "qk_rope_head_dim")
        return Heads(queries, queries, nope + rope, _number(config, "v_head_dim"))
    dim = getattr(config, "head_dim", None) or _number(config, "hidden_size") // queries
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        return Heads(queries, 1, dim, dim)
    name = next((name for name in ("num_key_value_heads", "num_kv_heads") if getattr(config, name, None)), None)
    return Heads(queries, _number(config, name) if name else queries, dim, dim)


def cached(config: Any, *, latents: bool = True) -> tuple[Cached, ...]:
    """What each layer keeps of a token. `latents=False`: MLA's keys and values of every head instead of its latents.

    Raises:
        SqvizError: layers that keep something else than keys and values, such as a recurrent state.
    """
    layers = _number(config, "num_hidden_layers")
    if getattr(config, "num_kv_shared_layers", None):
        raise SqvizError(
            f"{config.model_type!r} shares keys and values between layers (num_kv_shared_layers="
            f"{config.num_kv_shared_layers}): its cache cannot be told from its heads"
        )
    heads = heads_of(config)
    rows = ((heads.keys, heads.key_dim), (heads.keys, heads.value_dim))
    rank = getattr(config, "kv_lora_rank", None)
    if rank and latents:
        rows = ((1, rank), (1, config.qk_rope_head_dim))
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * layers
    return tuple(Cached(rows, _window(config, kind), bool(rank and latents)) for kind in kinds)


def cache_bytes(layers: tuple[Cached, ...], heads: Heads, batch: int, length: int, bits: int, devices: int = 1) -> int:
    """Bytes of all layers' keys and values, `batch` sequences of `length` tokens, on the fullest device."""
    held = heads.held(devices)
    return sum(layer.bytes(batch, length, bits, held) for layer in layers)


def _window(config: Any, kind: str) -> int | None:
    if kind == "full_attention":
        return None
    if kind in _WINDOWED:
        return _number(config, _WINDOWED[kind])
    raise SqvizError(
        f"a layer of type {kind!r} in {config.model_type!r}: only attention that keeps keys and values can be counted, "
        f"which is 'full_attention', {', '.join(map(repr, _WINDOWED))}"
    )


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SqvizError(
            f"the configuration {type(config).__name__} has {name}={value!r}; one whole number from 1 is needed, the "
            "same for all layers, to tell what its cache takes"
        )
    return value

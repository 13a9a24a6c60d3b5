"""`Int8Cache`: keys and values of a text as INT8, one step per token and head, for any transformers model.

A quarter of float32's memory, half of bfloat16's. A model with INT8 attention reads the codes as they lie; any other
gets floats made from them. Grows by doubling, so a step copies two tokens and not the whole cache. For endless texts
there is `SinkCache(lm, policy, int8=True)`.
"""

from typing import Any

import torch
from jaxtyping import Float, Int, Int8
from sqviz_kernels import spec
from sqviz_kernels.backend import opaque
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from sqviz.models.lm import LM
from sqviz.quant.int8_attention import backend_of, codes_of, uses_codes, with_steps

FIRST = 256
"""Tokens for which there is room at first."""


class Int8Cache(Cache):
    """Keys and values as INT8; given as `past_key_values` to `model(…)` or `model.generate(…)`."""

    def __init__(self, lm: LM) -> None:
        """An empty cache for this model."""
        super().__init__(layers=[Int8Layer(lm) for _ in range(lm.config.num_hidden_layers)])

    @property
    def bytes(self) -> int:
        """Memory of the buffers, in bytes."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.buffers)


class Int8Layer(CacheLayerMixin):
    """One layer: codes [batch head slot dim] and steps [batch head slot], of keys and of values."""

    is_sliding = False
    is_croppable = True

    def __init__(self, lm: LM) -> None:
        super().__init__()
        self._codes, self._backend = uses_codes(lm), backend_of(lm)
        self.length = 0
        self.buffers: list[Tensor] = []
        """Codes of the keys, their steps, codes of the values, their steps."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room."""
        self.dtype, self.device = key_states.dtype, key_states.device
        with torch.inference_mode(False):
            self.buffers = [
                torch.zeros(*x.shape[:2], FIRST, *tail, dtype=kind, device=x.device)
                for x in (key_states, value_states)
                for tail, kind in ((x.shape[3:], torch.int8), ((), torch.float32))
            ]
        self.is_initialized = True

    @opaque
    @torch.no_grad()
    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values; returns all of them, as codes with their steps or as floats.

        Raises `NonFinite` for NaN and infinities; nothing is written then.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        made = [*codes_of(key_states, self._backend), *codes_of(value_states, self._backend)]
        stop = self.length + key_states.shape[2]
        self._room(stop)
        for buffer, new in zip(self.buffers, made, strict=True):
            buffer.narrow(2, self.length, new.shape[2]).copy_(new)
        self.length = stop
        keys, key_steps, values, value_steps = (buffer.narrow(2, 0, stop) for buffer in self.buffers)
        return self._given(keys, key_steps), self._given(values, value_steps)

    def _given(self, codes: Int8[Tensor, "batch head slot dim"], steps: Float[Tensor, "batch head slot"]) -> Tensor:
        if not self._codes:
            read = spec.read_cache if self._backend is None else self._backend.read_cache
            return read(codes, steps, self.dtype)
        return with_steps(codes, steps)

    def _room(self, needed: int) -> None:
        length = self.buffers[0].shape[2]
        if needed <= length:
            return
        while length < needed:
            length *= 2
        with torch.inference_mode(False):
            for index, old in enumerate(self.buffers):
                new = old.new_zeros(*old.shape[:2], length, *old.shape[3:])
                new[:, :, : self.length] = old[:, :, : self.length]
                self.buffers[index] = new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys attended to, 0)."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; the number is given negative, as transformers does."""
        self.length = max(0, self.length - abs(tokens_to_remove))

    def reset(self) -> None:
        """Forget everything."""
        self.buffers, self.length, self.is_initialized = [], 0, False

    def _take(self, rows: Int[Tensor, " row"]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.buffers = [buffer.index_select(0, rows.to(buffer.device)) for buffer in self.buffers]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows in another order (beam search)."""
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        if self.buffers:
            self._take(torch.arange(self.buffers[0].shape[0]).repeat_interleave(repeats))

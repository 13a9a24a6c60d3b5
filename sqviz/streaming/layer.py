"""One layer of a `SinkCache`: where keys and values are written, turned and read."""

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from sqviz_kernels.backend import opaque
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sqviz.errors import SqvizError
from sqviz.quant.int8_attention import backend_of, uses_codes
from sqviz.streaming.policies import capacity
from sqviz.streaming.positions import Rotary, angles, turn
from sqviz.streaming.storage import CodeStore, Int8Store, Store, zeros

if TYPE_CHECKING:
    from sqviz.streaming.cache import SinkCache


class SinkLayer(CacheLayerMixin):
    """Keys and values in a store each (storage.py), and the sinks apart, as floats turned back to position 0.

    Both pairs are lists of two, keys and values, because MLA turns the second: it caches (latent, turned key).
    """

    is_sliding = False

    def __init__(self, cache: "SinkCache", omega: Float[Tensor, " pair"] | None) -> None:
        super().__init__()
        self._cache = weakref.ref(cache)
        self.omega = omega
        rotary = cache.scheme if isinstance(cache.scheme, Rotary) else Rotary()
        self._turned = ("keys", "values").index(rotary.tensor) if omega is not None else None
        self._pairs = rotary.pairs
        self.stores: list[Store] = []
        self.sinks: list[Float[Tensor, "batch head sink dim"]] = []
        self.base = 0
        self._passes = 0

    @property
    def cache(self) -> "SinkCache":
        """The cache that this layer belongs to."""
        cache = self._cache()
        assert cache is not None
        return cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the stores, as long as the cache says."""
        self.dtype, self.device = key_states.dtype, key_states.device
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        pair = key_states, value_states
        self.stores = [self.store_for(x) for x in pair]
        self.sinks = [zeros(x, self.cache.slots, wide) for x in pair]
        self.base = self.cache.state.base
        self.is_initialized = True

    @opaque
    @torch.no_grad()
    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the new keys and values; returns those that the queries of this pass attend to."""
        now = self.cache.now
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states)
        if self._passes == self.cache.passes:  # a pass that was interrupted is not this one
            raise self.cache.stranger
        self._passes = self.cache.passes
        for store, states in zip(self.stores, (key_states, value_states), strict=True):
            store.write(now.start, states)
        if self.cache.arriving:
            self.remember(self.cache.arriving, (key_states, value_states))
        found = [store.attended(now.window - (0 if now.each else now.taken), now.end) for store in self.stores]
        for which, store in enumerate(self.stores):
            if now.each:
                found[which] = store.join(self._own(which), found[which])
            elif now.taken:
                store.put(self._placed(which), found[which])
        return found[0], found[1]

    def store_for(self, like: Float[Tensor, "batch head _ dim"]) -> Store:
        """An empty store, as long as the cache says, of the kind that the model's attention reads."""
        cache = self.cache
        if not cache.int8:
            return Store(like, cache.length)
        if not uses_codes(cache.lm):
            return Int8Store(like, cache.length)
        return CodeStore(like, cache.length, backend=backend_of(cache.lm))

    def _placed(self, which: int) -> Float[Tensor, "batch head sink dim"]:
        """The sinks where the queries of this pass want them."""
        sinks = self.sinks[which][:, :, : self.cache.now.taken]
        return turn(sinks, self.cache.angles_of(self.omega), self._pairs) if which == self._turned else sinks

    def _own(self, which: int) -> Float[Tensor, "batch head key dim"]:
        """Sinks for each query, turned to where it wants them; one query after the other."""
        sinks = self.sinks[which][:, :, None, : self.cache.now.taken]
        if which == self._turned:
            sinks = turn(sinks, self.cache.angles_of(self.omega), self._pairs)
        return sinks.expand(-1, -1, self.cache.now.new, -1, -1).flatten(2, 3)

    @torch.no_grad()
    def remember(self, columns: Mapping[int, Int[Tensor, " row"]], new: tuple[Tensor, Tensor] | None = None) -> None:
        """Keep the keys and values of new sinks: {sink: [row] column, −1 where it is none of these tokens}.

        One row stands for all rows of the batch. Taken from the `new` keys and values of this pass, or from what is
        stored.
        """
        for which, store in enumerate(self.stores):
            missing = max(columns) + 1 - self.sinks[which].shape[2]
            if missing > 0:
                more = zeros(self.sinks[which], missing)
                with torch.inference_mode(False):
                    self.sinks[which] = torch.cat([self.sinks[which], more], 2)
            for sink, column in columns.items():
                column = column.expand(len(self.sinks[which]))
                rows = torch.nonzero(column >= 0).flatten()
                index = column[rows] - self.base
                found = store.pick(rows, index) if new is None else new[which][rows, :, index - self.cache.now.start]
                found = found.to(self.sinks[which].dtype)  # [row head dim]
                if which == self._turned and self.omega is not None:
                    back = angles(-index[:, None].to(self.device), self.omega, self.dtype)  # [row 1 pair]
                    found = turn(found, back, self._pairs)
                self.sinks[which][rows, :, sink] = found

    @torch.no_grad()
    def move(self, first: int, stop: int, base: int, length: int) -> None:
        """Bring the columns first … stop − 1 to where `base` has them in stores of this length; keys turn as much.

        If this is cut short, nothing has changed.
        """
        if base == self.base and length == self.stores[0].length:
            return
        moved = []
        for which, store in enumerate(self.stores):
            new, here, end = store.empty(length), first - self.base, stop - self.base
            if which == self._turned and self.omega is not None and base != self.base:
                by = torch.full((1,), self.base - base, device=self.device)
                new.write(first - base, turn(store.read(here, end), angles(by, self.omega, self.dtype), self._pairs))
            else:
                new.copy(first - base, store, here, end)
            moved.append(new)
        self.stores, self.base = moved, base

    def _check(self, keys: Tensor) -> None:
        if keys.dtype != self.dtype or keys.device != self.device:
            raise SqvizError(
                f"this cache holds {self.dtype} keys on {self.device}, and the model now gives {keys.dtype} on "
                f"{keys.device}. Make a new SinkCache after moving or converting the model"
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of keys attended to, 0)."""
        return self.cache.attended + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens read so far, evicted ones included: generate() cuts the prompt by it."""
        return self.cache.state.seen

    def get_max_length(self) -> int:
        """Most keys held, −1 without a limit."""
        return capacity(self.cache.policy) or -1

    def reset(self) -> None:
        """Forget everything."""
        self.stores, self.sinks, self.is_initialized = [], [], False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows in another order (beam search)."""
        with torch.inference_mode(False), torch.no_grad():
            for store in self.stores:
                store.reorder(beam_idx)
            self.sinks = [sinks.index_select(0, beam_idx.to(sinks.device)) for sinks in self.sinks]

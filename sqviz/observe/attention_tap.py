"""Where a model's attention scores can be seen, without its help and without leaving anything behind.

Inside a `with Tap(lm, see)` block, the functions that attention is made of are watched (a `TorchFunctionMode`, nothing
is patched): for `scaled_dot_product_attention` the scores are computed once more from its queries and keys, a few
queries at a time; where a model multiplies them out itself, its softmax is given them. Both are what the model really
attends with: after rotary positions, scale, soft cap, ALiBi and masks. `output_attentions`, for comparison, needs
another attention implementation and hands out probabilities of all layers at once.
"""

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from sqviz.errors import SqvizError
from sqviz.models.lm import LM

LOT = 256
"""Queries whose scores are in memory at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one layer in one forward pass: query · key · scale, −∞ where a query may not look.

    Attributes:
        layer: index of the block.
        shape: batch, head, query, key.
    """

    layer: int
    shape: tuple[int, int, int, int]
    _part: Callable[[int, int], Float[Tensor, "batch head query key"]]

    def lots(self, size: int = LOT) -> Iterator[tuple[int, Float[Tensor, "batch head query key"]]]:
        """(first query, scores) of `size` queries at a time, in float32 (float64 in a float64 model)."""
        for first in range(0, self.shape[2], size):
            yield first, self._part(first, min(first + size, self.shape[2]))


class Tap(TorchFunctionMode):
    """Calls `see(scores)` for every block of every forward pass inside of the `with` block.

    Attributes:
        seen: indices of the blocks whose attention was seen in the latest pass.
    """

    def __init__(self, lm: LM, see: Callable[[Scores], None]) -> None:
        super().__init__()
        self._lm, self._see, self._layer = lm, see, -1
        self._lowest = torch.finfo(lm.dtype).min / 2
        self.seen: set[int] = set()
        self._thread = threading.get_ident()
        self._handles: list[Any] = []

    def __enter__(self) -> "Tap":
        blocks = self._lm.blocks
        for index, block in enumerate(blocks):
            self._handles += [
                block.register_forward_pre_hook(lambda *_, index=index: self._enter_block(index)),
                block.register_forward_hook(lambda *_: self._enter_block(-1), always_call=True),
            ]
        super().__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        while self._handles:
            self._handles.pop().remove()

    def check(self) -> None:
        """Raise `SqvizError` unless the attention of every block was seen."""
        count = self._lm.config.num_hidden_layers
        if missing := [str(index) for index in range(count) if index not in self.seen]:
            raise SqvizError(
                f"{self._lm.name} has no softmax attention to be seen in block {', '.join(missing)} of {count}. "
                "Attention maps need layers that compare queries with keys; load flash-attention models with "
                "attn_implementation='sdpa'"
            )

    def _enter_block(self, index: int) -> None:
        if threading.get_ident() != self._thread:
            return  # another thread uses the same model
        self._layer = index
        if index == 0:
            self.seen.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called for every torch function of the pass."""
        kwargs = kwargs or {}
        if self._layer >= 0 and self._layer not in self.seen:
            if func is scaled_dot_product_attention:
                self._attended(*args, **kwargs)
            elif getattr(func, "__name__", "") == "softmax" and args and args[0].ndim == 4:
                self._softened(args[0])
        return func(*args, **kwargs)

    def _attended(
        self,
        query: Float[Tensor, "batch head query dim"],
        key: Float[Tensor, "batch kv_head key dim"],
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        """The scores that this call is about to compute inside."""
        del value, dropout_p, enable_gqa
        queries, keys = query.shape[2], key.shape[2]
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).to(wide)
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        columns = torch.arange(keys, device=key.device)

        def part(first: int, stop: int) -> Tensor:
            scores = query[:, :, first:stop].to(wide) @ key.transpose(-1, -2) * factor
            if is_causal:
                rows = torch.arange(first, stop, device=key.device)
                scores = scores.masked_fill(columns[None] > rows[:, None], -torch.inf)
            if attn_mask is None:
                return scores
            mask = attn_mask[..., first:stop, :keys] if attn_mask.shape[-2] > 1 else attn_mask[..., :keys]
            if mask.dtype == torch.bool:
                return scores.masked_fill(~mask, -torch.inf)
            scores = scores + mask.to(wide)
            return scores.masked_fill(scores < self._lowest, -torch.inf)

        self._found((query.shape[0], query.shape[1], queries, keys), part)

    def _softened(self, scores: Float[Tensor, "batch head query key"]) -> None:
        """What the model gives to its own softmax."""
        wide = torch.float64 if scores.dtype == torch.float64 else torch.float32

        def part(first: int, stop: int) -> Tensor:
            some = scores[:, :, first:stop].to(wide)
            return some.masked_fill(some < self._lowest, -torch.inf)

        self._found(tuple(scores.shape), part)

    def _found(self, shape: tuple[int, ...], part: Callable[[int, int], Tensor]) -> None:
        batch, head, query, key = shape
        self.seen.add(self._layer)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            self._see(Scores(self._layer, (batch, head, query, key), part))

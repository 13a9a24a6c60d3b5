"""The output of one block by itself, of a model and of another made from it: what a search over its folds looks at."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sqviz.models.lm import LM
from sqviz.observe.hooks import body
from sqviz.quant.kept_sinks import begun_cache

CACHES = ("past_key_values", "layer_past")
"""What blocks call the cache that they are given."""


class Blocks:
    """What flows into every block of a model over some segments, kept so that blocks can be run one by one."""

    def __init__(self, lm: LM, segments: Int64[Tensor, "segment token"]) -> None:
        """Read the segments once. Keeps the residual stream in front of every block."""
        self.lm = lm
        self._given: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = [[] for _ in lm.blocks]
        self._made: tuple[int, list[Tensor]] = (-1, [])
        hooks = [
            block.register_forward_pre_hook(self._keep(index), with_kwargs=True)
            for index, block in enumerate(lm.blocks)
        ]
        try:
            with torch.no_grad():
                for segment in segments:
                    body(lm)(segment[None].to(lm.device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def error(self, other: LM, index: int) -> float:
        """mean_t ‖ŷ_t − y_t‖² / ‖y_t − x_t‖²: of what block `index` adds to the residual stream x, token by token.

        Args:
            other: a model with the same inputs of that block: smoothed, or quantised inside of it.
            index: of the block.
        """
        if self._made[0] != index:
            self._made = (index, self._run(self.lm, index))
        total, count = 0.0, 0
        for (arguments, named), y, new in zip(self._given[index], self._made[1], self._run(other, index), strict=True):
            x = arguments[0] if arguments else named["hidden_states"]
            size = (y - x).float().square().sum(-1)
            relative = (new - y).float().square().sum(-1) / torch.where(size == 0, 1.0, size)
            total += float(relative.sum())
            count += relative.numel()
        return total / count

    def _run(self, lm: LM, index: int) -> list[Float[Tensor, "batch token channel"]]:
        block = lm.blocks[index]
        made = []
        with torch.no_grad():
            for arguments, named in self._given[index]:
                batch = (arguments[0] if arguments else named["hidden_states"]).shape[0]
                caches = {key: begun_cache(lm, batch) for key in CACHES if key in named}
                out = block(*arguments, **{**named, **caches})
                made.append(out if isinstance(out, Tensor) else out[0])
        return made

    def _keep(self, index: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._given[index].append((arguments, {**named, **{key: None for key in CACHES if key in named}}))

        return hook

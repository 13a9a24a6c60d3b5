"""A text fed to a model under a policy, block by block: the logits at every token, as a stream would have had them."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import psutil
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sqviz.errors import TooLarge
from sqviz.models.lm import LM
from sqviz.models.logits import logits_of
from sqviz.streaming.policies import Dense, Policy, Recompute
from sqviz.streaming.shared_sinks import SharedSinks, applies

if TYPE_CHECKING:
    from sqviz.streaming.cache import SinkCache

BLOCK = 256
"""Tokens per forward pass."""


class Feed:
    """One text on its way through a model.

    Attributes:
        read: tokens that went through the model.
        cache: what is kept; None for `Recompute`.
    """

    def __init__(
        self,
        lm: LM,
        ids: Int64[Tensor, " token"],
        policy: Policy,
        block: int = BLOCK,
        cache: "SinkCache | None" = None,
        int8: bool = False,
    ) -> None:
        """Start at the first token.

        Args:
            lm: the model.
            ids: the text.
            policy: what is kept.
            block: tokens per pass; with `Recompute`, tokens of all windows of a pass together, one window at least.
            cache: a stream to go on with; a new one by default.
            int8: whether a new one keeps keys and values as INT8.
        """
        self.lm, self.ids, self.policy, self.block = lm, ids, policy, block
        from sqviz.streaming.cache import SinkCache  # a subclass of transformers' Cache: loads it

        self.read = 0
        self.cache = cache
        if cache is None and not isinstance(policy, Recompute):
            self.cache = SinkCache(lm, policy, int8=int8)
        self._last_only = logits_of(lm, 1)

    def passes(self) -> Iterator[tuple[int, Float[Tensor, "token vocabulary"]]]:
        """(tokens read before, logits at each token of the pass), until the text ends."""
        while self.read < len(self.ids):
            before = self.read
            with torch.no_grad():
                logits = self._windows(self.policy) if isinstance(self.policy, Recompute) else self._block()
            yield before, logits

    def _block(self) -> Tensor:
        part = self.ids[self.read : self.read + self.block]
        given = part[None].to(self.lm.device)
        with self._attention():
            logits = self.lm.model(input_ids=given, past_key_values=self.cache, use_cache=True).logits[0]
        if isinstance(self.policy, Dense) and self.read == 0 and self.cache is not None:
            _check_fits(self.cache, len(self.ids))
        self.read += len(part)
        return logits

    def _attention(self) -> AbstractContextManager[Any]:
        assert self.cache is not None
        return SharedSinks(self.cache) if self.block > 1 and applies(self.cache) else nullcontext()

    def _windows(self, policy: Recompute) -> Tensor:
        """First the tokens that see all before them, in one pass; then windows side by side."""
        if self.read == 0:
            part = self.ids[: policy.recent]
            logits = self.lm.model(input_ids=part[None].to(self.lm.device), use_cache=False).logits[0]
            self.read = len(part)
            return logits
        ends = range(self.read, min(self.read + max(1, self.block // policy.recent), len(self.ids)))
        windows = torch.stack([self.ids[end - policy.recent + 1 : end + 1] for end in ends]).to(self.lm.device)
        logits = self.lm.model(input_ids=windows, use_cache=False, **self._last_only).logits[:, -1]
        self.read = ends.stop
        return logits

    def close(self) -> None:
        """Take the cache's hooks off the model."""
        if self.cache is not None:
            self.cache.close()


def _check_fits(cache: "SinkCache", tokens: int) -> None:
    """Refuse a dense run that would not fit, before the machine is out of memory."""
    each = cache.bytes / cache.length
    needed = int(2.5 * each * tokens)  # the buffer grows by half, and both are there while it is copied
    device = cache.lm.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > 0.9 * free:
        raise TooLarge(
            f"Dense() keeps {each / 1e3:.0f} kB per token: {tokens} tokens need about {needed / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free. Score fewer tokens, or use sqviz.Sinks(4, 1020), whose memory does not grow"
        )

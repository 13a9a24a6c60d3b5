"""How a stream's tokens get into the model, one piece at a time, and what of them is kept: the picture of a cache."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz.models.lm import LM
from sqviz.models.logits import logits_of
from sqviz.streaming.policies import Policy, Recompute, capacity

if TYPE_CHECKING:
    from sqviz.streaming.cache import SinkCache


@dataclasses.dataclass(frozen=True)
class CacheView:
    """What a cache holds. Columns count the tokens of the stream from 0.

    Attributes:
        sinks: columns of the attention sinks, also while they are still in the window.
        first: oldest column of the window.
        last: latest column of it.
        keys: how many keys the latest token attended to: the window and the sinks that it has left behind.
        capacity: the most keys that are held; None without a limit.
        bytes: memory of keys and values; 0 if they are computed anew each time.
    """

    sinks: tuple[int, ...]
    first: int
    last: int
    keys: int
    capacity: int | None
    bytes: int


class Reader(abc.ABC):
    """Reads the tokens of a stream.

    Attributes:
        start: column of the stream's first token.
    """

    start: int = 0

    @property
    def cache(self) -> "SinkCache | None":
        """Where keys are kept."""
        return None

    @abc.abstractmethod
    def read(self, ids: Sequence[int], stopped: Callable[[], bool]) -> Float[Tensor, " vocabulary"] | None:
        """Read those of `ids` that were not read yet.

        Returns the logits after the last one; None if `stopped()` was true between two passes. A pass that raises
        changes nothing: it can be done again.
        """

    @abc.abstractmethod
    def view(self) -> CacheView:
        """What is kept now."""

    @abc.abstractmethod
    def change(self, policy: Policy) -> None:
        """Keep something else from the next pass on.

        Raises `SqvizError` where a policy with a cache would have to become one without, or the other way round.
        """


class CacheReader(Reader):
    """Reads each token once and keeps keys and values in a `SinkCache`."""

    def __init__(self, lm: LM, cache: "SinkCache", chunk: int) -> None:
        """Go on where the cache is; at most `chunk` tokens are read in one pass.

        Raises:
            SqvizError: the cache was made for another model, is closed, or holds a batch.
        """
        self.lm, self._cache, self.chunk = lm, cache, chunk
        self.start = cache.state.seen
        self._done = 0
        self._logits: Float[Tensor, " vocabulary"] | None = None
        if cache.lm.model is not lm.model:
            raise SqvizError(
                f"this cache was made for another model ({cache.lm!r}), not for {lm!r}. Make one with "
                "SinkCache(lm, policy)"
            )
        if cache.rows > 1:
            raise SqvizError(f"this cache holds {cache.rows} rows; a stream is one text. Make a new one, or reset() it")
        self._check()

    @property
    def cache(self) -> "SinkCache":
        """Where keys are kept."""
        return self._cache

    def read(self, ids: Sequence[int], stopped: Callable[[], bool]) -> Float[Tensor, " vocabulary"] | None:
        """See `Reader`."""
        self._check()
        begun = self._done
        while self._done < len(ids):
            if self._done > begun and stopped():
                return None
            self._pass(ids[self._done : self._done + self.chunk])
        return self._logits

    def view(self) -> CacheView:
        """See `Reader`."""
        state, cache = self.cache.state, self.cache
        sinks = tuple(column for column in state.sinks[0].tolist() if column < state.seen)
        return CacheView(sinks, state.held, state.seen - 1, cache.kept, capacity(cache.policy), cache.bytes)

    def change(self, policy: Policy) -> None:
        """See `Reader`."""
        if isinstance(policy, Recompute):
            raise SqvizError(f"{policy!r} keeps no cache, and this stream has one. Begin a new stream for it")
        self.cache.policy = policy

    def _pass(self, ids: Sequence[int]) -> None:
        cache, before = self.cache, dataclasses.replace(self.cache.state)
        try:
            logits = last_logits(self.lm, ids, cache)
            self._logits, self._done = logits, self._done + len(ids)
        except BaseException:
            # The cache has the tokens as soon as the blocks are through; the head may still fail, or be interrupted.
            cache.undo(before)
            raise

    def _check(self) -> None:
        if not self.cache.close.alive:
            raise SqvizError("the cache of this stream is closed. Begin a new stream")
        if self.cache.state.seen != self.start + self._done:
            raise SqvizError(
                f"the cache has read {self.cache.state.seen} tokens, this stream {self.start + self._done}: it was "
                "used for something else too. Give each stream a cache of its own"
            )


class WindowReader(Reader):
    """`Recompute`: runs the latest tokens through the model anew each time."""

    def __init__(self, lm: LM, policy: Recompute) -> None:
        """Raises `SqvizError` if the window is longer than the model was made for."""
        self.lm, self.policy = lm, policy
        self._seen = 0
        longest = getattr(lm.config, "max_position_embeddings", None)
        if isinstance(longest, int) and policy.recent > longest:
            raise SqvizError(f"{policy} is more than the {longest} positions that {lm.name} was made for")

    def read(self, ids: Sequence[int], stopped: Callable[[], bool]) -> Float[Tensor, " vocabulary"] | None:
        """See `Reader`."""
        logits = last_logits(self.lm, ids[-self.policy.recent :], None)
        self._seen = len(ids)
        return logits

    def view(self) -> CacheView:
        """See `Reader`."""
        first = max(0, self._seen - self.policy.recent)
        return CacheView((), first, self._seen - 1, self._seen - first, self.policy.recent, 0)

    def change(self, policy: Policy) -> None:
        """See `Reader`."""
        if not isinstance(policy, Recompute):
            raise SqvizError(f"this stream keeps no cache, and {policy!r} needs one. Begin a new stream for it")
        self.policy = policy


def reader(lm: LM, policy: Policy, cache: "SinkCache | None", chunk: int) -> Reader:
    """Whatever reads under this policy; `cache` is used if there is one.

    Raises:
        SqvizError: a cache for `Recompute`, a cache of another kind, or one that `CacheReader` refuses.
    """
    from sqviz.streaming.cache import SinkCache

    if isinstance(policy, Recompute):
        if cache is not None:
            raise SqvizError(f"{policy!r} keeps no cache; leave cache out, or use Dense(), Window(n) or Sinks(s, r)")
        return WindowReader(lm, policy)
    if cache is not None and not isinstance(cache, SinkCache):
        raise SqvizError(f"cache must be a SinkCache(lm, policy), not {type(cache).__name__}")
    return CacheReader(lm, SinkCache(lm, policy) if cache is None else cache, chunk)


@torch.no_grad()
def last_logits(lm: LM, ids: Sequence[int], cache: "SinkCache | None") -> Float[Tensor, " vocabulary"]:
    """Logits after the last of these tokens."""
    row = torch.tensor([list(ids)], dtype=torch.long, device=lm.device)
    output = lm.model(input_ids=row, past_key_values=cache, use_cache=cache is not None, **logits_of(lm, 1))
    logits: Tensor = output.logits[0, -1]
    return logits.clone()

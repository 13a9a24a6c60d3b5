"""Perplexity of one endless text under a policy (thesis §4.4.1), token by token or in exact blocks.

Unlike `sqviz.perplexity`, nothing is cut into segments: every token is predicted from what the policy keeps of all that
came before it. Two methods give the same numbers up to rounding:

    tokens     one forward pass per token, as a stream would be decoded
    parallel   blocks of tokens, each query with the window, the sinks and the positions that it would have had
               (plan.py); as fast as reading a prompt, in memory bounded by cache and block

`Recompute` keeps no cache: each token is predicted from a pass over the `recent` tokens before it; `parallel` runs
several of these windows at once. A long run can be stopped and resumed through a checkpoint file.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from sqviz.corpus.segments import Text, as_tokens
from sqviz.errors import NonFinite, SqvizError, TextTooShort
from sqviz.models.lm import LM
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.streaming.checkpoint import Checkpoint
from sqviz.streaming.feed import BLOCK, Feed
from sqviz.streaming.policies import Policy, Sinks

WIDENED = 128  # positions whose logits are widened to float32 at a time
MARK = 1024  # tokens between two rows of the trace

Method = Literal["tokens", "parallel"]


@dataclasses.dataclass(frozen=True, eq=False)
class StreamPerplexity:
    """What a stream of `len(nll) + 1` tokens cost the model.

    Attributes:
        policy: what was kept.
        method: "tokens" or "parallel".
        nll: −ln p of every token but the first, in nats.
        trace: [mark 3] tokens read, seconds since the start, resident memory of the process in bytes.
    """

    policy: Policy
    method: str
    nll: Float[Tensor, " predicted"]
    trace: Float64[Tensor, "mark 3"]

    @property
    def perplexity(self) -> float:
        """exp of the mean of `nll`."""
        mean = float(self.nll.double().mean())
        return math.exp(mean) if mean < 700 else math.inf

    @property
    def running(self) -> Float[Tensor, " predicted"]:
        """Perplexity of the text up to each token."""
        return perplexity_within(self.nll, len(self.nll))

    def within(self, window: int) -> Float[Tensor, " predicted"]:
        """Perplexity of the `window` tokens up to each one; of fewer at the beginning."""
        return perplexity_within(self.nll, window)

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run; 0 where it was too short to be timed."""
        return float(self.trace[-1, 0] / self.trace[-1, 1]) if len(self.trace) and self.trace[-1, 1] > 0 else 0.0

    def __repr__(self) -> str:
        return (
            f"StreamPerplexity({self.policy!r}: {self.perplexity:.4g} over {len(self.nll) + 1} tokens, {self.method})"
        )


def perplexity_within(nll: Float[Tensor, " predicted"], window: int) -> Float[Tensor, " predicted"]:
    """exp of the mean of the `window` values up to each one; of fewer at the beginning."""
    total = torch.nn.functional.pad(nll.double().cumsum(0), (window, 0))
    count = torch.arange(1, len(nll) + 1, dtype=torch.float64).clamp(max=window)
    return ((total[window:] - total[:-window]) / count).exp().float()


def streaming_perplexity(
    lm: LM,
    tokens: Text,
    policy: Policy | None = None,
    *,
    method: Method = "parallel",
    block: int = BLOCK,
    int8: bool = False,
    checkpoint: str | Path | None = None,
    every_seconds: float = 120.0,
    on_block: Callable[[int, Float[Tensor, " predicted"]], None] | None = None,
    cancel: CancelToken | None = None,
    progress: bool = False,
) -> StreamPerplexity:
    """Score one text as a stream.

    Args:
        lm: the model, quantised or not.
        tokens: a 1-D LongTensor of ids, or text; at least 2 tokens.
        policy: `Sinks(4, 252)` by default.
        method: "parallel" or "tokens"; see the module's docstring. For a model that quantises its activations with one
            dynamic step per tensor the two differ: a block then shares a step.
        block: tokens per pass of "parallel".
        int8: keep keys and values as INT8; see `SinkCache`.
        checkpoint: a file; written every `every_seconds` and when the work is cancelled, read if it is there.
        every_seconds: between two writes.
        on_block: called as `on_block(read, nll)` after every pass, with the tokens read and all −ln p so far.
        cancel: stops the work between two passes.
        progress: show a progress bar.

    Raises:
        TextTooShort: fewer than 2 tokens.
        TooLarge: `Dense` over more tokens than fit into memory.
        NonFinite: the model gave NaN or infinite logits.
        SqvizError: what `SinkCache` refuses; a checkpoint of another run.
        Cancelled: stopped through `cancel`.
    """
    policy = Sinks() if policy is None else policy
    if method not in ("tokens", "parallel"):
        raise SqvizError(f"method={method!r}: 'tokens' or 'parallel' is allowed")
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise SqvizError(f"block={block!r}: a number of tokens per pass, at least 1, is allowed")
    ids = as_tokens(lm, tokens)
    if len(ids) < 2:
        raise TextTooShort(f"{len(ids)} token: a stream has at least 2, one given and one predicted")
    run = _Run(lm, ids, policy, method, 1 if method == "tokens" else block, int8)
    file = None if checkpoint is None else Checkpoint(Path(checkpoint), run.about())
    if file is not None:
        run.resume(file)
    saved = time.monotonic()
    with progress_bar(len(ids), f"perplexity, {policy}", unit="tokens", cancel=cancel, show=progress) as bar:
        try:
            bar.step(run.read)
            for done in run.passes():
                if on_block is not None:
                    on_block(run.read, run.nll[: run.scored])
                bar.step(done)
                if file is not None and time.monotonic() - saved > every_seconds:
                    run.save(file)
                    saved = time.monotonic()
        finally:
            if file is not None:
                run.save(file)
            run.feed.close()
    return StreamPerplexity(policy, method, run.nll, run.trace())


class _Run:
    """One text on its way through the model."""

    def __init__(
        self, lm: LM, ids: Int64[Tensor, " token"], policy: Policy, method: str, block: int, int8: bool
    ) -> None:
        self.lm, self.ids, self.policy, self.method, self.block, self.int8 = lm, ids, policy, method, block, int8
        self.nll = torch.zeros(len(ids) - 1)
        self.scored = 0
        self.feed = Feed(lm, ids, policy, block, int8=int8)
        self._marks: list[tuple[float, float, float]] = []
        self._spent, self._start, self._process = 0.0, time.perf_counter(), psutil.Process()

    def passes(self) -> Iterator[int]:
        """Tokens read by each pass."""
        for before, logits in self.feed.passes():
            self._score(logits, self.ids[before + 1 : self.read + 1])
            self._mark()
            yield self.read - before

    @property
    def read(self) -> int:
        """Tokens that went through the model."""
        return self.feed.read

    def _score(self, logits: Float[Tensor, "token vocabulary"], targets: Int64[Tensor, " token"]) -> None:
        logits, targets = logits[: len(targets)], targets.to(logits.device)
        parts = [
            cross_entropy(some.float(), wanted, reduction="none")
            for some, wanted in zip(logits.split(WIDENED), targets.split(WIDENED), strict=True)
        ]
        if not parts:
            return
        nll = torch.cat(parts).cpu()
        if not bool(torch.isfinite(nll).all()):
            raise NonFinite(
                f"{self.lm.name} gave NaN or infinite logits after {self.scored} tokens, so there is no perplexity. "
                "Load it in float32 or bfloat16, and check what was done to it last"
            )
        self.nll[self.scored : self.scored + len(nll)] = nll
        self.scored += len(nll)

    def _mark(self) -> None:
        last = self._marks[-1][0] if self._marks else 0.0
        if self.read - last >= MARK or self.read == len(self.ids):
            seconds = self._spent + time.perf_counter() - self._start
            self._marks.append((float(self.read), seconds, float(self._process.memory_info().rss)))

    def trace(self) -> Float64[Tensor, "mark 3"]:
        """See `StreamPerplexity.trace`."""
        return torch.tensor(self._marks, dtype=torch.float64).reshape(-1, 3)

    # --- stopping and going on ---

    def about(self) -> dict[str, Any]:
        """What has to be the same for a run to go on."""
        return {
            "policy": repr(self.policy),
            "method": self.method,
            "block": self.block,
            "int8": self.int8,
            "model": self.lm,
            "ids": self.ids,
        }

    def save(self, file: Checkpoint) -> None:
        """Write where the run stands; in the middle of a pass that failed, leave the file as it was."""
        if self.scored != min(self.read, len(self.nll)) or (
            self.feed.cache is not None and self.feed.cache.state.seen != self.read
        ):
            return
        seconds = self._spent + time.perf_counter() - self._start
        mine = {"nll": self.nll[: self.scored], "trace": self.trace()}
        file.write(self.feed.cache, mine, {"read": self.read, "seconds": seconds})

    def resume(self, file: Checkpoint) -> None:
        """Go on where the file stands, if it is there."""
        found = file.read(self.feed.cache)
        if found is None:
            return
        tensors, numbers = found
        self.scored, self.feed.read, self._spent = len(tensors["nll"]), int(numbers["read"]), float(numbers["seconds"])
        self.nll[: self.scored] = tensors["nll"]
        self._marks = [tuple(row) for row in tensors["trace"].tolist()]

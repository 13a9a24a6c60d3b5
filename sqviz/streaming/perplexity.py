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
from sqviz.errors import NonFinite, SqvizError, TextTooShort, TooLarge
from sqviz.models.lm import LM
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.streaming.cache import SinkCache
from sqviz.streaming.checkpoint import Checkpoint
from sqviz.streaming.policies import Dense, Policy, Recompute, Sinks

BLOCK = 256
"""Tokens per forward pass of the parallel method."""
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
        count = torch.arange(1, len(self.nll) + 1, dtype=torch.float64)
        return (self.nll.double().cumsum(0) / count).exp().float()

    def within(self, window: int) -> Float[Tensor, " predicted"]:
        """Perplexity of the `window` tokens up to each one; of fewer at the beginning."""
        total = torch.nn.functional.pad(self.nll.double().cumsum(0), (window, 0))
        count = torch.arange(1, len(self.nll) + 1, dtype=torch.float64).clamp(max=window)
        return ((total[window:] - total[:-window]) / count).exp().float()

    @property
    def tokens_per_second(self) -> float:
        """Over the whole run; 0 where it was too short to be timed."""
        return float(self.trace[-1, 0] / self.trace[-1, 1]) if len(self.trace) and self.trace[-1, 1] > 0 else 0.0

    def __repr__(self) -> str:
        return (
            f"StreamPerplexity({self.policy!r}: {self.perplexity:.4g} over {len(self.nll) + 1} tokens, {self.method})"
        )


def streaming_perplexity(
    lm: LM,
    tokens: Text,
    policy: Policy | None = None,
    *,
    method: Method = "parallel",
    block: int = BLOCK,
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
    run = _Run(lm, ids, policy, method, 1 if method == "tokens" else block)
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
            run.close()
    return StreamPerplexity(policy, method, run.nll, run.trace())


class _Run:
    """One text on its way through the model."""

    def __init__(self, lm: LM, ids: Int64[Tensor, " token"], policy: Policy, method: str, block: int) -> None:
        self.lm, self.ids, self.policy, self.method, self.block = lm, ids, policy, method, block
        self.nll = torch.zeros(len(ids) - 1)
        self.read, self.scored = 0, 0
        self.cache = None if isinstance(policy, Recompute) else SinkCache(lm, policy)
        self._marks: list[tuple[float, float, float]] = []
        self._spent, self._start, self._process = 0.0, time.perf_counter(), psutil.Process()

    def passes(self) -> Iterator[int]:
        """Tokens read by each pass."""
        while self.read < len(self.ids):
            before = self.read
            with torch.no_grad():
                logits, targets = self._windows() if self.cache is None else self._block(self.cache)
                self._score(logits, targets)
            self._mark()
            yield self.read - before

    def _block(self, cache: SinkCache) -> tuple[Tensor, Tensor]:
        """Logits of the next block, and the tokens that follow each of its tokens."""
        part = self.ids[self.read : self.read + self.block]
        logits = self.lm.model(input_ids=part[None].to(self.lm.device), past_key_values=cache, use_cache=True).logits[0]
        if isinstance(self.policy, Dense) and self.read == 0:
            _check_fits(cache, len(self.ids))
        self.read += len(part)
        targets = self.ids[self.read - len(part) + 1 : self.read + 1]
        return logits[: len(targets)], targets

    def _windows(self) -> tuple[Tensor, Tensor]:
        """The same by recomputation: first the tokens that still see all before them, then windows side by side."""
        assert isinstance(self.policy, Recompute)
        recent = self.policy.recent
        if self.read == 0:
            part = self.ids[:recent]
            logits = self.lm.model(input_ids=part[None].to(self.lm.device), use_cache=False).logits[0]
            self.read = len(part)
            targets = self.ids[1 : self.read + 1]
            return logits[: len(targets)], targets
        most = max(1, self.block // recent) if self.method == "parallel" else 1
        ends = range(self.read, min(self.read + most, len(self.ids)))
        windows = torch.stack([self.ids[end - recent + 1 : end + 1] for end in ends])
        logits = self.lm.model(input_ids=windows.to(self.lm.device), use_cache=False).logits[:, -1]
        self.read = ends.stop
        targets = self.ids[ends.start + 1 : ends.stop + 1]
        return logits[: len(targets)], targets

    def _score(self, logits: Float[Tensor, "token vocabulary"], targets: Int64[Tensor, " token"]) -> None:
        targets = targets.to(logits.device)
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
            "model": self.lm,
            "ids": self.ids,
        }

    def save(self, file: Checkpoint) -> None:
        """Write where the run stands; in the middle of a pass that failed, leave the file as it was."""
        if self.scored != min(self.read, len(self.nll)) or (
            self.cache is not None and self.cache.state.seen != self.read
        ):
            return
        seconds = self._spent + time.perf_counter() - self._start
        mine = {"nll": self.nll[: self.scored], "trace": self.trace()}
        file.write(self.cache, mine, {"read": self.read, "seconds": seconds})

    def resume(self, file: Checkpoint) -> None:
        """Go on where the file stands, if it is there."""
        found = file.read(self.cache)
        if found is None:
            return
        tensors, numbers = found
        self.scored, self.read, self._spent = len(tensors["nll"]), int(numbers["read"]), float(numbers["seconds"])
        self.nll[: self.scored] = tensors["nll"]
        self._marks = [tuple(row) for row in tensors["trace"].tolist()]

    def close(self) -> None:
        """Take the cache's hooks off the model."""
        if self.cache is not None:
            self.cache.close()


def _check_fits(cache: SinkCache, tokens: int) -> None:
    """Refuse a dense run that would not fit, before the machine is out of memory."""
    each = sum(x.shape[0] * x.shape[1] * x.shape[3] * x.element_size() for layer in cache.layers for x in layer.buffers)
    needed = int(2.5 * each * tokens)  # the buffer grows by half, and both are there while it is copied
    device = cache.lm.device
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed > 0.9 * free:
        raise TooLarge(
            f"Dense() keeps {each / 1e3:.0f} kB per token: {tokens} tokens need about {needed / 1e9:.1f} GB and "
            f"{free / 1e9:.1f} GB are free. Score fewer tokens, or use sqviz.Sinks(4, 1020), whose memory does not grow"
        )

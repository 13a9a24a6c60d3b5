"""What a token costs, in time and memory, by the size of the cache (thesis Figure 4.8).

    sqviz.stream_cost(lm, (256, 1024, 4096))

Sinks and a window, against a window that is recomputed for each token (the baseline of the figure, "sliding window with
re-computation") and against a plain decode step with transformers' own cache of as many keys. Steps of all policies are
taken in turns, so that a busy machine is busy for all of them; memory is that of each policy by itself.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from sqviz.corpus.segments import as_tokens
from sqviz.errors import SqvizError, TextTooShort
from sqviz.memory import peak_memory
from sqviz.models.lm import LM
from sqviz.models.logits import logits_of
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.shown import Shown
from sqviz.streaming.feed import Feed
from sqviz.streaming.policies import Sinks, of_size

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from sqviz.plots.streams import Panels
    from sqviz.widgets.still import Still

Step = Callable[[int], Any]
SIZES = (256, 512, 1024, 2048, 4096)
POLICIES = ("sinks", "dense", "window, recomputed")
_X = "keys in the cache"
MARGIN = 16
"""Tokens read beyond those that fill the cache."""


@dataclasses.dataclass(frozen=True)
class CostRow:
    """One policy at one size.

    Attributes:
        policy: one of `POLICIES`.
        size: keys that a token attends to.
        milliseconds: per token, median.
        peak: most memory in use during a step, model included, in bytes: resident on a CPU, allocated on a GPU.
        cache: memory of the keys and values, in bytes.
    """

    policy: str
    size: int
    milliseconds: float
    peak: int
    cache: int


@dataclasses.dataclass(frozen=True)
class StreamCost(Shown):
    """All rows, and the model and device that they belong to."""

    rows: tuple[CostRow, ...]
    model: str
    device: str

    def to_frame(self) -> "pandas.DataFrame":
        """One row per size and policy; times also as multiples of a dense step."""
        import pandas

        frame = pandas.DataFrame([dataclasses.asdict(row) for row in self.rows])
        dense = frame[frame.policy == "dense"].set_index("size").milliseconds
        frame["of a dense step"] = frame.milliseconds / frame["size"].map(dense)
        frame["peak MB"], frame["cache MB"] = frame.pop("peak") / 1e6, frame.pop("cache") / 1e6
        return frame.set_index(["size", "policy"])

    @property
    def panels(self) -> "Panels":
        """The curves of `figure`: (size, value) by quantity and policy."""
        names = dict.fromkeys(row.policy for row in self.rows)
        times = {name: [(row.size, row.milliseconds) for row in self.rows if row.policy == name] for name in names}
        peaks = {name: [(row.size, row.peak / 1e6) for row in self.rows if row.policy == name] for name in names}
        return {"milliseconds per token": times, "peak memory, MB": peaks}

    def figure(self) -> "plotly.graph_objects.Figure":
        """Latency and memory against the size of the cache, one line per policy (Figure 4.8)."""
        from sqviz.plots.streams import cost_curves

        return cost_curves(self.panels, self._title, _X)

    def still(self) -> "Still":
        """The picture of `figure`, drawn without a browser."""
        from sqviz.widgets.streams_still import cost_still

        return cost_still(self.panels, self._title, "medians; both axes logarithmic", _X)

    def __repr__(self) -> str:
        return f"{self._title}\n{self.to_frame().round(2).to_string()}"

    @property
    def _title(self) -> str:
        return f"Cost of a token · {self.model} on {self.device}"


@contextmanager
def steps_at(
    lm: LM, ids: Int64[Tensor, " token"], size: int, sinks: int, names: Sequence[str] = POLICIES
) -> Iterator[tuple[dict[str, Step], dict[str, Callable[[], int]]]]:
    """Per policy, a step with a cache that holds `size` keys and stays that long, and the bytes of its cache."""
    from transformers import DynamicCache

    text = ids[: size + MARGIN]
    only = logits_of(lm, 1)
    steps: dict[str, Step] = {}
    sizes: dict[str, Callable[[], int]] = {}
    feed: Feed | None = None
    if "sinks" in names:
        feed = _filled(lm, text, of_size(size, sinks))
        cache = feed.cache
        assert cache is not None

        def streaming(turn: int) -> None:
            lm.model(input_ids=_one(lm, ids, turn), past_key_values=cache, use_cache=True)

        steps["sinks"], sizes["sinks"] = streaming, lambda: cache.bytes
    if "dense" in names:
        dense = DynamicCache(config=lm.config)
        lm.model(input_ids=text[None, : size - 1].to(lm.device), past_key_values=dense, use_cache=True, **only)

        def plain(turn: int) -> None:
            lm.model(input_ids=_one(lm, ids, turn), past_key_values=dense, use_cache=True)
            dense.crop(-1)

        steps["dense"], sizes["dense"] = plain, lambda: _bytes(dense)
    if "window, recomputed" in names:

        def recompute(turn: int) -> None:
            first = turn % MARGIN
            lm.model(input_ids=text[None, first : first + size].to(lm.device), use_cache=False, **only)

        steps["window, recomputed"], sizes["window, recomputed"] = recompute, lambda: 0
    try:
        yield steps, sizes
    finally:
        if feed is not None:
            feed.close()


def interleaved(
    steps: dict[str, Step], rounds: dict[str, int], device: torch.device, cancel: CancelToken | None = None
) -> dict[str, float]:
    """Median seconds of each, taken in turns; the first of each is not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(max(rounds.values()) + 1):
        for name, step in steps.items():
            if turn > rounds[name]:
                continue
            if cancel is not None:
                cancel.check("measuring what a token costs")
            _settle(device)
            start = time.perf_counter()
            step(turn)
            _settle(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


@torch.no_grad()
def stream_cost(
    lm: LM,
    sizes: Sequence[int] = SIZES,
    tokens: Any = None,
    *,
    sinks: int = 4,
    rounds: int = 15,
    policies: Sequence[str] = POLICIES,
    cancel: CancelToken | None = None,
    progress: bool = False,
) -> StreamCost:
    """Measure one decode step of each policy at each size of the cache (Figure 4.8).

    Args:
        lm: the model.
        sizes: keys that a token attends to.
        tokens: text or ids to fill the caches with; the embedded text by default.
        sinks: how many of the keys are sinks.
        rounds: steps timed of each policy; a quarter of it, three at least, of the recomputed window.
        policies: any of "sinks", "dense", "window, recomputed".
        cancel: stops the work between two steps.
        progress: show a progress bar.

    Raises:
        SqvizError: a policy that is not known, sizes without room for the sinks, no rounds.
        TextTooShort: fewer tokens than the largest cache needs.
    """
    unknown = [name for name in policies if name not in POLICIES]
    if unknown or not policies:
        raise SqvizError(f"policies={list(policies)}: any of {', '.join(map(repr, POLICIES))} can be measured")
    if rounds < 1 or not sizes:
        raise SqvizError(f"sizes={list(sizes)}, rounds={rounds}: one size and one round at least are needed")
    for size in sizes:
        of_size(size, sinks)
    if tokens is None:
        from sqviz.corpus.source import text

        tokens = text()
    needed = max(sizes) + MARGIN
    ids = as_tokens(lm, tokens, needed)
    if len(ids) < needed:
        raise TextTooShort(f"a cache of {max(sizes)} keys is filled with {needed} tokens, and the text has {len(ids)}")
    rows = []
    turns = {name: max(3, rounds // 4) if name == "window, recomputed" else rounds for name in policies}
    with progress_bar(2 * len(sizes), "cost of a token", unit="measurements", cancel=cancel, show=progress) as bar:
        for size in sizes:
            peaks = {name: _peak(lm, ids, size, sinks, name) for name in policies}
            bar.step()
            times = _times(lm, ids, size, sinks, turns, cancel)
            rows += [CostRow(name, size, 1000 * times[name][0], peaks[name], times[name][1]) for name in policies]
            bar.step()
    device = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else lm.device.type.upper()
    return StreamCost(tuple(rows), lm.name, device)


def _times(
    lm: LM, ids: Tensor, size: int, sinks: int, turns: dict[str, int], cancel: CancelToken | None
) -> dict[str, tuple[float, int]]:
    """Seconds per step and bytes of the cache. A function of its own: nothing of it is left when peaks are measured."""
    with steps_at(lm, ids, size, sinks, tuple(turns)) as (steps, held):
        seconds = interleaved(steps, turns, lm.device, cancel)
        return {name: (seconds[name], held[name]()) for name in turns}


def _peak(lm: LM, ids: Tensor, size: int, sinks: int, name: str) -> int:
    """Most memory during two steps, with no cache but this one."""
    with steps_at(lm, ids, size, sinks, (name,)) as (steps, _), peak_memory(lm.device) as peak:
        for turn in range(2):
            steps[name](turn)
    assert peak.bytes is not None
    return peak.bytes


def _filled(lm: LM, ids: Tensor, policy: Sinks) -> Feed:
    feed = Feed(lm, ids, policy)
    for _ in feed.passes():
        pass
    return feed


def _one(lm: LM, ids: Tensor, turn: int) -> Int64[Tensor, "1 1"]:
    return ids[turn % len(ids)].view(1, 1).to(lm.device)


def _bytes(cache: Any) -> int:
    return sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

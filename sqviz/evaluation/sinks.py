"""Which tokens are attention sinks, how many a model needs, and whether it is their place or their meaning.

    sqviz.sinks(lm)          a table, a picture, and a policy to go on with

Three experiments of the thesis on the user's model and text: where attention goes (Figure 4.2), caches of one size with
0, 1, 2, 4 and 8 sinks (Table 4.2), the first tokens replaced by line breaks (Table 4.1).
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sqviz.corpus.segments import Text, as_tokens
from sqviz.errors import SqvizError, TextTooShort
from sqviz.evaluation.policies import PolicyComparison, compare_policies, sink_counts, with_line_breaks
from sqviz.models.lm import LM
from sqviz.observe.attention import AttentionMaps, attention_maps
from sqviz.progress import CancelToken
from sqviz.shown import Shown
from sqviz.streaming.perplexity import StreamPerplexity, streaming_perplexity
from sqviz.streaming.policies import Sinks, of_size

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from sqviz.widgets.still import Still

LOOKED_AT = 512
"""Tokens whose attention is looked at."""
SHARE = 0.1
"""A token is called a sink if, in some layer, this part of all attention goes to it."""
ENOUGH = 1.02
"""A number of sinks is enough if its perplexity is at most this many times the best."""


@dataclasses.dataclass(frozen=True, eq=False)
class SinkReport(Shown):
    """What `sinks` found.

    Attributes:
        maps: attention over the beginning of the text.
        counts: caches of one size with more and more sinks, by "sinks + recent".
        breaks: as the largest number of sinks asked for, with line breaks as the first tokens; None without a
            tokenizer that has one.
        size: keys in the caches.
        recommended: the smallest number of sinks that is enough.
    """

    maps: AttentionMaps
    counts: PolicyComparison
    breaks: StreamPerplexity | None
    size: int
    recommended: Sinks

    @property
    def share(self) -> Float[Tensor, "layer key"]:
        """Share of attention that each key gets, mean over heads."""
        return self.maps.share.mean(1)

    @property
    def positions(self) -> tuple[int, ...]:
        """Tokens to which at least `SHARE` of the attention goes in some layer, the largest first."""
        most = self.share.amax(0)
        found = torch.nonzero(most >= SHARE).flatten()
        return tuple(found[most[found].argsort(descending=True)].tolist())

    def to_frame(self) -> "pandas.DataFrame":
        """One row per sink: the token, its largest share, in how many layers it is one, its largest activation."""
        import pandas

        median = self.maps.norms.median(1).values
        rows = [
            {
                "position": at,
                "token": self.maps.token_texts[at],
                "largest share %": 100 * float(self.share[:, at].max()),
                "layers": int((self.share[:, at] >= SHARE).sum()),
                "largest |x|": float(self.maps.norms[:, at].max()),
                "times the median token": float((self.maps.norms[:, at] / median).max()),
            }
            for at in self.positions
        ]
        return pandas.DataFrame(rows).set_index("position") if rows else pandas.DataFrame()

    def figure(self) -> "plotly.graph_objects.Figure":
        """Perplexity of a stream against position, one line per number of sinks."""
        from sqviz.plots.streams import perplexity_curves

        title = f"How many sinks? Caches of {self.size} keys, sinks + recent · {self.maps.model}"
        return perplexity_curves(self.counts.curves(), title, note=self.verdict)

    @property
    def verdict(self) -> str:
        """The findings in a sentence each."""
        values = {label: result.perplexity for label, result in self.counts.results.items()}
        said = [
            f"{self.recommended} is enough: " + ", ".join(f"{label}: {value:.4g}" for label, value in values.items())
        ]
        if self.breaks is not None:
            plain = list(values.values())[-1]
            kind = "their place" if self.breaks.perplexity < 1.2 * plain else "their meaning as well"
            said.append(f"with line breaks as first tokens {self.breaks.perplexity:.4g}, so it is {kind}")
        return "; ".join(said)

    def still(self) -> "Still":
        """The picture of `figure`, drawn without a browser."""
        return self.counts.still()

    def __repr__(self) -> str:
        none = f"no token gets {SHARE:.0%} of the attention in any layer"
        return f"{self.verdict}\n{self.to_frame().round(1).to_string() if self.positions else none}"


def sinks(
    lm: LM,
    text: Text | None = None,
    *,
    size: int = 256,
    tokens: int = 2048,
    counts: Sequence[int] = (0, 1, 2, 4, 8),
    cancel: CancelToken | None = None,
    progress: bool = False,
) -> SinkReport:
    """Which tokens of a text are attention sinks, and how many of them a streaming cache of this model needs.

    Args:
        lm: the model.
        text: text or ids; the embedded text by default.
        size: keys in each cache.
        tokens: of the text to read.
        counts: numbers of sinks to try, ascending.
        cancel: stops the work between two passes.
        progress: show progress bars.

    Raises:
        TextTooShort: not more tokens than the cache holds: nothing would leave it.
        SqvizError: no counts, or more sinks than keys; what `SinkCache` and `attention_maps` refuse.
        Cancelled: stopped through `cancel`.
    """
    if not counts or list(counts) != sorted(set(counts)):
        raise SqvizError(f"counts={list(counts)}: numbers of sinks in ascending order are needed")
    policies = sink_counts(size, counts)
    if text is None:
        from sqviz.corpus.source import text as embedded

        text = embedded()
    ids = as_tokens(lm, text, tokens)
    if len(ids) <= size:
        raise TextTooShort(f"{len(ids)} tokens fit into a cache of {size} keys, so nothing would leave it")
    maps = attention_maps(lm, ids[:LOOKED_AT], sentences=None, cancel=cancel)
    found = compare_policies(lm, ids, policies, cancel=cancel, progress=progress)
    values = [result.perplexity for result in found.results.values()]
    enough = next(count for count, value in zip(counts, values, strict=True) if value <= ENOUGH * min(values))
    breaks = None
    if (
        lm.tokenizer is not None
        and counts[-1] > 0
        and len(lm.tokenizer("\n", add_special_tokens=False)["input_ids"]) == 1
    ):
        changed = with_line_breaks(lm, ids, counts[-1])
        breaks = streaming_perplexity(lm, changed, of_size(size, counts[-1]), cancel=cancel, progress=progress)
    return SinkReport(maps, found, breaks, size, of_size(size, enough))

"""Policies side by side on one text (thesis Figures 4.1 and 4.3, Tables 4.1, 4.2 and 4.6).

compare_policies(lm, text, four_policies(256))            Figure 4.1: dense, window, recomputation, sinks
compare_policies(lm, text, sink_counts(256))              Table 4.2: 0, 1, 2, 4, 8 sinks in a cache of one size
compare_policies(lm, text, cache_sizes((64, 128, 256)))   Table 4.6: sinks with caches of several sizes
with_line_breaks(lm, tokens, 4)                           Table 4.1: what if the first tokens mean nothing?
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sqviz.corpus.segments import Text, as_tokens
from sqviz.errors import Cancelled, SqvizError, TooLarge
from sqviz.models.lm import LM
from sqviz.progress import CancelToken, in_notebook
from sqviz.shown import Shown
from sqviz.streaming.feed import BLOCK
from sqviz.streaming.perplexity import StreamPerplexity, streaming_perplexity
from sqviz.streaming.policies import Dense, Policy, Recompute, Window, of_size

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from sqviz.widgets.still import Still

OnBlock = Callable[[str, int, Float[Tensor, " predicted"]], None]


def four_policies(size: int, sinks: int = 4) -> dict[str, Policy]:
    """The four of Figure 4.1, each of which keeps `size` tokens; the dense one keeps all. The slowest comes last."""
    return {
        "dense": Dense(),
        "window": Window(size),
        f"{sinks} sinks": of_size(size, sinks),
        "window, recomputed": Recompute(size),
    }


def sink_counts(size: int, counts: Sequence[int] = (0, 1, 2, 4, 8)) -> dict[str, Policy]:
    """Table 4.2: caches of one size, written sinks + recent."""
    return {f"{count} + {size - count}": of_size(size, count) for count in counts}


def cache_sizes(sizes: Sequence[int], sinks: int = 4) -> dict[str, Policy]:
    """Table 4.6: caches of several sizes, written sinks + recent."""
    return {f"{sinks} + {size - sinks}": of_size(size, sinks) for size in sizes}


def with_line_breaks(lm: LM, tokens: Int64[Tensor, " token"], count: int = 4) -> Int64[Tensor, " token"]:
    """The text with its first `count` tokens replaced by line breaks (Table 4.1): sinks without a meaning.

    Raises:
        SqvizError: the tokenizer has no single token for a line break, or there is no tokenizer.
    """
    if lm.tokenizer is None:
        raise SqvizError("a line break has to be encoded, and this model has no tokenizer: put its id in yourself")
    found = lm.tokenizer("\n", add_special_tokens=False)["input_ids"]
    if len(found) != 1:
        raise SqvizError(f"the tokenizer writes a line break as {found}, not as one token")
    changed = tokens.clone()
    changed[:count] = found[0]
    return changed


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyComparison(Shown):
    """One text under several policies.

    Attributes:
        results: by label.
        refused: why a policy has no result or not all of it, by label: a dense run that would not fit into memory, a
            run that was stopped.
        model: name of the model.
    """

    results: Mapping[str, StreamPerplexity]
    refused: Mapping[str, str]
    model: str

    def to_frame(self) -> "pandas.DataFrame":
        """One row per policy: perplexity, of the whole text and of its last quarter; tokens per second."""
        import pandas

        rows = {
            label: {
                "policy": repr(result.policy),
                "perplexity": result.perplexity,
                "last quarter": float(result.within(max(1, len(result.nll) // 4))[-1]),
                "tokens": len(result.nll) + 1,
                "tokens per second": result.tokens_per_second,
            }
            for label, result in self.results.items()
        }
        return pandas.DataFrame.from_dict(rows, orient="index")

    def figure(self, window: int | None = None) -> "plotly.graph_objects.Figure":
        """Perplexity of the last `window` tokens against position (Figure 4.1); a tenth of the text by default."""
        from sqviz.plots.streams import perplexity_curves

        note = " · ".join(self.refused.values())
        return perplexity_curves(self.curves(window), f"Perplexity of a stream · {self.model}", note=note)

    def curves(self, window: int | None = None) -> dict[str, Float[Tensor, " predicted"]]:
        """Perplexity of the `window` tokens up to each one, by label."""
        shown = {label: window or max(16, len(result.nll) // 10) for label, result in self.results.items()}
        return {label: result.within(shown[label]) for label, result in self.results.items()}

    def still(self) -> "Still":
        """The picture of `figure`, drawn without a browser."""
        from sqviz.widgets.streams_still import draw_still

        curves = {label: values.numpy() for label, values in self.curves().items()}
        return draw_still(curves, f"Perplexity of a stream · {self.model}", "of the last tenth of the text")

    def __repr__(self) -> str:
        return "\n".join([*(f"{label}: {result!r}" for label, result in self.results.items()), *self.refused.values()])


def compare_policies(
    lm: LM,
    tokens: Text,
    policies: Mapping[str, Policy] | Sequence[Policy] | None = None,
    *,
    limit: int | None = None,
    block: int = BLOCK,
    live: bool = False,
    on_block: OnBlock | None = None,
    cancel: CancelToken | None = None,
    progress: bool = False,
) -> PolicyComparison:
    """Score one text under each policy.

    Args:
        lm: the model.
        tokens: text or ids.
        policies: by label; the four of Figure 4.1 with 256 tokens by default.
        limit: score the first so many tokens only.
        block: tokens per pass.
        live: in a notebook, draw the curves while they grow, with a button that stops the work; what was read until
            then is returned.
        on_block: called as `on_block(label, read, nll)` after each pass.
        cancel: stops the work between two passes.
        progress: show a progress bar per policy.

    Raises:
        SqvizError: two policies of one name, and what `streaming_perplexity` raises; a policy whose run would not fit
            into memory is left out and named in `refused`.
        Cancelled: stopped through `cancel`; not by the button of `live`.
    """
    chosen = four_policies(256) if policies is None else policies
    if not isinstance(chosen, Mapping):
        labels = [repr(policy) for policy in chosen]
        if len(set(labels)) < len(labels):
            raise SqvizError(f"policies are listed twice: {', '.join(labels)}")
        chosen = dict(zip(labels, chosen, strict=True))
    ids = as_tokens(lm, tokens, limit)
    if live and in_notebook():
        from sqviz.widgets.live_curves import LiveCurves

        cancel = CancelToken() if cancel is None else cancel
        with LiveCurves(list(chosen), len(ids), f"Perplexity of a stream · {lm.name}", cancel) as curves:
            hear = _both(curves, on_block)
            return _compare(lm, ids, chosen, block, hear, cancel, progress=False, keep=True)
    return _compare(lm, ids, chosen, block, on_block, cancel, progress=progress, keep=False)


def _compare(
    lm: LM,
    ids: Int64[Tensor, " token"],
    policies: Mapping[str, Policy],
    block: int,
    on_block: OnBlock | None,
    cancel: CancelToken | None,
    *,
    progress: bool,
    keep: bool,
) -> PolicyComparison:
    """`keep`: return what is there once the work is cancelled, instead of raising."""
    results, refused = {}, {}
    for label, policy in policies.items():
        heard: list[Float[Tensor, " predicted"]] = [torch.empty(0)]

        def hear(read: int, nll: Float[Tensor, " predicted"], label: str = label, heard: list[Tensor] = heard) -> None:
            heard[0] = nll
            if on_block is not None:
                on_block(label, read, nll)

        try:
            results[label] = streaming_perplexity(
                lm, ids, policy, block=block, on_block=hear, cancel=cancel, progress=progress
            )
        except TooLarge as large:
            refused[label] = f"{label}: {large}"
        except Cancelled:
            if not keep:
                raise
            refused[label] = f"{label}: stopped after {len(heard[0]) + 1 if len(heard[0]) else 0:,} tokens"
            if len(heard[0]):
                results[label] = StreamPerplexity(policy, "parallel", heard[0].clone(), torch.empty(0, 3).double())
    return PolicyComparison(results, refused, lm.name)


def _both(first: OnBlock, second: OnBlock | None) -> OnBlock:
    def hear(label: str, read: int, nll: Float[Tensor, " predicted"]) -> None:
        first(label, read, nll)
        if second is not None:
            second(label, read, nll)

    return hear

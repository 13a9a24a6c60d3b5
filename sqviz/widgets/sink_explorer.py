"""The sink explorer: choose how many sinks, which tokens, how wide a window, and see what the tokens after them cost.

The page (sink_explorer.js) shows the text, each token coloured by what it costs under the chosen cache beyond what it
costs the untouched model; a click makes a token a sink or takes it away. The kernel scores the text under the latest
choice (`streaming_perplexity`), on a thread of its own.

Traits, both ways: recent, chosen. From the kernel: about, scores, status, problem, code. `scores` holds −ln p of every
token but the first, float32, of the untouched model ("dense"), of the window alone and of the chosen sinks, with what
they belong to.
"""

import base64
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import traitlets
from jaxtyping import Int64
from torch import Tensor

from sqviz.corpus.segments import Text, as_tokens
from sqviz.errors import SqvizError, TextTooShort
from sqviz.models.lm import LM
from sqviz.observe.pieces import token_texts
from sqviz.plots.streams import perplexity_range
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.streaming.perplexity import perplexity_within, streaming_perplexity
from sqviz.streaming.policies import Dense, Policy, Sinks, Window
from sqviz.widgets.still import Still
from sqviz.widgets.streams_still import draw_still
from sqviz.widgets.view import View, float32_bytes
from sqviz.widgets.worker import Turn, Worker, heard_while_busy

TOKENS = 400
BLOCK = 128
SMOOTH = 16
LABELS = {"dense": "untouched model", "window": "window alone", "sinks": "chosen sinks"}


class SinkExplorer(View):
    """See `explore_sinks`. Assign `recent` and `chosen`; read `scores`; `close()` it."""

    _scripts = ("draw.js", "sink_explorer_text.js", "sink_explorer.js")
    _styles = ("base.css", "sink_explorer.css")

    about = traitlets.Dict().tag(sync=True)
    recent = traitlets.Int(28).tag(sync=True)
    chosen = traitlets.List(traitlets.Int()).tag(sync=True)
    scores = traitlets.Dict().tag(sync=True)
    status = traitlets.Unicode("").tag(sync=True)
    problem = traitlets.Unicode("").tag(sync=True)
    code = traitlets.Unicode("").tag(sync=True)

    def __init__(self, lm: LM, ids: Int64[Tensor, " token"], sinks: int, recent: int) -> None:
        self._lm, self._ids, self._lock = lm, ids, threading.RLock()
        self._states: list[dict[str, Any]] = []
        self._worker = Worker(("sinks", "window", "dense"), self._failed, "sqviz sinks")
        super().__init__(
            title=f"Attention sinks · {lm.name}",
            about={"model": lm.name, "tokens": list(token_texts(lm.tokenizer, ids.tolist())), "smooth": SMOOTH},
            recent=recent,
            chosen=list(range(sinks)),
        )
        heard_while_busy(self)
        self._say_code()
        self.observe(self._on_choice, names=["recent", "chosen"])
        self._score("dense", Dense())
        self._on_choice(None)

    @traitlets.validate("recent")
    def _check_recent(self, proposal: Any) -> int:
        return min(max(1, int(proposal["value"])), len(self._ids))

    @traitlets.validate("chosen")
    def _check_chosen(self, proposal: Any) -> list[int]:
        found = sorted({int(at) for at in proposal["value"]})
        if found and not 0 <= found[0] <= found[-1] < len(self._ids):
            raise traitlets.TraitError(f"chosen={found}: places of tokens, 0 … {len(self._ids) - 1}, are allowed")
        return found

    @property
    def policy(self) -> Policy:
        """What is chosen now."""
        return _policy(self.recent, self.chosen)

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Block until the latest choice is scored; False when that took longer."""
        return self._worker.wait(timeout_seconds)

    def close(self) -> None:
        """Stop scoring and take the view away."""
        self._worker.close()
        super().close()

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """What the page sends. Messages may come on a thread of their own, and the worker publishes: one at a time."""
        with self._lock:
            super().set_state(sync_data)

    def to_html(
        self,
        path: str | Path | None = None,
        counts: Sequence[int] = (0, 1, 2, 4, 8),
        recents: Sequence[int] | None = None,
        *,
        progress: bool = False,
    ) -> str | Path:
        """A self-contained page whose sliders work: the text is scored beforehand for every choice that they offer.

        Args:
            path: where to write it; None returns the text of the page.
            counts: numbers of sinks that the page offers.
            recents: windows that it offers; half the present one, it, twice and four times it by default.
            progress: show a progress bar; each choice costs a pass over the text.
        """
        wide = len(self._ids)
        offered = recents or (self.recent // 2, self.recent, 2 * self.recent, 4 * self.recent)
        offered = sorted({min(max(1, recent), wide) for recent in offered})
        counts = sorted({count for count in (*counts, len(self.chosen)) if count <= wide})
        self._states = []
        with progress_bar(len(offered) * len(counts), "page", unit="choices", show=progress) as bar:
            for recent in offered:
                for count in counts:
                    chosen = self.chosen if count == len(self.chosen) else list(range(count))
                    found = {
                        "sinks": self._found("sinks", _policy(recent, chosen), recent, chosen),
                        "window": self._found("window", Window(recent + count), recent, chosen),
                    }
                    code = _code(_policy(recent, chosen))
                    self._states.append({"recent": recent, "chosen": chosen, "scores": found, "code": code})
                    bar.step()
        return super().to_html(path)

    def page_state(self) -> dict[str, Any]:
        """The traits, and what `to_html` has scored beforehand; in a page nothing is under way."""
        return super().page_state() | {"status": "", "states": self._states}

    def still(self) -> Still:
        """The curves of the present scores."""
        curves = {
            LABELS[name]: perplexity_within(_values(found), SMOOTH).numpy() for name, found in self.scores.items()
        }
        if perplexity_range(curves) is None:
            curves = {}
        note = f"perplexity of the last {SMOOTH} tokens under {self.policy!r}"
        return draw_still(curves, self.title, note)

    # --- scoring ---

    def _on_choice(self, change: Any) -> None:
        self._say_code()
        self._score("sinks", self.policy)
        if change is None or change["name"] == "recent":
            # As many keys as with the sinks, so that the two differ in nothing else.
            self._score("window", Window(self.recent + len(self.chosen)))
        elif (size := self.recent + len(self.chosen)) != self._size("window"):
            self._score("window", Window(size))

    def _size(self, name: str) -> int | None:
        return self.scores.get(name, {}).get("size")

    def _score(self, name: str, policy: Policy) -> None:
        recent, chosen = self.recent, list(self.chosen)

        def work(turn: Turn) -> None:
            self._publish(status=f"reading the text with {policy!r} …", problem="")
            mine = self._found(name, policy, recent, chosen, turn)
            turn.check()
            with self._lock:
                self._publish(scores=self.scores | {name: mine}, status="")

        self._worker.submit(name, work)

    def _found(
        self, name: str, policy: Policy, recent: int, chosen: list[int], cancel: CancelToken | None = None
    ) -> dict[str, Any]:
        found = streaming_perplexity(self._lm, self._ids, policy, block=BLOCK, cancel=cancel)
        return {
            "nll": base64.b64encode(float32_bytes(found.nll)).decode(),
            "policy": repr(policy),
            "perplexity": found.perplexity,
            "size": recent + len(chosen) if name != "dense" else None,
            "recent": recent,
            "chosen": chosen,
        }

    def _publish(self, **traits: Any) -> None:
        with self._lock:
            for name, value in traits.items():
                setattr(self, name, value)

    def _failed(self, lane: str, error: Exception) -> None:
        self._publish(problem=f"{LABELS[lane]}: {type(error).__name__}: {error}", status="")

    def _say_code(self) -> None:
        self.code = _code(self.policy)


def _policy(recent: int, chosen: list[int]) -> Policy:
    count = len(chosen)
    if not count:
        return Window(recent)
    if chosen == list(range(count)):
        return Sinks(count, recent)
    return Sinks(count, recent, positions=tuple(chosen))


def _code(policy: Policy) -> str:
    return f"cache = sqviz.SinkCache(lm, sqviz.{policy!r})"


def _values(found: dict[str, Any]) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(found["nll"]), "<f4").copy())


def explore_sinks(
    lm: LM, text: Text | None = None, *, sinks: int = 4, recent: int = 28, tokens: int = TOKENS
) -> SinkExplorer:
    """Make tokens sinks, take them away, move the window, and see what the tokens after them cost.

    Args:
        lm: the model.
        text: text or ids; the embedded text by default.
        sinks: how many of the first tokens are sinks at first.
        recent: width of the window at first.
        tokens: of the text to show, at most.

    Raises:
        TextTooShort: fewer than 2 tokens.
        SqvizError: sinks, window or number of tokens that make no sense; a model that cannot be streamed.
    """
    if tokens < 2 or sinks < 0 or recent < 1:
        raise SqvizError(f"tokens={tokens}, sinks={sinks}, recent={recent}: at least 2, 0 and 1 are needed")
    if text is None:
        from sqviz.corpus.source import text as embedded

        text = embedded()
    ids = as_tokens(lm, text, tokens)
    if len(ids) < 2:
        raise TextTooShort(f"{len(ids)} token: one to give and one to predict are needed")
    from sqviz.streaming.cache import SinkCache

    SinkCache(lm, Sinks(max(1, min(sinks, len(ids))), min(recent, len(ids)))).close()  # refuses what cannot be streamed
    return SinkExplorer(lm, ids, min(sinks, len(ids)), min(recent, len(ids)))

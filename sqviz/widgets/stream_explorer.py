"""The live stream: policies side by side on one text, each its own lane, step by step, for as long as one likes.

One thread of the kernel steps the lanes; it takes the lane that has had least time, so each has the same share of the
machine and a fast policy gets further than a slow one. Ten times a second the page is sent what is new. What the page
keeps is bounded: the latest tokens of each lane, and curves thinned to `POINTS`; a page that comes late, or comes back,
asks for the same from the kernel.

Traits, both ways: sinks, recent, on (which lanes). From the kernel: about, state, problem, snapshot. Messages from the
page: {"kind": "start" | "pause" | "stop" | "reset" | "hello" | "piece" | "source"}; to the page: {"kind": "steps"} and
{"kind": "all"}.
"""

import threading
import time
from typing import Any

import numpy as np
import psutil
import traitlets
from jaxtyping import Int64
from torch import Tensor

from sqviz.corpus.segments import Text, as_tokens
from sqviz.errors import SqvizError, TextTooShort
from sqviz.models.lm import LM
from sqviz.observe.pieces import token_texts
from sqviz.streaming.lane import Lane, Reading, Writing, trained_context
from sqviz.streaming.policies import Dense, Policy, Recompute, Window, of_size
from sqviz.widgets.still import Still
from sqviz.widgets.stream_track import Track
from sqviz.widgets.streams_still import draw_still
from sqviz.widgets.view import View
from sqviz.widgets.worker import Pace, Turn, Worker, heard_while_busy

LANES = {"dense": "Dense", "window": "Window", "sinks": "Sinks", "recompute": "Window, recomputed"}
ALTERNATIVES = 3
SAMPLING = {"do_sample": bool, "temperature": float, "top_p": float, "top_k": int, "seed": int}
MOST_PASTED = 10_000_000
"""Characters of a pasted or uploaded text; the rest is left out, and the view says so."""
SLOW_TO_TOKENIZE = 200_000
"""Characters from which on the view says that a text is being cut into tokens."""


class StreamExplorer(View):
    """See `explore_stream`. `start()`, `pause()`, `stop()`, `reset()`, `close()`; assign `sinks`, `recent`, `on`."""

    _scripts = ("draw.js", "stream_lane.js", "stream_chart.js", "stream_source.js", "stream_explorer.js")
    _styles = ("base.css", "stream_explorer.css")

    about = traitlets.Dict().tag(sync=True)
    sinks = traitlets.Int(4).tag(sync=True)
    recent = traitlets.Int(252).tag(sync=True)
    on = traitlets.List(traitlets.Unicode()).tag(sync=True)
    state = traitlets.Enum(["ready", "running", "paused", "ended"], "ready").tag(sync=True)
    problem = traitlets.Unicode("").tag(sync=True)
    snapshot = traitlets.Dict().tag(sync=True)

    def __init__(
        self, lm: LM, ids: Int64[Tensor, " token"], source: str, on: list[str], sinks: int, recent: int
    ) -> None:
        self._lm, self._ids, self._options = lm, ids, dict[str, Any]()
        self._lock = threading.RLock()
        self._lanes: dict[str, Lane] = {}
        self._pieces: list[str] = []
        self._tracks: dict[str, Track] = {}
        self._process = psutil.Process()
        self._worker = Worker(("stream",), self._failed, "sqviz stream")
        super().__init__(
            title=f"Streams · {lm.name}",
            about={
                "model": lm.name,
                "lanes": LANES,
                "trained": trained_context(lm),
                **self._about(source, len(ids)),
            },
            on=on,
            sinks=sinks,
            recent=recent,
        )
        heard_while_busy(self)
        self.on_msg(self._message)
        self.observe(self._more_to_do, names=["on"])

    @traitlets.validate("sinks")
    def _check_sinks(self, proposal: Any) -> int:
        return min(max(0, int(proposal["value"])), 64)

    @traitlets.validate("recent")
    def _check_recent(self, proposal: Any) -> int:
        return min(max(1, int(proposal["value"])), trained_context(self._lm) or 1 << 16)

    @traitlets.validate("on")
    def _check_on(self, proposal: Any) -> list[str]:
        unknown = [name for name in proposal["value"] if name not in LANES]
        if unknown:
            raise traitlets.TraitError(f"on={proposal['value']}: any of {', '.join(LANES)} can run")
        return [name for name in LANES if name in proposal["value"]]

    def policy(self, name: str) -> Policy:
        """What a lane keeps now; window and recomputation as many tokens as the sinks and their window together."""
        size = self.sinks + self.recent
        policies: dict[str, Policy] = {
            "dense": Dense(),
            "window": Window(size),
            "sinks": of_size(size, self.sinks),
            "recompute": Recompute(size),
        }
        return policies[name]

    # --- driving ---

    def start(self) -> None:
        """Run, or go on; after the end, begin anew."""
        if self.state == "ended":
            self.reset()
        with self._lock:
            if self.state == "running":
                return
            self.state, self.problem = "running", ""
        self._worker.submit("stream", self._run)

    def pause(self) -> None:
        """Stop after the step under way; `start()` goes on."""
        self._halt("paused")

    def stop(self) -> None:
        """End here: what is shown stays, the caches are freed; `start()` begins anew."""
        self._halt("ended")
        self._worker.wait()  # however long the step under way takes: its lane must not be closed inside it
        self._free()

    def reset(self) -> None:
        """Stop, forget everything read, and stand at the beginning."""
        self.stop()
        with self._lock:
            self._tracks = {}
            self.state, self.problem = "ready", ""
            self._send_all()

    def _halt(self, state: str) -> None:
        self._worker.cancel("stream")
        with self._lock:
            if self.state == "running" or (self.state == "paused" and state == "ended"):
                self.state = state

    def _free(self) -> None:
        with self._lock:
            for lane in self._lanes.values():
                lane.close()
            self._lanes = {}

    def _more_to_do(self, _: Any) -> None:
        """A lane that comes in when the others are at the end of the text can still be read."""
        with self._lock:
            if self.state == "ended" and self._lanes and set(self.on) - set(self._tracks):
                self.state = "paused"

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Block until nothing runs; False when that took longer."""
        return self._worker.wait(timeout_seconds)

    def read(self, text: Text, *, source: str = "text") -> None:
        """Stand at the beginning of another text."""
        ids = self._tokens(text)
        if len(ids) < 2:
            raise TextTooShort(f"{len(ids)} token: one to give and one to predict are needed")
        self.reset()
        self._ids, self._options = ids, {}
        self.about = self.about | self._about(source, len(ids))

    def write(self, prompt: str, **options: Any) -> None:
        """Stand at the beginning of what the model writes after a prompt; options as for `stream_generate`."""
        ids = self._tokens(prompt)
        if not len(ids):
            raise TextTooShort("the prompt is empty")
        self.reset()
        self._ids, self._options = ids, {"do_sample": True, "eos": ()} | options
        self.about = self.about | self._about("the model's own text", None)

    def _tokens(self, text: Text) -> Int64[Tensor, " token"]:
        known = self.about
        if isinstance(text, str) and len(text) > SLOW_TO_TOKENIZE:
            self.about = known | {"source": f"cutting {len(text):,} characters into tokens …", "tokens": None}
        try:
            return as_tokens(self._lm, text)
        finally:
            self.about = known

    def close(self) -> None:
        """Stop, take the hooks off the model, and the view away."""
        self._worker.close()
        self._worker.join(60)
        self._free()
        super().close()

    def _about(self, source: str, tokens: int | None) -> dict[str, Any]:
        first = token_texts(self._lm.tokenizer, self._ids[:64].tolist())  # the sinks, most often
        return {"source": source, "tokens": tokens, "first": list(first)}

    @property
    def tracks(self) -> dict[str, Track]:
        """What each lane has read so far, by name."""
        return dict(self._tracks)

    # --- the thread ---

    def _run(self, turn: Turn) -> None:
        pace = Pace(10)
        try:
            while True:
                turn.check()
                lane = self._next_lane()
                if lane is None:
                    with self._lock:
                        self.state = "ended"
                    return
                changed = self._step(lane)
                if changed or pace.due():
                    self._send_steps()
        finally:
            self._send_steps()

    def _next_lane(self) -> str | None:
        """The lane that is on, has more to read, and has had least time; first of all one whose policy was changed."""
        with self._lock:
            for name in self.on:
                if name not in self._lanes:
                    self._lanes[name] = self._make(self.policy(name))
                    others = [track.spent for track in self._tracks.values() if not track.ended]
                    self._tracks[name] = Track(spent=min(others, default=0.0))
            waiting = [name for name in self.on if not self._tracks[name].ended]
        return min(waiting, key=lambda name: (not self._outdated(name), self._tracks[name].spent), default=None)

    def _outdated(self, name: str) -> bool:
        return self._lanes[name].policy != self.policy(name)

    def _make(self, policy: Policy) -> Lane:
        if self._options:
            return Writing(self._lm, self._ids, policy, alternatives=ALTERNATIVES, **self._options)
        return Reading(self._lm, self._ids, policy, ALTERNATIVES)

    def _step(self, name: str) -> bool:
        """One step of a lane; whether its policy was changed before."""
        lane, track, changed = self._lanes[name], self._tracks[name], self._outdated(name)
        if changed:
            lane.change(self.policy(name))
        began = time.perf_counter()
        step = lane.step()
        track.add(step, time.perf_counter() - began)
        return changed

    def _failed(self, _: str, error: Exception) -> None:
        with self._lock:
            self.problem, self.state = f"{type(error).__name__}: {error}", "paused"

    # --- to and from the page ---

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """What the page sends. Messages may come on a thread of their own, and the worker publishes: one at a time."""
        with self._lock:
            super().set_state(sync_data)

    def _message(self, _: Any, content: Any, __: Any) -> None:
        kind = content.get("kind") if isinstance(content, dict) else None
        try:
            if kind in ("start", "pause", "stop", "reset"):
                getattr(self, kind)()
            elif kind == "hello":
                self._send_all()
            elif kind == "piece":
                self._pieces.append(str(content.get("text", "")))
            elif kind == "source":
                self._source(content)
        except (SqvizError, TypeError, ValueError) as error:
            with self._lock:
                self.problem = str(error)

    def _source(self, content: dict[str, Any]) -> None:
        text = "".join([*self._pieces, str(content.get("text", ""))])
        self._pieces = []
        if content.get("what") == "corpus":
            from sqviz.corpus.source import text as embedded

            self.read(embedded(), source="embedded text")
        elif content.get("what") == "prompt":
            options = {name: kind(content[name]) for name, kind in SAMPLING.items() if content.get(name) is not None}
            self.write(text[:MOST_PASTED], **options)
        else:
            self.read(text[:MOST_PASTED], source=str(content.get("name", "pasted text")))
        if len(text) > MOST_PASTED:
            with self._lock:
                self.problem = f"the text is longer than {MOST_PASTED:,} characters; the rest was left out"

    def _machine(self) -> dict[str, float]:
        return {"resident": self._process.memory_info().rss / 1e6}

    def _send_steps(self) -> None:
        with self._lock:
            new = {name: track.news() for name, track in self._tracks.items()}
            if any(found["steps"] for found in new.values()):
                self.send({"kind": "steps", "lanes": new, "machine": self._machine()})

    def _send_all(self) -> None:
        with self._lock:
            self.send({"kind": "all", **self._all()})

    def _all(self) -> dict[str, Any]:
        return {"lanes": {name: track.all() for name, track in self._tracks.items()}, "machine": self._machine()}

    def page_state(self) -> dict[str, Any]:
        """The traits, and what the lanes have read: a page shows where the streams stood."""
        with self._lock:
            return super().page_state() | {"snapshot": self._all()}

    def still(self) -> Still:
        """Perplexity against position, one curve per lane."""
        curves = {}
        for name, track in self.tracks.items():
            positions, values = track.curve()
            if len(values) > 1:
                curves[LANES[name]] = np.interp(np.arange(1, positions[-1] + 1), positions, values)
        note = f"{self.about['source']} · {self.sinks} sinks, {self.recent} recent"
        return draw_still(curves, self.title, note)


def explore_stream(
    lm: LM,
    text: Text | None = None,
    *,
    lanes: list[str] | None = None,
    sinks: int = 4,
    recent: int = 252,
) -> StreamExplorer:
    """Watch a text being read under several policies at once, live: start, pause, move the sliders while it runs.

    Args:
        lm: the model.
        text: text or ids; the embedded text by default. `read` and `write` change it later, and so does the view.
        lanes: any of "dense", "window", "sinks", "recompute"; dense, window and sinks by default.
        sinks: attention sinks of the lane with sinks.
        recent: width of its window; the other lanes keep as many tokens in all.

    Raises:
        TextTooShort: fewer than 2 tokens.
        SqvizError: lanes that are not known; numbers that make no sense.
    """
    chosen = ["dense", "window", "sinks"] if lanes is None else list(lanes)
    if not chosen or any(name not in LANES for name in chosen):
        raise SqvizError(f"lanes={chosen}: one or more of {', '.join(map(repr, LANES))} are needed")
    if sinks < 0 or recent < 1:
        raise SqvizError(f"sinks={sinks}, recent={recent}: at least 0 and 1 are needed")
    source = "text"
    if text is None:
        from sqviz.corpus.source import text as embedded

        text, source = embedded(), "embedded text"
    ids = as_tokens(lm, text)
    if len(ids) < 2:
        raise TextTooShort(f"{len(ids)} token: one to give and one to predict are needed")
    return StreamExplorer(lm, ids, source, chosen, sinks, recent)

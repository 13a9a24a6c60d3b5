"""The computing behind the smoothing explorer: what the page cannot compute from vectors, on one worker thread.

The engine is given states and publishes results by name; it knows no widget. Work, from the most urgent:

    answer    the error at α: sampled while the hand moves, exact when it rests
    picture   the arrays of a group that is opened
    exact     the exact error of a linear too large for the moving hand
    measure   the activations of the sample text, once (or per block, where all are too many)
    export    sweeps that an exported page needs
    estimate  perplexity of the whole model under a state
    sweep     the error curve of the linear in view; its error at every stop of the slider, so that none has to be asked
              for any more; then the curve of the same linear in every other layer

Every result says which state it belongs to, so that the page can tell a stale one.
"""

import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float16
from torch import Tensor

from sqviz.corpus.segments import Text
from sqviz.errors import NonFinite
from sqviz.models.linears import groups
from sqviz.models.lm import LM
from sqviz.observe.magnitudes import Magnitudes
from sqviz.quant.error import ALPHAS, LinearProbe
from sqviz.quant.schemes import Scheme
from sqviz.widgets.smoothing_estimate import Estimator
from sqviz.widgets.smoothing_pack import group_pack
from sqviz.widgets.smoothing_probes import STOPS, SWEEP_COLUMNS, Errors, Probes
from sqviz.widgets.smoothing_sample import BUDGET_BYTES, SAMPLE_TOKENS, Sample, held_tokens, longest
from sqviz.widgets.smoothing_state import State, answer_for, scheme_key
from sqviz.widgets.worker import Pace, Turn, Worker

LANES = ("answer", "picture", "exact", "measure", "export", "estimate", "sweep")
QUICK_PRODUCT = 1_500_000_000
"""Multiplications up to which the exact error comes as fast as the hand moves."""
STOPS_AT_ONCE = 8
"""Stops of the slider whose errors are asked for, and kept, together."""
Publish = Callable[..., None]


class Engine:
    """Answers for one explorer. `publish(name=value, …)` is called on the worker's thread."""

    def __init__(
        self,
        lm: LM,
        magnitudes: Magnitudes,
        text: Text | None,
        state: State,
        publish: Publish,
        *,
        budget_bytes: int = BUDGET_BYTES,
    ) -> None:
        self.lm, self.magnitudes, self.state = lm, magnitudes, state
        self._text, self._budget, self._publish = text, budget_bytes, publish
        self.worker = Worker(LANES, self._failed, name="sqviz smoothing")
        self._index = {name: place for place, name in enumerate(magnitudes.names)}
        self._resolved = {group.name: group for group in groups(lm)}
        self._group_of = {name: group for group in magnitudes.groups for name in group.consumers}
        self._sample: Sample | None = None
        self._maps: dict[str, Float16[Tensor, "bin channel"]] = {}
        self._probes, self._errors = Probes(lm, magnitudes, self._resolved), Errors(len(self._index))
        self._status: dict[str, dict[str, Any]] = {}
        self._status_lock = threading.Lock()
        self._estimator = Estimator(lm, magnitudes, text, self._report)

    # --- what the explorer asks for ---

    def start(self) -> None:
        """Measure the sample, then answer for the present state and sweep."""
        self._submit("measure", self._measure)

    def ask(self, state: State) -> None:
        """α was moved, or let go."""
        self.state = state
        self._publish(problem="")
        self.worker.cancel("exact", "estimate")
        self._drop_status("estimate")
        quick, known = self._quick(state.linear), self._errors.known(state.linear, state.scheme, state.alpha)
        if known is not None:
            self._publish(answer=answer_for(state, known))
        else:
            self.worker.submit("answer", lambda turn: self._answer(turn, state, exact=quick), interrupt=False)
        if not quick and not state.moving:
            self.worker.submit("exact", lambda turn: self._answer(turn, state, exact=True))

    def open(self, state: State) -> None:
        """Another linear came into view."""
        self.state = state
        self.worker.submit("picture", lambda turn: self._picture(turn, state.linear))
        if self._sample is not None and self._sample.get(self._group_of[state.linear].name) is None:
            self._submit("measure", self._measure)
        self.ask(state)
        self._submit("sweep", self._sweep)

    def rescheme(self, state: State) -> None:
        """The scheme changed."""
        self.state = state
        self.publish_sweeps()
        self.ask(state)
        self._submit("sweep", self._sweep)

    def estimate(self, state: State) -> None:
        """Perplexity of the whole model under `state`, beside the model as it is."""

        def work(turn: Turn) -> None:
            try:
                self._publish(estimate=self._estimator.run(turn, state))
            finally:
                self._drop_status("estimate")

        self._submit("estimate", work)

    def cancel_estimate(self) -> None:
        """Stop the estimate; it is gone from the status at once, and from the thread at its next step."""
        self.worker.cancel("estimate")
        self._drop_status("estimate")

    def close(self) -> None:
        """Stop everything and end the thread."""
        self.worker.close()

    # --- what it computes ---

    def picture(self, linear: str) -> bytes:
        """The pack of the group that `linear` belongs to."""
        return self.pack(self._group_of[linear].name)

    def sweeps_of(self, scheme: Scheme) -> Float[np.ndarray, "linear alpha"]:
        """Swept errors by linear: NaN where not swept, −1 where not finite; the last column is without smoothing."""
        return self._errors.sweeps(scheme)

    def publish_sweeps(self) -> None:
        """The sweeps of the present scheme, as far as they are."""
        scheme = self.state.scheme
        self._publish(sweeps_for=scheme_key(scheme), sweeps=self.sweeps_of(scheme).tobytes())

    def complete(self, linears: Sequence[str], turn: Turn | None = None) -> threading.Event:
        """Sweep all of these linears under the present scheme; on the worker's thread, or at once given its `turn`."""
        done = threading.Event()

        def work(mine: Turn) -> None:
            try:
                for linear in linears:
                    if self._x(linear) is None:
                        self._measure_block(mine, linear)
                    self._sweep_one(mine, linear, self.state.scheme)
                self.publish_sweeps()
            finally:
                done.set()

        if turn is not None:
            work(turn)
        elif self.worker.submit("export", work) == 0:
            done.set()  # closed: what was swept before is all there is
        return done

    def _answer(self, turn: Turn, state: State, *, exact: bool) -> None:
        probe = self._probe(state.linear, state.scheme)
        if probe is None:
            if not self.worker.busy("measure"):  # it failed before, or this is the first question after that
                self._submit("measure", self._measure)
            return  # the measuring job asks again once the activations are there
        found = probe.exact(state.alpha, turn) if exact else probe.coarse(state.alpha, turn)
        turn.check()
        if exact == self._quick(state.linear):
            self._errors.learn(state.linear, state.scheme, state.alpha, found)
        self._publish(answer=answer_for(state, found))

    def _picture(self, turn: Turn, linear: str) -> None:
        data = self.picture(linear)
        turn.check()
        self._publish(picture=data)

    def _measure(self, turn: Turn) -> None:
        try:
            self._measure_block(turn, self.state.linear)
        finally:
            self._drop_status("activations")
        self.ask_again()

    def ask_again(self) -> None:
        """Answer for the present state, and go on sweeping."""
        self.ask(self.state)
        self._submit("sweep", self._sweep)

    def _measure_block(self, turn: Turn, linear: str) -> None:
        self._report("activations", 0, 1, "measuring activations")
        if self._sample is None:
            count = longest(self.lm, SAMPLE_TOKENS)
            self._sample = Sample(self.lm, held_tokens(self.lm, self.magnitudes, self._text, count), self._budget)
        sample, group = self._sample, self._group_of[linear].name
        pace = Pace()

        def report(done: int, total: int) -> None:
            if pace.due():
                self._report("activations", done, total, f"measuring activations, {done} of {total} inputs")

        def arrived(name: str) -> None:
            if name == self._group_of[self.state.linear].name:
                self.ask(self.state)

        if sample.get(group) is None:
            sample.measure(turn, group, report, arrived)
        if not self._maps and any(len(self.magnitudes.inputs[g.name].map) == 0 for g in self.magnitudes.groups):
            self._report("activations", 0, 1, "measuring token maps")
            self._maps = sample.maps(turn, self.magnitudes)
            self._picture(turn, self.state.linear)

    def _sweep(self, turn: Turn) -> None:
        """The linear in view, then the same one in every other layer, the nearest first."""
        state = self.state
        order = self._alike(state.linear)
        rows = self.sweeps_of(state.scheme)
        pace = Pace(4)
        try:
            for done, linear in enumerate(order):
                if self._x(linear) is None or not np.isnan(rows[self._index[linear], 0]):
                    continue
                self._report("sweep", done, len(order), f"sweeping α, {done} of {len(order)} layers")
                self._sweep_one(turn, linear, state.scheme)
                if linear == state.linear or pace.due():
                    self.publish_sweeps()
                if linear == state.linear:
                    self._refine(turn, state)
        finally:
            self._drop_status("sweep")
        self.publish_sweeps()
        self._refine(turn, state)

    def _refine(self, turn: Turn, state: State) -> None:
        """The error at every stop of the slider, from α outwards: exact, or sampled where that would take too long."""
        if self.sweeps_of(state.scheme)[self._index[state.linear], 0] < 0:
            return  # there is no error to speak of
        probe, exact = self._probe(state.linear, state.scheme), self._quick(state.linear)
        here, pace = round(state.alpha * (STOPS - 1)), Pace(4)
        order = sorted(range(STOPS), key=lambda stop: abs(stop - here))
        for first in range(0, STOPS if probe is not None else 0, STOPS_AT_ONCE):
            turn.check("refining")
            alphas = [stop / (STOPS - 1) for stop in order[first : first + STOPS_AT_ONCE]]
            alphas = [a for a in alphas if self._errors.known(state.linear, state.scheme, a) is None]
            assert probe is not None
            for alpha, found in zip(alphas, probe.ask(alphas, exact=exact, cancel=turn), strict=True):
                self._errors.learn(state.linear, state.scheme, alpha, found)
            if pace.due():
                self._publish(stops=self._errors.stops(state.linear, state.scheme))
        self._publish(stops=self._errors.stops(state.linear, state.scheme))

    def _sweep_one(self, turn: Turn, linear: str, scheme: Scheme) -> None:
        row = self.sweeps_of(scheme)[self._index[linear]]
        if self._x(linear) is None or not np.isnan(row[0]):
            return
        exact = self._quick(linear)
        asked: list[float | Tensor] = [*ALPHAS, torch.ones(self._probes.vectors(linear).x_absmax.shape)]
        values = np.full(SWEEP_COLUMNS, -1.0, dtype="<f4")
        try:
            probe = self._probe(linear, scheme)
            assert probe is not None
            turn.check("the sweep")
            for place, found in enumerate(probe.ask(asked, exact=exact, cancel=turn)):
                values[place] = found.frobenius if math.isfinite(found.frobenius) else -1.0
        except NonFinite:
            pass  # there is no error to speak of, and −1 says so
        row[:] = values

    # --- what it holds ---

    def _x(self, linear: str) -> Float[Tensor, "token channel"] | None:
        return None if self._sample is None else self._sample.get(self._group_of[linear].name)

    def _probe(self, linear: str, scheme: Scheme) -> LinearProbe | None:
        """The probe of a linear under a scheme; None while its input is not measured."""
        x = self._x(linear)
        return None if x is None else self._probes.probe(linear, scheme, x)

    def _quick(self, linear: str) -> bool:
        """Whether the exact error comes as fast as the hand moves."""
        weights = self.magnitudes.weights[linear]
        return SAMPLE_TOKENS * len(weights.out_absmax) * len(weights.channel_absmax) <= QUICK_PRODUCT

    def _alike(self, linear: str) -> list[str]:
        """The same linear in every layer, from the one in view outwards."""
        group = self._group_of[linear]
        place = group.consumers.index(linear)
        alike = [other for other in self.magnitudes.groups if other.kind == group.kind and place < len(other.consumers)]
        alike.sort(key=lambda other: abs(other.block - group.block))
        return [other.consumers[place] for other in alike]

    def pack(self, group: str, **limits: int) -> bytes:
        """The arrays of a group; `limits` as in `group_pack`."""
        return group_pack(self.lm, self.magnitudes, self._resolved[group], self._maps.get(group), **limits)

    def swept(self, linears: Sequence[str]) -> int:
        """How many of these are swept under the present scheme."""
        rows = self.sweeps_of(self.state.scheme)
        return sum(not np.isnan(rows[self._index[linear], 0]) for linear in linears)

    # --- how it reports ---

    def _submit(self, lane: str, work: Callable[[Turn], None]) -> None:
        self.worker.submit(lane, work)

    def _report(self, what: str, done: int, total: int, text: str) -> None:
        with self._status_lock:
            self._status = {**self._status, what: {"done": done, "total": total, "text": text}}
        self._publish(status=self._status)

    def _drop_status(self, what: str) -> None:
        with self._status_lock:
            known = what in self._status
            self._status = {name: entry for name, entry in self._status.items() if name != what}
        if known:
            self._publish(status=self._status)

    def _failed(self, lane: str, error: Exception) -> None:
        self._publish(problem=f"{type(error).__name__}: {error}")

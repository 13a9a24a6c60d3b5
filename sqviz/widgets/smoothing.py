"""The smoothing explorer: slide α, watch X/s and s·W flatten and the error of the linear's output fall and rise.

The page (smoothing*.js) computes every frame itself from vectors sent once per group of linears; the kernel
(smoothing_engine.py) supplies what needs a matrix product or the model. This file only wires the two.

Traits, both ways: alpha, moving, linear, scheme, folds, estimate_on_release. From the kernel: about, picture, sweeps,
sweeps_for, stops, answer, estimate, status, problem, code. Messages from the page: {"kind": …} with "estimate",
"cancel" or "export". Arrays travel as packs (smoothing_pack.py), and as float32: sweeps [linear, α…, without
smoothing], and in stops the errors of the linear in view at α = 0, 0.01 … 1.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import traitlets

from sqviz.corpus.segments import Text
from sqviz.errors import Cancelled, SqvizError
from sqviz.models.lm import LM
from sqviz.observe.magnitudes import Magnitudes
from sqviz.progress import progress as progress_bar
from sqviz.quant.error import ALPHAS
from sqviz.quant.plan import Folds, check_alpha
from sqviz.quant.schemes import PRESETS, W8A8, Scheme
from sqviz.widgets.smoothing_engine import Engine
from sqviz.widgets.smoothing_estimate import smooth_online
from sqviz.widgets.smoothing_export import PAGE_BYTES, choose_linears, embed
from sqviz.widgets.smoothing_sample import BUDGET_BYTES
from sqviz.widgets.smoothing_state import (
    PRESET_LABELS,
    SLACK,
    State,
    catalogue,
    check_folds,
    check_linear,
    check_same_model,
    code_template,
    first_linear,
    named,
    open_linear,
    scheme_from_page,
    scheme_key,
    scheme_to_page,
)
from sqviz.widgets.smoothing_still import draw_still
from sqviz.widgets.still import Still
from sqviz.widgets.view import View, build_page
from sqviz.widgets.worker import Turn, heard_while_busy


class SmoothingExplorer(View):
    """See `explore_smoothing`. Assign `alpha`, `linear`, `scheme`, `folds`; read `answer`, `estimate`; `close()` it."""

    _scripts = (
        "draw.js",
        "smoothing_formula.js",
        "smoothing_store.js",
        "smoothing_maps.js",
        "smoothing_maxima.js",
        "smoothing_curves.js",
        "smoothing_controls.js",
        "smoothing.js",
    )
    _styles = ("base.css", "smoothing.css")

    about = traitlets.Dict().tag(sync=True)
    alpha = traitlets.Float(0.5).tag(sync=True, echo_update=False)  # an echo would only trail behind the hand
    moving = traitlets.Bool(False).tag(sync=True, echo_update=False)
    linear = traitlets.Unicode().tag(sync=True)
    scheme = traitlets.Any().tag(sync=True)
    folds = traitlets.Unicode("all").tag(sync=True)
    estimate_on_release = traitlets.Bool(False).tag(sync=True)
    picture = traitlets.Bytes().tag(sync=True)
    embedded = traitlets.Bytes().tag(sync=True)
    sweeps = traitlets.Bytes().tag(sync=True)
    sweeps_for = traitlets.Unicode().tag(sync=True)
    stops = traitlets.Dict().tag(sync=True)
    answer = traitlets.Dict().tag(sync=True)
    estimate = traitlets.Dict().tag(sync=True)
    status = traitlets.Dict().tag(sync=True)
    problem = traitlets.Unicode().tag(sync=True)
    code = traitlets.Unicode().tag(sync=True)

    def __init__(
        self, lm: LM, magnitudes: Magnitudes, text: Text | None, state: State, *, map_height: int, budget_bytes: int
    ) -> None:
        self._lock = threading.RLock()
        self._magnitudes, self._online = magnitudes, smooth_online(lm)
        self._engine = Engine(lm, magnitudes, text, state, self._publish, budget_bytes=budget_bytes)
        first = {"alpha": state.alpha, "linear": state.linear, "folds": state.folds}
        first["scheme"] = scheme_to_page(state.scheme)
        about = {
            "model": magnitudes.model or lm.name,
            "alphas": list(ALPHAS),
            "slack": SLACK,
            "linears": catalogue(magnitudes),
            "presets": [
                {"id": name, "label": label, "scheme": scheme_to_page(PRESETS[name])}
                for name, label in PRESET_LABELS.items()
            ],
            "first": first,
            "map_height": map_height,
            "embedded": [],
        }
        super().__init__(
            about=about,
            title=f"Smoothing · {about['model']}",
            picture=self._engine.picture(state.linear),
            code=code_template(state.scheme, state.folds, online=self._online),
            **first,
        )
        heard_while_busy(self)
        self._engine.publish_sweeps()
        self.observe(self._on_alpha, names=["alpha", "moving"])
        self.observe(self._on_linear, names=["linear"])
        self.observe(self._on_scheme, names=["scheme", "folds"])
        self.on_msg(self._message)
        self._asked: State | None = None
        self._engine.start()

    # --- the state, checked ---

    @traitlets.validate("alpha")
    def _check_alpha(self, proposal: Any) -> float:
        return check_alpha(proposal["value"])

    @traitlets.validate("folds")
    def _check_folds(self, proposal: Any) -> str:
        return check_folds(proposal["value"])

    @traitlets.validate("linear")
    def _check_linear(self, proposal: Any) -> str:
        return check_linear(self._magnitudes, proposal["value"])

    @traitlets.validate("scheme")
    def _check_scheme(self, proposal: Any) -> dict[str, Any]:
        value = proposal["value"]
        return scheme_to_page(value if isinstance(value, Scheme) else scheme_from_page(value))

    @property
    def state(self) -> State:
        """What is shown now."""
        return State(self.linear, self.alpha, scheme_from_page(self.scheme), check_folds(self.folds), self.moving)

    # --- from the page, and from Python ---

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """What the page sends. Messages may come on a thread of their own, and the worker publishes: one at a time."""
        with self._lock:
            super().set_state(sync_data)

    def _publish(self, **traits: Any) -> None:
        with self._lock:
            for name, value in traits.items():
                setattr(self, name, value)

    def _on_alpha(self, _: Any) -> None:
        state = self.state
        if state == self._asked:
            return  # alpha and moving came in one message
        self._asked = state
        self._engine.ask(state)
        self._estimate_if_wanted(state)

    def _on_linear(self, _: Any) -> None:
        self._engine.open(self.state)

    def _on_scheme(self, _: Any) -> None:
        state = self.state
        self._publish(code=code_template(state.scheme, state.folds, online=self._online))
        self._engine.rescheme(state)
        self._estimate_if_wanted(state)

    def _estimate_if_wanted(self, state: State) -> None:
        if self.estimate_on_release and not state.moving:
            self._engine.estimate(state)

    def _message(self, _: Any, content: Any, __: Any) -> None:
        kind = content.get("kind") if isinstance(content, dict) else None
        if kind == "estimate":
            self._engine.estimate(self.state)
        elif kind == "cancel":
            self._engine.cancel_estimate()
        elif kind == "export":
            self._engine.worker.submit("export", self._send_page)

    def _send_page(self, turn: Turn) -> None:
        linears = choose_linears(self._magnitudes, self.linear)
        self._engine.complete(linears, turn)
        page = build_page(self.title, str(self._esm), str(self._css), self._page_state(linears, PAGE_BYTES))
        self.send({"kind": "page", "name": f"smoothing-{self.linear}.html"}, buffers=[page.encode()])

    # --- kept pictures ---

    def to_html(
        self,
        path: str | Path | None = None,
        linears: str | Sequence[str] | None = None,
        *,
        budget_bytes: int = PAGE_BYTES,
        progress: bool = True,
    ) -> str | Path:
        """A page that works without a kernel: α, layer and linear stay live, the scheme stays as it is now.

        Args:
            path: where to write it; None returns the text of the page.
            linears: names or glob patterns of the linears to carry, such as "*.mlp.down_proj"; None: all linears of
                eight layers: the one in view, the one with the largest outliers, and evenly spaced ones.
            budget_bytes: of the arrays in the page; maps get coarser, then groups are left out, to stay within.
            progress: draw a bar while error curves that are missing are computed.

        Raises:
            NoSuchLayer: a name or pattern matches nothing.
        """
        chosen = choose_linears(self._magnitudes, self.linear, linears)
        self._complete(chosen, progress)
        page = build_page(self.title, str(self._esm), str(self._css), self._page_state(chosen, budget_bytes))
        if path is None:
            return page
        Path(path).write_text(page, encoding="utf-8")
        return Path(path)

    def _complete(self, linears: Sequence[str], show: bool) -> None:
        """Wait until all of these are swept, with a bar that can cancel."""
        engine, known = self._engine, 0
        done = engine.complete(linears)
        with progress_bar(len(linears), "error curves", unit="linears", show=show) as bar:
            while not done.wait(0.05) and engine.worker.busy("export"):
                swept = engine.swept(linears)
                try:
                    bar.step(swept - known)
                except Cancelled:
                    engine.worker.cancel("export")
                    raise
                known = swept

    def _page_state(self, linears: Sequence[str], budget_bytes: int) -> dict[str, Any]:
        packs, held = embed(self._magnitudes, linears, self.linear, self._engine.pack, budget_bytes)
        sweeps = self._engine.sweeps_of(self.state.scheme).tobytes()
        about = {**self.about, "embedded": held, "first": {**self.about["first"], "linear": self.linear}}
        return {
            **self.page_state(),
            "about": about,
            "embedded": packs,
            "picture": b"",
            "sweeps": sweeps,
            "sweeps_for": scheme_key(self.state.scheme),
            "moving": False,
            "status": {},
            "problem": "",
        }

    def still(self) -> Still:
        """The view at this α, drawn without a browser."""
        state = self.state
        sweep = self._engine.sweeps_of(state.scheme)[self._magnitudes.names.index(state.linear)]
        pack = self._engine.picture(state.linear)
        return draw_still(pack, state.linear, state.alpha, state.scheme, sweep, self.title)

    def close(self) -> None:
        """Stop the worker and remove the view."""
        self._engine.close()
        super().close()


def explore_smoothing(
    lm: LM,
    magnitudes: Magnitudes,
    *,
    text: Text | None = None,
    alpha: float = 0.5,
    linear: str | int | None = None,
    scheme: Scheme = W8A8,
    folds: Folds = "all",
    map_height: int = 240,
    budget_bytes: int = BUDGET_BYTES,
) -> SmoothingExplorer:
    """Slide α and watch: channel maxima of X/s and s·W, the error of a linear's output, and perplexity on request.

    The arrows of the keyboard move α. The view keeps working where there is no kernel: `to_html()`.

    Args:
        lm: the model; left as it was, and used by the view through a private copy of its module tree.
        magnitudes: `sqviz.capture(lm, …)` of the same model.
        text: on which errors and perplexity are measured (512 and 1024 tokens); None: addresses that are not the
            calibration's, or for a model without tokenizer the end of the calibration stream.
        alpha: migration strength at the start, in [0, 1].
        linear: where to open: a linear's name or an end of it, or a block; None: where outliers stand out most.
        scheme: how weights and activations are quantised at the start.
        folds: "norm" or "all", see `sqviz.smooth`: used for perplexity and in the copied code.
        map_height: of the token map, in CSS pixels.
        budget_bytes: for the activations of the sample text; above it, those of one block are kept at a time.

    Raises:
        SqvizError: α, scheme or folds out of range; magnitudes of a model that was smoothed otherwise.
        NoSuchLayer: `linear` fits nothing, or the magnitudes are another model's.
    """
    if not isinstance(scheme, Scheme):
        raise SqvizError(f"scheme={scheme!r}: a sqviz.Scheme is needed, such as sqviz.W8A8.")
    check_same_model(lm, magnitudes)
    opened = first_linear(magnitudes) if linear is None else open_linear(magnitudes, linear)
    state = State(opened, check_alpha(alpha), named(scheme), check_folds(folds))
    return SmoothingExplorer(lm, magnitudes, text, state, map_height=map_height, budget_bytes=budget_bytes)

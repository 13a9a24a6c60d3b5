"""Perplexity curves that grow while a comparison runs, with a button that stops it."""

import time
from types import TracebackType
from typing import Any

import ipywidgets
import plotly.graph_objects as go
from IPython.display import display
from jaxtyping import Float
from torch import Tensor

from sqviz.plots.streams import perplexity_axis, perplexity_curves, thin
from sqviz.progress import CancelToken
from sqviz.streaming.perplexity import perplexity_within
from sqviz.widgets.worker import heard_while_busy

REDRAW_SECONDS = 0.4
POINTS = 400


class LiveCurves:
    """A figure in the output of the cell, for the length of a `with` block; called as `live(label, read, nll)`.

    It goes away with the block: the result that the cell returns shows the finished curves.
    """

    def __init__(self, labels: list[str], tokens: int, title: str, cancel: CancelToken) -> None:
        self._tokens, self._window, self._drawn = tokens, max(16, tokens // 10), 0.0
        figure = perplexity_curves({label: [] for label in labels}, title)
        self._figure = go.FigureWidget(figure)
        self._figure.update_xaxes(range=[0, tokens])
        self._place = {label: place for place, label in enumerate(labels)}
        self._shown: dict[str, Any] = {}
        self._label = ipywidgets.Label("starting")
        self._button = ipywidgets.Button(description="Cancel", tooltip="Stop after the next block")
        self._button.on_click(lambda _: cancel.cancel())
        heard_while_busy(self._button)
        self._box = ipywidgets.VBox([self._figure, ipywidgets.HBox([self._button, self._label])])

    def __enter__(self) -> "LiveCurves":
        self._handle: Any = display(self._box, display_id=True)
        return self

    def __call__(self, label: str, read: int, nll: Float[Tensor, " predicted"]) -> None:
        """Draw what is known of one curve; at most every REDRAW_SECONDS, and at its end."""
        now = time.monotonic()
        if now - self._drawn < REDRAW_SECONDS and read < self._tokens:
            return
        self._drawn = now
        curve = perplexity_within(nll, self._window).numpy()
        self._shown[label] = curve
        positions, values = thin(curve, POINTS)
        with self._figure.batch_update():
            self._figure.data[self._place[label]].x = positions
            self._figure.data[self._place[label]].y = values
            self._figure.update_yaxes(**perplexity_axis(self._shown))
        mean = float(nll.double().mean().exp())
        self._label.value = f"{label}: {read:,} of {self._tokens:,} tokens, perplexity {mean:.4g}"

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": self._label.value}, raw=True)
        for widget in (self._box, self._figure, self._button, self._label):
            widget.close()

"""Perplexity curves that grow while a comparison runs, with a button that stops it."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from sqviz.plots.streams import perplexity_axis, perplexity_curves, thin
from sqviz.progress import CancelToken
from sqviz.streaming.perplexity import perplexity_within
from sqviz.widgets.live_figure import LiveFigure

POINTS = 400


class LiveCurves(LiveFigure):
    """A line per policy; called as `live(label, read, nll)`."""

    def __init__(self, labels: list[str], tokens: int, title: str, cancel: CancelToken) -> None:
        super().__init__(perplexity_curves({label: [] for label in labels}, title), cancel, "after the next block")
        self._tokens, self._window = tokens, max(16, tokens // 10)
        self._figure.update_xaxes(range=[0, tokens])
        self._place = {label: place for place, label in enumerate(labels)}
        self._shown: dict[str, Any] = {}

    def __call__(self, label: str, read: int, nll: Float[Tensor, " predicted"]) -> None:
        """Draw what is known of one curve; at most every REDRAW_SECONDS, and at its end."""
        if not self.due() and read < self._tokens:
            return
        curve = perplexity_within(nll, self._window).numpy()
        self._shown[label] = curve
        positions, values = thin(curve, POINTS)
        with self._figure.batch_update():
            self._figure.data[self._place[label]].x = positions
            self._figure.data[self._place[label]].y = values
            self._figure.update_yaxes(**perplexity_axis(self._shown))
        mean = float(nll.double().mean().exp())
        self._label.value = f"{label}: {read:,} of {self._tokens:,} tokens, perplexity {mean:.4g}"

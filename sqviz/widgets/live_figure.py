"""`LiveFigure`: a plotly figure in the output of the cell that runs, which grows, with a button that stops the work."""

import time
from types import TracebackType
from typing import Any, Self

import ipywidgets
import plotly.graph_objects as go
from IPython.display import display

from sqviz.progress import CancelToken
from sqviz.widgets.worker import heard_while_busy

REDRAW_SECONDS = 0.4


class LiveFigure:
    """A figure, a button and a line of text, for the length of a `with` block.

    It goes away with the block: the result that the cell returns shows the finished figure.
    """

    def __init__(self, figure: go.Figure, cancel: CancelToken, stops: str) -> None:
        """`stops`: when the button stops the work, in words: "after the next block"."""
        self._drawn = 0.0
        self._figure = go.FigureWidget(figure)
        self._label = ipywidgets.Label("starting")
        self._button = ipywidgets.Button(description="Cancel", tooltip=f"Stop {stops}")
        self._button.on_click(lambda _: cancel.cancel())
        heard_while_busy(self._button)
        self._box = ipywidgets.VBox([self._figure, ipywidgets.HBox([self._button, self._label])])

    def due(self) -> bool:
        """Whether the last drawing lies far enough back; if so, this one counts as the last."""
        now = time.monotonic()
        if now - self._drawn < REDRAW_SECONDS:
            return False
        self._drawn = now
        return True

    def __enter__(self) -> Self:
        self._handle: Any = display(self._box, display_id=True)
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": self._label.value}, raw=True)
        for widget in (self._box, self._figure, self._button, self._label):
            widget.close()

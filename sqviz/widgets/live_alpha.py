"""The α curve while it grows, with a button that stops it."""

from sqviz.evaluation.alpha_result import AlphaCurve
from sqviz.progress import CancelToken
from sqviz.widgets.live_figure import LiveFigure


class LiveAlpha(LiveFigure):
    """Called with the curve so far."""

    def __init__(self, curve: AlphaCurve, cancel: CancelToken) -> None:
        super().__init__(curve.figure(), cancel, "after this point; what is there is kept")
        self._total = len(curve.schemes) * len(curve.alphas)

    def __call__(self, curve: AlphaCurve) -> None:
        """Draw what is known; at most every REDRAW_SECONDS, and at the end."""
        point, done = curve.points[-1], len(curve.points)
        strength = "not smoothed" if point.alpha is None else f"α = {point.alpha:g}"
        self._label.value = (
            f"{done} of {self._total} points; {point.scheme}, {strength}: perplexity {point.perplexity:.4g}"
        )
        if not self.due() and done < self._total:
            return
        new = curve.figure()
        with self._figure.batch_update():
            for old, trace in zip(self._figure.data, new.data, strict=True):
                old.update(x=trace.x, y=trace.y, text=trace.text)
            self._figure.layout.update(xaxis=new.layout.xaxis, xaxis2=new.layout.xaxis2)
            self._figure.layout.update(yaxis=new.layout.yaxis, yaxis2=new.layout.yaxis2)

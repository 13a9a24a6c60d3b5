"""`AlphaCurve`: what `alpha_curve` found, as lines against α (thesis Figure 3.8) and as a table."""

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

from sqviz.errors import SqvizError
from sqviz.quant.plan import FOLDS, Folds
from sqviz.shown import Shown

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from sqviz.plots.alpha import AlphaLines
    from sqviz.widgets.still import Still

Measure = Literal["perplexity", "divergence"]
TITLES: dict[Measure, str] = {"perplexity": "perplexity", "divergence": "KL, nats per token"}


@dataclasses.dataclass(frozen=True)
class AlphaPoint:
    """One scheme at one α (None: not smoothed): perplexity, and KL(p ‖ p̂) in nats per token, of the held text."""

    scheme: str
    alpha: float | None
    perplexity: float
    divergence: float


@dataclasses.dataclass(frozen=True, eq=False)
class AlphaCurve(Shown):
    """What a model loses under each scheme, against α.

    Attributes:
        points: those that are done, in the order in which they were.
        schemes, alphas: the lines and the grid that were asked for.
        reference: perplexity of the model itself.
        model: its name.
        folds: where the factors were folded.
        tokens, length: how many held tokens were scored, in segments of how many.
        seen: the share of them that the calibration contains.
        complete: False if the work was cancelled.
    """

    points: tuple[AlphaPoint, ...]
    schemes: tuple[str, ...]
    alphas: tuple[float | None, ...]
    reference: float
    model: str
    folds: Folds
    tokens: int
    length: int
    seen: float = 0.0
    complete: bool = True

    def best(self, scheme: str, by: Measure = "divergence") -> AlphaPoint:
        """The point of a scheme that loses least: its sweet spot.

        Raises:
            SqvizError: there is no such scheme, none of its points is done, or `by` is no measure.
        """
        if by not in TITLES:
            raise SqvizError(f"by={by!r}: one of {', '.join(TITLES)} is allowed.")
        mine = [point for point in self.points if point.scheme == scheme]
        if not mine:
            raise SqvizError(f"no point of {scheme!r} is done; there are: {', '.join(self._done) or 'none'}")
        return min(mine, key=lambda point: getattr(point, by))

    def to_frame(self) -> "pandas.DataFrame":
        """One row per point: scheme, alpha (NaN: not smoothed), perplexity, × unquantised, KL, and which is best."""
        import pandas

        best = {self.best(scheme) for scheme in self._done}
        return pandas.DataFrame(
            [
                {
                    "scheme": point.scheme,
                    "alpha": point.alpha,
                    "perplexity": point.perplexity,
                    "× unquantised": point.perplexity / self.reference,
                    "KL, nats per token": point.divergence,
                    "best": point in best,
                }
                for point in self.points
            ],
            columns=["scheme", "alpha", "perplexity", "× unquantised", "KL, nats per token", "best"],
        )

    @property
    def lines(self) -> "AlphaLines":
        """What `figure` shows: (α, value) by measure and by scheme."""
        return {
            title: {
                scheme: [(point.alpha, getattr(point, measure)) for point in self.points if point.scheme == scheme]
                for scheme in self.schemes
            }
            for measure, title in TITLES.items()
        }

    @property
    def _references(self) -> dict[str, float]:
        return {} if math.isnan(self.reference) else {TITLES["perplexity"]: self.reference}

    def figure(self) -> "plotly.graph_objects.Figure":
        """Perplexity and KL against α, a line per scheme; a star where it loses least."""
        from sqviz.plots.alpha import alpha_lines

        return alpha_lines(self.lines, self._references, self._title, self._note)

    def still(self) -> "Still":
        """The picture of `figure`, drawn without a browser."""
        from sqviz.widgets.alpha_still import alpha_lines_still

        return alpha_lines_still(self.lines, self._references, self._title, self._note)

    @property
    def _done(self) -> list[str]:
        return [scheme for scheme in self.schemes if any(point.scheme == scheme for point in self.points)]

    @property
    def _title(self) -> str:
        return f"What α costs · {self.model}" + ("" if self.complete else " (not finished)")

    @property
    def _note(self) -> str:
        folds = FOLDS[self.folds]
        seen = f"; {self.seen:.0%} of them stand in the calibration too!" if self.seen > 0.01 else ""
        return f"{self.tokens:,} tokens in segments of {self.length}, {folds}; a star marks the least{seen}"

    def __repr__(self) -> str:
        lines = [f"{self._title}: {self._note}"]
        if not math.isnan(self.reference):
            lines.append(f"unquantised: perplexity {self.reference:.4g}")
        for scheme in self._done:
            point = self.best(scheme)
            strength = "not smoothed" if point.alpha is None else f"α = {point.alpha:g}"
            lines.append(
                f"{scheme}: best {strength}, perplexity {point.perplexity:.4g} "
                f"({point.perplexity / self.reference - 1:+.1%}), KL {point.divergence:.3g} nats per token"
            )
        return "\n".join(lines)

"""`Comparison`: every score of one model against the same score of another, as numbers, words and a table."""

import dataclasses
from typing import TYPE_CHECKING, Any

from sqviz.errors import SqvizError
from sqviz.evaluation.paired import Difference, NotComparable, difference
from sqviz.evaluation.scores import Score, metric
from sqviz.shown import Shown

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from sqviz.plots.changes import Changes, Verdict
    from sqviz.widgets.still import Still


@dataclasses.dataclass(frozen=True)
class Comparison(Shown):
    """Paired differences between two models.

    Attributes:
        model, reference: their names.
        rows: one per score that both have, in the order of the first.
    """

    model: str
    reference: str
    rows: tuple[Difference, ...]

    def __getitem__(self, key: str | tuple[str, str]) -> Difference:
        """The difference in a task's first metric, or in the metric of a (task, metric)."""
        for row in self.rows:
            if key in (row.task, (row.task, row.metric)):
                return row
        there = ", ".join(f"{row.task} {row.metric}" for row in self.rows)
        raise SqvizError(f"{key!r} was not compared; there are: {there}")

    def to_frame(self) -> "pandas.DataFrame":
        """One row per score: both values, the change with its intervals, p and the verdict. Values as they are."""
        import pandas

        rows = []
        for row in self.rows:
            flat = {field.name: getattr(row, field.name) for field in dataclasses.fields(row) if field.name != "normal"}
            flat["normal low"], flat["normal high"] = row.normal or (None, None)
            rows.append(flat | {"verdict": row.verdict})
        return pandas.DataFrame(rows).set_index(["task", "metric"])

    @property
    def panels(self) -> "Changes":
        """What `figure` shows: changes with their intervals, by the unit that they are in."""
        from sqviz.plots.changes import Change

        found: dict[str, list[Change]] = {}
        for row in self.rows:
            scale, unit, none = _scale(row)
            label = metric(row.metric, row.higher_is_better).label
            what = {"points": "accuracy", "%": "perplexity"}.get(unit, label)
            axis = f"change in {what}, {unit}".removesuffix(", ")
            name = label if row.task == label else f"{row.task} · {label}"
            low, high = (None if end is None else (end - none) * scale for end in (row.low, row.high))
            verdict: Verdict = "not told apart from noise"
            if row.significant:
                verdict = "better" if row.better else "worse"
            made = Change(name, (row.change - none) * scale, low, high, verdict)
            found.setdefault(axis, []).append(made)
        return found

    def figure(self) -> "plotly.graph_objects.Figure":
        """A row per score: the change, its 95 % interval, and by shape whether it can be told apart from noise."""
        from sqviz.plots.changes import changes

        return changes(self.panels, f"{self.model}<br>against {self.reference}, 95 % intervals")

    def still(self) -> "Still":
        """The picture of `figure`, drawn without a browser."""
        from sqviz.widgets.changes_still import changes_still

        return changes_still(self.panels, self.model, f"against {self.reference}, paired by item, 95 % intervals")

    def __repr__(self) -> str:
        from sqviz.evaluation.table import comparison_text

        return comparison_text(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from sqviz.evaluation.table import comparison_html

        return {"text/plain": repr(self), "text/html": comparison_html(self)}


def compare(
    model: str, scores: tuple[Score, ...], reference: str, others: tuple[Score, ...], seed: int = 0
) -> Comparison:
    """Every score that both have; those without a value in one of the two are left out.

    Raises:
        NotComparable: no score in common, or one over other items.
    """
    known = {(other.task, other.metric): other for other in others}
    pairs = [(score, known[score.task, score.metric]) for score in scores if (score.task, score.metric) in known]
    if not pairs:
        names = [", ".join(f"{one.task} {one.metric}" for one in side) or "nothing" for side in (scores, others)]
        raise NotComparable(f"the two evaluations have no score in common: {names[0]} in one, {names[1]} in the other")
    rows = tuple(
        difference(score, other, seed) for score, other in pairs if score.value is not None and other.value is not None
    )
    return Comparison(model, reference, rows)


def change_shown(row: Difference) -> tuple[str, str]:
    """A change and its interval for people: percentage points for an accuracy, per cent for a perplexity."""
    scale, unit, none = _scale(row)
    digits = 2 if scale == 100 else 4
    low, high = ((None if end is None else (end - none) * scale) for end in (row.low, row.high))
    interval = "one item: none" if low is None or high is None else f"{low:+.{digits}f} … {high:+.{digits}f}"
    return f"{(row.change - none) * scale:+.{digits}f} {unit}".rstrip(), interval


def _scale(row: Difference) -> tuple[float, str, float]:
    """How a change is shown: what it is multiplied by, the unit then, and the value that stands for no change."""
    if row.relative:
        return 100.0, "%", 1.0
    known = metric(row.metric, row.higher_is_better)
    return known.scale, "points" if known.unit == "%" else known.unit, 0.0

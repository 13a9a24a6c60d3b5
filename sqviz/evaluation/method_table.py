"""`MethodTable`: what `compare` found, as a table and a picture (thesis Table 3.3)."""

import dataclasses
from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

from sqviz.errors import SqvizError
from sqviz.evaluation.comparison import change_shown
from sqviz.evaluation.result import Evaluation
from sqviz.evaluation.scores import metric
from sqviz.progress import in_notebook
from sqviz.shown import Shown

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from sqviz.widgets.still import Still


@dataclasses.dataclass(frozen=True, eq=False)
class MethodRow:
    """One method.

    Attributes:
        name, describe: what it is called, and what it does.
        evaluation: its scores; None if the model cannot have it.
        bytes: of its weights as deployed.
        milliseconds: reading 128 tokens, executed in integers; None if that was not measured or cannot be.
        itself: the same of the model itself, in the same run.
        error: why there are no scores.
    """

    name: str
    describe: str
    evaluation: Evaluation | None
    bytes: int
    milliseconds: float | None
    itself: float | None
    error: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON knows it."""
        assert self.evaluation is not None
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "evaluation": self.evaluation.to_json()}

    @classmethod
    def read(cls, held: Mapping[str, Any]) -> "MethodRow":
        """What `plain` made."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{**{name: held[name] for name in names}, "evaluation": Evaluation.from_json(held["evaluation"])})


@dataclasses.dataclass(frozen=True, eq=False)
class MethodTable(Shown):
    """Methods side by side; the first row is the model itself, and what the others are compared with.

    Attributes:
        model: its name.
        rows: finished ones, in the order asked for.
        complete: False if the comparison was cancelled.
    """

    model: str
    rows: tuple[MethodRow, ...]
    complete: bool = True

    def __getitem__(self, name: str) -> MethodRow:
        """The row of a method. Raises `SqvizError` if there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise SqvizError(f"there is no method {name!r}; there are: {', '.join(row.name for row in self.rows)}")

    def to_frame(self) -> "pandas.DataFrame":
        """One row per method: scores, their change against the first row with a 95 % interval, size, latency."""
        import pandas

        return pandas.DataFrame([self._values(row) for row in self.rows]).set_index("method")

    @property
    def panels(self) -> dict[str, dict[str, float]]:
        """What `figure` shows: the first metric of each task, and the size, by method."""
        found: dict[str, dict[str, float]] = {}
        for row in self.rows:
            seen: set[str] = set()
            for score in () if row.evaluation is None else row.evaluation.scores:
                if score.task not in seen and score.value is not None:
                    seen.add(score.task)
                    known = metric(score.metric, score.higher_is_better)
                    title = f"{score.task}: {known.label}{f', {known.unit}' if known.unit else ''}"
                    found.setdefault(title, {})[row.name] = score.value * known.scale
        whole = {name: values for name, values in found.items() if len(values) == len(self._scored)}
        return whole | {"weights, MB": {row.name: row.bytes / 1e6 for row in self._scored}}

    def figure(self) -> "plotly.graph_objects.Figure":
        """A bar per method for each quantity."""
        from sqviz.plots.bars import bars

        return bars(self.panels, self._title)

    def still(self) -> "Still":
        """The picture of `figure`, drawn without a browser."""
        from sqviz.widgets.bars_still import bars_still

        return bars_still(self.panels, self._title, "size as deployed; the first row is the model itself")

    @property
    def _scored(self) -> list[MethodRow]:
        return [row for row in self.rows if row.evaluation is not None]

    @property
    def _title(self) -> str:
        return f"Quantised in {len(self.rows)} ways · {self.model}" + ("" if self.complete else " (not finished)")

    def _values(self, row: MethodRow) -> dict[str, Any]:
        values: dict[str, Any] = {"method": row.name, "what": row.describe}
        first = self.rows[0].evaluation
        for score in () if row.evaluation is None else row.evaluation.scores:
            known = metric(score.metric, score.higher_is_better)
            label = f"{score.task} {known.label}{f', {known.unit}' if known.unit else ''}"
            values[label] = None if score.value is None else score.value * known.scale
            if first is not None and row is not self.rows[0] and score.value is not None and row.evaluation is not None:
                change, interval = change_shown((row.evaluation - first)[score.task, score.metric])
                values[f"{label}: change"] = change
                values[f"{label}: 95 % interval"] = interval
        values["weights, MB"] = row.bytes / 1e6
        values["128 tokens, ms"] = row.milliseconds
        values["× faster"] = row.itself / row.milliseconds if row.itself and row.milliseconds else None
        values["why not"] = row.error
        return values

    def _shown(self) -> "pandas.DataFrame":
        """The frame without columns that hold nothing."""
        frame = self.to_frame()
        return frame[
            [name for name in frame if frame[name].map(lambda cell: cell not in (None, "") and cell == cell).any()]
        ]

    def __repr__(self) -> str:
        if not self.rows:
            return f"{self._title}: no row is finished"
        return f"{self._title}\n{self._shown().to_string(float_format=_number, na_rep='')}"

    def to_table(self) -> str:
        """An HTML table, which takes its colours from the page."""
        if not self.rows:
            return f"<p>{escape(self._title)}: no row is finished</p>"
        table = self._shown().to_html(float_format=_number, na_rep="", border=0)
        return f"<p>{escape(self._title)}</p><div style='overflow-x: auto'>{table}</div>"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {"text/html": self.to_table(), "text/plain": repr(self)}


def live_table() -> Callable[[MethodTable], None]:
    """Shows a table in the notebook cell that runs, in place of the one before; does nothing where there is no cell."""
    if not in_notebook():
        return lambda table: None
    from IPython.display import display

    handle: Any = display({"text/plain": "the first row is being computed"}, raw=True, display_id=True)
    return lambda table: handle.update(table)


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.3g}"

"""`MethodTable`: what `compare` found, as a table and a picture (thesis Table 3.3)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sqviz.errors import SqvizError
from sqviz.evaluation.comparison import change_shown
from sqviz.evaluation.method_sheet import Sheet, change, label_of, sheet_of
from sqviz.evaluation.result import Evaluation
from sqviz.evaluation.scores import metric
from sqviz.shown import Shown

if TYPE_CHECKING:
    import pandas
    import plotly.graph_objects

    from sqviz.widgets.method_table import MethodTableView
    from sqviz.widgets.still import Still

Against = Literal["size", "latency"]


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
        untimed: why there are no milliseconds, if they were asked for.
    """

    name: str
    describe: str
    evaluation: Evaluation | None
    bytes: int
    milliseconds: float | None
    itself: float | None
    error: str = ""
    untimed: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON knows it."""
        assert self.evaluation is not None
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**values, "evaluation": self.evaluation.to_json()}

    @classmethod
    def read(cls, held: Mapping[str, Any]) -> "MethodRow":
        """What `plain` made; a field that has a default may be missing. Raises `KeyError`, `SqvizError`."""
        plain = dataclasses.MISSING
        names = [field.name for field in dataclasses.fields(cls) if field.name in held or field.default is plain]
        return cls(**{**{name: held[name] for name in names}, "evaluation": Evaluation.from_json(held["evaluation"])})


@dataclasses.dataclass(frozen=True, eq=False)
class MethodTable(Shown):
    """Methods side by side; the first row is the model itself, and what the others are compared with.

    Attributes:
        model: its name.
        rows: finished ones, in the order asked for.
        missing: names of those that were not reached, because the comparison was cancelled.
    """

    model: str
    rows: tuple[MethodRow, ...]
    missing: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every row asked for is there."""
        return not self.missing

    def __getitem__(self, name: str) -> MethodRow:
        """The row of a method. Raises `SqvizError` if there is none."""
        for row in self.rows:
            if row.name == name:
                return row
        raise SqvizError(f"there is no method {name!r}; there are: {', '.join(row.name for row in self.rows)}")

    def to_frame(self) -> "pandas.DataFrame":
        """One row per method: scores, their change against the first row with a 95 % interval, size, latency."""
        import pandas

        values = [self._values(row) for row in self.rows]
        return pandas.DataFrame(values, columns=None if values else ["method"]).set_index("method")

    def sheet(self) -> Sheet:
        """Columns and rows as plain values; see `method_sheet`."""
        return sheet_of(self.rows)

    def view(self) -> "MethodTableView":
        """The table as a widget: columns sort, changes are drawn with their intervals."""
        from sqviz.widgets.method_table import MethodTableView

        return MethodTableView(title=self.title, sheet=self.sheet())

    def figure(self, against: Against = "size") -> "plotly.graph_objects.Figure":
        """The first metric against the size of the weights, or against measured latency; a point per method.

        Raises:
            SqvizError: `against` is neither, or no row has both numbers.
        """
        from sqviz.plots.methods import methods_figure

        if against not in ("size", "latency"):
            raise SqvizError(f"against={against!r}: 'size' or 'latency' is allowed.")
        return methods_figure(self.sheet(), "size" if against == "size" else "time", self.title)

    def still(self) -> "Still":
        """The table with its intervals, drawn without a browser."""
        from sqviz.widgets.method_table_still import method_table_still

        return method_table_still(self.sheet(), self.title)

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """A page with the table, its columns sort: no kernel, no network. Written to `path`; None returns its text."""
        view = self.view()
        try:
            return view.to_html(path)
        finally:
            view.close()

    @property
    def title(self) -> str:
        """Over the table: how many methods, of which model."""
        of = "" if self.complete else f" of {len(self.rows) + len(self.missing)}"
        return f"{len(self.rows)}{of} methods · {self.model}" + ("" if self.complete else " (not finished)")

    def _values(self, row: MethodRow) -> dict[str, Any]:
        values: dict[str, Any] = {"method": row.name, "what": row.describe}
        for score in () if row.evaluation is None else row.evaluation.scores:
            label, known = label_of(score), metric(score.metric, score.higher_is_better)
            values[label] = None if score.value is None else score.value * known.scale
            if row is not self.rows[0] and (found := change(row.evaluation, self.rows[0].evaluation, score)):
                values[f"{label}: change"], values[f"{label}: 95 % interval"] = change_shown(found)
        values["weights, MB"] = row.bytes / 1e6
        values["128 tokens, ms"] = row.milliseconds
        values["× faster"] = row.itself / row.milliseconds if row.itself and row.milliseconds else None
        values["why not"] = row.error
        return values

    def __repr__(self) -> str:
        if not self.rows:
            return f"{self.title}: no row is finished"
        frame = self.to_frame()
        full = [name for name in frame if frame[name].map(lambda cell: cell not in (None, "") and cell == cell).any()]
        return f"{self.title}\n{frame[full].to_string(float_format=_number, na_rep='')}"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        """HTML that is a table everywhere and the view where scripts run: in a saved notebook too, without a kernel."""
        from sqviz.widgets.live_methods import gives_way
        from sqviz.widgets.method_table import as_html

        gives_way(self)
        return {"text/html": as_html(self.title, self.sheet()), "text/plain": repr(self)}


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 1e5 else f"{value:.3g}"

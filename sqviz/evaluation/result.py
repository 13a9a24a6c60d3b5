"""`Evaluation`: the scores of one model; saved as JSON, compared with those of another, shown as a table."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sqviz.errors import SqvizError
from sqviz.evaluation.comparison import Comparison, compare
from sqviz.evaluation.scores import Score

if TYPE_CHECKING:
    import pandas

FORMAT = "sqviz.evaluation/1"
"""What a saved evaluation calls itself; the number changes when older ones can no longer be read."""


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """The scores of a model.

    Attributes:
        model: its name, and what was done to it.
        scores: in the order asked for.
        reference: the evaluation of the model that it is to be compared with, if one was given.
        seed: of the bootstrap.
    """

    model: str
    scores: tuple[Score, ...]
    reference: "Evaluation | None" = None
    seed: int = 0

    def __getitem__(self, key: str | tuple[str, str]) -> Score:
        """The first score of a task, or that of a (task, metric).

        Raises:
            SqvizError: there is none; the message lists those there are.
        """
        for score in self.scores:
            if key in (score.task, (score.task, score.metric)):
                return score
        there = ", ".join(f"{score.task} {score.metric}" for score in self.scores) or "none"
        raise SqvizError(f"there is no score {key!r}; there are: {there}")

    def against(self, reference: "Evaluation") -> Comparison:
        """Paired differences to another model's scores on the same items: `evaluation - reference` does the same.

        Raises:
            NotComparable: no score in common, or one over other items.
        """
        if not isinstance(reference, Evaluation):
            raise SqvizError(
                f"against() takes an Evaluation, not {type(reference).__name__}: sqviz.evaluate(lm) makes one"
            )
        return compare(self.model, self.scores, reference.model, reference.scores, self.seed)

    def __sub__(self, reference: "Evaluation") -> Comparison:
        return self.against(reference) if isinstance(reference, Evaluation) else NotImplemented

    @property
    def comparison(self) -> Comparison | None:
        """Against the reference that `evaluate` was given; None without one."""
        return None if self.reference is None else self.against(self.reference)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per score; accuracies are fractions, not per cent."""
        import pandas

        hidden = {"items", "weights", "content"}
        names = [field.name for field in dataclasses.fields(Score) if field.name not in hidden]
        rows = [{name: getattr(score, name) for name in names} for score in self.scores]
        return pandas.DataFrame(rows, columns=names).set_index(["task", "metric"])

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str | Path:
        """Everything, items included, as JSON. Written to `path` in one step; None returns the text."""
        content = json.dumps(self._plain(), ensure_ascii=False, allow_nan=False)
        return content if path is None else _written(content, Path(path))

    @classmethod
    def from_json(cls, source: str | os.PathLike[str]) -> "Evaluation":
        """What `to_json` wrote: a path, or the text itself.

        Raises:
            SqvizError: it is not such a file.
            OSError: it cannot be read.
        """
        is_text = isinstance(source, str) and source.lstrip().startswith("{")
        content = source if is_text else Path(source).read_text(encoding="utf-8")
        name = "the text" if is_text else repr(os.fspath(source))
        try:
            data = json.loads(str(content))
        except json.JSONDecodeError as error:
            raise SqvizError(f"{name} is not JSON: {error}") from error
        form = data.get("format") if isinstance(data, dict) else None
        if form != FORMAT:
            raise SqvizError(
                f"{name} is no evaluation in the format {FORMAT!r} (it says {form!r}); to_json() writes one"
            )
        try:
            return _read(data)
        except (KeyError, TypeError, ValueError) as error:
            raise SqvizError(f"{name} is a damaged evaluation: {error!r}") from error

    def _plain(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model,
            "seed": self.seed,
            "scores": [_plain_score(score) for score in self.scores],
            "reference": None if self.reference is None else self.reference._plain(),
        }

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str | Path:
        """A page with the tables that a notebook shows. Written to `path` in one step; None returns its text.

        The changes against a reference as a picture: `evaluation.comparison.to_html(…)`, `to_png`, `to_svg`.
        """
        from sqviz.evaluation.table import evaluation_page

        return evaluation_page(self) if path is None else _written(evaluation_page(self), Path(path))

    def __repr__(self) -> str:
        from sqviz.evaluation.table import evaluation_text

        return evaluation_text(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from sqviz.evaluation.table import evaluation_html

        return {"text/plain": repr(self), "text/html": evaluation_html(self)}


def _plain_score(score: Score) -> dict[str, Any]:
    values = {field.name: getattr(score, field.name) for field in dataclasses.fields(score)}
    plain = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    return plain | {"value": "inf" if score.value == math.inf else score.value}  # JSON knows no infinity


def _read(data: Mapping[str, Any]) -> Evaluation:
    reference = data["reference"]
    scores = tuple(_read_score(score) for score in data["scores"])
    return Evaluation(str(data["model"]), scores, None if reference is None else _read(reference), int(data["seed"]))


def _read_score(values: Mapping[str, Any]) -> Score:
    tensors = {
        name: None if values[name] is None else torch.tensor(values[name], dtype=torch.float64)
        for name in ("items", "weights")
    }
    value = None if values["value"] is None else float(values["value"])
    return Score(**{**values, **tensors, "value": value})


def _written(content: str, path: Path) -> Path:
    """Write a file that is either there as a whole or not at all."""
    waiting = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        waiting.write_text(content, encoding="utf-8")
        waiting.replace(path)
    finally:
        waiting.unlink(missing_ok=True)
    return path

"""Tables of an `Evaluation` and a `Comparison`, for a notebook and for a terminal.

They take their colours from the page. Which way is better stands in words beside an arrow, and so does the judgement on
a change: nothing rests on colour.
"""

from collections.abc import Sequence
from html import escape

from sqviz.evaluation.comparison import Comparison, change_shown
from sqviz.evaluation.paired import Difference
from sqviz.evaluation.result import Evaluation
from sqviz.evaluation.scores import metric

_SCORES = ("task", "metric", "value ± standard error", "items", "seconds", "note")
_CHANGES = ("task", "metric", "value", "reference", "change", "95 % interval", "verdict")

_PAGE_STYLE = (
    ":root{color-scheme:light dark}body{font:14px system-ui,sans-serif;margin:1em;overflow-x:auto}"
    "table{border-collapse:collapse;margin-bottom:2em}caption{font-weight:bold;text-align:left;padding:.4em 0}"
    "th,td{text-align:left;padding:.2em .9em .2em 0}tbody tr{border-top:1px solid #8884}"
)

Rows = list[tuple[str, ...]]


def evaluation_text(evaluation: Evaluation) -> str:
    """Columns of plain text."""
    parts = [_line(evaluation), _columns(_SCORES, _score_rows(evaluation))]
    if (comparison := evaluation.comparison) is not None:
        parts += ["", comparison_text(comparison)]
    return "\n".join(parts)


def evaluation_html(evaluation: Evaluation) -> str:
    """An HTML table, and one more for the comparison if there is a reference."""
    table = _table(_line(evaluation), _SCORES, _score_rows(evaluation))
    comparison = evaluation.comparison
    return table if comparison is None else table + comparison_html(comparison)


def evaluation_page(evaluation: Evaluation) -> str:
    """The tables as a page of their own, light or dark as the reader has it."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(_line(evaluation))}</title>'
        f"<style>{_PAGE_STYLE}</style><body>{evaluation_html(evaluation)}</body></html>"
    )


def comparison_text(comparison: Comparison) -> str:
    """Columns of plain text."""
    return f"{_title(comparison)}\n{_columns(_CHANGES, _change_rows(comparison))}"


def comparison_html(comparison: Comparison) -> str:
    """An HTML table."""
    return _table(_title(comparison), _CHANGES, _change_rows(comparison))


def judged(row: Difference) -> str:
    """The verdict behind a sign: an arrow in the direction of the change, or ≈."""
    if not row.significant:
        return f"≈ {row.verdict}"
    return f"{'↑' if (row.better is True) == row.higher_is_better else '↓'} {row.verdict}"


def _line(evaluation: Evaluation) -> str:
    return f"Evaluation of {evaluation.model}"


def _title(comparison: Comparison) -> str:
    return f"{comparison.model} against {comparison.reference}, paired by item"


def _named(name: str, higher_is_better: bool) -> str:
    label = metric(name, higher_is_better).label
    return f"{label} {'↑ higher' if higher_is_better else '↓ lower'} is better"


def _score_rows(evaluation: Evaluation) -> Rows:
    return [
        (
            score.task,
            _named(score.metric, score.higher_is_better),
            score.shown(),
            str(score.count),
            f"{score.seconds:.1f}",
            score.note,
        )
        for score in evaluation.scores
    ]


def _change_rows(comparison: Comparison) -> Rows:
    return [
        (
            row.task,
            _named(row.metric, row.higher_is_better),
            _value(row, row.value),
            _value(row, row.reference),
            *change_shown(row),
            judged(row),
        )
        for row in comparison.rows
    ]


def _value(row: Difference, value: float) -> str:
    known = metric(row.metric, row.higher_is_better)
    return f"{known.number(value)} {known.unit}".rstrip()


def _columns(head: Sequence[str], rows: Rows) -> str:
    widths = [max(len(row[place]) for row in [tuple(head), *rows]) for place in range(len(head))]
    lines = [tuple(head), *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _table(caption: str, head: Sequence[str], rows: Rows) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"

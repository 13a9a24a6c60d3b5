"""What a `MethodTable` shows, as plain values: the one source of its HTML, its view and its pictures.

    columns   [{key, kind, label, unit, help, better}]     kind: "number", "change" or "bar"; better: "lower", "higher"
    rows      [{name, what, state, why, cells: {key: {value, text, note, …}}}]

A row's state is "done", "cannot" (`why` says why), or, while it is being computed, "waiting", "running", "stopped".
Cells of a change also hold low and high (the ends of the 95 % interval), interval, and tone: "same", "noise", "worse"
or "better". Numbers that JSON does not know, such as an infinite perplexity, have a text and no value.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sqviz.evaluation.comparison import change_shown
from sqviz.evaluation.paired import Difference, NotComparable, difference
from sqviz.evaluation.result import Evaluation
from sqviz.evaluation.scores import Metric, Score, metric
from sqviz.evaluation.table import judged

if TYPE_CHECKING:
    from sqviz.evaluation.method_table import MethodRow

Sheet = dict[str, Any]
HELP = {
    "change": "Against the first row, paired item by item, with the 95 % interval of a bootstrap over items. A full "
    "dot can be told apart from noise, a ring cannot. Where changes go beyond ±5 the axis is compressed: from 10 to "
    "100 is as far as from 1 to 10.",
    "size": "Weights as they would be deployed: quantised linears in the scheme's bits with float32 step sizes, "
    "everything else in 16 bit.",
    "time": "Milliseconds to read a prompt of 128 tokens: median, executed in integers on this machine, in turns with "
    "the unquantised model. Empty where the method cannot be executed in integers or was not timed.",
    "faster": "How many times as fast as the unquantised model, measured in the same run.",
}


def label_of(score: Score) -> str:
    """ "perplexity perplexity", "hellaswag accuracy, %": the name of a score's column in a frame."""
    known = metric(score.metric, score.higher_is_better)
    return f"{score.task} {known.label}{f', {known.unit}' if known.unit else ''}"


def sheet_of(rows: Sequence["MethodRow"]) -> Sheet:
    """Columns and rows of what is finished. The first row is what the others are compared with."""
    columns = _columns(rows)
    first = rows[0].evaluation if rows else None
    return {"columns": columns, "rows": [_row(row, first, _itself(rows) if row is rows[0] else None) for row in rows]}


def waiting_row(name: str, what: str, size: int) -> dict[str, Any]:
    """A row of which only the size is known."""
    return {"name": name, "what": what, "state": "waiting", "why": "", "cells": {"size": _number(size / 1e6, 1)}}


def _columns(rows: Sequence["MethodRow"]) -> list[dict[str, str]]:
    """Per task its first metric and the change of it; then size and times; then what other metrics there are."""
    found: dict[tuple[str, str], Score] = {}
    for row in rows:
        for score in row.evaluation.scores if row.evaluation else ():
            if score.value is not None:
                found.setdefault((score.task, score.metric), score)
    leading, others, seen = [], [], set()
    for score in found.values():
        if score.task in seen:
            others.append(_score_column(score))
        else:
            seen.add(score.task)
            leading += [_score_column(score), _change_column(score)]
    cost = [_column("size", "bar", "weights", "MB", HELP["size"], "lower")]
    if any(row.milliseconds is not None for row in rows):
        cost.append(_column("time", "bar", "128 tokens", "ms", HELP["time"], "lower"))
        cost.append(_column("faster", "number", "faster", "×", HELP["faster"], "higher"))
    return leading + cost + others


def _column(key: str, kind: str, label: str, unit: str, help_: str, better: str) -> dict[str, str]:
    return {"key": key, "kind": kind, "label": label, "unit": unit, "help": help_, "better": better}


def _score_column(score: Score) -> dict[str, str]:
    known, better = metric(score.metric, score.higher_is_better), _better(score)
    label = known.label if score.task in (known.label, "perplexity") else f"{score.task} {known.label}"
    what = f"{known.label} of {score.task}" if score.task != known.label else f"{known.label} of the text"
    help_ = f"{what[0].upper()}{what[1:]}, {score.count} items, of the simulated model. {better.title()} is better."
    return _column(_key(score), "number", label, known.unit, help_, better)


def _change_column(score: Score) -> dict[str, str]:
    known = metric(score.metric, score.higher_is_better)
    unit = "%" if score.exponential else ("points" if known.unit == "%" else known.unit)
    label = "change" if score.task == known.label else f"{score.task}: change"
    return _column(f"change {_key(score)}", "change", label, unit, HELP["change"], _better(score))


def _better(score: Score) -> str:
    return "higher" if score.higher_is_better else "lower"


def _key(score: Score) -> str:
    return f"{score.task} {score.metric}"


def _row(row: "MethodRow", first: Evaluation | None, itself: float | None) -> dict[str, Any]:
    cells: dict[str, Any] = {"size": _number(row.bytes / 1e6, 1)}
    time = itself if row.milliseconds is None else row.milliseconds
    if time is not None:
        note = "" if row.milliseconds is not None else "median over the runs of the other rows"
        cells["time"] = _number(time, 1) | {"note": note}
    elif row.untimed:
        cells["time"] = {"value": None, "text": "", "note": row.untimed}
    if row.itself and row.milliseconds:
        cells["faster"] = _number(row.itself / row.milliseconds, 2)
    for score in row.evaluation.scores if row.evaluation else ():
        if score.value is not None:
            known = metric(score.metric, score.higher_is_better)
            cells[_key(score)] = _score_cell(score, known)
            if row.evaluation is not first and (found := change(row.evaluation, first, score)) is not None:
                cells[f"change {_key(score)}"] = _change_cell(found)
    state = "cannot" if row.evaluation is None else "done"
    return {"name": row.name, "what": row.describe, "state": state, "why": row.error, "cells": cells}


def _itself(rows: Sequence["MethodRow"]) -> float | None:
    times = [row.itself for row in rows if row.itself is not None]
    return statistics.median(times) if times else None


def _number(value: float, digits: int) -> dict[str, Any]:
    return {"value": value, "text": f"{value:,.{digits}f}", "note": ""}


def _score_cell(score: Score, known: Metric) -> dict[str, Any]:
    assert score.value is not None
    value = score.value * known.scale
    text = f"{value:.{2 if known.digits == 2 or value >= 10 else 3}f}" if value < 1e5 else f"{value:.3g}"
    error = "" if score.standard_error is None else f"± {known.number(score.standard_error)} {known.unit}".rstrip()
    return {"value": value if math.isfinite(value) else None, "text": "∞" if value == math.inf else text, "note": error}


def _change_cell(found: Difference) -> dict[str, Any]:
    """Scaled as `change_shown` has it: per cent of a perplexity, percentage points of an accuracy."""
    text, interval = change_shown(found)
    none = 1.0 if found.relative else 0.0
    scale = 100.0 if found.relative else metric(found.metric, found.higher_is_better).scale
    value, low, high = (
        None if end is None or not math.isfinite(end) else (end - none) * scale
        for end in (found.change, found.low, found.high)
    )
    tone = "noise" if not found.significant else ("better" if found.better else "worse")
    if found.better is None and found.low == found.high:
        tone = "same"
    return {
        "value": value,
        "low": low,
        "high": high,
        "text": text,
        "interval": interval,
        "note": judged(found),
        "tone": tone,
    }


def change(evaluation: Evaluation | None, first: Evaluation | None, score: Score) -> Difference | None:
    """One score against the first row's, paired; None where the two cannot be paired."""
    if evaluation is None or first is None:
        return None
    return _changes(evaluation, first).get((score.task, score.metric))


@functools.lru_cache(maxsize=128)  # a bootstrap is worth keeping; evaluations are equal only to themselves
def _changes(evaluation: Evaluation, first: Evaluation) -> dict[tuple[str, str], Difference]:
    known = {(score.task, score.metric): score for score in first.scores if score.value is not None}
    found = {}
    for score in evaluation.scores:
        other = known.get((score.task, score.metric))
        if other is not None and score.value is not None:
            try:
                found[score.task, score.metric] = difference(score, other, evaluation.seed)
            except NotComparable:  # a metric that is no sum over items: its value is shown, without a change
                continue
    return found

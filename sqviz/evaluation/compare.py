"""`compare`: thesis Table 3.3 for a model of one's own. Rows are methods, columns metrics, size and measured latency.

    sqviz.compare(lm)                                               # the thesis's rows, perplexity
    sqviz.compare(lm, sqviz.frontier(sqviz.SMOOTHQUANT_O3))         # what each relaxation of O3 buys
    sqviz.compare(lm, [sqviz.W8A8, sqviz.LLM_INT8], ["perplexity", {"hellaswag": "val.jsonl"}], limit=200)

A finished row is written to disk at once, under a hash of everything that it depends on: the weights, the method, the
calibration tokens, what was asked; so are captures of the calibration. A comparison that was cancelled or crashed goes
on where it was when it is called again, and the same row of another table is not computed twice. Metrics are those of
the simulated model. Where a method can be executed in integers, latency is measured on that, in turns with the model
itself, and added to the row.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from sqviz.corpus.segments import Text
from sqviz.errors import Cancelled, SqvizError
from sqviz.evaluation.evaluate import evaluate
from sqviz.evaluation.jobs import Settings, Wanted, jobs
from sqviz.evaluation.method_rows import read_row, row_folder, write_row
from sqviz.evaluation.method_runner import Runner, method_bytes
from sqviz.evaluation.method_sheet import waiting_row
from sqviz.evaluation.method_table import MethodRow, MethodTable
from sqviz.evaluation.result import Evaluation
from sqviz.models.lm import LM
from sqviz.progress import CancelToken, in_notebook
from sqviz.progress import progress as progress_bar
from sqviz.quant.methods import LENGTH, SAMPLES, Method, table_3_2
from sqviz.quant.schemes import Scheme


def compare(
    lm: LM,
    methods: Sequence[Method | Scheme] | None = None,
    tasks: Wanted | Sequence[Wanted] = ("perplexity",),
    *,
    text: Text | None = None,
    calibration: Text | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    limit: int | None = None,
    latency: bool = True,
    folder: str | Path | None = None,
    live: bool = False,
    on_row: Callable[[MethodTable], None] | None = None,
    cancel: CancelToken | None = None,
    progress: bool = True,
) -> MethodTable:
    """Evaluate a model under several methods.

    Args:
        lm: the model, not quantised.
        methods: rows; a `Scheme` stands for itself without smoothing. None: `sqviz.table_3_2()`. The model itself is
            always the first row.
        tasks, text, limit: what is evaluated, as for `sqviz.evaluate`.
        calibration: text that the methods are calibrated on; by default the second half of the embedded addresses, of
            which evaluation by default reads the beginning.
        samples, length: segments of the calibration, and tokens in each; 512 × 512 as in the thesis. `length` is that
            of evaluated segments too.
        latency: measure how long reading 128 tokens takes, where a method can be executed.
        folder: where rows are kept; by default sqviz's cache folder.
        live: in a notebook, show all rows while they fill, with a Cancel button, in place of the progress bar.
        on_row: called with the table so far whenever a row is finished.
        cancel: ends the comparison; so does a Cancel button. The rows so far are returned; `missing` names the others.
        progress: draw a bar.

    Raises:
        SqvizError: two methods of one name, a folder that cannot be written to, and what `evaluate` and `capture` raise
            for tasks and texts. A method that this model cannot have does not end the comparison: its row says why.
    """
    rows = _methods(methods)
    place = row_folder(folder)
    asked = [(job.name, job.content) for job in jobs(lm, tasks, Settings(text, length, limit, 1))]
    score = functools.partial(evaluate, tasks=tasks, text=text, length=length, limit=limit, progress=False)
    outer = CancelToken() if cancel is None else cancel
    with _watched(live, lm, rows, place, outer) as watch:
        token = _Watched(outer, watch)
        runner = Runner(lm, calibration, samples, length, place, token)
        table = MethodTable(lm.name, (), tuple(row.name for row in rows))
        show = progress and isinstance(watch, Nobody)
        with progress_bar(len(rows), "comparing", unit="methods", cancel=outer, show=show) as bar:
            try:
                for number, method in enumerate(rows):
                    watch.begin(number)
                    row = _row(runner, method, asked, functools.partial(score, cancel=token), latency)
                    table = dataclasses.replace(table, rows=(*table.rows, row), missing=table.missing[1:])
                    watch.finish(table)
                    if on_row is not None:
                        on_row(table)
                    bar.step()
            except Cancelled:
                pass
    return table


def _row(
    runner: Runner, method: Method, asked: list[tuple[str, str]], score: Callable[[LM], Evaluation], latency: bool
) -> MethodRow:
    """The row of one method: read if it is kept, else made; each half is kept as soon as it is there."""
    path = runner.folder / f"{runner.key(method, asked)}.json"
    row = read_row(path)
    if row is None:
        row = runner.row(method, score)
        write_row(row, path)
    row = dataclasses.replace(row, name=method.name, describe=method.describe())  # it may be kept under another name
    if latency and row.milliseconds is None and not row.error:
        timed = runner.timed(method, row)
        if timed.milliseconds is not None:
            write_row(timed, path)
        row = timed
    return row


class Watch(Protocol):
    """Who is told how a comparison goes on: the live view."""

    def begin(self, number: int) -> None:
        """A row is begun."""

    def told(self, what: str, done: int, total: int | None) -> None:
        """How far the work inside the row is; `total` 0: it has just begun, or cannot say."""

    def finish(self, table: MethodTable) -> None:
        """A row is finished; the table so far."""


class Nobody:
    """No one watches."""

    def begin(self, number: int) -> None:
        """Nothing happens."""

    def told(self, what: str, done: int, total: int | None) -> None:
        """Nothing happens."""

    def finish(self, table: MethodTable) -> None:
        """Nothing happens."""


class _Watched(CancelToken):
    """The token that the work inside rows holds: what its bars say goes to the watch."""

    def __init__(self, outer: CancelToken, watch: Watch) -> None:
        super().__init__()
        self._outer, self._watch = outer, watch

    def cancel(self) -> None:
        self._outer.cancel()

    @property
    def cancelled(self) -> bool:
        return self._outer.cancelled

    def check(self, what: str = "the work") -> None:
        self._outer.check(what)

    def told(self, what: str, done: int, total: int | None) -> None:
        self._watch.told(what, done, total)


def _watched(
    live: bool, lm: LM, rows: Sequence[Method], folder: Path, cancel: CancelToken
) -> AbstractContextManager[Watch]:
    if not live or not in_notebook():
        return nullcontext(Nobody())
    from sqviz.widgets.live_methods import LiveMethods

    waiting = [waiting_row(row.name, row.describe(), method_bytes(lm, row)) for row in rows]
    return LiveMethods(waiting, lm.name, folder, cancel)


def _methods(methods: Sequence[Method | Scheme] | None) -> tuple[Method, ...]:
    """The rows, the model itself first."""
    given = table_3_2() if methods is None else methods
    rows = [one if isinstance(one, Method) else Method(one.name or one.describe(), one) for one in given]
    itself = [row for row in rows if row.key() == Method("").key()] or [Method("none")]
    rows = [itself[0], *(row for row in rows if row is not itself[0])]
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SqvizError(f"methods: {', '.join(twice)} is there more than once; give each a name of its own.")
    return tuple(rows)

"""The table of `compare` while it fills, in the output of the cell, with a button that stops the work.

The cell computes on the kernel's main thread; the page's click is heard on a thread of its own (`heard_while_busy`) and
answered at once. When the work ends, the finished table takes the place of the widget, as HTML that needs no kernel. If
the same cell also returns the table, this output gives way to it and becomes a line.
"""

import os
import threading
import time
import weakref
from pathlib import Path
from types import TracebackType
from typing import Any

from IPython import get_ipython
from IPython.display import display

from sqviz.errors import Cancelled
from sqviz.evaluation.method_sheet import sheet_of
from sqviz.evaluation.method_table import MethodTable
from sqviz.progress import CancelToken
from sqviz.widgets.method_table import MethodTableView, as_html
from sqviz.widgets.worker import Pace, heard_while_busy

WORDS = {
    "capture": "reading the calibration text, segment",
    "quantising": "quantising, linear",
    "measuring": "measuring latency, turn",
    "searching α": "searching α, trial",
}
"""What a bar inside a row is called here; the others are tasks."""


class LiveMethods:
    """A table in the output of the cell, for the length of a `with` block; `compare` tells it how it goes on."""

    def __init__(self, waiting: list[dict[str, Any]], model: str, folder: Path, cancel: CancelToken) -> None:
        self._waiting, self._model, self._folder, self._cancel = waiting, model, os.fspath(folder), cancel
        self._table: MethodTable | None = None
        self._number, self._began, self._pace = 0, time.monotonic(), Pace(8)
        self._lock = threading.RLock()
        self.view = MethodTableView(
            title=f"{len(waiting)} methods · {model}",
            state="running",
            note="Cancel answers within 200 ms; the step under way ends first. Finished rows stay here, and are kept "
            f"in {self._folder}: the same call goes on from there.",
        )
        self._show()
        heard_while_busy(self.view)
        self.view.on_msg(self._message)

    def __enter__(self) -> "LiveMethods":
        self._handle: Any = display(self.view, display_id=True)
        return self

    def begin(self, number: int) -> None:
        """A row is begun."""
        self._number = number
        self._show()
        with self._lock:
            self.view.running = {"number": number, "what": "preparing", "done": 0, "total": 0}

    def told(self, what: str, done: int, total: int | None) -> None:
        """How far the work inside the row is."""
        if self._pace.due() or done == total:
            shown = WORDS.get(what, f"scoring {what}, item")
            with self._lock:
                self.view.running = {"number": self._number, "what": shown, "done": done, "total": total or 0}

    def finish(self, table: MethodTable) -> None:
        """A row is finished; the table so far."""
        self._table = table
        self._number = len(table.rows)
        self._show()

    def _show(self, left: str = "waiting") -> None:
        found = self._table.sheet() if self._table else sheet_of([])
        rows = [*found["rows"], *({**row, "state": left} for row in self._waiting[len(found["rows"]) :])]
        if left == "waiting" and self._number < len(rows) and self._number >= len(found["rows"]):
            rows[self._number] = rows[self._number] | {"state": "running"}
        with self._lock:
            self.view.sheet = {"columns": found["columns"], "rows": rows}

    def _message(self, _: Any, content: Any, __: Any) -> None:
        """On the thread that hears the page."""
        if isinstance(content, dict) and content.get("kind") == "cancel":
            self._cancel.cancel()
            with self._lock:
                self.view.send({"kind": "heard"})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        done = 0 if self._table is None else len(self._table.rows)
        seconds = time.monotonic() - self._began
        line = f"{done} of {len(self._waiting)} methods in {seconds:.1f} s; rows are kept in {self._folder}"
        self._show("stopped")
        state, problem = "done" if done == len(self._waiting) else "stopped", ""
        if error is not None and not isinstance(error, Cancelled | KeyboardInterrupt):
            state, problem = "failed", f"{type(error).__name__}: {error}".removesuffix(": ")
        if self._handle is not None:
            html = as_html(self.view.title, self.view.sheet, state, line, problem)
            self._handle.update({"text/html": html, "text/plain": line}, raw=True)
            _leave(self._table, self._handle, line)
        self.view.close()


_left: list[tuple["weakref.ref[MethodTable]", Any, str, int]] = []
"""The last live output: its table, its handle, the line it becomes, and the number of its cell."""


def _leave(table: MethodTable | None, handle: Any, line: str) -> None:
    if table is not None:
        _left[:] = [(weakref.ref(table), handle, line, _cell())]


def gives_way(table: MethodTable) -> None:
    """Called when a table is shown: if the cell that runs has its live output, that becomes a line."""
    if _left and _left[0][0]() is table and _left[0][3] == _cell():
        _, handle, line, _ = _left.pop()
        handle.update({"text/plain": line}, raw=True)


def _cell() -> int:
    shell = get_ipython()
    return -1 if shell is None else int(shell.execution_count)

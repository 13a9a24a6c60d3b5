"""Progress bars for long work, with a cancel button where there is a notebook to show one.

In a terminal this is a tqdm bar, and Ctrl-C stops the work. In a notebook it is an ipywidgets bar with a *Cancel*
button; the button answers while the cell runs, because JupyterLab ≥ 4.4 with ipykernel ≥ 7 delivers widget messages
on a thread of their own. Either way the work stops at its next `step()` by raising `Cancelled`, and cleans up after it.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqviz.errors import Cancelled

REDRAW_SECONDS = 0.1


class CancelToken:
    """A request to stop, that any thread can make with `cancel()` and that long work looks at between its steps."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the work holding this token to stop at its next step."""
        self._event.set()

    @property
    def cancelled(self) -> bool:
        """Whether a stop was asked for."""
        return self._event.is_set()

    def check(self, what: str = "the work") -> None:
        """Raise `Cancelled` if a stop was asked for."""
        if self.cancelled:
            raise Cancelled(f"{what} was cancelled")

    def told(self, what: str, done: int, total: int | None) -> None:
        """Hear how far a task that holds this token is; each of its bars says so after every step. Nothing happens
        here: a subclass shows it."""


class Bar:
    """One running task: `step()` after each unit of it. Draws nothing itself; see `progress`."""

    def __init__(self, total: int | None, what: str, cancel: CancelToken) -> None:
        self.total, self.what, self.cancel = total, what, cancel
        self.done = 0

    def step(self, count: int = 1) -> None:
        """`count` more units are done. Raises `Cancelled` when a stop was asked for."""
        self.done += count
        self._draw(final=False)
        self.cancel.told(self.what, self.done, self.total)
        self.cancel.check(self.what)

    def close(self) -> None:
        """Draw the last state."""
        self._draw(final=True)

    def _draw(self, *, final: bool) -> None:
        """Nothing here: the quiet bar."""


class _TerminalBar(Bar):
    def __init__(self, total: int | None, what: str, unit: str, cancel: CancelToken) -> None:
        super().__init__(total, what, cancel)
        from tqdm import tqdm

        self._tqdm = tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", leave=False, file=sys.stderr)

    def _draw(self, *, final: bool) -> None:
        self._tqdm.update(self.done - self._tqdm.n)
        if final:
            self._tqdm.close()


class _NotebookBar(Bar):
    def __init__(self, total: int | None, what: str, unit: str, cancel: CancelToken) -> None:
        super().__init__(total, what, cancel)
        import ipywidgets as widgets
        from IPython.display import display

        self._unit, self._start, self._drawn = unit, time.perf_counter(), 0.0
        self._bar = widgets.IntProgress(max=total or 1, bar_style="" if total else "info")
        self._label = widgets.Label(what)
        self._button = widgets.Button(description="Cancel", tooltip=f"Stop: {what}", layout={"width": "auto"})
        self._button.on_click(lambda _: cancel.cancel())
        self._box = widgets.HBox([self._label, self._bar, self._button])
        self._handle: Any = display(self._box, display_id=True)

    def _draw(self, *, final: bool) -> None:
        now = time.perf_counter()
        if not final and now - self._drawn < REDRAW_SECONDS:
            return
        self._drawn = now
        seconds = now - self._start
        self._bar.value = self.done if self.total else int(final)
        self._label.value = f"{self.what}: {_count(self.done, self.total, self._unit)}, {seconds:.1f} s"
        if final:  # a line of text takes the widgets' place, so that a saved notebook holds no dead ones
            if self._handle is not None:
                self._handle.update({"text/plain": self._label.value}, raw=True)
            for widget in (self._box, self._label, self._bar, self._button):
                widget.close()


def _count(done: int, total: int | None, unit: str) -> str:
    if unit == "B":
        return f"{done / 1e6:.0f}" + (f" of {total / 1e6:.0f} MB" if total else " MB")
    return f"{done}" + (f" of {total} {unit}" if total else f" {unit}")


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process, so that widgets can be shown."""
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None else None
    return shell is not None and getattr(shell, "kernel", None) is not None


@contextmanager
def progress(
    total: int | None, what: str, *, unit: str = "it", cancel: CancelToken | None = None, show: bool = True
) -> Iterator[Bar]:
    """A progress bar over `total` units of `what` (None: unknown), as a context manager.

    `show=False` draws nothing but still honours `cancel`. A bar is drawn in a notebook, and in a terminal where
    standard error is one; never into a file.
    """
    token = cancel if cancel is not None else CancelToken()
    bar: Bar
    if show and in_notebook():
        bar = _NotebookBar(total, what, unit, token)
    elif show and sys.stderr is not None and sys.stderr.isatty():
        bar = _TerminalBar(total, what, unit, token)
    else:
        bar = Bar(total, what, token)
    try:
        yield bar
    finally:
        bar.close()

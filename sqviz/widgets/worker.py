"""One thread that does an explorer's computing, so that the interface never waits and never shows a stale answer.

Work is handed in by *lane*; the lanes are ordered, the most urgent first. Each lane has one waiting place, and the
latest request wins it: a hundred slider moves during one slow computation cost one more computation, not a hundred. A
job is a plain function that is given its `Turn` and calls `turn.check()` between its steps. There two things happen:

* work waiting in a more urgent lane is done at once, on the same thread, inside the slow job's pause
  (a slider move is answered in the middle of a sweep or of a perplexity estimate), and
* `Cancelled` is raised if the job was replaced, cancelled, or its explorer closed.

A `Turn` is a `CancelToken`, so it is passed on as the `cancel=` of capture or perplexity. Every submission has a
generation number, and only a job that is still current may publish (`turn.check()` right before). What a job raises is
given to `on_error`; the thread lives on.
"""

import atexit
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from sqviz.errors import Cancelled
from sqviz.progress import CancelToken

Work = Callable[["Turn"], None]
LAST_SECONDS = 10.0
_started: "weakref.WeakSet[Worker]" = weakref.WeakSet()


class Turn(CancelToken):
    """One job's right to run. `check()` lets more urgent work through and raises `Cancelled` if the job is stale."""

    def __init__(self, worker: "Worker", lane: str, rank: int, generation: int) -> None:
        super().__init__()
        self._worker, self._rank = worker, rank
        self.lane, self.generation = lane, generation

    def check(self, what: str = "the work") -> None:
        """Do what waits in more urgent lanes, then raise `Cancelled` if this job was replaced or stopped."""
        super().check(what)
        self._worker._let_through(self._rank)
        super().check(what)


class Worker:
    """A thread with ordered lanes and a latest-wins place in each.

    Args:
        lanes: names, the most urgent first.
        on_error: called on the worker's thread as `on_error(lane, exception)` with whatever a job raises
            (`Cancelled` excepted: that is a request that was met).
        name: of the thread.

    The thread starts with the first submission and is a daemon: it never keeps the process alive. When that ends it is
    given `LAST_SECONDS` to come to its next `check()`: Python ends a thread inside torch by aborting the process.
    """

    def __init__(self, lanes: Sequence[str], on_error: Callable[[str, Exception], None], name: str = "sqviz") -> None:
        if len(set(lanes)) != len(lanes) or not lanes:
            raise ValueError(f"lanes must be different names, got {list(lanes)}")
        self._ranks = {lane: rank for rank, lane in enumerate(lanes)}
        self._on_error, self._name = on_error, name
        self._state = threading.Condition()
        self._waiting: dict[str, tuple[Turn, Work]] = {}
        self._running: list[Turn] = []  # the innermost last: urgent work runs inside the pause of slower work
        self._generations = itertools.count(1)
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, lane: str, work: Work, *, interrupt: bool = True) -> int:
        """Put `work` into the lane's waiting place, replacing what waits there; returns its generation.

        With `interrupt` a job of the same lane that is already running is told to stop at its next `check()`; without,
        it finishes (right for short answers that are true whatever came later).
        """
        rank = self._rank(lane)
        with self._state:
            if self._closed:
                return 0
            turn = Turn(self, lane, rank, next(self._generations))
            self._drop(lane, running=interrupt)
            self._waiting[lane] = (turn, work)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name=self._name, daemon=True)
                self._thread.start()
                _started.add(self)
            self._state.notify_all()
            return turn.generation

    def cancel(self, *lanes: str) -> None:
        """Forget what waits in these lanes (all, when none is named) and stop what runs there at its next `check()`."""
        with self._state:
            for lane in lanes or tuple(self._ranks):
                self._rank(lane)
                self._drop(lane, running=True)
            self._state.notify_all()

    def close(self) -> None:
        """Cancel everything and end the thread at the running job's next `check()`. Later submissions are ignored."""
        with self._state:
            self._closed = True
            for lane in self._ranks:
                self._drop(lane, running=True)
            self._state.notify_all()

    def busy(self, lane: str) -> bool:
        """Whether a job of this lane waits or runs."""
        with self._state:
            return lane in self._waiting or any(turn.lane == lane for turn in self._running)

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Block until nothing waits or runs; False when that took longer than the timeout."""
        with self._state:
            return self._state.wait_for(lambda: not self._waiting and not self._running, timeout_seconds)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def join(self, timeout_seconds: float | None = None) -> None:
        """Wait for the thread to end, after `close()`."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_seconds)

    def _rank(self, lane: str) -> int:
        if lane not in self._ranks:
            raise KeyError(f"no lane {lane!r}; there are {', '.join(self._ranks)}")
        return self._ranks[lane]

    def _drop(self, lane: str, *, running: bool) -> None:
        waiting = self._waiting.pop(lane, None)
        if waiting is not None:
            waiting[0].cancel()
        for turn in self._running:
            if running and turn.lane == lane:
                turn.cancel()

    def _take(self, below: int) -> tuple[Turn, Work] | None:
        """The most urgent waiting job of rank < `below`, now counted as running. The caller holds the lock."""
        lane = min((lane for lane in self._waiting if self._ranks[lane] < below), key=self._rank, default=None)
        if lane is None:
            return None
        job = self._waiting.pop(lane)
        self._running.append(job[0])
        return job

    def _let_through(self, below: int) -> None:
        if threading.current_thread() is not self._thread:
            return  # a helper thread of the job looks whether to stop; it must not do other work
        while True:
            with self._state:
                job = self._take(below)
            if job is None:
                return
            self._run(*job)

    def _loop(self) -> None:
        while True:
            with self._state:
                self._state.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                job = self._take(len(self._ranks))
            if job is not None:
                self._run(*job)

    def _run(self, turn: Turn, work: Work) -> None:
        try:
            work(turn)
        except Cancelled:
            pass
        except Exception as error:  # noqa: BLE001 - nothing is swallowed: the explorer shows it
            self._on_error(turn.lane, error)
        finally:
            with self._state:
                self._running.remove(turn)
                self._state.notify_all()


@atexit.register
def _end_all() -> None:
    workers = list(_started)
    for worker in workers:
        worker.close()
    limit = time.monotonic() + LAST_SECONDS
    for worker in workers:
        worker.join(max(0.0, limit - time.monotonic()))


def heard_while_busy(widget: Any) -> None:
    """Let the page's messages reach this widget while a cell computes.

    JupyterLab sends them to a thread of the kernel that is theirs. ipykernel 7.4 takes them back to where the widget
    last spoke from, for callers that wait for a reply there: for a widget made in a cell that is the main thread, where
    the next long cell blocks them. This widget waits for no reply, so JupyterLab's choice is restored.
    """
    if hasattr(widget.comm, "_reply_subshell_for"):
        widget.comm._reply_subshell_for = lambda data, chosen: chosen


class Pace:
    """Says at most so many times a second that it is time to report progress."""

    def __init__(self, per_second: float = 10.0) -> None:
        self._gap, self._last = 1.0 / per_second, float("-inf")

    def due(self) -> bool:
        """True if the last True lies far enough back."""
        now = time.monotonic()
        if now - self._last < self._gap:
            return False
        self._last = now
        return True

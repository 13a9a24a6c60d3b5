"""The worker: latest wins, urgent work passes slow work, stale work stops, errors arrive, the thread ends."""

import subprocess
import sys
import threading

import pytest

from sqviz.errors import Cancelled
from sqviz.widgets.worker import Pace, Turn, Worker, heard_while_busy

WAIT = 20.0  # seconds; only a hang comes near it


class Errors(list):
    def __call__(self, lane: str, error: Exception) -> None:
        self.append((lane, error))


@pytest.fixture
def errors() -> Errors:
    return Errors()


@pytest.fixture
def worker(errors):
    made = Worker(("fast", "slow"), errors)
    yield made
    made.close()
    made.join(WAIT)
    assert not made.alive


def gate(worker: Worker, lane: str = "slow") -> tuple[threading.Event, threading.Event]:
    """A job that holds the lane until it is let go: (it runs, let it go)."""
    started, release = threading.Event(), threading.Event()

    def hold(turn: Turn) -> None:
        started.set()
        while not release.wait(0.002):
            turn.check()

    worker.submit(lane, hold)
    assert started.wait(WAIT)
    return started, release


def test_of_many_requests_during_one_computation_only_the_last_is_done(worker):
    done = []
    started, release = threading.Event(), threading.Event()

    def first(turn: Turn) -> None:
        started.set()
        assert release.wait(WAIT)
        done.append("first")

    worker.submit("fast", first, interrupt=False)
    assert started.wait(WAIT)
    for number in range(100):
        worker.submit("fast", lambda turn, number=number: done.append(number), interrupt=False)
    release.set()
    assert worker.wait(WAIT)
    assert done == ["first", 99]


def test_generations_grow_and_a_replaced_job_cannot_publish(worker):
    published, running = [], threading.Event()

    def stale(turn: Turn) -> None:
        running.set()
        while True:
            turn.check()  # raises once the next request replaces this one

    def fresh(turn: Turn) -> None:
        turn.check()
        published.append(turn.generation)

    first = worker.submit("slow", stale)
    assert running.wait(WAIT)
    second = worker.submit("slow", fresh)
    assert worker.wait(WAIT)
    assert published == [second]
    assert second > first


def test_an_urgent_job_runs_in_the_pause_of_a_slow_one_on_the_same_thread(worker):
    _, release = gate(worker)
    threads, answered = [], threading.Event()
    threads_of_slow = []

    def urgent(turn: Turn) -> None:
        threads.append(threading.current_thread())
        answered.set()

    worker.submit("fast", urgent)
    assert answered.wait(WAIT)
    assert worker.busy("slow")
    release.set()
    assert worker.wait(WAIT)
    worker.submit("slow", lambda turn: threads_of_slow.append(threading.current_thread()))
    assert worker.wait(WAIT)
    assert threads == threads_of_slow


def test_a_less_urgent_job_never_interrupts_a_more_urgent_one(worker):
    order = []
    running, release = threading.Event(), threading.Event()

    def urgent(turn: Turn) -> None:
        running.set()
        assert release.wait(WAIT)
        turn.check()
        order.append("fast")

    worker.submit("fast", urgent)
    assert running.wait(WAIT)
    worker.submit("slow", lambda turn: order.append("slow"))
    release.set()
    assert worker.wait(WAIT)
    assert order == ["fast", "slow"]


def test_cancel_stops_the_named_lane_and_leaves_the_other(worker):
    _, release = gate(worker)
    done = []
    worker.submit("slow", lambda turn: done.append("waiting"), interrupt=False)
    worker.cancel("slow")
    assert worker.wait(WAIT)
    assert done == []
    worker.submit("fast", lambda turn: done.append("after"))
    assert worker.wait(WAIT)
    assert done == ["after"]
    assert not release.is_set()


def test_what_a_job_raises_is_delivered_and_the_thread_lives_on(worker, errors):
    def broken(turn: Turn) -> None:
        raise ZeroDivisionError("no such α")

    done = []
    worker.submit("fast", broken)
    assert worker.wait(WAIT)
    worker.submit("fast", lambda turn: done.append(True))
    assert worker.wait(WAIT)
    assert [(lane, str(error)) for lane, error in errors] == [("fast", "no such α")]
    assert done == [True]


def test_an_urgent_error_inside_a_pause_does_not_stop_the_slow_job(worker, errors):
    _, release = gate(worker)

    def broken(turn: Turn) -> None:
        raise ValueError("bad")

    worker.submit("fast", broken)
    while not errors:
        release.wait(0.002)
    assert worker.busy("slow")
    release.set()
    assert worker.wait(WAIT)
    assert len(errors) == 1


def test_cancelled_is_no_error(worker, errors):
    def stopped(turn: Turn) -> None:
        raise Cancelled("as asked")

    worker.submit("slow", stopped)
    assert worker.wait(WAIT)
    assert errors == []


def test_close_ends_a_running_job_and_later_requests_are_ignored(worker):
    gate(worker)
    worker.close()
    worker.join(WAIT)
    assert not worker.alive
    assert worker.submit("fast", lambda turn: pytest.fail("ran after close")) == 0
    assert worker.wait(WAIT)


def test_close_from_inside_a_job_does_not_deadlock(worker):
    worker.submit("slow", lambda turn: (worker.close(), worker.join()))
    worker.join(WAIT)
    assert worker.wait(WAIT)


def test_a_helper_thread_that_checks_does_not_run_other_work(worker):
    threads = []
    started, release = threading.Event(), threading.Event()

    def slow(turn: Turn) -> None:
        started.set()
        assert release.wait(WAIT)
        helper = threading.Thread(target=turn.check)
        helper.start()
        helper.join(WAIT)
        assert threads == []  # still waiting: the helper must not have done it
        turn.check()

    worker.submit("slow", slow)
    assert started.wait(WAIT)
    worker.submit("fast", lambda turn: threads.append(threading.current_thread()))
    release.set()
    assert worker.wait(WAIT)
    assert len(threads) == 1


def test_no_thread_before_the_first_request(errors):
    worker = Worker(("only",), errors)
    assert not worker.alive
    assert worker.wait(0)
    worker.close()


def test_unknown_and_repeated_lanes_are_named(worker, errors):
    with pytest.raises(KeyError, match="no lane 'fsat'; there are fast, slow"):
        worker.submit("fsat", lambda turn: None)
    with pytest.raises(KeyError, match="fast, slow"):
        worker.cancel("fsat")
    with pytest.raises(ValueError, match="different names"):
        Worker(("a", "a"), errors)


def test_a_widget_is_heard_where_jupyterlab_sends_its_messages():
    class Comm:
        def _reply_subshell_for(self, data, chosen):
            return "where it last spoke from"

    class Widget:
        comm = Comm()

    heard_while_busy(Widget)
    assert Widget.comm._reply_subshell_for({}, "the widgets' own thread") == "the widgets' own thread"
    Widget.comm = object()  # another ipykernel, or none: nothing to do
    heard_while_busy(Widget)


def test_pace_lets_the_first_through_and_holds_the_next():
    pace = Pace(per_second=0.001)
    assert pace.due()
    assert not pace.due()


@pytest.mark.parametrize("closed", [True, False])
def test_the_process_ends_well_while_a_job_is_inside_torch(closed):
    """Python would abort it otherwise: "terminate called without an active exception"."""
    script = f"""
import time, torch
from sqviz.widgets.worker import Worker
def work(turn):
    x = torch.randn(700, 700)
    while True:
        turn.check()
        for _ in range(60):
            x = torch.tanh(x @ x)
worker = Worker(["one"], lambda lane, error: None)
worker.submit("one", work)
time.sleep(0.5)
if {closed}:
    worker.close()
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")

"""Progress bars: quiet where nobody looks, drawn in a terminal, and cancellable from another thread."""

import io
import sys
import threading
import time

import pytest

from sqviz.errors import Cancelled
from sqviz.progress import CancelToken, in_notebook, progress


class Terminal(io.StringIO):
    """Standard error as a terminal would be."""

    def isatty(self) -> bool:
        return True


def test_counts_and_stays_quiet_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(3, "work") as bar:
        for _ in range(3):
            bar.step()
    assert bar.done == 3
    assert capsys.readouterr().err == ""


def test_draws_name_and_count_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress(4, "capture", unit="segment") as bar:
        time.sleep(0.15)  # longer than tqdm's pause between two drawings
        bar.step(4)
    assert "capture" in terminal.getvalue()
    assert "4/4" in terminal.getvalue()


def test_a_request_from_another_thread_stops_the_work_at_its_next_step() -> None:
    token = CancelToken()
    threading.Timer(0.05, token.cancel).start()
    deadline = time.monotonic() + 10
    with pytest.raises(Cancelled, match="sweep was cancelled"), progress(None, "sweep", cancel=token) as bar:
        while time.monotonic() < deadline:
            bar.step()
            time.sleep(0.001)
    assert token.cancelled
    assert bar.done > 0


def test_a_token_already_cancelled_stops_the_first_step() -> None:
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled), progress(2, "work", cancel=token, show=False) as bar:
        bar.step()
    assert bar.done == 1


def test_a_token_hears_how_far_its_bars_are() -> None:
    class Listening(CancelToken):
        def __init__(self) -> None:
            super().__init__()
            self.heard: list[tuple[str, int, int | None]] = []

        def told(self, what: str, done: int, total: int | None) -> None:
            self.heard.append((what, done, total))

    token = Listening()
    with progress(3, "work", cancel=token, show=False) as bar:
        bar.step()
        bar.step(2)
    assert token.heard == [("work", 1, 3), ("work", 3, 3)]


def test_pytest_is_no_notebook() -> None:
    assert not in_notebook()

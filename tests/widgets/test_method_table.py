"""The table of methods as a widget, as HTML without a kernel, as a picture, and live."""

import math
import re
import threading

import pytest
import synthetic_methods

import sqviz
from sqviz.errors import Cancelled
from sqviz.evaluation.method_sheet import waiting_row
from sqviz.widgets import live_methods
from sqviz.widgets.live_methods import LiveMethods
from sqviz.widgets.method_table import as_html, plain_table
from sqviz.widgets.method_table_still import change_axis


@pytest.fixture(scope="module")
def table():
    return synthetic_methods.table()


def test_html_is_a_table_without_scripts_and_the_view_with_them(table):
    html = table._repr_mimebundle_()["text/html"]
    plain, scripted = html.split("<style>", 1)
    assert plain.count("<tr>") == 1 + len(table.rows)
    assert "<script" not in plain
    assert "export default { render }" in scripted
    for row in table.rows:
        assert row.name in plain
    assert "cannot: model.layers.0" in plain
    assert scripted.count("</script>") == 1


def test_names_cannot_break_out_of_the_html():
    rows = [waiting_row("</script><img src=x onerror=alert(1)>", "<b>", 1)]
    html = as_html("<i>", {"columns": [], "rows": rows}, problem="</script>")
    assert "<img" not in html
    assert "<b>" not in html
    assert html.count("</script>") == 1


def test_the_plain_table_says_what_is_missing():
    rows = [waiting_row("a", "what a does", 10**6) | {"state": "stopped"}]
    assert "what a does; not computed" in plain_table("t", {"columns": [], "rows": rows}, "a note")


def test_pictures_show_every_method(table):
    svg = table.to_svg()
    for row in table.rows:
        assert f">{row.name}<" in svg
    for heading in ("change, %", "weights, MB", "128 tokens, ms", "faster, ×"):
        assert f">{heading}<" in svg
    assert table.to_png().startswith(b"\x89PNG")
    assert table.to_html().startswith("<!doctype html>")
    widest = max(float(x) for x in re.findall(r'<text x="([\d.]+)"', svg))
    assert widest < float(re.search(r'width="(\d+)"', svg)[1])


def cell(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def test_small_changes_have_a_linear_axis_and_large_ones_a_compressed_one():
    at, ticks = change_axis([cell(-1.0), cell(3.0, 2.0, 4.0)])
    assert at(1.5) == pytest.approx(0.5)
    assert 0.0 in ticks
    at, ticks = change_axis([cell(-2.0), cell(150.0, 120.0, 180.0)])
    assert ticks == [-1, 0, 1, 10, 100]
    whole = math.asinh(180) - math.asinh(-2)
    assert at(10.0) - at(1.0) == pytest.approx((math.asinh(10) - math.asinh(1)) / whole)
    assert (at(-2.0), at(180.0)) == (0, 1)
    assert change_axis([])[0](0.0) == 0


@pytest.fixture
def live(tmp_path):
    token = sqviz.CancelToken()
    waiting = [waiting_row(name, what, int(1e6 * size)) for name, what, _, _, size, _ in synthetic_methods.ROWS]
    return LiveMethods(waiting, "made up", tmp_path, token), token


def states(live):
    return [row["state"] for row in live.view.sheet["rows"]]


def test_rows_wait_run_and_are_done(live):
    view, _ = live
    assert [row["cells"]["size"]["text"] for row in view.view.sheet["rows"]][:2] == ["269.0", "162.9"]
    with view:
        view.begin(0)
        assert states(view) == ["running", *["waiting"] * 5]
        assert view.view.running["what"] == "preparing"
        view.told("capture", 8, 8)
        assert view.view.running == {
            "number": 0,
            "what": "reading the calibration text, segment",
            "done": 8,
            "total": 8,
        }
        view.finish(synthetic_methods.table(1, failing=False))
        assert states(view) == ["done", "running", *["waiting"] * 4]
        view.begin(1)
        view.told("hellaswag", 5, 5)
        assert view.view.running["what"] == "scoring hellaswag, item"
        view.finish(synthetic_methods.table(2, failing=False))
        assert view.view.sheet["rows"][1]["cells"]["change perplexity perplexity"]["tone"] == "worse"
    assert states(view) == ["done", "done", *["stopped"] * 4]
    assert view.view.comm is None


def test_it_tells_no_more_often_than_one_can_see(live):
    view, _ = live
    with view:
        view.begin(0)
        sent = []
        view.view.observe(lambda change: sent.append(change["new"]["done"]), "running")
        for done in range(1, 1001):
            view.told("capture", done, 1000)
        assert sent[0] == 1
        assert sent[-1] == 1000
        assert len(sent) < 20


def test_the_button_cancels_on_the_thread_that_hears_it_and_is_answered(live, monkeypatch):
    view, token = live
    answers = []
    monkeypatch.setattr(view.view, "send", answers.append)
    with view:
        thread = threading.Thread(target=view._message, args=(view.view, {"kind": "cancel"}, None))
        thread.start()
        thread.join(5)
    assert token.cancelled
    assert answers == [{"kind": "heard"}]


@pytest.mark.parametrize(
    ("error", "state", "says"),
    [(Cancelled("x"), "stopped", ""), (KeyboardInterrupt(), "stopped", ""), (RuntimeError("full"), "failed", "full")],
)
def test_what_is_left_says_how_it_ended(live, monkeypatch, error, state, says):
    view, _ = live
    left = []
    real = live_methods.as_html
    monkeypatch.setattr(live_methods, "as_html", lambda *given: left.append(given) or real(*given))
    with pytest.raises(type(error)), view:
        view._handle = Handle()
        view.finish(synthetic_methods.table(1, failing=False))
        raise error
    ((_, sheet, ended, line, problem),) = left
    assert ended == state
    assert says in problem
    assert bool(says) == bool(problem)
    assert [row["state"] for row in sheet["rows"]] == ["done", *["stopped"] * 5]
    assert line.startswith("1 of 6 methods in ")


class Handle:
    """In place of the output of a cell."""

    def update(self, data, **_):
        self.data = data

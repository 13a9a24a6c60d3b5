"""Changes and their intervals: what the figure holds, and the same in the still."""

from sqviz.evaluation.comparison import compare
from sqviz.evaluation.scores import score
from sqviz.plots.changes import Change, changes, extent
from sqviz.plots.template import wrapped
from sqviz.widgets.changes_still import COLOURS, changes_still
from sqviz.widgets.still_marks import Line, Text

PANELS = {
    "change in accuracy, points": [
        Change("a", -2.0, -3.5, -0.5, "worse"),
        Change("b", 1.0, -1.0, 3.0, "not told apart from noise"),
        Change("c", 4.0, None, None, "better"),
    ],
    "change in perplexity, %": [Change("a", 8.0, 6.0, 11.0, "worse")],
}


def test_every_change_stands_with_its_interval_and_verdict():
    figure = changes(PANELS, "a title")
    seen = {}
    for trace in figure.data:
        for place, (x, label) in enumerate(zip(trace.x, trace.y, strict=True)):
            low, high = x - trace.error_x.arrayminus[place], x + trace.error_x.array[place]
            seen[trace.xaxis, label] = (x, low, high, trace.name)
    assert seen == {
        ("x", "a"): (-2.0, -3.5, -0.5, "worse"),
        ("x", "b"): (1.0, -1.0, 3.0, "not told apart from noise"),
        ("x", "c"): (4.0, 4.0, 4.0, "better"),
        ("x2", "a"): (8.0, 6.0, 11.0, "worse"),
    }
    assert sorted(trace.name for trace in figure.data if trace.showlegend) == sorted(COLOURS)
    assert len({trace.marker.symbol for trace in figure.data}) == 3  # told by shape, not by colour alone
    assert [figure.layout.xaxis.title.text, figure.layout.xaxis2.title.text] == list(PANELS)
    for axis, rows in ((figure.layout.xaxis, PANELS["change in accuracy, points"]), (figure.layout.xaxis2, [])):
        low, high = axis.range
        assert low < 0 < high
        assert all(low < end < high for row in rows for end in (row.change, row.low, row.high) if end is not None)


def test_the_still_shows_the_same():
    still = changes_still(PANELS, "int8", "against float32")
    texts = {mark.text for mark in still.marks if isinstance(mark, Text)}
    assert {"int8", "against float32", "a", "b", "c", *PANELS, *COLOURS} <= texts
    intervals = [
        mark for mark in still.marks if isinstance(mark, Line) and mark.colour in COLOURS.values() and mark.width == 1.5
    ]
    assert len(intervals) == 3 * 3  # three rows have one, each a line with two ends
    assert all(0 <= x <= still.width and 0 <= y <= still.height for mark in intervals for x, y in mark.points)
    assert still.svg().startswith("<svg")


def test_nothing_compared_is_an_empty_picture():
    assert extent([]) == (-0.08, 0.08)
    assert changes({}, "nothing").layout.title.text == "nothing"
    assert changes_still({}, "nothing", "").svg()


def test_a_comparison_of_equals_can_be_drawn(tmp_path):
    import torch

    one = score("t", "perplexity", torch.tensor([3.0, 4.0]), torch.tensor([2.0, 2.0]), content="c", seconds=0.0)
    found = compare("m", (one,), "r", (one,))
    assert found.to_png(tmp_path / "a.png").stat().st_size > 1000
    assert "plotly" in found.to_html()
    assert [row.change for row in found.panels["change in perplexity, %"]] == [0.0]


def test_titles_are_wrapped_between_dots():
    assert wrapped("short") == "short"
    assert wrapped("one two · three four", 12) == "one two ·<br>three four"
    assert wrapped("first<br>second line is long", 11) == "first<br>second line<br>is long"
    assert all(len(line) <= 20 for line in wrapped("a word and others, all of them together " * 3, 20).split("<br>"))

"""The layout of a block: nothing on top of anything else, data flowing downwards, no line through an operator."""

import itertools

import pytest

from sqviz.models.tiny import TINY, tiny
from sqviz.observe.flow import operators_of
from sqviz.plots.block import INPUT, lay_out


@pytest.mark.parametrize("name", TINY)
def test_operators_have_room_and_lines_pass_between_them(name):
    for ops in operators_of(tiny(name)):
        layout = lay_out({one.name: one.sources for one in ops})
        assert set(layout.places) == {INPUT, *(one.name for one in ops)}
        for one, other in itertools.combinations(layout.places.values(), 2):
            assert one[1] != other[1] or abs(one[0] - other[0]) >= 1 - 1e-9
        assert len(layout.lines) == sum(len(one.sources) for one in ops)
        for start, end, corners in layout.lines:
            assert (corners[0], corners[-1]) == (layout.places[start], layout.places[end])
            assert layout.places[start][1] < layout.places[end][1]
            for (x0, y0), (x1, y1) in itertools.pairwise(corners):
                assert all(layout.columns[0] <= x <= layout.columns[1] for x in (x0, x1))
                if x0 == x1:  # straight down: through no other operator
                    passed = [n for n, (x, y) in layout.places.items() if y0 < y < y1 and abs(x - x0) < 0.42]
                    assert set(passed) <= {start, end}


def test_side_by_side_and_below():
    sources = {"norm": ["input"], "q": ["norm"], "k": ["norm"], "qk": ["q", "k"], "add": ["input", "qk"]}
    layout = lay_out(sources)
    assert [layout.places[name][1] for name in ("input", "norm", "q", "k", "qk", "add")] == [0, 1, 2, 2, 3, 4]
    assert layout.places["k"][0] - layout.places["q"][0] == 1
    assert layout.places["qk"][0] == pytest.approx(layout.places["norm"][0])
    residual = next(corners for start, end, corners in layout.lines if (start, end) == ("input", "add"))
    assert min(x for x, _ in residual) < min(x for x, _ in layout.places.values()) - 0.5  # around, on the left

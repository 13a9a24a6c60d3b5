"""Figures of streams."""

import numpy as np
import pytest

from sqviz.plots.streams import START, cost_curves, perplexity_curves, perplexity_range, thin


def test_a_long_curve_is_thinned_and_keeps_its_ends():
    positions, values = thin(np.arange(100_000.0), 500)
    assert len(positions) <= 500
    assert (positions[0], positions[-1]) == (1, 100_000)
    assert (values == positions - 1).all()
    positions, values = thin(np.arange(3.0))
    assert positions.tolist() == [1, 2, 3]


def test_the_axis_fits_all_but_the_first_tokens():
    curve = np.concatenate([np.full(START, 1e7), np.full(100, 20.0)])
    lo, hi = perplexity_range({"a": curve, "b": np.full(300, 90.0)})
    assert lo < np.log10(20) < np.log10(90) < hi
    assert hi < 2.2
    assert perplexity_range({"a": np.empty(0)}) is None


@pytest.mark.parametrize("theme", ["light", "dark", "either"])
def test_one_line_per_policy_told_apart_by_dash_too(theme):
    figure = perplexity_curves({"a": [3.0, 4.0], "b": [5.0, 6.0]}, "title", theme=theme)
    assert [trace.name for trace in figure.data] == ["a", "b"]
    assert len({trace.line.dash for trace in figure.data}) == 2
    assert figure.layout.xaxis.title.text == "tokens read"
    figure = cost_curves({"a": [1, 2]}, {"a": [3, 4]}, "title", "cache size", "seconds", theme=theme)
    assert figure.layout.yaxis.type == "log"

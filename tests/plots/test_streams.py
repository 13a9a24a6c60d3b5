"""Figures of streams."""

import io

import numpy as np
import pytest
from PIL import Image

from sqviz.plots.streams import START, cost_curves, log_ticks, perplexity_curves, perplexity_range, thin
from sqviz.widgets.still import BLUE, ORANGE, rgb
from sqviz.widgets.streams_still import cost_still


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


@pytest.mark.parametrize(("lo", "hi"), [(2.26, 2.33), (2.1, 2.4), (1.2, 2.6), (0.0, 5.0), (1.4, 4.2), (-3.4, -3.3)])
def test_ticks_of_a_log_axis_are_round_and_neither_few_nor_many(lo, hi):
    ticks = log_ticks(lo, hi)
    assert 3 <= len(ticks["tickvals"]) <= 10
    assert all(lo <= np.log10(value) <= hi for value in ticks["tickvals"])
    assert [float(text.replace(",", "")) for text in ticks["ticktext"]] == pytest.approx(ticks["tickvals"])


PANELS = {
    "seconds": {"a": [(256, 3.0), (512, 4.0)], "b": [(256, 30.0), (512, 90.0)]},
    "MB": {"a": [(256, 3), (512, 3)]},
}


@pytest.mark.parametrize("theme", ["light", "dark", "either"])
def test_costs_in_panels_with_one_legend(theme):
    figure = cost_curves(PANELS, "title", "keys", theme=theme)
    assert [(trace.name, trace.yaxis, trace.showlegend) for trace in figure.data] == [
        ("a", "y", True),
        ("b", "y", True),
        ("a", "y2", False),
    ]
    assert figure.data[0].line.color == figure.data[2].line.color != figure.data[1].line.color
    assert (figure.layout.yaxis.title.text, figure.layout.yaxis2.title.text) == ("seconds", "MB")
    assert (figure.layout.xaxis2.title.text, figure.layout.yaxis.type) == ("keys", "log")
    assert cost_curves(PANELS, "title", "keys", log=False, theme=theme).layout.yaxis2.rangemode == "tozero"


@pytest.mark.parametrize("log", [True, False])
def test_the_still_of_costs_has_a_line_for_each(log):
    picture = np.asarray(
        Image.open(io.BytesIO(cost_still(PANELS, "title", "note", "keys", log=log).png())).convert("RGB")
    )
    for colour in (BLUE, ORANGE):
        assert (picture == rgb(colour)).all(-1).sum() > 200

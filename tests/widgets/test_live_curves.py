"""Curves that grow while a comparison runs."""

import contextlib

import pytest
import torch

from sqviz.progress import CancelToken
from sqviz.streaming.perplexity import perplexity_within
from sqviz.widgets import live_figure
from sqviz.widgets.live_curves import LiveCurves

NLL = torch.rand(200, generator=torch.Generator().manual_seed(0)) + 2


def test_each_policy_has_its_line_which_grows(monkeypatch):
    monkeypatch.setattr(live_figure, "REDRAW_SECONDS", 0)
    live = LiveCurves(["window", "4 sinks"], 201, "title", CancelToken())
    with live:
        live("window", 101, NLL[:100])
        live("4 sinks", 51, NLL[:50])
        live("window", 201, NLL)
        window, sinks = live._figure.data
        assert (window.name, sinks.name) == ("window", "4 sinks")
        assert torch.allclose(torch.tensor(window.y), perplexity_within(NLL, 20), atol=1e-4)
        assert len(sinks.y) == 50
        assert live._figure.layout.xaxis.range == (0, 201)
        lo, hi = live._figure.layout.yaxis.range
        assert 10**lo < min(window.y[48:]) < max(window.y[48:]) < 10**hi
        assert live._label.value.startswith("window: 201 of 201 tokens, perplexity ")


def test_it_draws_no_faster_than_one_can_see_but_draws_the_end(monkeypatch):
    monkeypatch.setattr(live_figure, "REDRAW_SECONDS", 1000)
    live = LiveCurves(["window"], 201, "title", CancelToken())
    with live:
        live("window", 101, NLL[:100])
        live("window", 151, NLL[:150])
        assert len(live._figure.data[0].y) == 100
        live("window", 201, NLL)
        assert len(live._figure.data[0].y) == 200


@pytest.mark.parametrize("fails", [False, True])
def test_the_button_asks_the_work_to_stop_and_the_figure_goes_away(fails):
    token = CancelToken()
    live = LiveCurves(["window"], 201, "title", token)
    with pytest.raises(KeyError) if fails else contextlib.nullcontext(), live:
        live._button.click()
        assert token.cancelled
        if fails:
            raise KeyError
    assert live._box.comm is None

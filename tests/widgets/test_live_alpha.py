"""The α curve while it grows."""

import dataclasses

from sqviz.evaluation.alpha_result import AlphaCurve, AlphaPoint
from sqviz.progress import CancelToken
from sqviz.widgets import live_figure
from sqviz.widgets.live_alpha import LiveAlpha

ALPHAS = (None, 0.2, 0.5)
POINTS = tuple(
    AlphaPoint(scheme, alpha, 20.0 + 3 * number + place, 0.1 + number / 10)
    for number, alpha in enumerate(ALPHAS)
    for place, scheme in enumerate(("O1", "O2"))
)
EMPTY = AlphaCurve((), ("O1", "O2"), ALPHAS, float("nan"), "model", "norm", 80, 40, complete=False)


def test_lines_stars_and_axes_grow_with_the_points(monkeypatch):
    monkeypatch.setattr(live_figure, "REDRAW_SECONDS", 0)
    live = LiveAlpha(EMPTY, CancelToken())
    with live:
        for count in range(1, len(POINTS) + 1):
            curve = dataclasses.replace(EMPTY, points=POINTS[:count], reference=19.0)
            live(curve)
            for drawn, wanted in zip(live._figure.data, curve.figure().data, strict=True):
                assert (drawn.name, tuple(drawn.x or ()), tuple(drawn.y or ())) == (
                    wanted.name,
                    tuple(wanted.x or ()),
                    tuple(wanted.y or ()),
                )
            lo, hi = live._figure.layout.yaxis.range
            assert 10**lo < 19.0 <= max(point.perplexity for point in curve.points) < 10**hi
        assert live._label.value == "6 of 6 points; O2, α = 0.5: perplexity 27"
        assert "none" in live._figure.layout.xaxis.ticktext


def test_it_draws_no_faster_than_one_can_see_but_draws_the_end(monkeypatch):
    monkeypatch.setattr(live_figure, "REDRAW_SECONDS", 1000)
    live = LiveAlpha(EMPTY, CancelToken())
    with live:
        for count in (1, 3):
            live(dataclasses.replace(EMPTY, points=POINTS[:count], reference=19.0))
        assert len(live._figure.data[1].y) == 1
        assert live._label.value.startswith("3 of 6 points; O1, α = 0.2")
        live(dataclasses.replace(EMPTY, points=POINTS, reference=19.0))
        assert len(live._figure.data[1].y) == 4


def test_the_button_asks_the_work_to_stop():
    token = CancelToken()
    with LiveAlpha(EMPTY, token) as live:
        live._button.click()
        assert token.cancelled
    assert live._box.comm is None

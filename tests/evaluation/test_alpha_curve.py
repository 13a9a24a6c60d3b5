"""The α curve: every point against doing it by hand, the text that was calibrated on, and what a cancel leaves."""

import io
import math
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

import sqviz
from sqviz.errors import SqvizError
from sqviz.evaluation.alpha_curve import alpha_curve, share_seen
from sqviz.models.tiny import tiny
from sqviz.plots.alpha import NONE
from sqviz.quant.clipping import ClipTokens
from sqviz.quant.divergence import Divergence

TOKENS = torch.randint(3, 131, (12 * 40,), generator=torch.Generator().manual_seed(3))
CALIBRATION, HELD = TOKENS[:320], TOKENS[320:400]
GRID = (0.8, None, 0.2, 0.5)
SCHEMES = (sqviz.SMOOTHQUANT_O1, sqviz.SMOOTHQUANT_O3)


@pytest.fixture(scope="module")
def lm():
    return tiny("LlamaForCausalLM")


@pytest.fixture(scope="module")
def m(lm):
    return sqviz.capture(lm, CALIBRATION, length=40, progress=False)


@pytest.fixture(scope="module")
def curve(lm, m):
    return alpha_curve(lm, m, HELD, SCHEMES, GRID, folds="all", length=40, progress=False)


def test_every_point_is_what_smoothing_and_quantising_by_hand_gives(lm, m, curve):
    assert curve.complete
    assert curve.alphas == (None, 0.2, 0.5, 0.8)
    assert curve.reference == pytest.approx(sqviz.perplexity(lm, HELD, 40), rel=1e-6)
    kl = Divergence(lm, HELD.view(-1, 40))
    wanted = [(scheme, alpha) for alpha in curve.alphas for scheme in SCHEMES]
    assert len(curve.points) == len(wanted)
    for point, (scheme, alpha) in zip(curve.points, wanted, strict=True):
        ready = lm if alpha is None else sqviz.smooth(lm, m, alpha, folds="all")
        q = sqviz.quantize(ready, scheme, m)
        assert (point.scheme, point.alpha) == (scheme.name, alpha)
        assert point.perplexity == pytest.approx(sqviz.perplexity(q, HELD, 40), rel=1e-6)
        assert point.divergence == pytest.approx(kl(q), rel=1e-5, abs=1e-7)


def test_clips_at_quantiles_take_a_second_pass_after_smoothing(lm, m):
    scheme = sqviz.SMOOTHQUANT_O3.replace(clip=ClipTokens(0.02))
    found = alpha_curve(lm, m, HELD, [scheme], (0.5,), length=40, progress=False)
    method = sqviz.Method("clipped", scheme, 0.5)
    q = method.apply(lm, lambda one: sqviz.capture(one, CALIBRATION, length=40, progress=False))
    assert found.points[0].perplexity == pytest.approx(sqviz.perplexity(q, HELD, 40), rel=1e-6)


def test_the_best_is_marked_in_words_in_the_table_and_in_both_pictures(curve):
    for by in ("divergence", "perplexity"):
        mine = [point for point in curve.points if point.scheme == SCHEMES[0].name]
        assert curve.best(SCHEMES[0].name, by) is sorted(mine, key=lambda point: getattr(point, by))[0]
    frame = curve.to_frame()
    assert frame["best"].sum() == 2
    assert frame["alpha"].isna().sum() == 2
    assert "best" in repr(curve)
    figure = curve.figure()
    reference, line, star = figure.data[:3]
    assert reference.name == "unquantised"
    assert tuple(reference.y) == (curve.reference, curve.reference)
    assert line.x[0] == NONE
    assert line.y[1] is None  # no line from what was not smoothed to the rest
    assert tuple(line.x[2:]) == (0.2, 0.5, 0.8)
    assert star.y[0] == min(point.perplexity for point in curve.points if point.scheme == SCHEMES[0].name)
    titles = [figure.layout.yaxis.title.text, figure.layout.yaxis2.title.text, figure.layout.xaxis2.title.text]
    assert titles == ["perplexity", "KL, nats per token", "migration strength α"]
    texts = {element.text for element in ElementTree.fromstring(curve.to_svg())}
    assert {"none", "unquantised", SCHEMES[0].name, "migration strength α", "KL, nats per token"} <= texts
    still = curve.still()
    assert Image.open(io.BytesIO(curve.to_png())).size == (2 * still.width, 2 * still.height)
    assert "plotly" in curve.to_html()


def test_text_that_was_calibrated_on_is_told(lm, m, curve):
    assert curve.seen == 0
    assert "calibration" not in repr(curve)
    same = alpha_curve(lm, m, CALIBRATION[:80], SCHEMES[:1], (0.5,), length=40, progress=False)
    assert same.seen == 1
    assert "100% of them stand in the calibration too" in repr(same)
    half = torch.cat([CALIBRATION[100:140], HELD[:40]])
    by_hand = [
        any(half[at : at + 16].equal(CALIBRATION[to : to + 16]) for to in range(len(CALIBRATION) - 15))
        for at in range(len(half) - 15)
    ]
    assert share_seen(half, CALIBRATION) == pytest.approx(sum(by_hand) / len(by_hand))
    assert share_seen(half[:8], CALIBRATION) == 0


def test_a_cancelled_curve_returns_what_is_done(lm, m):
    cancel, heard = sqviz.CancelToken(), []

    def hear(curve):
        heard.append(curve)
        if len(heard) == 3:
            cancel.cancel()

    found = alpha_curve(lm, m, HELD, SCHEMES, GRID, length=40, on_point=hear, cancel=cancel, progress=False)
    assert not found.complete
    assert [len(one.points) for one in heard] == [1, 2, 3]
    assert found.points == heard[-1].points
    assert "not finished" in repr(found)
    assert len(found.figure().data) == 9
    found.still().svg()
    early = alpha_curve(lm, m, HELD, SCHEMES, GRID, length=40, cancel=cancel, progress=False)
    assert early.points == ()
    assert math.isnan(early.reference)
    for show in (early.figure, early.to_svg, early.to_frame, early.__repr__):
        show()
    with pytest.raises(SqvizError, match="no point of"):
        early.best(SCHEMES[0].name)


def test_the_model_stays_as_it_was(lm, m):
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    alpha_curve(lm, m, HELD, SCHEMES[:1], (0.9,), length=40, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"schemes": []}, "at least one"),
        ({"schemes": sqviz.W8A8}, "a list"),
        ({"schemes": [sqviz.W8A8, sqviz.W8A8]}, "W8A8 is there more than once"),
        ({"alphas": ()}, r"strengths in \[0, 1\]"),
        ({"alphas": (0.5, 1.5)}, r"1.5 is outside \[0, 1\]"),
        ({"length": 3}, "at least 4 tokens"),
        ({"folds": "some"}, "folds='some'"),
        ({"text": TOKENS[:10]}, "10"),
    ],
)
def test_what_cannot_be_drawn_is_said(lm, m, changes, told):
    given = {"text": HELD, "schemes": SCHEMES, "alphas": (0.5,), "length": 40} | changes
    with pytest.raises(SqvizError, match=told):
        alpha_curve(lm, m, progress=False, **given)
    with pytest.raises(SqvizError, match="by='loss'"):
        alpha_curve(lm, m, HELD, SCHEMES[:1], (0.5,), length=40, progress=False).best("SmoothQuant-O1", "loss")


def test_magnitudes_of_another_model_are_refused(m):
    with pytest.raises(SqvizError, match="of this capture"):
        alpha_curve(tiny("OPTForCausalLM"), m, HELD, SCHEMES, (0.5,), length=40, progress=False)

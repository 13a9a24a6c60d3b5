"""Standard errors, tests and intervals against counting, loops and other formulas for the same thing."""

import itertools
import math
import random
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqviz.errors import NonFinite, SqvizError
from sqviz.evaluation.comparison import change_shown, compare
from sqviz.evaluation.paired import NotComparable, bootstrap, difference, mcnemar, sign_flips
from sqviz.evaluation.scores import METRICS, Score, metric, missing, ratio, score
from sqviz.evaluation.table import comparison_html, comparison_text, judged


def made(values, name="acc", weights=None, content="same", task="t"):
    items = torch.tensor(values, dtype=torch.float64)
    weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    return score(task, name, items, weights, content=content, seconds=0.0)


def chance():
    return np.random.default_rng(0)


# --- scores ---


def test_an_accuracy_and_its_standard_error():
    values = [1, 0, 0, 1, 1, 1, 0]
    found = made(values)
    assert found.value == pytest.approx(4 / 7)
    assert found.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(7))
    assert (found.count, found.higher_is_better, found.exponential) == (7, True, False)
    assert found.shown() == "57.14 ± 20.20 %"
    assert made([1]).standard_error is None


def test_a_perplexity_and_its_standard_error():
    values, weights = [20.0, 31.0, 25.0, 44.0], [10, 10, 10, 20]
    found = made(values, "perplexity", weights)
    assert found.value == pytest.approx(math.exp(120 / 50))
    assert (found.higher_is_better, found.exponential) == (False, True)
    assert made([8000.0], "perplexity").value == math.inf
    assert made([8000.0, 1.0, 9000.0], "perplexity").standard_error is None
    assert made([13.0, 13.1], "perplexity").shown() == "4.651e+05 ± 23254.8206"


@pytest.mark.parametrize("name", ["bits_per_byte", "perplexity"])
def test_the_standard_error_is_that_of_leaving_one_item_out(name):
    """Against the jackknife, which knows nothing of the formula."""
    pick = random.Random(1)
    weights = [pick.uniform(5, 15) for _ in range(400)]
    values = [weight * pick.gauss(1.2, 0.4) for weight in weights]
    without = []
    for leave in range(400):
        rest = [place for place in range(400) if place != leave]
        value = sum(values[place] for place in rest) / sum(weights[place] for place in rest)
        without.append(math.exp(value) if name == "perplexity" else value)
    error = math.sqrt(399 / 400 * sum((one - statistics.fmean(without)) ** 2 for one in without))
    assert made(values, name, weights).standard_error == pytest.approx(error, rel=0.01)


def test_metrics_that_sqviz_does_not_know():
    assert metric("word_perplexity").higher_is_better is False
    assert metric("exact_match").higher_is_better is True
    assert metric("ter", higher_is_better=False).label == "ter"
    assert all(row.label for row in METRICS.values())
    with pytest.raises(NonFinite, match="item 2 of t has a acc of nan"):
        made([1, math.nan])
    assert missing("t", "bits_per_byte", 3, content="", seconds=0, note="why").shown() == "not available"


# --- tests ---


@pytest.mark.parametrize("total", range(13))
def test_mcnemar_counts_all_tosses(total):
    for gained in range(total + 1):
        distance = abs(2 * gained - total)
        as_far = [abs(2 * sum(toss) - total) >= distance for toss in itertools.product((0, 1), repeat=total)]
        assert mcnemar(gained, total - gained) == pytest.approx(statistics.fmean(as_far))


def test_mcnemar_of_thousands():
    assert mcnemar(5000, 5000) == 1
    assert mcnemar(0, 5000) == 0  # below the smallest float
    normal = math.erfc((5200 - 4800 - 1) / math.sqrt(10000) / math.sqrt(2))  # with the correction for continuity
    assert mcnemar(5200, 4800) == pytest.approx(normal, rel=0.02)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-50, 50).map(lambda tenths: tenths / 10), min_size=1, max_size=8))
def test_sign_flips_counts_all_patterns(values):
    d = np.array(values)
    sums = [
        abs(sum(s * v for s, v in zip(signs, values, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(d))
    ]
    seen = abs(sum(values)) - 1e-11 * sum(map(abs, values))
    assert sign_flips(d, chance()) == pytest.approx(statistics.fmean(one >= seen for one in sums), abs=1e-12)


def test_sign_flips_of_ones_is_mcnemar():
    for gained, lost in [(9, 2), (5, 5), (0, 4), (40, 20), (200, 150)]:
        d = np.array([1.0] * gained + [-1.0] * lost + [0.0] * 7)
        assert sign_flips(d, chance()) == pytest.approx(mcnemar(gained, lost), abs=0.02)
    assert sign_flips(np.zeros(5), chance()) == 1
    assert sign_flips(np.full(30, 1.0), chance()) < 0.001


def test_sign_flips_says_noise_of_noise_as_often_as_it_should():
    pick = np.random.default_rng(3)
    found = [sign_flips(pick.normal(size=9), chance()) < 0.05 for _ in range(400)]
    assert 0.02 < np.mean(found) < 0.08


# --- intervals ---


def test_the_bootstrap_is_a_loop_over_draws():
    pick = random.Random(5)
    d = [pick.gauss(0.3, 1) for _ in range(30)]
    w = [pick.uniform(1, 3) for _ in range(30)]
    drawn = []
    for _ in range(20000):
        places = [pick.randrange(30) for _ in range(30)]
        drawn.append(sum(d[place] for place in places) / sum(w[place] for place in places))
    drawn.sort()
    low, high = bootstrap(np.array(d), np.array(w), chance())
    spread = drawn[19500] - drawn[500]
    assert low == pytest.approx(drawn[500], abs=0.05 * spread)
    assert high == pytest.approx(drawn[19500], abs=0.05 * spread)
    assert bootstrap(np.array(d), np.array(w), chance()) == (low, high)


def test_the_bootstrap_of_many_items_is_the_normal_interval():
    pick = np.random.default_rng(0)
    values = made(pick.normal(2, 1, 5000).tolist(), "bits_per_byte", [1.0] * 5000)
    other = made(pick.normal(2, 1, 5000).tolist(), "bits_per_byte", [1.0] * 5000)
    found = difference(values, other)
    assert found.low is not None
    assert found.normal is not None
    spread = found.high - found.low
    assert found.normal == pytest.approx((found.low, found.high), abs=0.05 * spread)
    _, error = ratio(values.items - other.items, values.weights)
    assert spread == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_the_interval_holds_the_truth_as_often_as_it_should():
    pick = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        low, high = bootstrap(pick.normal(1, 2, 60), np.ones(60), chance())
        held += low <= 1 <= high
    assert 0.88 < held / 200 < 0.99


# --- differences ---


def test_a_clear_loss_of_accuracy():
    found = difference(made([0] * 30 + [1] * 70), made([1] * 100))
    assert (found.change, found.gained, found.lost) == (pytest.approx(-0.3), 0, 30)
    assert found.p == pytest.approx(2 / 2**30)
    assert found.test == "McNemar, exact"
    assert found.low < -0.3 < found.high < 0
    assert (found.significant, found.better) == (True, False)
    assert found.verdict == "worse, not noise (p < 0.0001)"
    assert judged(found) == f"↓ {found.verdict}"
    assert change_shown(found) == ("-30.00 points", f"{found.low * 100:+.2f} … {found.high * 100:+.2f}")


def test_a_gain_in_perplexity_is_a_fall():
    pick = random.Random(0)
    before = [pick.gauss(100, 20) for _ in range(40)]
    after = [value - pick.uniform(1, 3) for value in before]
    found = difference(made(after, "perplexity", [50] * 40), made(before, "perplexity", [50] * 40))
    assert found.change == pytest.approx(found.value / found.reference)
    assert (found.relative, found.significant, found.better) == (True, True, True)
    assert found.test == "sign flips"
    assert judged(found).startswith("↓ better, not noise")
    assert "%" in change_shown(found)[0]
    alone = made(after, "perplexity", [50] * 40)
    assert alone.value - 2 * alone.standard_error < found.reference  # which two standard errors would not have told


def test_little_is_not_told_apart_from_noise():
    found = difference(made([1, 1, 1]), made([0, 0, 0]))
    assert (found.low, found.high) == (1, 1)  # the bootstrap alone would be sure of itself
    assert found.p == 0.25
    assert found.verdict == "cannot be told apart from noise (p = 0.25)"
    assert judged(found).startswith("≈")
    single = difference(made([2.0], "perplexity"), made([1.0], "perplexity"))
    assert (single.low, single.normal, single.p) == (None, None, 1)
    assert not single.significant
    assert change_shown(single)[1] == "one item: none"
    swapped = difference(made([1, 0]), made([0, 1]))
    assert swapped.better is None
    assert swapped.verdict == "cannot be told apart from noise (p = 1)"


def test_the_same_model_twice():
    for one in (made([1, 0, 1]), made([3.0, 4.0], "perplexity")):
        found = difference(one, one)
        assert (found.p, found.better, found.verdict) == (1, None, "no difference on any item")
        assert found.low == found.high == found.change


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9)), min_size=2, max_size=20), st.booleans())
def test_swapping_the_models_turns_the_change_around(pairs, relative):
    name = "perplexity" if relative else "bits_per_byte"
    one, other = (made([pair[side] for pair in pairs], name, [2.0] * len(pairs)) for side in (0, 1))
    there, back = difference(one, other), difference(other, one)
    assert there.change == pytest.approx(1 / back.change if relative else -back.change, rel=1e-9)
    assert there.p == back.p
    assert there.significant == back.significant
    ends = [1 / back.high, 1 / back.low] if relative else [-back.high, -back.low]
    assert [there.low, there.high] == pytest.approx(ends, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (made([1, 0]), made([1, 0], content="other"), r"did not see the same items \(2 and 2 of them\)"),
        (made([1, 0]), made([1]), "2 and 1 of them"),
        (made([1, 0]), made([1, 0], task="u"), "t acc cannot be compared with u acc"),
        (made([1.0], "perplexity", [2]), made([1.0], "perplexity", [3]), "different numbers of tokens or bytes"),
        (made([1]), Score("t", "acc", 0.5, 1, None, True, None, None, "same", 0.0), "no values per item"),
    ],
)
def test_what_cannot_be_compared(one, other, message):
    with pytest.raises(NotComparable, match=message):
        difference(one, other)


def test_a_comparison_shows_itself():
    scores = made([0] * 30 + [1] * 70, task="<b>"), made([1.0, 2.0], "bits_per_byte", [1, 1])
    none = missing("t", "perplexity", 2, content="same", seconds=0, note="why")
    others = made([1] * 100, task="<b>"), made([1.0, 2.5], "bits_per_byte", [1, 1])
    found = compare("int8", (*scores, none), "float32", (*others, none))
    assert [row.metric for row in found.rows] == ["acc", "bits_per_byte"]
    assert found["t"].change == found["t", "bits_per_byte"].change == -0.25
    with pytest.raises(SqvizError, match="'x' was not compared; there are: <b> acc, t bits_per_byte"):
        found["x"]
    text, html = comparison_text(found), comparison_html(found)
    assert "int8 against float32, paired by item" in text
    assert "accuracy ↑ higher is better" in text
    assert "↓ worse, not noise" in text
    assert "bit/B" in text
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert found._repr_mimebundle_() == {"text/plain": text, "text/html": html}
    panels = found.panels
    assert list(panels) == ["change in accuracy, points", "change in bits per byte, bit/B"]
    (accuracy,), (bits,) = panels.values()
    assert (accuracy.label, accuracy.verdict, bits.verdict) == ("<b> · accuracy", "worse", "not told apart from noise")
    row = found["<b>"]
    assert (accuracy.change, accuracy.low, accuracy.high) == (-30.0, 100 * row.low, 100 * row.high)
    frame = found.to_frame()
    assert frame.loc[("<b>", "acc"), "change"] == pytest.approx(-0.3)
    assert frame.loc[("t", "bits_per_byte"), "verdict"].startswith("cannot be told apart")
    with pytest.raises(
        NotComparable, match="no score in common: <b> acc, t bits_per_byte in one, nothing in the other"
    ):
        compare("int8", scores, "float32", ())

"""The error of a quantised linear: against an obvious implementation, and the estimate against the exact value."""

import math

import pytest
import torch

from sqviz.errors import Cancelled, NonFinite, SqvizError
from sqviz.progress import CancelToken
from sqviz.quant import integer
from sqviz.quant.error import ALPHAS, LinearProbe, OutputError, error_sweep, output_error
from sqviz.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from sqviz.quant.quantize import quantize_tensor
from sqviz.quant.sample import sample
from sqviz.quant.schemes import PRESETS, SMOOTHQUANT_LLAMA, SMOOTHQUANT_O1, SMOOTHQUANT_O3, W8A8, ZEROQUANT, Scheme
from sqviz.quant.smooth import smoothing_scale

SCHEMES = [
    *(preset for preset in PRESETS.values() if preset.clip is None and preset.outliers is None),
    Scheme(PerTensor(), PerToken(), bits=5, weight_bits=3),
    Scheme(PerChannel(), PerChannel(), static=True),
    Scheme(PerTensor(), PerTensor(), symmetric=False),
    Scheme(PerTensor(), PerTensor(), symmetric=False, static=True),
    Scheme(PerGroup(7), PerGroup(10), symmetric=False),
    Scheme(None, PerTensor()),
    Scheme(PerTensor(), None, bits=4),
]


def linear(tokens=70, out=37, channels=45, seed=0):
    """An input with outlier channels and one outlier token, a weight, and their maxima."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    x[:, 3] *= 60
    x[tokens // 2] *= 10
    w = torch.randn(out, channels, generator=generator) / channels**0.5
    return x, w, x.abs().amax(0), w.abs().amax(0)


def naive(x, w, s, scheme, bound):
    """‖Y − Ŷ‖ / ‖Y‖ in float64, step by step; symmetric schemes of whole matrices, rows or columns."""

    def fake(m, granularity, bits, of, bound=None):
        if granularity is None:
            return m
        dims = {PerTensor: (0, 1), PerToken: (1,), PerChannel: (1,) if of == "weight" else (0,)}[type(granularity)]
        top = 2 ** (bits - 1) - 1
        step = (m if bound is None else bound[None]).abs().amax(dims, keepdim=True) / top
        return (m / step).round().clamp(-top, top) * step

    x, w, s = x.double(), w.double(), s.double()
    x_hat = fake(x / s, scheme.activation, scheme.bits, "activation", bound.double() / s if scheme.static else None)
    w_hat = fake(w * s, scheme.weight, scheme.bits_of_weights, "weight")
    y = x @ w.T
    return float((y - x_hat @ w_hat.T).norm() / y.norm())


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s.symmetric and not isinstance(s.weight, PerGroup)], ids=str)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_output_error_is_the_definition(scheme, alpha):
    x, w, x_absmax, w_absmax = linear()
    s = smoothing_scale(x_absmax, w_absmax, alpha)
    bound = x_absmax * 0.7  # calibration saw less
    got = output_error(x, w, s, scheme, (-bound, bound))
    assert got.frobenius == pytest.approx(naive(x, w, s, scheme, bound), rel=2e-4)
    assert got == OutputError(got.frobenius, sampled=False, tokens=70, rows=37)
    assert got.sqnr_db == pytest.approx(-20 * math.log10(got.frobenius))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(70, 37, 45), (1, 300, 9), (300, 1, 130), (33, 600, 20)])
def test_exact_equals_the_definition(scheme, shape):
    x, w, x_absmax, w_absmax = linear(*shape)
    ranges = (x.amin(0) * 0.8, x.amax(0) * 0.9)
    probe = LinearProbe(x, w, x_absmax, w_absmax, scheme, x_range=ranges, tokens=16)
    for alpha in (0.0, 0.35, 0.8, 1.0):
        expected = output_error(x, w, smoothing_scale(x_absmax, w_absmax, alpha), scheme, ranges)
        got = probe.exact(alpha)
        assert got.frobenius == pytest.approx(expected.frobenius, rel=1e-4)
        assert (got.sampled, got.tokens, got.rows) == (False, *shape[:2])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_coarse_with_everything_in_the_sample_is_exact(scheme):
    x, w, x_absmax, w_absmax = linear()
    probe = LinearProbe(x, w, x_absmax, w_absmax, scheme, tokens=70)
    for alpha in (0.2, 0.6):
        assert probe.coarse(alpha) == probe.exact(alpha)


def test_integer_and_floating_point_products_agree(monkeypatch):
    x, w, x_absmax, w_absmax = linear(90, 300, 64)
    schemes = [s for s in SCHEMES if integer.applies(s, x.device)]
    assert {W8A8, SMOOTHQUANT_O1, SMOOTHQUANT_O3, SMOOTHQUANT_LLAMA} <= set(schemes)
    assert ZEROQUANT not in schemes
    probes = [LinearProbe(x, w, x_absmax, w_absmax, scheme, tokens=16, weights=5000) for scheme in schemes]
    fast = [(probe.coarse(0.4).frobenius, probe.exact(0.4).frobenius) for probe in probes]
    monkeypatch.setattr(integer, "applies", lambda scheme, device: False)
    slow = [(probe.coarse(0.4).frobenius, probe.exact(0.4).frobenius) for probe in probes]
    for one, other in zip(fast, slow, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


# --- the estimate ---


@pytest.mark.parametrize("scheme", [W8A8, SMOOTHQUANT_O1, SMOOTHQUANT_LLAMA, ZEROQUANT], ids=str)
@pytest.mark.parametrize("shape", [(512, 700, 96), (512, 130, 500)])
def test_the_estimate_is_near(scheme, shape):
    x, w, x_absmax, w_absmax = linear(*shape)
    probe = LinearProbe(x, w, x_absmax, w_absmax, scheme, weights=shape[2] * 100)
    for alpha in (0.0, 0.5, 0.9):
        coarse, exact = probe.coarse(alpha), probe.exact(alpha)
        assert (coarse.sampled, coarse.tokens, coarse.rows) == (True, 64, 100)
        assert coarse.frobenius == pytest.approx(exact.frobenius, rel=0.15)


def test_the_estimate_converges():
    x, w, x_absmax, w_absmax = linear(256, 200, 64)
    exact = LinearProbe(x, w, x_absmax, w_absmax, SMOOTHQUANT_LLAMA).exact(0.5).frobenius
    mean = {}
    for tokens, rows in ((20, 64), (200, 180)):
        off = [
            LinearProbe(x, w, x_absmax, w_absmax, SMOOTHQUANT_LLAMA, tokens=tokens, weights=rows * 64, seed=seed)
            .coarse(0.5)
            .frobenius
            / exact
            - 1
            for seed in range(12)
        ]
        mean[tokens] = sum(map(abs, off)) / len(off)
    assert mean[200] < mean[20] / 3 < 0.05


def test_sums_of_squares_over_the_sample_are_unbiased():
    x, w, *_ = linear(120, 150, 24)
    truth = float((x @ w.T).square().sum())
    parts = [sample(x, w, 40, 24 * 80, seed)[0] for seed in range(200)]
    estimates = torch.tensor([part.norm_squared(part.y) for part in parts])
    spread = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - truth) < 4 * spread
    norms = torch.tensor([part.norm for part in parts])
    assert (norms / math.sqrt(truth) - 1).abs().max() < 0.05  # and the norm is known better than that
    assert (norms / math.sqrt(truth)).std() < (estimates.sqrt() / math.sqrt(truth)).std() / 3


def test_the_largest_tokens_and_rows_are_always_in_the_sample():
    x, w, *_ = linear(400, 300, 32)
    x[[7, 399]] *= 1000
    w[[0, 150]] *= 1000
    for seed in range(5):
        part, _ = sample(x, w, 20, 32 * 70, seed)
        for row in (7, 399):
            assert (part.x == x[row]).all(1).any()
        for row in (0, 150):
            assert (part.w == w[row]).all(1).any()
        assert float(part.token_weight.sum()) == pytest.approx(400)
        assert float(part.row_weight.sum()) == pytest.approx(300, rel=1e-4)


def test_the_step_of_the_sample_is_that_of_the_whole():
    x, w, x_absmax, w_absmax = linear(200, 300, 16)
    probe = LinearProbe(x, w, x_absmax, w_absmax, W8A8, tokens=17, weights=1)
    s = probe.scale(0.3)
    assert torch.equal(probe._activation_grid(s)[0], quantize_tensor(x / s, PerTensor()).step)
    assert torch.equal(probe._weight_grid(s)[0], quantize_tensor(w * s, PerTensor()).step)


# --- what the curve says ---


def test_there_is_a_sweet_spot():
    """Thesis Figure 3.8: too small an α leaves the outliers in X, too large a one moves them all into W."""
    x, w, x_absmax, w_absmax = linear(256, 96, 64)
    curve = error_sweep(x, w, x_absmax, w_absmax, W8A8)
    assert curve.shape == (21,)
    best = int(curve.argmin())
    assert 4 <= best <= 16
    assert curve[0] > 2 * curve[best]
    assert curve[-1] > 1.5 * curve[best]


def test_sweep_asks_at_each_alpha():
    x, w, x_absmax, w_absmax = linear()
    probe = LinearProbe(x, w, x_absmax, w_absmax, SMOOTHQUANT_O1, tokens=20)
    assert list(ALPHAS) == pytest.approx([k * 0.05 for k in range(21)])
    assert probe.sweep().tolist() == pytest.approx([probe.coarse(alpha).frobenius for alpha in ALPHAS])
    assert probe.sweep((0.1, 0.9), exact=True).tolist() == pytest.approx(
        [probe.exact(0.1).frobenius, probe.exact(0.9).frobenius]
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_many_at_once_are_the_same_as_one_by_one(scheme):
    x, w, x_absmax, w_absmax = linear(70, 300, 45)
    probe = LinearProbe(x, w, x_absmax, w_absmax, scheme, tokens=20, weights=1)
    asked = [0.0, torch.ones(45), 0.35, 1.0]
    for exact, ask in ((False, probe.coarse), (True, probe.exact)):
        assert probe.ask(asked, exact=exact) == [ask(alpha) for alpha in asked]
    assert probe.ask([]) == []


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_alpha_that_exceeds_float32_spoils_no_other(scheme):
    x, w, x_absmax, w_absmax = linear()
    probe = LinearProbe(x, w, x_absmax, w_absmax, scheme)
    tiny, fair = torch.full((45,), 1e-38), torch.ones(45)
    found = [found.frobenius for found in probe.ask([fair, tiny, fair], exact=True)]
    assert math.isnan(found[1])
    assert found[0] == found[2] == probe.exact(fair).frobenius


def test_a_given_s_replaces_alpha():
    x, w, x_absmax, w_absmax = linear()
    probe = LinearProbe(x, w, x_absmax, w_absmax, W8A8)
    assert probe.exact(probe.scale(0.4)) == probe.exact(0.4)
    unsmoothed = output_error(x, w, torch.ones(45), W8A8).frobenius
    assert probe.exact(torch.ones(45)).frobenius == pytest.approx(unsmoothed, rel=1e-5)


def test_with_scheme_shares_everything():
    x, w, x_absmax, w_absmax = linear()
    probe = LinearProbe(x, w, x_absmax, w_absmax, W8A8)
    other = probe.with_scheme(SMOOTHQUANT_LLAMA)
    assert other.scheme == SMOOTHQUANT_LLAMA
    assert probe.scheme == W8A8
    assert other._w is probe._w
    assert other.exact(0.5) == LinearProbe(x, w, x_absmax, w_absmax, SMOOTHQUANT_LLAMA).exact(0.5)


def test_decompose_separates_activations_from_weights():
    x, w, x_absmax, w_absmax = linear()
    probe = LinearProbe(x, w, x_absmax, w_absmax, W8A8)
    for alpha, blame in ((0.0, 0), (1.0, 1)):
        parts = [part.frobenius for part in probe.decompose(alpha)]
        whole = probe.coarse(alpha).frobenius
        assert parts[blame] > 2 * parts[1 - blame]
        assert math.hypot(*parts) == pytest.approx(whole, rel=0.2)
    weights_only = probe.with_scheme(Scheme(PerTensor(), None)).decompose(0.5)
    assert weights_only[0].frobenius == 0
    assert weights_only[1].frobenius > 0
    static = probe.with_scheme(SMOOTHQUANT_O3).decompose(0.5)
    assert static[0].frobenius > 0 < static[1].frobenius


# --- bad input ---


def test_dead_channels_do_no_harm():
    x, w, *_ = linear()
    x[:, 5] = 0
    w[:, 6] = 0
    x_absmax, w_absmax = x.abs().amax(0), w.abs().amax(0)
    for scheme in SCHEMES:
        for alpha in (0.0, 0.5, 1.0):
            assert math.isfinite(LinearProbe(x, w, x_absmax, w_absmax, scheme).exact(alpha).frobenius)


def test_nothing_at_all_is_no_error():
    zero = torch.zeros(4, 3)
    probe = LinearProbe(zero, zero, zero[0], zero[0], W8A8)
    assert probe.coarse(0.5).frobenius == 0
    assert probe.exact(0.5).sqnr_db == math.inf
    assert output_error(zero, zero, torch.ones(3), SMOOTHQUANT_LLAMA).frobenius == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_are_named(bad):
    for name in ("x", "w"):
        x, w, x_absmax, w_absmax = linear()
        {"x": x, "w": w}[name][2, 2] = bad
        with pytest.raises(NonFinite, match=rf"{name} of the linear"):
            LinearProbe(x, w, x_absmax, w_absmax, W8A8)
        with pytest.raises(NonFinite):
            output_error(x, w, torch.ones(45), W8A8)


def test_bad_arguments_are_named():
    x, w, x_absmax, w_absmax = linear()
    with pytest.raises(SqvizError, match=r"got x \(70, 45\), w \(37, 44\)"):
        LinearProbe(x, w[:, 1:], x_absmax, w_absmax, W8A8)
    with pytest.raises(SqvizError, match="nothing to multiply"):
        LinearProbe(x[:0], w, x_absmax, w_absmax, W8A8)
    with pytest.raises(SqvizError, match="is static: give x_range"):
        output_error(x, w, torch.ones(45), SMOOTHQUANT_O3)
    with pytest.raises(SqvizError, match="alpha"):
        LinearProbe(x, w, x_absmax, w_absmax, W8A8).coarse(1.2)


def test_cancelling_stops_and_leaves_the_probe_usable():
    x, w, x_absmax, w_absmax = linear(100, 600, 40)
    probe = LinearProbe(x, w, x_absmax, w_absmax, W8A8, tokens=16, weights=1)
    cancel = CancelToken()
    cancel.cancel()
    for ask in (probe.coarse, probe.exact):
        with pytest.raises(Cancelled):
            ask(0.5, cancel)
    threads = torch.get_num_threads()
    assert probe.exact(0.5, CancelToken()) == probe.exact(0.5)
    assert torch.get_num_threads() == threads


def test_the_tensors_given_are_never_written():
    given = linear()
    kept = [tensor.clone() for tensor in given]
    for scheme in SCHEMES:
        probe = LinearProbe(*given, scheme, tokens=16)
        probe.coarse(0.5)
        probe.exact(0.5)
        probe.decompose(0.5)
    assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))

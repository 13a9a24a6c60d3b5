"""The α sweep: against its definition, against an obvious loop, and the same with any product and number of threads."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sqviz_kernels import alpha_sweep, spec

from sqviz.errors import Cancelled, NonFinite, SqvizError
from sqviz.progress import CancelToken
from sqviz.quant.granularity import PerChannel, PerTensor, PerToken
from sqviz.quant.quantize import quantize_tensor


def linear(tokens=70, out=45, channels=50, alphas=3, seed=0):
    """X with an outlier channel, W, Y and s."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator)
    x[:, channels // 2] *= 60
    w = torch.randn(out, channels, generator=generator) / channels**0.5
    return x, w, x @ w.T, torch.rand(alphas, channels, generator=generator) + 0.2


def steps_of(x, w, s, per_tensor_x, per_tensor_w, share=1.0):
    """One step per α for the whole, where asked for; below the largest value if `share` is less than 1."""
    x_step = torch.stack([(x / one).abs().max() for one in s]) / 127 * share if per_tensor_x else None
    w_step = torch.stack([(w * one).abs().max() for one in s]) / 127 * share if per_tensor_w else None
    return x_step, w_step


def obvious(x, w, y, s, x_step=None, w_step=None, top=127):
    """Element by element, with numpy's float32."""
    found = np.zeros((len(s), len(x)))
    for a, factors in enumerate(s.numpy()):
        codes = []
        for rows, given_step in ((x.numpy() / factors, x_step), (w.numpy() * factors, w_step)):
            quantised = []
            for row in rows:
                step = np.abs(row).max() / np.float32(top) if given_step is None else given_step[a].numpy()
                code = np.zeros(len(row)) if step == 0 else np.clip(np.rint(row / step), -top, top)
                quantised.append((code.astype(int), np.float32(step)))
            codes.append(quantised)
        for t, (x_code, x_own) in enumerate(codes[0]):
            for o, (w_code, w_own) in enumerate(codes[1]):
                off = np.float32(int(x_code @ w_code)) * x_own * w_own - y[t, o].numpy()
                found[a, t] += float(off) ** 2
    return torch.from_numpy(found)


def near(got, expected):
    return got.dtype == torch.float64 and torch.allclose(got, expected, rtol=1e-12, atol=1e-300)


@pytest.fixture(params=["tile", "torch", "float"])
def product(request, monkeypatch):
    """The product by the VNNI tile, by torch._int_mm, and by float32."""
    if request.param == "tile" and not alpha_sweep.HAVE_VNNI:
        pytest.skip("the processor has no AVX-512 VNNI")
    if request.param == "torch" and alpha_sweep.why_not_exact():
        pytest.skip("torch has no exact int8 product here")
    use(request.param, monkeypatch)
    return request.param


def use(name, monkeypatch):
    if name != "tile":
        monkeypatch.setattr(alpha_sweep, "HAVE_VNNI", False)
    if name == "float":
        monkeypatch.setattr(alpha_sweep, "why_not_exact", lambda: "for the test")


def products():
    """Those that this machine has."""
    return [
        *(["tile"] if alpha_sweep.HAVE_VNNI else []),
        *(["torch"] if alpha_sweep.why_not_exact() is None else []),
        "float",
    ]


shapes = st.tuples(
    st.one_of(st.sampled_from([1, 11, 12, 13, 17]), st.integers(1, 60)),
    st.one_of(st.sampled_from([1, 31, 32, 33, 64]), st.integers(1, 150)),
    st.one_of(st.sampled_from([1, 3, 4, 5, 64]), st.integers(1, 90)),
    st.integers(1, 4),
    st.integers(0, 99),
)


@settings(deadline=None, derandomize=True, max_examples=80)
@given(shapes, st.booleans(), st.booleans(), st.sampled_from([0.4, 1.0]))
def test_it_is_the_definition(shape, per_tensor_x, per_tensor_w, share):
    x, w, y, s = linear(*shape)
    given_steps = steps_of(x, w, s, per_tensor_x, per_tensor_w, share)
    expected = spec.sweep(x, w, y, s, *given_steps)
    with pytest.MonkeyPatch.context() as patch:
        got = {}
        for name in products():
            use(name, patch)
            got[name] = alpha_sweep.sweep(x, w, y, s, *given_steps)
            patch.undo()
    assert near(got["float"], expected)
    assert all(near(one, got["float"]) for one in got.values())


@pytest.mark.parametrize("top", [1, 7, 127])
@pytest.mark.parametrize("which", [(False, False), (True, True), (False, True)])
def test_it_is_the_obvious_loop(product, which, top):
    x, w, y, s = linear(5, 37, 9, 2)
    given_steps = steps_of(x, w, s, *which, 127 / top)
    got = alpha_sweep.sweep(x, w, y, s, *given_steps, x_top=top, w_top=top)
    assert near(got, obvious(x, w, y, s, *given_steps, top=top))


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    rows=st.integers(1, 12),
    channels=st.integers(1, 40),
    bits=st.integers(2, 8),
    seed=st.integers(0, 99),
    per_tensor=st.booleans(),
    divide=st.booleans(),
)
def test_codes_are_those_of_quantize_tensor(rows, channels, bits, seed, per_tensor, divide):
    generator = torch.Generator().manual_seed(seed)
    m = torch.randn(rows, channels, generator=generator) * (torch.rand(rows, 1, generator=generator) > 0.2)
    s = torch.rand(channels, generator=generator) + 0.1
    own = PerTensor() if per_tensor else PerToken() if divide else PerChannel()
    expected = quantize_tensor(m / s if divide else m * s, own, bits, of="activation" if divide else "weight")
    given_step = np.float32(expected.step.item() if per_tensor else -1)
    codes, steps = np.empty((rows, channels), np.int8), np.empty(rows, np.float32)
    bits_top = np.float32(2 ** (bits - 1) - 1)
    arguments = (m.numpy(), s.numpy(), divide, given_step, bits_top, codes, 0, steps)
    assert alpha_sweep.loops.codes_of(0, rows, *arguments) == 0
    assert np.array_equal(codes, expected.values.numpy())
    assert np.array_equal(steps, expected.step.expand(rows, 1)[:, 0].numpy())


@pytest.mark.parametrize("shape", [(40, 200, 70), (1, 700, 33), (30, 5, 2500), (13, 600, 260)])
def test_the_number_of_threads_does_not_show(product, shape):
    x, w, y, s = linear(*shape, alphas=5)
    before, got = torch.get_num_threads(), []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(alpha_sweep, "WORTH_THREADS", 1)
                got.append(alpha_sweep.sweep(x, w, y, s))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


@pytest.mark.parametrize("limit", [{"CALL": 1}, {"TOKENS": 7}, {"KEPT": 1}, {"TOKENS": 1, "CALL": 40_000}])
def test_pieces_do_not_show(product, limit, monkeypatch):
    x, w, y, s = linear(40, 700, 70, alphas=4)
    x_step, w_step = steps_of(x, w, s, True, True)
    whole = alpha_sweep.sweep(x, w, y, s, x_step, w_step)
    for name, value in limit.items():
        monkeypatch.setattr(alpha_sweep, name, value)
    assert torch.equal(alpha_sweep.sweep(x, w, y, s, x_step, w_step), whole)


def test_an_alpha_is_the_same_alone_and_among_others(product):
    x, w, y, s = linear(1, 900, 333, alphas=6)
    together = alpha_sweep.sweep(x, w, y, s)
    alone = torch.cat([alpha_sweep.sweep(x, w, y, one[None]) for one in s])
    assert torch.equal(together, alone)


def test_out_channels_count_as_often_as_they_stand_for_others(product):
    x, w, y, s = linear(21, 77, 40)
    weight = torch.arange(77.0) / 3
    columns = [alpha_sweep.sweep(x, w[[o]], y[:, [o]], s) for o in range(77)]
    expected = sum(column * float(weight[o]) for o, column in enumerate(columns))
    assert near(alpha_sweep.sweep(x, w, y, s, out_weight=weight), expected)


def test_full_sums_do_not_saturate(product):
    """Every product is ±127², over 2500 channels: what int16, or float32 in one go, cannot hold."""
    x, w = torch.ones(3, 2500), torch.ones(40, 2500)
    x[1], w[7] = -1, -1
    w[8, 0] = 0.5
    for y in (x @ w.T, torch.zeros(3, 40)):
        assert near(
            alpha_sweep.sweep(x, w, y, torch.ones(1, 2500)), spec.sweep(x, w, y, torch.ones(1, 2500), None, None)
        )


def test_zero_rows_and_channels(product):
    x, w, _, s = linear()
    x[3], w[5], x[:, 7], w[:, 9] = 0, 0, 0, 0
    y = x @ w.T
    for which in (False, True):
        given_steps = steps_of(x, w, s, which, which)
        got = alpha_sweep.sweep(x, w, y, s, *given_steps)
        assert near(got, spec.sweep(x, w, y, s, *given_steps))
        assert (got[:, 3] == 0).all()
    zero = torch.zeros_like(x)
    assert near(alpha_sweep.sweep(zero, w, y, s), y.double().square().sum(1).expand(3, -1))
    assert near(alpha_sweep.sweep(zero, w, y, s, torch.zeros(3), None), y.double().square().sum(1).expand(3, -1))


def test_nothing_gives_nothing():
    x, w, y, s = linear()
    assert alpha_sweep.sweep(x[:0], w, y[:0], s).shape == (3, 0)
    assert alpha_sweep.sweep(x, w, y, s[:0]).shape == (0, 70)
    assert (alpha_sweep.sweep(x, w[:0], y[:, :0], s) == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_strides_are_read(dtype):
    x, w, y, s = linear()
    expected = spec.sweep(x.to(dtype), w.to(dtype), y, s, None, None)
    assert near(alpha_sweep.sweep(x.to(dtype), w.to(dtype), y, s), expected)
    columns = x.T.contiguous().T, w.T.contiguous().T, y.T.contiguous().T, s.T.contiguous().T
    assert torch.equal(alpha_sweep.sweep(*columns), alpha_sweep.sweep(x, w, y, s))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "w"])
@pytest.mark.parametrize("static", [False, True])
def test_what_no_step_can_represent_is_refused(product, bad, where, static):
    x, w, y, s = linear()
    given_steps = steps_of(x, w, s, static, static)
    {"x": x, "w": w}[where][-1, -1] = bad
    with pytest.raises(NonFinite, match={"x": "1 rows of X / s|3 rows of X / s", "w": "s·W"}[where]):
        alpha_sweep.sweep(x, w, y, s, *given_steps)


def test_an_overflow_is_refused(product):
    x, w, y, s = linear()
    s[1, 3] = 1e-39
    x[4, 3] = 1.0
    with pytest.raises(NonFinite, match="X / s"):
        alpha_sweep.sweep(x, w, y, s)


class _Counting(CancelToken):
    """Stops the work at the third look."""

    looks = 0

    def check(self, what="the work"):
        self.looks += 1
        if self.looks == 3:
            self.cancel()
        super().check(what)


def test_it_can_be_cancelled(product, monkeypatch):
    x, w, y, s = linear(alphas=20)
    token = CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        alpha_sweep.sweep(x, w, y, s, cancel=token)
    monkeypatch.setattr(alpha_sweep, "CALL", 1)
    counting = _Counting()
    with pytest.raises(Cancelled):
        alpha_sweep.sweep(x, w, y, s, cancel=counting)
    assert counting.looks == 3


def test_the_tensors_given_are_never_written(product):
    given_tensors = linear()
    kept = [tensor.clone() for tensor in given_tensors]
    alpha_sweep.sweep(*given_tensors)
    assert all(torch.equal(one, other) for one, other in zip(given_tensors, kept, strict=True))


def test_shapes_that_do_not_fit_are_named():
    x, w, y, s = linear()
    for name, arguments in {
        "w": (x, w[:, 1:], y, s),
        "y": (x, w, y.T, s),
        "s": (x, w, y, s[:, 1:]),
        "x_step": (x, w, y, s, torch.ones(2)),
        "w_step": (x, w, y, s, None, torch.ones(4)),
    }.items():
        with pytest.raises(SqvizError, match=f"^{name} has shape"):
            alpha_sweep.sweep(*arguments)
    with pytest.raises(SqvizError, match=r"^out_weight has shape"):
        alpha_sweep.sweep(x, w, y, s, out_weight=torch.ones(3))
    wide = torch.zeros(1, spec.MAX_CHANNELS + 1)
    with pytest.raises(SqvizError, match="channels"):
        alpha_sweep.sweep(wide, wide, torch.zeros(1, 1), wide + 1)

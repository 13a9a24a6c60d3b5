"""Every backend that runs on this CPU against the definition: bit-equal, or within one code behind a float sum."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sqviz_kernels import spec
from sqviz_kernels.dispatch import backend_for, backends, get

from sqviz.errors import NonFinite, SqvizError, Unavailable

CPU = [name for name, why in backends().items() if why is None and get(name).device == "cpu"]
few = settings(deadline=None, derandomize=True, max_examples=25, database=None)
AWKWARD = [
    *(
        (0, 7, 3),
        (5, 8, 0),
        (1, 1, 1),
        (1, 576, 96),
        (2, 63, 33),
        (3, 64, 32),
        (11, 65, 31),
        (12, 130, 64),
        (13, 37, 5),
    ),
    *((25, 1024, 40), (100, 4, 100), (49, 2048, 2)),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(params=CPU)
def backend(request):
    return get(request.param)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def matrix(rows, channels, seed=0):
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(seed))
    if rows and channels:
        x[:, channels // 2] *= 40
        x[rows // 2] *= 1e-3
    return x


def weights(out, channels, seed=1):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-127, 128, (out, channels), dtype=torch.int8, generator=generator)
    return w, torch.rand(out, generator=generator), torch.randn(out, generator=generator)


def plain(backend, codes):
    """Codes out of the backend's layout."""
    values = codes.values[:, : codes.channels]
    return (values ^ 128).view(torch.int8) if values.dtype == torch.uint8 else values


def same_codes(backend, x, divisor=None):
    for share in ("token", "tensor"):
        for step in (None, torch.tensor([0.02])):
            got, (codes, steps) = backend.quantise(x, step, share, divisor), spec.quantise(x, step, share, divisor)
            assert torch.equal(plain(backend, got), codes)
            assert torch.equal(got.step, steps)


def same_product(backend, rows, channels, out):
    x, (w, step, bias) = matrix(rows, channels), weights(out, channels)
    codes, x_step = spec.quantise(x)
    for w_step in (step, step[:1]):
        for b in (bias, None):
            packed = backend.pack(w, w_step, b)
            assert torch.equal(backend.unpack(packed), w)
            for dtype in DTYPES[:3]:
                expected = spec.linear(codes, x_step, w, w_step, b, dtype)
                assert torch.equal(backend.linear(backend.quantise(x), packed, dtype), expected)
            static = torch.tensor([0.05])
            expected = spec.linear(spec.quantise(x, static)[0], static, w, w_step, b)
            assert torch.equal(backend.linear(backend.quantise(x, static), packed), expected)
            found = backend.linear_requantise(backend.quantise(x, static), packed, static)
            assert torch.equal(plain(backend, found), spec.requantise(expected, static))


@pytest.mark.parametrize("shape", AWKWARD)
def test_codes_and_products_of_awkward_shapes(backend, threads, shape):
    same_codes(backend, matrix(*shape[:2]))
    same_product(backend, *shape)


@few
@given(st.integers(1, 40), st.integers(1, 200), st.integers(1, 80))
@pytest.mark.parametrize("name", CPU)
def test_codes_and_products_of_any_shape(name, rows, channels, out):
    same_codes(get(name), matrix(rows, channels, seed=out), torch.rand(channels) + 0.1)
    same_product(get(name), rows, channels, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(backend, dtype):
    same_codes(backend, matrix(9, 70).to(dtype))
    same_codes(backend, matrix(9, 70).to(dtype), torch.rand(70).to(dtype) + 0.5)


@pytest.mark.parametrize(
    "view",
    [
        lambda: matrix(20, 90)[::3, :45],
        lambda: matrix(90, 20).t(),
        lambda: matrix(1, 33).expand(7, 33),
        lambda: matrix(7, 1).expand(7, 33),
        lambda: matrix(20, 66)[:, ::2],
        lambda: matrix(1, 33)[:, :0],
    ],
)
def test_views(backend, view):
    x = view()
    same_codes(backend, x)
    w, step, _ = weights(10, x.shape[1])
    got = backend.linear(backend.quantise(x), backend.pack(w, step))
    assert torch.equal(got, spec.linear(*spec.quantise(x), w, step))


@pytest.mark.parametrize("signs", [(127, 127), (127, -127), (-127, -127)])
def test_extremes_do_not_saturate(backend, signs):
    x = torch.full((13, 4096), float(signs[0]))
    w = torch.full((33, 4096), signs[1], dtype=torch.int8)
    got = backend.linear(backend.quantise(x, torch.ones(1)), backend.pack(w, torch.ones(33)))
    assert (got == signs[0] * signs[1] * 4096).all()


def test_sums_at_the_limit_of_an_int32(backend):
    x, w = torch.full((2, spec.MAX_CHANNELS), 127.0), torch.full((3, spec.MAX_CHANNELS), 127, dtype=torch.int8)
    x[1], w[1] = -127, -127
    got = backend.linear(backend.quantise(x, torch.ones(1)), backend.pack(w, torch.ones(3)))
    assert torch.equal(got, spec.product(x.to(torch.int8), w).float())


@pytest.mark.parametrize("view", ["transposed", "apart", "expanded"])
def test_weights_that_are_views(backend, view):
    w = {
        "transposed": lambda: weights(40, 9)[0].t(),
        "apart": lambda: weights(18, 80)[0][::2, ::2],
        "expanded": lambda: weights(1, 40)[0].expand(9, 40),
    }[view]()
    x, step = matrix(5, 40), torch.rand(9)
    packed = backend.pack(w, step, torch.randn(1).expand(9))
    assert torch.equal(
        backend.linear(backend.quantise(x), packed), spec.linear(*spec.quantise(x), w, step, packed.bias)
    )


def test_steps_of_zero_give_zeros_and_wrong_ones_are_refused(backend):
    x, (w, _, bias) = matrix(5, 40), weights(7, 40)
    x[2] = 0
    assert not plain(backend, backend.quantise(x, torch.zeros(1))).any()
    assert not backend.quantise(x).step[2]
    packed = backend.pack(w, torch.zeros(7), bias)
    for codes in (backend.quantise(x), backend.quantise(x, torch.zeros(1))):
        assert torch.equal(backend.linear(codes, packed), bias.expand(5, 7))
    for bad in (-0.5, math.nan, math.inf):
        with pytest.raises(SqvizError, match="static step"):
            backend.quantise(x, torch.tensor([bad]))


def test_too_many_channels_are_refused(backend):
    with pytest.raises(SqvizError, match="133144"):
        backend.pack(torch.zeros(1, spec.MAX_CHANNELS + 1, dtype=torch.int8), torch.ones(1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_stays(backend, threads, bad):
    x = matrix(70, 600)
    x[33, 599] = bad
    before = x.clone()
    for call in (
        lambda: backend.quantise(x),
        lambda: backend.quantise(x, share="tensor"),
        lambda: backend.quantise(x, torch.ones(1)),
        lambda: backend.norm_quantise(x, torch.ones(600), None, 1e-5, "rms"),
    ):
        with pytest.raises(NonFinite):
            call()
    assert torch.equal(x.view(torch.int32), before.view(torch.int32))


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 48), (37, 100), (5, 1), (0, 8)])
def test_norms(backend, threads, kind, dtype, shape):
    x, gain, bias = matrix(*shape).to(dtype), torch.rand(shape[1]), torch.randn(shape[1])
    for b in (bias, None):
        out = torch.empty(shape, dtype=dtype)
        got = backend.norm_quantise(x, gain, b, 1e-5, kind, out=out)
        codes, step = spec.norm_quantise(x, gain, b, 1e-5, kind)
        assert torch.allclose(got.step, step, rtol=1e-4)
        away = (plain(backend, got).int() - codes.int()).abs()
        assert not away.numel() or (away.max() <= 1 and (away > 0).float().mean() < 0.02)
        assert torch.allclose(out.float(), spec.norm(x, gain, b, 1e-5, kind), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(1, 48, 32), (37, 101, 53), (24, 64, 17), (0, 8, 4)])
def test_gated(backend, threads, shape):
    rows, channels, inner = shape
    x, (w, step, bias) = matrix(rows, channels), weights(2 * inner, channels)
    step = step * 1e-3
    packed = backend.pack(w, step, bias, gated=True)
    assert torch.equal(backend.unpack(packed), w)
    which = torch.tensor([0, 2 * inner - 1, inner])
    assert torch.equal(backend.rows(packed, which), w[which])
    y = spec.linear(*spec.quantise(x), w, step, bias)
    assert torch.equal(backend.linear(backend.quantise(x), packed), y)
    for static in (None, torch.tensor([0.1])):
        codes, steps = spec.gate_quantise(*y.chunk(2, 1), static)
        got = backend.gated(backend.quantise(x), packed, static)
        away = (plain(backend, got).int() - codes.int()).abs()
        assert not away.numel() or (away.max() <= 1 and (away > 0).float().mean() < 0.02)
        assert torch.allclose(got.step, steps, rtol=1e-5)


def states(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes_of(x):
    codes, step = spec.quantise(x.flatten(0, 2))
    return codes.view(x.shape), step.view(x.shape[:3])


@pytest.mark.parametrize("mask", [None, "bool", "per head", "added", "nothing seen"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 1, 1, 1, 4, 4),
        (2, 4, 2, 1, 77, 64, 64),
        (2, 6, 2, 2, 33, 7, 5),
        (1, 6, 3, 50, 50, 32, 70),
        (2, 2, 2, 13, 40, 128, 16),
    ],
)
def test_attention(backend, threads, shape, mask):
    batch, heads, kv, queries, keys, dims, dims_v = shape
    q, k, v = (
        states(batch, heads, queries, dims),
        states(batch, kv, keys, dims, seed=1),
        states(batch, kv, keys, dims_v, seed=2),
    )
    hidden = torch.rand(batch, 1 if mask != "per head" else heads, queries, keys) < 0.4
    given_mask = {None: None, "added": torch.randn_like(hidden.float()).masked_fill(hidden, -math.inf)}.get(
        mask, ~hidden
    )
    if mask == "nothing seen":
        given_mask = torch.zeros_like(hidden)
    for causal in (None, max(0, keys - queries)):
        arguments = (q, *codes_of(k), *codes_of(v), dims**-0.5, causal, given_mask)
        got, expected = backend.attention(*arguments), spec.attention(*arguments)
        assert torch.allclose(got, expected, atol=0.02 * float(expected.abs().amax()) + 1e-6)
        assert float((got - expected).norm()) <= 2e-3 * float(expected.norm()) + 1e-6


PRODUCTS = [(1, 1, 1, 1, 1), (2, 3, 7, 33, 64), (1, 2, 13, 5, 7), (2, 1, 40, 130, 16), (1, 2, 0, 4, 8), (1, 2, 3, 0, 8)]


@pytest.mark.parametrize("shape", PRODUCTS)
def test_products_of_many_matrices_are_bit_equal(backend, threads, shape):
    """QKᵀ with steps of its keys, PV without; B as it comes, transposed, and repeated."""
    outer, inner, rows, out, channels = shape
    a = states(outer * inner * rows, channels)
    codes, step = spec.quantise(a)
    codes, step = codes.view(outer, inner, rows, channels), step.view(outer, inner, rows)
    b, b_step = codes_of(states(outer, inner, out, channels, seed=1))
    turned = b.transpose(2, 3).contiguous().transpose(2, 3)
    for each in (b, turned, b[:, :, :1].expand_as(b)):
        got = backend.batched(backend.quantise(a), each, b_step, 0.37)
        assert torch.equal(got, spec.batched(codes, step, each, b_step, 0.37))
        got = backend.batched(backend.quantise(a), each)
        assert torch.equal(got, spec.batched(codes, step, each))


def test_a_cache_of_codes_is_read(backend):
    codes, step = codes_of(states(2, 3, 11, 40))
    for dtype in DTYPES:
        for k, s in ((codes, step), (codes[:, :, 2:7], step[:, :, 2:7]), (codes[:0], step[:0])):
            assert torch.equal(backend.read_cache(k, s, dtype), (k.float() * s[..., None]).to(dtype))


def test_attention_of_more_keys_than_an_int32_can_sum_is_refused(backend):
    """At the limit exact: probabilities alike, values full."""
    keys, q = spec.MAX_CHANNELS, torch.zeros(1, 1, 1, 4)
    k, step = torch.full((1, 1, keys, 4), 127, dtype=torch.int8), torch.ones(1, 1, keys)
    assert torch.allclose(backend.attention(q, k, step, k, step, 1.0), torch.tensor(127.0), rtol=1e-3)
    k, step = (torch.cat([t, t[:, :, :1]], 2) for t in (k, step))
    with pytest.raises(SqvizError, match="133145 keys"):
        backend.attention(q, k, step, k, step, 1.0)


@pytest.mark.parametrize("which", ["query", "key", "head", "batch"])
def test_attention_of_repeated_views(backend, which):
    """Strides of 0 in queries, keys, values and their steps."""
    q, (k, step) = states(2, 4, 3, 16), codes_of(states(2, 2, 9, 16, seed=1))
    if which == "query":
        q = q[:, :, :1].expand(2, 4, 3, 16)
    else:
        dim = {"batch": 0, "head": 1, "key": 2}[which]
        k, step = (t.narrow(dim, 0, 1).expand(t.shape) for t in (k, step))
    got, expected = backend.attention(q, k, step, k, step, 0.3), spec.attention(q, k, step, k, step, 0.3)
    assert float((got - expected).norm()) <= 2e-3 * float(expected.norm())


def test_attention_reads_views_of_a_longer_buffer(backend):
    k, k_step = codes_of(states(2, 2, 40, 32))
    q = states(2, 4, 3, 32).transpose(1, 2).contiguous().transpose(1, 2)
    part = (k[:, :, 5:30], k_step[:, :, 5:30])
    whole = tuple(t.clone() for t in part)
    assert torch.equal(backend.attention(q, *part, *part, 0.2), backend.attention(q, *whole, *whole, 0.2))


def test_attention_refuses_what_is_not_finite_and_takes_no_keys(backend):
    q, (k, step) = states(1, 2, 3, 8), codes_of(states(1, 2, 5, 8))
    assert not backend.attention(q, k[:, :, :0], step[:, :, :0], k[:, :, :0], step[:, :, :0], 0.3).any()
    q[0, 1, 2, 3] = math.nan
    with pytest.raises(NonFinite):
        backend.attention(q, k, step, k, step, 0.3)


def test_wrong_use_is_told(backend):
    w, step, _ = weights(4, 8)
    with pytest.raises(SqvizError, match="8"):
        backend.linear(backend.quantise(torch.ones(2, 9)), backend.pack(w, step))
    with pytest.raises(SqvizError, match="floating"):
        backend.quantise(torch.ones(2, 9, dtype=torch.int32))
    with pytest.raises(SqvizError, match="channels are read"):
        backend.quantise(torch.ones(2, 9), divisor=torch.ones(8))


def test_backends_say_why_not():
    found = backends()
    assert list(found)[:3] == ["vnni", "onednn", "plain"]
    assert found["plain"] is None
    for name, why in found.items():
        if why is not None:
            with pytest.raises(Unavailable, match=name):
                get(name)
    with pytest.raises(SqvizError, match="'simulate', 'auto', 'vnni'"):
        get("cutlass")
    assert backend_for("auto", torch.device("cpu")).name == CPU[0]
    with pytest.raises(SqvizError, match="meta"):
        backend_for("plain", torch.device("meta"))

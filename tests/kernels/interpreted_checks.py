"""The Triton backend against the definition, in Triton's interpreter: run by test_triton_interpreter.py.

By itself: TRITON_INTERPRET=1 pytest -o python_files=interpreted_checks.py tests/kernels
"""

import gpu_checks as checks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sqviz_kernels import spec, triton_attend
from sqviz_kernels.tiles import Tile
from sqviz_kernels.triton_launch import Triton

from sqviz.errors import NonFinite, SqvizError

CPU = "cpu"
backend = Triton(tiles=(Tile(32, 32, 64, 4, 2),))
other = Triton(tiles=(Tile(16, 64, 128, 4, 2),))
few = settings(deadline=None, derandomize=True, max_examples=15, database=None)


@pytest.mark.parametrize("how", checks.HOW)
@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_codes(dtype, how):
    for rows, channels, _ in checks.SHAPES + checks.EMPTY:
        checks.check_quantise(backend, checks.values(rows, channels, dtype=dtype), how)


@pytest.mark.parametrize("rows", ["float16", "bfloat16", "float32", "float64"])
def test_halves_round_to_even_and_values_beyond_the_step_saturate(rows):
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 300.0, -300.0, 65504.0]], dtype=getattr(torch, rows))
    found = backend.quantise(x, torch.ones(1)).values[0, :10]
    assert found.tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -127, 127] or rows == "bfloat16"
    assert torch.equal(found, spec.quantise(x, torch.ones(1))[0][0])


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("how", ["token", "tensor", "static"])
def test_linear(dtype, how):
    for number, (rows, channels, out) in enumerate(checks.SHAPES + checks.EMPTY):
        checks.check_linear(backend, rows, channels, out, CPU, dtype, how, bias=number % 2 == 0)


@given(
    rows=st.integers(1, 40),
    channels=st.integers(1, 200),
    out=st.integers(1, 70),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
@few
def test_linear_of_any_shape(rows, channels, out, bias, seed):
    torch.manual_seed(seed)
    checks.check_linear(backend, rows, channels, out, CPU, torch.float32, "token", bias)
    checks.check_linear(other, rows, channels, out, CPU, torch.float16, "divided", bias)


def test_extremes():
    checks.check_extremes(backend, CPU)


def test_sums_alone_and_codes_for_the_next_operator():
    x, w, bias = checks.values(19, 131), checks.codes(45, 131), torch.randn(45)
    w_step, step = torch.rand(45) * 0.01, torch.tensor([0.37])
    packed, found = backend.pack(w, w_step, bias), backend.quantise(x)
    q, x_step = spec.quantise(x)
    assert torch.equal(backend.product(found, packed), spec.product(q, w))
    requantised = backend.linear_requantise(found, packed, step)
    assert torch.equal(checks.unpadded(requantised), spec.requantise(spec.linear(q, x_step, w, w_step, bias), step))
    assert requantised.values.shape == (19, 48)
    assert not requantised.values[:, 45:].any()
    after = backend.pack(checks.codes(8, 45), torch.ones(1))
    expected = spec.linear(checks.unpadded(requantised), step, backend.unpack(after), torch.ones(1))
    assert torch.equal(backend.linear(requantised, after), expected)


def test_strides():
    checks.check_strides(backend, CPU)


def test_a_product_of_different_channels_is_refused():
    with pytest.raises(SqvizError, match="x has 8 channels and the weight 9"):
        backend.linear(backend.quantise(torch.ones(2, 8)), backend.pack(checks.codes(3, 9), torch.ones(1)))
    with pytest.raises(SqvizError, match="an int32 holds the sum of at most"):
        backend.pack(torch.zeros(1, spec.MAX_CHANNELS + 1, dtype=torch.int8), torch.ones(1))


@pytest.mark.parametrize("how", ["token", "tensor", "static"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind, bias, how):
    for rows, channels in ((1, 1), (4, 131), (3, 576), (2, 4097)):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            checks.check_norm(backend, checks.values(rows, channels, dtype=dtype), kind, bias, how)


@pytest.mark.parametrize("how", ["token", "tensor", "static"])
def test_gates(how):
    checks.check_gated(backend, 5, 40, CPU, how)
    gate, up = torch.randn(3, 70, dtype=torch.float16), torch.randn(70, 3).T
    step, share = (torch.tensor([0.02]) if how == "static" else None), "tensor" if how == "tensor" else "token"
    checks.near(backend.gate_quantise(gate, up, step, share), spec.gate_quantise(gate, up, step, share))


MASKS = {
    "none": lambda batch, heads, queries, keys: None,
    "bool": lambda batch, heads, queries, keys: torch.rand(1, heads, queries, keys) > 0.5,
    "padding": lambda batch, heads, queries, keys: (torch.arange(keys) > 3).expand(batch, 1, queries, keys),
    "float": lambda batch, heads, queries, keys: torch.randn(batch, 1, queries, keys),
    "half": lambda batch, heads, queries, keys: torch.where(
        torch.rand(1, 1, queries, keys) > 0.5, 0.0, torch.finfo(torch.float16).min
    ).half(),
    "infinite": lambda batch, heads, queries, keys: torch.where(torch.rand(1, 1, queries, keys) > 0.5, 0.0, -torch.inf),
}


SHAPES = [(2, 6, 2, 5, 37, 24), (1, 3, 3, 1, 48, 64), (1, 4, 1, 9, 17, 33)]
"""Batch, heads, key heads, queries, keys, dim."""


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 7, 33, 64), (1, 2, 13, 5, 40), (1, 2, 0, 4, 8)], ids=str)
def test_products_of_many_matrices(shape):
    checks.check_batched(backend, *shape, CPU)


def test_more_keys_than_an_int32_can_sum_are_refused():
    k, step = torch.zeros(1, 1, 1, 4, dtype=torch.int8), torch.ones(1, 1, 1)
    k, step = k.expand(1, 1, spec.MAX_CHANNELS + 1, 4), step.expand(1, 1, spec.MAX_CHANNELS + 1)
    with pytest.raises(SqvizError, match="133145 keys"):
        backend.attention(torch.zeros(1, 1, 1, 4), k, step, k, step, 1.0)


@pytest.mark.parametrize(
    ("shape", "mask", "causal_from"),
    [
        (SHAPES[0], "none", 32),
        (SHAPES[0], "padding", None),
        (SHAPES[1], "none", None),
        (SHAPES[1], "float", 47),
        (SHAPES[2], "bool", 8),
        (SHAPES[2], "float", -3),
        (SHAPES[2], "half", None),
        (SHAPES[1], "infinite", 30),
    ],
    ids=str,
)
def test_attention(shape, mask, causal_from):
    hidden = MASKS[mask](shape[0], shape[1], shape[3], shape[4])
    checks.check_attention(backend, checks.attention_inputs(*shape, CPU), causal_from, hidden)


def test_scores_are_bit_equal_and_a_query_that_sees_nothing_gets_zeros():
    given = checks.attention_inputs(1, 2, 1, 4, 20, 32, CPU)
    found = backend.attention(*given, 0.2, -2)
    assert not found[:, :, :2].any()
    assert found[:, :, 2:].any()
    q, k, k_step = given[:3]
    scores = torch.empty(1, 8, 32)
    x = backend.quantise(q.reshape(-1, 32))
    triton_attend._batched(backend, x, k, k_step, scores, 0.2)
    expected = spec.linear(*spec.quantise(q.reshape(-1, 32)), k[0, 0], k_step[0, 0]) * 0.2
    assert torch.equal(scores[0, :, :20], expected)


def test_attention_takes_slices_of_a_cache_in_portions_of_the_queries(monkeypatch):
    q, k, k_step, v, v_step = checks.attention_inputs(1, 4, 2, 5, 30, 32, CPU)
    given = [q.half().transpose(1, 2).contiguous().transpose(1, 2), k[:, :, 3:21], k_step[:, :, 3:21]]
    given += [v[:, :, 3:21], v_step[:, :, 3:21]]
    mask = torch.rand(1, 4, 5, 18) > 0.3
    whole = backend.attention(*given, 0.2, 11, mask)
    monkeypatch.setattr(triton_attend, "WORKSPACE", 5 * 4 * 32 * 2)  # two queries
    assert torch.equal(backend.attention(*given, 0.2, 11, mask), whole)
    checks.check_attention(backend, given, 11, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reading_a_cache(dtype):
    codes, step = checks.codes(2, 3, 11, 40), torch.rand(2, 3, 11)
    for k, s in ((codes, step), (codes[:, :, 2:7], step[:, :, 2:7]), (codes[..., :1], step), (codes[:0], step[:0])):
        assert torch.equal(backend.read_cache(k, s, dtype), (k.float() * s[..., None]).to(dtype))


@pytest.mark.parametrize("static", [False, True])
def test_sweep(static):
    x, w, s = checks.values(9, 40), torch.randn(12, 40), torch.rand(3, 40) + 0.5
    steps = torch.rand(3) * 0.05 if static else None
    found = backend.sweep(x, w, x @ w.T, s, steps, steps)
    torch.testing.assert_close(found, spec.sweep(x, w, x @ w.T, s, steps, steps), rtol=1e-13, atol=0)


def test_what_is_not_finite_becomes_nan_and_is_told_once():
    backend.raise_if_not_finite()
    checks.check_not_finite(backend, CPU)
    with pytest.raises(NonFinite, match="held a NaN or an infinity"):
        backend.raise_if_not_finite()
    backend.raise_if_not_finite()


def test_nothing_finite_is_lost_in_norms_gates_attention_and_codes():
    x, gain = checks.values(4, 40), torch.ones(40)
    x[2, 3] = torch.inf
    assert backend.norm_quantise(x, gain, None, 1e-5, "layer").step.isnan().tolist() == [False, False, True, False]
    assert backend.gate_quantise(x, x).step.isnan().tolist() == [False, False, True, False]
    given = checks.attention_inputs(1, 2, 1, 3, 20, 32, CPU)
    given[0][0, 1, 2, 5] = torch.nan
    found = backend.attention(*given, 0.2).isnan()
    assert found[0, 1, 2].all()
    assert found.sum() == 32
    packed = backend.pack(checks.codes(5, 40), torch.ones(1))
    assert backend.linear_requantise(backend.quantise(x), packed, torch.ones(1)).step.isnan().all()
    with pytest.raises(NonFinite):
        backend.raise_if_not_finite()

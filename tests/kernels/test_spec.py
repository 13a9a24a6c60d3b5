"""The definition itself, against loops over single numbers and against torch's own operations in floating point."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sqviz_kernels import spec
from torch.nn import functional as F

from sqviz.errors import NonFinite, SqvizError

few = settings(deadline=None, derandomize=True, max_examples=30, database=None)
sizes = st.integers(1, 12)


def rounded(value):
    """Half to even, in Python."""
    return max(-127, min(127, round(float(value))))


@few
@given(sizes, sizes, st.sampled_from(["token", "tensor"]), st.booleans())
def test_quantising_number_by_number(rows, channels, share, static):
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(rows)) * 3
    given_step = torch.tensor([0.01]) if static else None
    codes, step = spec.quantise(x, given_step, share)
    for r in range(rows):
        row = x if share == "tensor" else x[r]
        delta = np.float32(0.01) if static else np.float32(row.abs().max().item()) / np.float32(127)
        assert np.float32(step[0 if len(step) == 1 else r].item()) == delta
        for c in range(channels):
            assert codes[r, c] == rounded(np.float32(x[r, c].item()) / delta)


def test_halves_go_to_even_and_what_is_beyond_saturates():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 300.0, -300.0]])
    codes, _ = spec.quantise(x, torch.ones(1))
    assert codes.tolist() == [[0, 2, 2, 0, -2, 126, 127, 127, -127]]


@pytest.mark.parametrize("share", ["token", "tensor"])
def test_what_has_no_step_is_zero(share):
    codes, step = spec.quantise(torch.tensor([[0.0, -0.0], [1e-44, 1e-39]]), None, share)
    assert not codes.any()
    assert not step.any()
    assert spec.quantise(torch.empty(0, 5), None, share)[0].shape == (0, 5)
    assert spec.quantise(torch.empty(3, 0), None, share)[0].shape == (3, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [None, torch.ones(1)])
def test_what_is_not_finite_is_refused(bad, step):
    x = torch.ones(3, 4)
    x[1, 2] = bad
    with pytest.raises(NonFinite):
        spec.quantise(x, step)


def test_products_are_exact_at_the_limit_and_refused_beyond():
    x = torch.full((1, spec.MAX_CHANNELS), 127, dtype=torch.int8)
    assert spec.product(x, x).item() == 127 * 127 * spec.MAX_CHANNELS
    assert spec.product(x, -x).item() == -127 * 127 * spec.MAX_CHANNELS
    more = torch.full((1, spec.MAX_CHANNELS + 1), 127, dtype=torch.int8)
    with pytest.raises(SqvizError, match="133144"):
        spec.product(more, more)


@few
@given(sizes, sizes, sizes)
def test_a_linear_number_by_number(rows, channels, out):
    generator = torch.Generator().manual_seed(channels)
    x, w = (torch.randint(-127, 128, (n, channels), dtype=torch.int8, generator=generator) for n in (rows, out))
    x_step, w_step, bias = (torch.rand(n, generator=generator) for n in (rows, out, out))
    y = spec.linear(x, x_step, w, w_step, bias)
    for r in range(rows):
        for o in range(out):
            total = sum(int(a) * int(b) for a, b in zip(x[r], w[o], strict=True))
            scaled = np.float32(np.float32(np.float32(total) * np.float32(x_step[r])) * np.float32(w_step[o]))
            assert np.float32(y[r, o]) == np.float32(scaled + np.float32(bias[o]))


@pytest.mark.parametrize("bad", [-0.5, math.nan, math.inf])
def test_a_static_step_that_is_none_is_refused_and_zero_makes_zeros(bad):
    x = torch.randn(3, 4)
    for share in ("token", "tensor"):
        with pytest.raises(SqvizError, match="static step"):
            spec.quantise(x, torch.tensor([bad]), share)
        assert not spec.quantise(x, torch.zeros(1), share)[0].any()


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_are_torchs(kind):
    x, gain, bias = torch.randn(7, 48), torch.rand(48), torch.randn(48)
    theirs = F.rms_norm(x, (48,), gain, 1e-5) + bias if kind == "rms" else F.layer_norm(x, (48,), gain, bias, 1e-5)
    assert torch.allclose(spec.norm(x, gain, bias, 1e-5, kind), theirs, atol=1e-5)


def codes_of(states):
    codes, step = spec.quantise(states.flatten(0, 2))
    return codes.view(states.shape), step.view(states.shape[:3])


@pytest.mark.parametrize("steps", [True, False])
def test_products_of_many_matrices_number_by_number(steps):
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-127, 128, (2, 3, n, 7), dtype=torch.int8, generator=generator) for n in (4, 5))
    a_step, b_step = (torch.rand(2, 3, n, generator=generator) for n in (4, 5))
    got = spec.batched(a, a_step, b, b_step if steps else None, 0.3)
    for i, j, r, o in ((i, j, r, o) for i in range(2) for j in range(3) for r in range(4) for o in range(5)):
        total = sum(int(one) * int(other) for one, other in zip(a[i, j, r], b[i, j, o], strict=True))
        value = np.float32(np.float32(total) * np.float32(a_step[i, j, r]))
        if steps:
            value = np.float32(np.float32(value * np.float32(b_step[i, j, o])) * np.float32(0.3))
        assert np.float32(got[i, j, r, o]) == value


def test_what_a_cache_of_codes_stands_for():
    codes, step = torch.tensor([[[3, -127]]], dtype=torch.int8), torch.tensor([[0.1]])
    for dtype in (torch.float32, torch.bfloat16):
        expected = [[[np.float32(3) * np.float32(0.1), np.float32(-127) * np.float32(0.1)]]]
        assert torch.equal(spec.read_cache(codes, step, dtype), torch.tensor(expected).to(dtype))


def test_more_keys_than_an_int32_can_sum_are_refused():
    """All probabilities alike and all values full: one key more and the sum is over."""
    q, k = torch.zeros(1, 1, 1, 4), torch.full((1, 1, spec.MAX_CHANNELS, 4), 127, dtype=torch.int8)
    step = torch.ones(1, 1, spec.MAX_CHANNELS)
    assert torch.allclose(spec.attention(q, k, step, k, step, 1.0), torch.tensor(127.0), rtol=1e-3)
    k, step = torch.zeros(1, 1, spec.MAX_CHANNELS + 1, 4, dtype=torch.int8), torch.ones(1, 1, spec.MAX_CHANNELS + 1)
    with pytest.raises(SqvizError, match="133145 keys"):
        spec.attention(q, k, step, k, step, 1.0)


@pytest.mark.parametrize("kind", ["causal", "bool", "added", "none"])
def test_attention_is_torchs_up_to_quantisation(kind):
    q, k, v = torch.randn(2, 6, 9, 16), torch.randn(2, 2, 13, 16), torch.randn(2, 2, 13, 8)
    seen = torch.ones(9, 13, dtype=torch.bool).tril(4)
    given_mask = {"bool": seen, "added": torch.zeros(9, 13).masked_fill(~seen, -math.inf)}.get(kind)
    got = spec.attention(
        q, *codes_of(k), *codes_of(v), 0.25, 4 if kind == "causal" else None,
        None if given_mask is None else given_mask[None, None],
    )  # fmt: skip
    mask = None if kind == "none" else seen
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25, enable_gqa=True)
    assert float((got - theirs).norm() / theirs.norm()) < 0.02


def test_attention_query_by_query():
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 6)
    (kc, ks), (vc, vs) = codes_of(k), codes_of(v)
    got = spec.attention(q, kc, ks, vc, vs, 0.5)
    for head in range(2):
        for query in range(3):
            codes, step = spec.quantise(q[0, head, query][None])
            s = torch.tensor([int((codes[0].int() * kc[0, 0, key].int()).sum()) for key in range(5)]).float()
            s = s * step * ks[0, 0] * 0.5
            p, p_step = spec.quantise((torch.softmax(s, 0) * vs[0, 0])[None])
            o = torch.stack([(p[0].int() * vc[0, 0, :, d].int()).sum() for d in range(6)]).float() * p_step
            assert torch.allclose(got[0, head, query], o, atol=1e-6)


def test_a_query_that_sees_nothing_gets_zeros():
    q, k = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[False] * 3, [True] * 3])[None, None]
    got = spec.attention(q, *codes_of(k), *codes_of(k), 0.5, None, mask)
    assert not got[0, 0, 0].any()
    assert got[0, 0, 1].any()

"""Quantisation of one tensor against a slow, obvious implementation of thesis equation 3.1."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqviz.errors import NonFinite, SqvizError
from sqviz.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from sqviz.quant.quantize import fake_quantize, levels, quantize_tensor

SETTINGS = settings(deadline=None, derandomize=True, max_examples=150)
GRANULARITIES = [PerTensor(), PerToken(), PerChannel(), PerGroup(1), PerGroup(3), PerGroup(64)]


def slices(shape, granularity, of):
    """The index sets that share a step, as (rows, columns), spelled out."""
    tokens, channels = shape
    every_row, every_column = list(range(tokens)), list(range(channels))
    if isinstance(granularity, PerTensor):
        return [(every_row, every_column)]
    if isinstance(granularity, PerToken) or (isinstance(granularity, PerChannel) and of == "weight"):
        return [([row], every_column) for row in every_row]
    if isinstance(granularity, PerChannel):
        return [(every_row, [column]) for column in every_column]
    size = granularity.size
    return [([r], every_column[start : start + size]) for r in every_row for start in range(0, channels, size)]


def half_to_even(value):
    below = math.floor(value)
    rest = value - below
    if rest != 0.5:
        return below + (rest > 0.5)
    return below if below % 2 == 0 else below + 1


def reference(x, granularity, bits, symmetric, of):
    """x̂ and x̄ of a 2-D array, one value at a time, every operation rounded to float32 as the library's is."""
    f = np.float32
    x = np.asarray(x, dtype=f)
    back, codes = np.zeros_like(x), np.zeros(x.shape, dtype=np.int64)
    for rows, columns in slices(x.shape, granularity, of):
        part = [x[r, c] for r in rows for c in columns]
        if not part:
            continue
        if symmetric:
            top = 2 ** (bits - 1) - 1
            low, high, zero = -top, top, 0
            step = f(max(abs(v) for v in part)) / f(top)
        else:
            low, high = 0, 2**bits - 1
            step = f(max(0, *part)) / f(high) - f(min(0, *part)) / f(high)
            zero = half_to_even(float(f(-min(0, *part)) / step)) if step else 0
            zero = min(max(zero, low), high)
        for r in rows:
            for c in columns:
                code = half_to_even(float(x[r, c] / step)) + zero if step else zero
                codes[r, c] = min(max(code, low), high)
                back[r, c] = f(codes[r, c] - zero) * step
    return back, codes


@st.composite
def matrices(draw, dtype=torch.float32):
    tokens, channels = draw(st.integers(0, 6)), draw(st.integers(1, 9))
    size = tokens * channels
    scale = draw(st.sampled_from([1e-20, 1e-3, 1.0, 300.0, 1e20]))
    number = st.one_of(st.just(0.0), st.floats(-1, 1, width=32), st.sampled_from([0.5, -0.5, 1.0, -1.0, 0.25]))
    values = draw(st.lists(number, min_size=size, max_size=size))
    x = torch.tensor(values, dtype=torch.float32).reshape(tokens, channels) * scale
    x[x.abs() < 1e-30] = 0.0
    return x.to(dtype)


CASES = {
    "granularity": st.sampled_from(GRANULARITIES),
    "bits": st.integers(2, 8),
    "symmetric": st.booleans(),
    "of": st.sampled_from(["activation", "weight"]),
}


@SETTINGS
@given(x=matrices(), **CASES)
def test_equals_the_reference_bit_for_bit(x, granularity, bits, symmetric, of):
    if isinstance(granularity, PerToken):
        of = "activation"
    back, codes = reference(x.numpy(), granularity, bits, symmetric, of)
    quantized = quantize_tensor(x, granularity, bits, symmetric, of=of)
    assert quantized.values.dtype == (torch.int8 if symmetric else torch.uint8)
    assert np.array_equal(quantized.values.numpy(), codes)
    assert np.array_equal(quantized.dequantize().numpy(), back)
    assert np.array_equal(fake_quantize(x, granularity, bits, symmetric, of=of).numpy(), back)


@SETTINGS
@given(x=matrices(), **CASES)
def test_error_is_at_most_half_a_step_and_zero_stays_zero(x, granularity, bits, symmetric, of):
    if isinstance(granularity, PerToken):
        of = "activation"
    quantized = quantize_tensor(x, granularity, bits, symmetric, of=of)
    step = granularity.spread(quantized.step, x.shape[-1])
    error = (quantized.dequantize().double() - x.double()).abs()
    assert (error <= step.double() * (0.5 + 1e-4)).all()
    assert (quantized.dequantize()[x == 0] == 0).all()
    low, high = levels(bits, symmetric)
    assert quantized.values.numel() == 0 or low <= int(quantized.values.min()) <= int(quantized.values.max()) <= high


@SETTINGS
@given(x=matrices(), **CASES)
def test_quantising_twice_changes_nothing_more(x, granularity, bits, symmetric, of):
    if isinstance(granularity, PerToken):
        of = "activation"
    if not symmetric:  # the bounds of x̂ are other bounds: only the grid found first is a fixed point
        first = quantize_tensor(x, granularity, bits, symmetric, of=of)
        once = first.dequantize()
        again = fake_quantize(once, granularity, bits, symmetric, first.step, zero=first.zero, of=of)
        assert torch.equal(once, again)
        return
    once = fake_quantize(x, granularity, bits, of=of)
    torch.testing.assert_close(fake_quantize(once, granularity, bits, of=of), once, rtol=1e-6, atol=0)


@SETTINGS
@given(x=matrices(), granularity=st.sampled_from(GRANULARITIES), bits=st.integers(2, 8))
def test_the_sign_does_not_matter_to_a_symmetric_grid(x, granularity, bits):
    plus = fake_quantize(x, granularity, bits, of="activation")
    assert torch.equal(fake_quantize(-x, granularity, bits, of="activation"), -plus)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_half_precision_is_computed_in_float32(dtype, symmetric, granularity):
    x = torch.randn(17, 33).to(dtype)
    got = fake_quantize(x, granularity, 8, symmetric, of="activation")
    assert got.dtype == dtype
    back, _ = reference(x.float().numpy(), granularity, 8, symmetric, "activation")
    assert torch.equal(got, torch.from_numpy(back).to(dtype))
    assert quantize_tensor(x, granularity, of="activation").dequantize().dtype == dtype


def test_float64_is_computed_in_float64():
    x = torch.randn(9, 9, dtype=torch.float64)
    step = x.abs().max() / 127
    assert torch.equal(fake_quantize(x, PerTensor()), (x / step).round() * step)


def test_halves_round_to_even():
    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.0]])  # Δ = 1
    assert quantize_tensor(x, PerTensor()).values.tolist() == [[0, 2, 2, 0, -2, -2, 127]]


def test_a_slice_of_zeros_stays_exactly_zero():
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, -3.0], [0.0, -0.0, 0.0]])
    for symmetric in (True, False):
        quantized = quantize_tensor(x, PerToken(), symmetric=symmetric)
        assert quantized.step[0] == quantized.step[2] == 0
        assert not quantized.dequantize()[[0, 2]].any()
        assert fake_quantize(torch.zeros(3, 3), PerTensor(), symmetric=symmetric).eq(0).all()


def test_one_sided_values_use_every_level_when_asymmetric():
    x = torch.linspace(0, 1, 256).reshape(16, 16)  # as after ReLU
    quantized = quantize_tensor(x, PerTensor(), symmetric=False)
    assert int(quantized.zero) == 0
    assert quantized.values.flatten().tolist() == list(range(256))
    assert (quantized.dequantize() - x).abs().max() < (fake_quantize(x, PerTensor()) - x).abs().max() / 1.9


def test_a_range_wider_than_float32_still_has_a_step():
    x = torch.tensor([[-3e38, 3e38, 1e38]])
    back = fake_quantize(x, PerTensor(), symmetric=False)
    assert torch.isfinite(back).all()
    assert (back - x).abs().max() < 3e38 / 127


def test_given_steps_saturate():
    x = torch.tensor([[0.4, -0.6, 300.0, -300.0]])
    assert fake_quantize(x, PerTensor(), step=1.0).tolist() == [[0, -1, 127, -127]]
    assert fake_quantize(x, PerTensor(), symmetric=False, step=1.0, zero=100.0).tolist() == [[0, -1, 155, -100]]
    per_channel = torch.tensor([1.0, 1.0, 10.0, 0.0])  # a channel that was dead in calibration
    assert fake_quantize(x, PerChannel(), step=per_channel, of="activation").tolist() == [[0, -1, 300, 0]]
    assert quantize_tensor(x, PerTensor(), step=torch.tensor(1.0)).values.tolist() == [[0, -1, 127, -127]]


def test_clip_limits_a_dynamic_range():
    x = torch.tensor([[1.0, -2.0, 1000.0]])
    clipped = fake_quantize(x, PerTensor(), clip=4.0)
    assert clipped[0, 2] == pytest.approx(4.0)
    assert (clipped[0, :2] - x[0, :2]).abs().max() <= 4 / 127 / 2 + 1e-6
    assert torch.equal(fake_quantize(x, PerTensor(), clip=5000.0), fake_quantize(x, PerTensor()))
    one_sided = fake_quantize(x, PerTensor(), symmetric=False, clip=4.0)
    assert one_sided.min() == pytest.approx(-2.0, abs=0.02)
    assert one_sided.max() == pytest.approx(4.0, abs=0.02)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_non_finite_values_are_refused(bad, symmetric, granularity):
    x = torch.randn(5, 5)
    x[3, 2] = bad
    kept = x.clone()
    with pytest.raises(NonFinite, match=r"the input of q_proj holds 1 NaN or infinite of 25"):
        fake_quantize(x, granularity, 8, symmetric, of="activation", name="the input of q_proj")
    with pytest.raises(NonFinite):
        fake_quantize(x, granularity, 8, symmetric, of="activation", clip=3.0)
    with pytest.raises(NonFinite):
        quantize_tensor(x, granularity, 8, symmetric, 0.1, zero=None if symmetric else 3, of="activation")
    assert torch.equal(x.nan_to_num(7.0), kept.nan_to_num(7.0))


def test_the_input_is_never_written():
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(8, 8).to(dtype)
        kept = x.clone()
        for symmetric in (True, False):
            fake_quantize(x, PerToken(), symmetric=symmetric, clip=0.5)
            quantize_tensor(x, PerToken(), symmetric=symmetric).dequantize().zero_()
        assert torch.equal(x, kept)


def test_non_contiguous_and_three_dimensional_tensors():
    x = torch.randn(6, 4, 10)
    for granularity in GRANULARITIES:
        flat = fake_quantize(x.reshape(24, 10), granularity, of="activation")
        assert torch.equal(fake_quantize(x, granularity, of="activation").reshape(24, 10), flat)
        assert torch.equal(
            fake_quantize(x[0].T, granularity, of="weight" if isinstance(granularity, PerChannel) else None),
            fake_quantize(
                x[0].T.contiguous(), granularity, of="weight" if isinstance(granularity, PerChannel) else None
            ),
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "from 2 to 8"),
        ({"bits": 9}, "from 2 to 8"),
        ({"bits": 8.0}, "from 2 to 8"),
        ({"bits": True}, "from 2 to 8"),
        ({"step": 1.0, "clip": 1.0}, "step and clip"),
        ({"step": 1.0, "symmetric": False}, "zero goes with step"),
        ({"zero": 1.0}, "zero goes with step"),
        ({"step": torch.ones(3)}, r"step has shape \(3,\)"),
        ({"step": -1.0}, "step holds a negative"),
        ({"clip": math.nan}, "clip holds a negative or non-finite"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(SqvizError, match=message):
        fake_quantize(torch.ones(2, 2), PerTensor(), **arguments)


def test_integers_are_refused():
    with pytest.raises(SqvizError, match="floating-point"):
        fake_quantize(torch.ones(2, 2, dtype=torch.int64), PerTensor())

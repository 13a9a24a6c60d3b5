"""The streaming reduction against the whole: numpy on all rows at once, and the torch form against the compiled one."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sqviz.observe import buckets
from sqviz.observe.reduce import CpuReducer, Reduced, TorchReducer, max_pool, to_half

LEVELS = (0.5, 0.9, 0.99, 0.999, 0.9999)
FLOOR, CEILING = 2.0**-20, 2.0**20

floats = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-40, FLOOR, CEILING, 3.4e38, -3.4e38, 65504.0]),
)
rows = hnp.arrays(
    np.float32, st.tuples(st.integers(0, 9), st.sampled_from([1, 3, 127, 128, 129, 257])), elements=floats
)


def reduce_with(reducer, parts: list[np.ndarray]) -> Reduced:
    start = 0
    for part in parts:
        reducer.add(torch.from_numpy(part), torch.arange(start, start + len(part)))
        start += len(part)
    return reducer.finish(LEVELS)


def both(parts: list[np.ndarray]) -> tuple[Reduced, Reduced]:
    channels, tokens = parts[0].shape[1], sum(map(len, parts))
    return reduce_with(CpuReducer(channels, tokens), parts), reduce_with(TorchReducer(channels, tokens, "cpu"), parts)


def assert_same(one: Reduced, other: Reduced) -> None:
    for field in dataclasses.fields(Reduced):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "mean":  # sums are taken in another order
            torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
        elif field.name == "rows":
            assert a == b
        else:
            assert a.dtype == b.dtype
            assert torch.equal(a, b), field.name


def quantile(values: np.ndarray, level: float) -> float:
    """The smallest value with a share of `level` at or below it."""
    return float(np.sort(values)[max(int(np.ceil(len(values) * level)), 1) - 1])


def assert_quantile(found: float, exact: float, absmax: float) -> None:
    if exact < FLOOR:
        assert found == 0
    elif exact >= CEILING:
        assert found == pytest.approx(absmax)
    else:
        assert found == pytest.approx(exact, rel=0.05)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(rows, st.integers(0, 9))
@example(np.zeros((1, 1), np.float32), 0)
def test_the_compiled_form_the_torch_form_and_numpy_agree(x: np.ndarray, cut: int) -> None:
    with np.errstate(over="ignore"):
        cpu, plain = both([x[:cut], x[cut:]])
        if np.abs(x).sum(0, dtype=np.float64).max(initial=0) < 3e38:  # the sums are float32 within a call
            assert_same(cpu, plain)
    if not len(x):
        assert cpu.rows == 0
        assert not cpu.absmax.any()
        assert (cpu.channel_token == -1).all()
        return
    magnitude = np.abs(x)
    np.testing.assert_array_equal(cpu.minimum.numpy(), x.min(0))
    np.testing.assert_array_equal(cpu.maximum.numpy(), x.max(0))
    np.testing.assert_array_equal(cpu.absmax.numpy(), magnitude.max(0))
    np.testing.assert_array_equal(cpu.token_absmax.numpy(), magnitude.max(1))
    np.testing.assert_array_equal(cpu.channel_token.numpy(), np.where(magnitude.max(0) > 0, magnitude.argmax(0), -1))
    held = magnitude[np.arange(len(x)), cpu.token_channel.numpy()]
    np.testing.assert_array_equal(held, magnitude.max(1))
    for index, level in enumerate(LEVELS):
        assert_quantile(float(cpu.tensor_quantiles[index]), quantile(magnitude.ravel(), level), magnitude.max())
        for channel in range(x.shape[1]):
            exact = quantile(magnitude[:, channel], level)
            assert_quantile(float(cpu.quantiles[index, channel]), exact, magnitude[:, channel].max())
            assert cpu.quantiles[index, channel] <= cpu.absmax[channel]


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 4))
def test_quantiles_of_long_heavy_tailed_streams_are_within_five_percent(seed: int, spread: float) -> None:
    generator = np.random.default_rng(seed)
    x = (generator.standard_normal((3000, 5)) * np.exp(spread * generator.standard_normal((3000, 5)))).astype(
        np.float32
    )
    cpu, plain = both(np.array_split(x, 7))
    assert_same(cpu, plain)
    exact = np.quantile(np.abs(x), LEVELS, axis=0, method="inverted_cdf")
    np.testing.assert_allclose(cpu.quantiles.numpy(), exact, rtol=0.05)
    np.testing.assert_allclose(cpu.mean.numpy(), np.abs(x).mean(0), rtol=1e-5)


@pytest.mark.parametrize("threads", [2, 3, 5])
@pytest.mark.parametrize("channels", [1, 256, 300, 1000])
def test_several_threads_give_what_one_gives(channels: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqviz.observe.reduce.THREAD_ELEMENTS", 1000)
    x = torch.randn(600, channels) * torch.randn(channels).exp()
    x[::7] = 3.0  # the first of equal channels counts, whichever thread has it
    with ThreadPoolExecutor(threads - 1) as pool:
        one, two = CpuReducer(channels, 600), CpuReducer(channels, 600, pool, threads)
        assert len(two._parts(x)) == min(threads, -(-channels // 128))
        for reducer in (one, two):
            reducer.add(x, torch.arange(600))
        assert_same(one.finish(LEVELS), two.finish(LEVELS))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_shows_in_its_absmax_only(bad: float) -> None:
    x = np.ones((4, 200), np.float32)
    x[2, 150] = bad
    for reduced in both([x]):
        np.testing.assert_array_equal(reduced.token_absmax.isfinite().numpy(), [True, True, False, True])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_widened_first(dtype: torch.dtype) -> None:
    x = torch.randn(7, 33).to(dtype)
    reducer = CpuReducer(33, 7)
    reducer.add(x, torch.arange(7))
    assert torch.equal(reducer.finish(LEVELS).absmax, x.float().abs().amax(0))


def test_rows_that_are_not_contiguous() -> None:
    x = torch.randn(33, 7).T
    one, other = CpuReducer(33, 7), CpuReducer(33, 7)
    one.add(x, torch.arange(7))
    other.add(x.contiguous(), torch.arange(7))
    assert_same(one.finish(LEVELS), other.finish(LEVELS))


def test_a_token_that_comes_again_keeps_its_largest() -> None:
    for reducer in (CpuReducer(2, 4), TorchReducer(2, 4, "cpu")):
        reducer.add(torch.tensor([[1.0, -5.0], [0.5, 0.25]]), torch.tensor([2, 0]))
        reducer.add(torch.tensor([[7.0, 0.0], [-0.1, 0.2]]), torch.tensor([2, 0]))
        reduced = reducer.finish(LEVELS)
        assert reduced.token_absmax.tolist() == [0.5, 0, 7, 0]
        assert reduced.token_channel.tolist() == [0, 0, 0, 0]
        assert reduced.channel_token.tolist() == [2, 2]
        assert reduced.rows == 4


def test_every_bucket_holds_its_own_middle_and_is_narrow() -> None:
    middles = buckets.MIDDLES[1:-1]
    assert torch.equal(buckets.bucket(middles), torch.arange(1, buckets.BUCKETS - 1, dtype=torch.int32))
    assert float((middles[1:] / middles[:-1]).max()) < 1.094


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 50))
def test_max_pooling_keeps_every_channels_absmax(tokens: int, channels: int, bins: int) -> None:
    x = torch.randn(tokens, channels)
    pooled = max_pool(x, bins)
    run = -(-tokens // bins)
    assert len(pooled) == -(-tokens // run) <= max(bins, 1)
    for index, row in enumerate(pooled):
        assert torch.equal(row, x[index * run : (index + 1) * run].abs().amax(0))


def test_half_precision_does_not_overflow() -> None:
    assert to_half(torch.tensor([1e6, 1.0])).tolist() == [65504.0, 1.0]

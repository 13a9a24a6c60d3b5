import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqviz.plots.pool import block_starts, max_pool, max_runs

SETTINGS = settings(deadline=None, derandomize=True, max_examples=60)
SIZES = st.integers(1, 70)


@SETTINGS
@given(SIZES, SIZES, st.integers(1, 20), st.integers(1, 20))
def test_every_cell_lies_in_the_block_that_keeps_its_maximum(rows: int, columns: int, limit: int, wide: int) -> None:
    values = np.random.default_rng(rows * 100 + columns).random((rows, columns))
    pooled = max_pool(values, limit, wide)
    down, across = block_starts(rows, limit), block_starts(columns, wide)
    assert pooled.shape == (min(rows, limit), min(columns, wide)) == (len(down), len(across))
    expected = np.zeros_like(pooled)
    for r in range(rows):  # the obvious way: cell by cell, into the last block that begins at or before it
        for c in range(columns):
            i, j = np.searchsorted(down, r, "right") - 1, np.searchsorted(across, c, "right") - 1
            expected[i, j] = max(expected[i, j], values[r, c])
    np.testing.assert_array_equal(pooled, expected)


@pytest.mark.parametrize("place", [(0, 0), (17, 4095), (2047, 2000)])
def test_one_outlying_cell_among_millions_survives(place: tuple[int, int]) -> None:
    values = np.full((2048, 4096), 0.5, np.float32)
    values[place] = 900.0
    pooled = max_pool(values, 96, 192)
    assert pooled.max() == 900.0
    assert (pooled == 900.0).sum() == 1


@SETTINGS
@given(SIZES, st.integers(1, 9), st.integers(1, 9))
def test_runs_of_runs_are_runs(rows: int, first: int, second: int) -> None:
    values = np.random.default_rng(rows).random((rows, 3))
    np.testing.assert_array_equal(max_runs(max_runs(values, first), second), max_runs(values, first * second))
    assert len(max_runs(values, first)) == -(-rows // first)

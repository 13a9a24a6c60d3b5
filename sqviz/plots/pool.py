"""Shrink before drawing: maxima over blocks of cells, so that no outlier is lost."""

import numpy as np
from jaxtyping import Float, Int


def block_starts(size: int, limit: int) -> Int[np.ndarray, " block"]:
    """Where the blocks of `max_pool` begin along an axis: at most `limit` blocks that cover it."""
    return np.arange(limit) * size // limit if size > limit else np.arange(size)


def max_pool(
    values: Float[np.ndarray, "row column"], rows: int, columns: int
) -> Float[np.ndarray, "pooled_row pooled_column"]:
    """Maxima over blocks, to at most `rows` × `columns`; every cell is in exactly one block, so no outlier is lost."""
    for axis, limit in ((0, rows), (1, columns)):
        if values.shape[axis] > limit:
            values = np.maximum.reduceat(values, block_starts(values.shape[axis], limit), axis=axis)
    return values


def max_runs(values: Float[np.ndarray, "row column"], run: int) -> Float[np.ndarray, "pooled_row column"]:
    """Maxima over `run` rows each, the last run possibly shorter: as capture pools, so pooling again stays exact."""
    return np.maximum.reduceat(values, np.arange(0, len(values), run), axis=0) if run > 1 else values

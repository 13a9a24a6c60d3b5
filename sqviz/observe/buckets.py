"""The logarithmic histogram behind the quantiles: one small integer per |x|, from the bits of the float.

Purpose: quantiles of |x| per channel from one pass, without keeping x. 8 buckets per factor of two, 2⁻²⁰ to 2²⁰.

Formula. A positive float32 is 2^(e−127) · (1 + m), so log₂|x| = e − 127 + log₂(1 + m), and
log₂(1 + m) = m + m(1 − m)(A + B m) to 0.0011. In integers of 2⁻¹⁵ this is a dozen operations without a table or a
call, the same on every device to the last bit. Every bucket but the first and the last spans less than a factor of
1.094, so its geometric middle is within 4.6 % of whatever fell into it.

Ranges. Bucket 0 holds |x| < 2⁻²⁰ (zeros and denormals too; read back as 0), the last one |x| ≥ 2²⁰ (read back as the
absmax). Memory is BUCKETS × 4 bytes per channel: 1.3 kB, or 126 MB for the 98 000 input channels of the embedded
model, and about 3.5 % of the bytes of a float32 model of any size.
"""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

PER_OCTAVE_BITS = 3
LOWEST_EXPONENT, HIGHEST_EXPONENT = -20, 20
BUCKETS = ((HIGHEST_EXPONENT - LOWEST_EXPONENT) << PER_OCTAVE_BITS) + 2

# log₂(1 + m) ≈ m + m(1 − m)(A + B m): least squares over the 2¹⁵ values of m, in units of 2⁻¹⁵
LOG_A, LOG_B = 13791, -5124
CODE_SHIFT = 15 - PER_OCTAVE_BITS
CODE_BASE = ((127 + LOWEST_EXPONENT) << 15) - (1 << CODE_SHIFT)


def bucket(magnitude: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The int32 bucket of every |x| ≥ 0 of a float32 tensor. NaN and infinity fall into the last bucket."""
    high = magnitude.view(torch.int32) >> 8  # exponent and the upper 15 bits of the mantissa
    m = high & 0x7FFF
    bend = (((m * (0x8000 - m)) >> 15) * (LOG_A + ((LOG_B * m) >> 15))) >> 15
    return ((high + bend - CODE_BASE) >> CODE_SHIFT).clamp(0, BUCKETS - 1)


def _middles() -> np.ndarray:
    """[bucket] geometric middles, from the exact edges: the smallest float of each bucket, by trying all mantissas."""
    m = torch.arange(0x8000, dtype=torch.int32)
    one = 127 << 15
    octave = bucket(((one + m) << 8).view(torch.float32)).numpy()  # the buckets of [1, 2)
    first = np.flatnonzero(np.diff(octave, prepend=octave[0] - 1))
    lower = 1 + first / 0x8000
    edges = (lower[None, :] * 2.0 ** np.arange(LOWEST_EXPONENT, HIGHEST_EXPONENT)[:, None]).reshape(-1)
    edges = np.append(edges, 2.0**HIGHEST_EXPONENT)
    return np.concatenate([[0.0], np.sqrt(edges[:-1] * edges[1:]), [np.inf]]).astype(np.float32)


MIDDLES = torch.from_numpy(_middles())


def quantiles(
    histogram: Int[Tensor, "channel bucket"], absmax: Float[Tensor, " channel"], levels: tuple[float, ...]
) -> Float[Tensor, "quantile channel"]:
    """Quantiles of |x| per channel from its counts, within 5 % of the exact ones, and never above `absmax`.

    The quantile at level q is the smallest of the values such that a share q of all lies at or below it (numpy's method
    "inverted_cdf"): one of the values, and not a mean of two that may be far apart. 0 where nothing was counted.
    """
    below = histogram.cumsum(1, dtype=histogram.dtype)
    count = below[:, -1:]
    rank = (count * torch.tensor(levels, dtype=torch.float64)).ceil().clamp(min=1).to(below.dtype)
    index = torch.searchsorted(below, rank).clamp(max=BUCKETS - 1)
    values = torch.minimum(MIDDLES[index], absmax[:, None])
    return torch.where(count > 0, values, 0.0).T.contiguous()

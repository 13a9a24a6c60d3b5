"""The loops of alpha_sweep.py, compiled by numba: codes of X / s and s·W, products of panels, sums of squared errors.

Arrays are those that numpy hands over, rows contiguous; shapes as `alpha_sweep._errors` has them. What a loop adds up
depends on its own group of out channels only, and the order is written down, not left to the compiler: the result is
the same however the groups are dealt out to threads, and whatever multiplied.
"""

import numpy as np
from numba import njit, prange

from sqviz_kernels.cpu_attention import _pack_keys as pack_panels
from sqviz_kernels.cpu_loops import absmax_bits, step_of, write_codes
from sqviz_kernels.vnni_tile import F32, WIDE, panels_of

_INFINITY, _TOKENS_AT_ONCE = np.int32(0x7F800000), 12


@njit(nogil=True, error_model="numpy", cache=True)
def codes_of(first, stop, source, s, divide, given, top, codes, shift, steps):
    """Rows first … stop − 1 of source / s or source · s: codes + shift, and Δ: the given one, or below 0 their own.

    Returns how many held a NaN or an infinity.
    """
    channels, bad = source.shape[1], 0
    row = np.empty(channels, np.float32)
    for r in range(first, stop):
        if divide:
            for i in range(channels):
                row[i] = source[r, i] / s[i]
        else:
            for i in range(channels):
                row[i] = source[r, i] * s[i]
        most = absmax_bits(row)
        if most >= _INFINITY:
            bad += 1
            continue
        steps[r] = step_of(most, top) if given < 0 else given
        write_codes(row, steps[r], codes[r].ctypes.data, shift, top)
    return bad


@njit(nogil=True, error_model="numpy", cache=True)
def x_codes(first, stop, x, s, given, top, codes, shift, steps):
    """Rows first … stop − 1 of X / s of all α, counted through."""
    tokens, bad, row = len(x), 0, first
    while row < stop:
        alpha = row // tokens
        begin, end = row - alpha * tokens, min(stop - alpha * tokens, tokens)
        bad += codes_of(begin, end, x, s[alpha], True, given[alpha], top, codes[alpha], shift, steps[alpha])
        row = alpha * tokens + end
    return bad


@njit(nogil=True, parallel=True, error_model="numpy", cache=True)
def x_codes_threads(threads, rows, x, s, given, top, codes, shift, steps):
    """All rows, dealt out."""
    bad = 0
    for t in prange(threads):
        bad += x_codes(rows * t // threads, rows * (t + 1) // threads, x, s, given, top, codes, shift, steps)
    return bad


@njit(nogil=True, error_model="numpy")
def _halved(values):
    """Σ values, which are lost: the second half is added to the first until one is left. Any compiler adds alike."""
    count = len(values)
    while count > 1:
        half = (count + 1) // 2
        for i in range(count - half):
            values[i] += values[i + half]
        count = half
    return values[0]


@njit(nogil=True, error_model="numpy", cache=True)
def add_errors(first, count, y_hat, wide, y, left, weight, found):
    """The error of tokens first … first + count − 1 over `wide` out channels from `left` on."""
    squares = np.empty(wide)
    for r in range(count):
        got, target = y_hat[r, :wide], y[first + r, left : left + wide]
        for i in range(wide):
            off = np.float64(np.float32(got[i] - target[i]))
            squares[i] = off * off
        if len(weight):
            for i in range(wide):
                squares[i] *= np.float64(weight[left + i])
        found[first + r] = _halved(squares)


@njit(nogil=True, error_model="numpy", cache=True)
def errors_of(first, stop, offset, w, s, given, top, weight, bounds, codes, x_steps, y, found):
    """Groups of panels of all α, counted through: offset + first … offset + stop − 1; see `_errors` for the shapes."""
    (out, channels), (_, tokens, stride), groups, bad = w.shape, codes.shape, len(bounds) - 1, 0
    fours, most = (channels + 3) // 4, 0
    for group in range(groups):
        most = max(most, bounds[group + 1] - bounds[group])
    rows, packed = np.zeros((WIDE, 4 * fours), np.uint8), np.empty(most * fours * WIDE, np.int32)
    start, none = np.empty(most * WIDE, np.int32), np.zeros(most * WIDE, np.float32)
    steps, y_hat = np.zeros(most * WIDE, np.float32), np.empty((_TOKENS_AT_ONCE, most * WIDE), np.float32)
    for item in range(offset + first, offset + stop):
        alpha, group = item // groups, item % groups
        panels, left = bounds[group + 1] - bounds[group], bounds[group] * WIDE
        wide = min(out - left, panels * WIDE)
        for p in range(panels):
            count, at = min(WIDE, wide - p * WIDE), left + p * WIDE
            own, sums = steps[p * WIDE :], start[p * WIDE :]
            bad += codes_of(0, count, w[at : at + count], s[alpha], False, given[alpha], top, rows, 0, own)
            pack_panels(rows.ctypes.data, 4 * fours, count, fours, packed[p * fours * WIDE :], sums)
        for token in range(0, tokens, _TOKENS_AT_ONCE):
            count = min(_TOKENS_AT_ONCE, tokens - token)
            panels_of(
                F32,
                0,
                count,
                0,
                panels,
                codes[alpha, token].ctypes.data,
                stride,
                packed.ctypes.data,
                fours,
                start.ctypes.data,
                x_steps[alpha, token:].ctypes.data,
                4,
                steps.ctypes.data,
                none.ctypes.data,
                y_hat.ctypes.data,
                4 * WIDE * most,
            )
            add_errors(token, count, y_hat, wide, y, left, weight, found[alpha, group])
    return bad


@njit(nogil=True, parallel=True, error_model="numpy", cache=True)
def errors_of_threads(threads, count, offset, w, s, given, top, weight, bounds, codes, x_steps, y, found):
    """`count` groups from `offset` on, dealt out."""
    bad = 0
    for t in prange(threads):
        first, stop = count * t // threads, count * (t + 1) // threads
        bad += errors_of(first, stop, offset, w, s, given, top, weight, bounds, codes, x_steps, y, found)
    return bad

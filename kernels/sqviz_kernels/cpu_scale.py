"""The epilogue as a pass of its own, for products that leave their int32 sums in memory; and which kinds of output.

    y = ((float32(sum) · Δ_x) · Δ_w) + bias        each operation rounded to float32, none contracted (`spec.scale`)

stored as float32 or bfloat16. numba contracts no multiply and add unless it is told to, which it is not here.
"""

import numpy as np
from numba import carray, njit, prange

from sqviz_kernels.cpu_loops import floats, ints, write_row


@njit(nogil=True, error_model="numpy", inline="always")
def scale_row(sums, step, w_step, bias, y):
    """One row; an empty bias is none."""
    if bias.size:
        for i in range(len(y)):
            y[i] = np.float32(np.float32(np.float32(sums[i]) * step) * w_step[i]) + bias[i]
    else:
        for i in range(len(y)):
            y[i] = np.float32(np.float32(sums[i]) * step) * w_step[i]


@njit(nogil=True, error_model="numpy", cache=True)
def scale_rows(first, stop, count, sums, x_step, step_stride, w_step, bias, out, kind, out_stride):
    """Rows first … stop − 1 of `count` int32 sums each, one after another in memory.

    step_stride: 4, or 0 where one step serves all rows. bias: 0 for none. kind, out_stride: see cpu_loops.
    """
    scales, biases = carray(floats(w_step), count), carray(floats(bias), count if bias else 0)
    y = np.empty(count, np.float32)
    for r in range(first, stop):
        step = carray(floats(x_step + r * step_stride), 1)[0]
        scale_row(carray(ints(sums + r * count * 4), count), step, scales, biases, y)
        write_row(out + r * out_stride, kind, y)


@njit(nogil=True, parallel=True, error_model="numpy", cache=True)
def scale_rows_threads(threads, rows, count, sums, x_step, step_stride, w_step, bias, out, kind, out_stride):
    """All rows, dealt out."""
    for t in prange(threads):
        first, stop = rows * t // threads, rows * (t + 1) // threads
        scale_rows(first, stop, count, sums, x_step, step_stride, w_step, bias, out, kind, out_stride)

"""The numba.cuda kernels against the definition, in numba's simulator: run by test_numba_cuda.py.

By itself: NUMBA_ENABLE_CUDASIM=1 pytest -o python_files=simulated_checks.py tests/kernels
"""

import re
import types
from pathlib import Path

import gpu_checks as checks
import numpy as np
import pytest
import sqviz_kernels.numba_cuda_int8 as module
import torch
from sqviz_kernels import spec

from sqviz.errors import NonFinite, SqvizError

backend = module.NumbaCuda()


@pytest.mark.parametrize("how", checks.HOW)
def test_codes(how):
    for number, (rows, channels) in enumerate([(1, 1), (4, 37), (0, 8), (3, 0)]):
        checks.check_quantise(backend, checks.values(rows, channels, dtype=checks.DTYPES[number]), how)


@pytest.mark.parametrize("how", ["token", "static"])
def test_linear(how):
    for number, (rows, channels, out) in enumerate([(1, 1, 1), (5, 37, 6), (0, 8, 3), (3, 0, 2), (2, 8, 0)]):
        checks.check_linear(backend, rows, channels, out, "cpu", checks.DTYPES[number % 4], how, bias=number % 2 == 0)


def test_extremes():
    checks.check_extremes(backend, "cpu", channels=96)


def test_what_is_composed_of_them():
    checks.check_norm(backend, checks.values(4, 40), "rms", False, "token")
    checks.check_gated(backend, 3, 12, "cpu", "token")
    checks.check_batched(backend, 1, 2, 3, 5, 9, "cpu")
    checks.check_attention(backend, checks.attention_inputs(1, 2, 1, 2, 5, 8, "cpu"), 3)


def test_what_is_not_finite_becomes_nan():
    checks.check_not_finite(backend, "cpu")
    with pytest.raises(NonFinite):
        backend.raise_if_not_finite()
    with pytest.raises(SqvizError, match="x has 40 channels and the weight 9"):
        backend.linear(backend.quantise(torch.ones(1, 40)), backend.pack(checks.codes(3, 9), torch.ones(1)))


def products(kernels) -> bool:
    """Whether `linear_tiles` of this module is right about a product of several tiles."""
    x, w = checks.codes(6, 64), checks.codes(9, 64)
    y, one, none = np.zeros((6, 9), np.float32), np.ones(1, np.float32), np.zeros(0, np.float32)
    words = [t.view(torch.int32).numpy() for t in (x, w)]
    kernels.linear_tiles[(3, 2), (kernels.T, kernels.T)](*words, one, one, none, y)
    return bool((y == spec.product(x, w).float().numpy()).all())


@pytest.mark.parametrize("barrier", ["everyone has read them", "the tiles are whole"])
def test_a_missing_barrier_is_caught(barrier):
    source = Path(module.__file__).read_text()
    broken = re.sub(rf" +cuda\.syncthreads\(\)  # {barrier}\n", "", source)
    assert broken != source
    kernels = types.ModuleType("racing")
    exec(compile(broken, "racing.py", "exec"), kernels.__dict__)
    assert not all(products(kernels) for _ in range(5))
    assert all(products(module) for _ in range(5))

"""Threads and processes around the kernels: forked workers, several threads at once, a layer that cannot be shared."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sqviz_kernels import spec
from sqviz_kernels.dispatch import backends, get
from test_isa import printed_by

CPU = [name for name, why in backends().items() if why is None and get(name).device == "cpu"]


def task(name, seed):
    """Whether a product large enough for threads, a norm and an attention are right."""
    backend, generator = get(name), torch.Generator().manual_seed(seed)
    x = torch.randn(96, 600, generator=generator)
    w = torch.randint(-127, 128, (333, 600), dtype=torch.int8, generator=generator)
    step = torch.rand(333, generator=generator)
    got = backend.linear(backend.quantise(x), backend.pack(w, step))
    return torch.equal(got, spec.linear(*spec.quantise(x), w, step))


def two_threads_then(name, seed):
    torch.set_num_threads(2)
    return task(name, seed)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("name", CPU)
def test_a_forked_worker_computes(name, two_threads):
    assert task(name, 0)  # the threads are there
    torch.randn(400, 400) @ torch.randn(400, 400)  # and torch's, which a worker would wait for
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply_async(task, (name, 1)).get(timeout=120)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("name", CPU)
def test_threads_at_once(name, two_threads):
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda seed: two_threads_then(name, seed), range(24)))


def test_a_threading_layer_that_cannot_be_shared_is_not():
    code = """
from concurrent.futures import ThreadPoolExecutor
import numba, torch
from sqviz_kernels.dispatch import backends, get
torch.set_num_threads(2)
backend = get("plain" if backends()["vnni"] else "vnni")
w = backend.pack(torch.ones(400, 600, dtype=torch.int8), torch.ones(400))
def once(_):
    torch.set_num_threads(2)
    return bool((backend.linear(backend.quantise(torch.ones(200, 600)), w) == 600).all())
with ThreadPoolExecutor(4) as pool:
    print(all(pool.map(once, range(60))), numba.threading_layer())
"""
    assert printed_by(code, NUMBA_THREADING_LAYER="workqueue").split() == ["True", "workqueue"]

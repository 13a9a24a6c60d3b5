"""Every GPU backend against the definition, on a real GPU; skipped, with the reason, where a backend cannot run."""

import gpu_checks as checks
import pytest
import torch
from sqviz_kernels import spec
from sqviz_kernels.gpu_library import CublasLt
from sqviz_kernels.numba_cuda_int8 import NumbaCuda
from sqviz_kernels.tiles import FEW_ROWS, family, linear_tiles
from sqviz_kernels.triton_launch import Triton

from sqviz.errors import NonFinite

CUDA = "cuda"
LARGE = [(1, 4096, 11008), (17, 4096, 4096), (512, 576, 1536), (300, 1536, 577)]
"""Rows, channels, out in the sizes of real models."""


@pytest.fixture(params=[Triton, CublasLt, NumbaCuda], ids=lambda kind: kind.name)
def backend(request):
    why = request.param.why_not()
    if why is not None:
        pytest.skip(f"no GPU for {request.param.name}: {why}")
    return request.param()


@pytest.fixture
def triton():
    why = Triton.why_not()
    if why is not None:
        pytest.skip(f"no GPU for triton: {why}")
    return Triton()


@pytest.mark.parametrize("how", checks.HOW)
def test_codes_are_bit_equal(backend, how):
    for rows, channels, _ in checks.SHAPES + checks.EMPTY + LARGE:
        for dtype in checks.DTYPES:
            checks.check_quantise(backend, checks.values(rows, channels, dtype=dtype, device=CUDA), how)


@pytest.mark.parametrize("how", ["token", "tensor", "static"])
def test_linear_is_bit_equal(backend, how):
    for number, (rows, channels, out) in enumerate(checks.SHAPES + checks.EMPTY + LARGE):
        for dtype in checks.DTYPES:
            checks.check_linear(backend, rows, channels, out, CUDA, dtype, how, bias=number % 2 == 0)


def test_sums_of_extremes_and_any_strides(backend):
    checks.check_extremes(backend, CUDA)
    checks.check_extremes(backend, CUDA, spec.MAX_CHANNELS // 16 * 16)
    checks.check_strides(backend, CUDA)


@pytest.mark.parametrize("how", ["token", "tensor", "static"])
def test_norms_and_gates(backend, how):
    for kind in ("rms", "layer"):
        for shape in ((1, 1), (7, 131), (64, 576), (33, 4096), (2, 4097)):
            x = checks.values(*shape, device=CUDA)
            checks.check_norm(backend, x, kind, kind == "layer", how)
    checks.check_gated(backend, 40, 96, CUDA, how)


def test_products_of_many_matrices_are_bit_equal(backend):
    for shape in ((1, 1, 1, 1, 1), (2, 3, 7, 33, 64), (2, 9, 200, 200, 64), (1, 8, 4, 1023, 128), (1, 2, 5, 64, 1023)):
        checks.check_batched(backend, *shape, CUDA)


def test_attention(backend):
    for shape in ((2, 6, 2, 5, 37, 24), (1, 9, 3, 200, 200, 64), (1, 32, 8, 1, 1023, 128), (1, 4, 1, 9, 17, 33)):
        given = checks.attention_inputs(*shape, CUDA)
        checks.check_attention(backend, given)
        checks.check_attention(backend, given, shape[4] - shape[3])
        checks.check_attention(backend, given, None, torch.rand(1, shape[1], shape[3], shape[4], device=CUDA) > 0.5)
        checks.check_attention(backend, given, None, torch.randn(1, 1, shape[3], shape[4], device=CUDA))
        checks.check_attention(backend, [given[0].half(), *given[1:]])


def test_what_is_not_finite_becomes_nan_and_is_told_once(backend):
    backend.raise_if_not_finite()
    checks.check_not_finite(backend, CUDA)
    with pytest.raises(NonFinite):
        backend.raise_if_not_finite()
    backend.raise_if_not_finite()


@pytest.mark.parametrize("rows", [5, 200])
def test_every_tile_gives_the_same(triton, rows):
    x, w, bias = (
        checks.values(rows, 1040, device=CUDA),
        checks.codes(528, 1040, device=CUDA),
        torch.randn(528, device=CUDA),
    )
    q, step = spec.quantise(x.cpu())
    expected = spec.linear(q, step, w.cpu(), torch.ones(1), bias.cpu())
    tiles = {
        *linear_tiles(family(torch.device("cuda", 0)), FEW_ROWS),
        *linear_tiles(family(torch.device("cuda", 0)), 4096),
    }
    for tile in tiles:
        backend = Triton(tiles=(tile,))
        found = backend.linear(backend.quantise(x), backend.pack(w, torch.ones(1, device=CUDA), bias))
        assert torch.equal(found.cpu(), expected), tile


def test_codes_for_the_next_operator_cache_and_sweep(triton):
    x, w = checks.values(50, 131, device=CUDA), checks.codes(45, 131, device=CUDA)
    w_step, step = torch.rand(45, device=CUDA) * 0.01, torch.tensor([0.37], device=CUDA)
    found = triton.linear_requantise(triton.quantise(x), triton.pack(w, w_step), step)
    y = spec.linear(*spec.quantise(x.cpu()), w.cpu(), w_step.cpu())
    assert torch.equal(checks.unpadded(found), spec.requantise(y, step.cpu()))
    k, k_step = checks.codes(2, 3, 50, 64, device=CUDA), torch.rand(2, 3, 50, device=CUDA)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(triton.read_cache(k, k_step, dtype), (k.float() * k_step[..., None]).to(dtype))
    w, s = torch.randn(45, 131, device=CUDA), torch.rand(3, 131, device=CUDA) + 0.5
    y = x @ w.T
    expected = spec.sweep(x.cpu(), w.cpu(), y.cpu(), s.cpu(), None, None)
    torch.testing.assert_close(triton.sweep(x, w, y, s, None, None).cpu(), expected, rtol=1e-12, atol=0)


def test_a_graph_of_launches_replays(triton):
    x, w = torch.randn(8, 576, device=CUDA), checks.codes(1536, 576, device=CUDA)
    packed = triton.pack(w, torch.rand(1536, device=CUDA))
    expected = triton.linear(triton.quantise(x), packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = triton.linear(triton.quantise(x), packed)
    graph.replay()
    assert torch.equal(y, expected)


# --- what needs no GPU


@pytest.mark.parametrize("kind", [Triton, CublasLt, NumbaCuda], ids=lambda kind: kind.name)
def test_without_a_gpu_every_backend_says_why(kind, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvidia-smi" in kind.why_not() or "not installed" in kind.why_not()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in kind.why_not() or "not installed" in kind.why_not()


def test_an_older_gpu_is_told_which_backends_it_has(monkeypatch):
    pytest.importorskip("triton", reason="the extra 'gpu' is not installed: make setup EXTRAS=dev,gpu")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "Tesla T4 has compute capability 7.5" in Triton.why_not()


def test_the_library_backend_on_the_cpu():
    """The same code: torch's CPU has _int_mm too, and the padding is there."""
    backend = CublasLt()
    for rows, channels, out in checks.SHAPES + checks.EMPTY:
        for how in checks.HOW:
            for dtype in checks.DTYPES:
                checks.check_quantise(backend, checks.values(rows, channels, dtype=dtype), how)
        for how in ("token", "tensor", "static"):
            checks.check_linear(backend, rows, channels, out, "cpu", torch.bfloat16, how, bias=True)
    packed, found = backend.pack(checks.codes(9, 20), torch.ones(1)), backend.quantise(torch.randn(3, 20))
    assert found.values.shape == (32, 24)
    assert packed.values.shape == (16, 24)
    checks.check_extremes(backend, "cpu")
    checks.check_strides(backend, "cpu")
    checks.check_norm(backend, checks.values(5, 64), "layer", True, "static")
    checks.check_gated(backend, 5, 40, "cpu", "token")
    checks.check_batched(backend, 2, 3, 7, 33, 20, "cpu")
    checks.check_attention(backend, checks.attention_inputs(2, 6, 2, 5, 37, 24, "cpu"), 32)
    backend.raise_if_not_finite()
    checks.check_not_finite(backend, "cpu")
    with pytest.raises(NonFinite):
        backend.raise_if_not_finite()


def test_gpu_check_without_a_gpu_says_that_nothing_was_run():
    if Triton.why_not() is None:
        pytest.skip("there is a GPU: gpu_check would run on it")
    from own_process import HERE, run

    log = HERE.parents[1] / "kernels/LOG.md"
    before = log.read_bytes()
    found = run(str(HERE.parents[1] / "kernels/gpu_check.py"))
    assert found.returncode == 1
    assert "Nothing was run" in found.stdout
    assert log.read_bytes() == before

"""What the environment takes from the processor, each in a process of its own: right numbers or a clear refusal."""

import pytest
from own_process import run
from sqviz_kernels.vnni_tile import HAVE_VNNI

CHECK = """
import torch
from sqviz_kernels import spec
from sqviz_kernels.dispatch import backends, get
torch.set_num_threads(1)
for name, why in backends().items():
    print(name, "|", why)
generator = torch.Generator().manual_seed(0)
for rows, channels, out in ((1, 256, 32), (13, 131, 37), (64, 576, 96)):
    w = torch.randint(-127, 128, (out, channels), dtype=torch.int8, generator=generator)
    w[0], w[1] = 127, -127
    x = torch.randn(rows, channels, generator=generator)
    x[0] = 127.0
    step = torch.rand(out, generator=generator)
    expected = spec.linear(*spec.quantise(x), w, step)
    for name in ("vnni", "onednn", "plain"):
        if backends()[name] is None:
            backend = get(name)
            assert torch.equal(backend.linear(backend.quantise(x), backend.pack(w, step)), expected), name
    b, b_step = w.view(1, 1, out, channels), step.view(1, 1, out)
    codes, own = spec.quantise(x)
    expected = spec.batched(codes[None, None], own[None, None], b, b_step, 0.37)
    for name in ("vnni", "onednn", "plain"):
        if backends()[name] is None:
            assert torch.equal(get(name).batched(get(name).quantise(x), b, b_step, 0.37), expected), name
print("all equal")
"""


def printed_by(code, **environment):
    """What the code prints in a process with this environment."""
    found = run("-c", code, **environment)
    assert found.returncode == 0, found.stderr
    return found.stdout


def lines(text):
    return dict(line.split(" | ", 1) for line in text.splitlines() if " | " in line)


@pytest.mark.skipif(not HAVE_VNNI, reason="the processor has no AVX-512 VNNI that could be taken away")
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_onednn_is_refused_where_it_would_saturate(isa):
    printed = printed_by(CHECK, ONEDNN_MAX_CPU_ISA=isa)
    why = lines(printed)
    assert "saturates" in why["onednn"]
    assert f"ONEDNN_MAX_CPU_ISA={isa}" in why["onednn"]
    assert why["vnni"] == why["plain"] == "None"
    assert "all equal" in printed


@pytest.mark.skipif(not HAVE_VNNI, reason="the processor has no AVX-512 VNNI")
def test_all_are_exact_with_vnni_and_no_more():
    printed = printed_by(CHECK, ONEDNN_MAX_CPU_ISA="AVX512_CORE_VNNI")
    assert lines(printed)["onednn"] == "None"
    assert "all equal" in printed


@pytest.mark.parametrize("cpu", ["haswell", "x86-64"])
def test_without_vnni_the_plain_kernel_is_exact(cpu, tmp_path):
    printed = printed_by(CHECK, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))
    why = lines(printed)
    assert "no AVX-512 VNNI" in why["vnni"]
    assert why["plain"] == "None"
    assert "all equal" in printed


REFERENCE = """
import torch, sqviz
from sqviz.models.tiny import tiny
torch.set_num_threads(1)
lm, ids = tiny("LlamaForCausalLM"), torch.arange(3, 43)
seen = sqviz.capture(lm, ids, samples=1, length=40)
for scheme in (sqviz.SMOOTHQUANT_LLAMA, sqviz.SMOOTHQUANT_O3):
    model = sqviz.quantize(lm, scheme, seen, backend="onednn", head=True, attention=True).model
    model.generate(ids[None], max_new_tokens=2, do_sample=False)
print("the trap", flush=True)
x, w = (torch.ones(size, dtype=torch.int8) for size in ((16, 64), (32, 64)))
packed = torch.ops.onednn.qlinear_prepack(w, None)
zeros = torch.zeros(32, dtype=torch.int64)
after = (None, 1.0, 0, torch.float32, "none", [], "")
torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, packed, torch.ones(32), zeros, *after)
"""


@pytest.mark.skipif(not HAVE_VNNI, reason="the processor has no AVX-512 VNNI: oneDNN's product is refused there")
def test_onednn_takes_its_instruction_and_never_its_reference_loop():
    """What oneDNN says that it ran. Its quantised linear, which we do not call, is a loop for int8 activations."""
    ours, trap = printed_by(REFERENCE, ONEDNN_VERBOSE="1").split("the trap")
    integers = [line for line in ours.splitlines() if ",exec," in line and "s8" in line]
    assert integers
    assert all(",gemm_api," in line for line in integers)
    assert ",ref" not in ours
    assert ",ref_int8" in trap


def test_a_model_says_why_its_backend_cannot_run(tmp_path):
    code = """
import sqviz
from sqviz.errors import Unavailable
from sqviz.models.tiny import tiny
try:
    sqviz.quantize(tiny("LlamaForCausalLM"), sqviz.SMOOTHQUANT_O1, backend="vnni")
except Unavailable as error:
    print(error)
print(sqviz.quantize(tiny("LlamaForCausalLM"), sqviz.SMOOTHQUANT_O1, backend="auto").model)
"""
    printed = printed_by(code, NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=str(tmp_path))
    assert "backend='vnni' cannot run here: the processor has no AVX-512 VNNI" in printed
    assert "on vnni" not in printed

"""torch.compile around our operations: it calls them as they are, and makes no INT8 linear of its own of them."""

import shutil

import pytest
import torch
from sqviz_kernels.dispatch import backends, get
from torch import nn

from sqviz.models.tiny import tiny
from sqviz.observe.capture import capture
from sqviz.quant.linear import quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA, SMOOTHQUANT_O3, Scheme
from sqviz.quant.w8a8 import Site, merged

RUNNING = [name for name, why in backends().items() if why is None and get(name).device == "cpu"]
inductor = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: install g++")


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "scheme"),
    [(RUNNING[0], SMOOTHQUANT_O3), *((name, SMOOTHQUANT_LLAMA) for name in RUNNING if name != "plain")],
    ids=str,
)
def test_a_compiled_model_computes_what_it_did(name: str, scheme: Scheme):
    """Traced, and what is between our operations run as it was: to the bit."""
    lm = tiny("LlamaForCausalLM")
    ids = torch.arange(1, 40)[None]
    executed = quantize(lm, scheme, capture(lm, ids[0], samples=1, length=39), backend=name, head=True, attention=True)
    model = torch.compile(executed.model, backend="aot_eager")
    with torch.no_grad():
        for length in (5, 39):
            assert torch.equal(model(ids[:, :length]).logits, executed.model(ids[:, :length]).logits)
        torch._dynamo.reset()
        got, expected = (
            each.generate(ids[:, :5], max_new_tokens=3, do_sample=False) for each in (model, executed.model)
        )
    assert torch.equal(got, expected)


class Naive(nn.Module):
    """What one would write: a product of codes and two scalings."""

    def __init__(self, codes: torch.Tensor, step: torch.Tensor) -> None:
        super().__init__()
        self.codes, self.step = nn.Parameter(codes, False), nn.Parameter(step, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(1, keepdim=True) / 127
        codes = (x / step).round().to(torch.int8)
        return torch._int_mm(codes, self.codes.t()).float() * step * self.step


@inductor
@pytest.mark.parametrize("name", [None, *RUNNING[:2]], ids=str)
def test_freezing_does_not_swap_our_products_for_its_own(name: str | None):
    """With freezing, inductor takes the naive product for a linear of oneDNN's; ours it does not see."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(size, generator=generator) for size in ((64, 128), (32, 128)))
    step = w.abs().amax(1) / 127
    codes = (w / step[:, None]).round().to(torch.int8)
    backend = None if name is None else get(name)
    ours = [] if backend is None else merged(backend, Site(backend, "token"), [(codes, step, None)])
    module = (ours[0] if ours else Naive(codes, step)).eval()
    with torch.no_grad(), config.patch(freezing=True, force_disable_caches=True):
        expected = module(x)
        got, found = run_and_get_code(torch.compile(module), x)
    swapped = any("qlinear" in code for code in found)
    assert swapped == (name is None and torch.cpu._is_vnni_supported())
    assert torch.equal(got, expected) or name is None

"""torch.compile around our operations: it calls them as they are, and makes no INT8 linear of its own of them."""

import functools
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sqviz_kernels.dispatch import backends, get
from torch import nn

from sqviz.models.lm import LM, share
from sqviz.models.tiny import tiny
from sqviz.observe.capture import capture
from sqviz.quant.linear import quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA, SMOOTHQUANT_O3, Scheme
from sqviz.quant.w8a8 import Site, merged
from sqviz.streaming.cache import SinkCache
from sqviz.streaming.policies import Sinks

RUNNING = [name for name, why in backends().items() if why is None and get(name).device == "cpu"]
IDS = torch.randint(3, 131, (1, 40), generator=torch.Generator().manual_seed(0))
inductor = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler: install g++")


@pytest.fixture(autouse=True)
def _forget():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def executed(name: str, scheme: Scheme = SMOOTHQUANT_LLAMA) -> LM:
    lm = tiny("LlamaForCausalLM", num_hidden_layers=1)
    return quantize(
        lm, scheme, capture(lm, IDS[0], samples=1, length=40), backend=name, head=True, attention=True, progress=False
    )


def traced() -> int:
    """Graphs that were compiled; 0 would mean that nothing was tested."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("name", "scheme"),
    [(RUNNING[0], SMOOTHQUANT_O3), *((name, SMOOTHQUANT_LLAMA) for name in RUNNING)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_compiled_model_computes_what_it_did(name: str, scheme: Scheme):
    """Traced, and what is between our operations run as it was: to the bit, and for a second length too."""
    lm = executed(name, scheme)
    model = torch.compile(lm.model, backend="eager")
    with torch.no_grad():
        for length in (5, 39) if name == RUNNING[0] else (39,):
            assert torch.equal(model(IDS[:, :length]).logits, lm.model(IDS[:, :length]).logits)
    assert traced()


@inductor
def test_with_inductor_the_floats_between_round_otherwise_and_nothing_else_differs():
    """Rotary positions and residuals are fused there: last bits differ, and a code at a half may go the other way."""
    lm = executed(RUNNING[0])
    with torch.no_grad():
        expected = lm.model(IDS).logits
        got = torch.compile(lm.model)(IDS).logits
    off = (got - expected).abs().amax(-1) / expected.abs().max()
    assert traced()
    assert off.median() < 1e-5
    assert off.max() < 0.05


def test_a_compiled_model_generates_the_same_tokens():
    """`compile()` in place: `torch.compile(model).generate` would run the model as it is."""
    lm = executed(RUNNING[0])
    model = share(lm.model)
    model.compile(backend="eager")
    expected, got = (each.generate(IDS[:, :5], max_new_tokens=4, do_sample=False) for each in (lm.model, model))
    assert traced()
    assert torch.equal(got, expected)


def test_a_compiled_model_streams():
    """A cache that hands codes over, and hooks that tell positions: outside of the graphs, nothing is traced twice."""
    lm = executed(RUNNING[0])

    def stream(model: Callable[..., Any]) -> torch.Tensor:
        cache = SinkCache(lm, Sinks(2, 9), int8=True)
        with torch.no_grad():
            parts = IDS.split([9, 1, 1, 1, 12, 1, 1, 14], 1)
            found = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in parts]
        cache.close()
        return torch.cat(found, 1)

    expected, got = stream(lm.model), stream(torch.compile(lm.model, backend="eager"))
    assert torch.equal(got, expected)
    assert 0 < traced() < 50


class Naive(nn.Module):
    """What one would write: a product of codes and two scalings."""

    def __init__(self, codes: torch.Tensor, step: torch.Tensor) -> None:
        super().__init__()
        self.codes, self.step = nn.Parameter(codes, False), nn.Parameter(step, False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(1, keepdim=True) / 127
        codes = (x / step).round().to(torch.int8)
        return torch._int_mm(codes, self.codes.t()).float() * step * self.step


class Between(nn.Module):
    """A product with float operations before and after it; not a Sequential, whose loop dynamo gives up on."""

    def __init__(self, product: nn.Module) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.product(torch.relu(x)))


class Operations(nn.Module):
    """A backend's operations by themselves, in no module of ours."""

    def __init__(self, name: str, codes: torch.Tensor, step: torch.Tensor) -> None:
        super().__init__()
        self.backend = get(name)
        self.packed = self.backend.pack(codes, step)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backend.linear(self.backend.quantise(x), self.packed)


def linear(name: str, codes: torch.Tensor, step: torch.Tensor) -> nn.Module:
    return merged(get(name), Site(get(name), "token"), [(codes, step, None)])[0]


@inductor
@pytest.mark.parametrize(
    "product",
    [Naive, *(functools.partial(make, name) for make in (linear, Operations) for name in RUNNING)],
    ids=lambda made: getattr(made, "__name__", None) or f"{made.func.__name__}-{made.args[0]}",
)
def test_freezing_does_not_swap_our_products_for_its_own(product: Callable[..., nn.Module]):
    """With freezing, inductor takes the naive product for a linear of oneDNN's; ours it does not see."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(size, generator=generator) for size in ((64, 128), (32, 128)))
    step = w.abs().amax(1) / 127
    codes = (w / step[:, None]).round().to(torch.int8)
    module = Between(product(codes, step)).eval()
    with torch.no_grad(), config.patch(freezing=True, force_disable_caches=True):
        expected = module(x)
        got, found = run_and_get_code(torch.compile(module), x)
    assert any("relu" in code for code in found), "what stands around the product is compiled"
    swapped = any("qlinear" in code for code in found)
    assert swapped == (product is Naive and torch.cpu._is_vnni_supported())
    assert torch.equal(got, expected) or product is Naive

"""LLM.int8() and Outlier Suppression against the obvious loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sqviz
from sqviz.errors import SqvizError
from sqviz.models.arch import Norm
from sqviz.models.linears import groups
from sqviz.models.tiny import tiny
from sqviz.quant.equivalence import logits, probe
from sqviz.quant.quantize import fake_quantize
from sqviz.quant.simulated import InputQuantizer, MixedLinear

TOKENS = torch.arange(160) * 37 % 131


def obvious(x, w, threshold):
    """Token by token and out channel by out channel; the kept channels apart."""
    kept = [j for j in range(x.shape[1]) if len(x) and max(abs(float(v)) for v in x[:, j]) >= threshold]
    rest = [j for j in range(x.shape[1]) if j not in kept]
    y = torch.zeros(len(x), len(w), dtype=torch.float64)
    for t in range(len(x)):
        step_x = max([abs(float(x[t, j])) for j in rest], default=0.0) / 127
        for o in range(len(w)):
            step_w = float(w[o].abs().max()) / 127
            total = sum(float(x[t, j]) * float(w[o, j]) for j in kept)
            for j in rest:
                a = round(float(x[t, j]) / step_x) * step_x if step_x else 0.0
                b = round(float(w[o, j]) / step_w) * step_w if step_w else 0.0
                total += a * b
            y[t, o] = total
    return y


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 4), st.integers(1, 6), st.integers(1, 5), st.sampled_from([0.5, 2.0, 6.0]), st.integers(0, 99))
def test_llm_int8_against_the_loop(tokens, channels, out, threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, channels, generator=generator, dtype=torch.float64) * 2
    w = torch.randn(out, channels, generator=generator, dtype=torch.float64)
    scheme = sqviz.LLM_INT8.replace(outliers=threshold)
    new = fake_quantize(w, scheme.weight, of="weight")
    linear = MixedLinear(w, new, None, InputQuantizer(scheme, "it"), threshold)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), obvious(x, w, threshold), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["OPTForCausalLM", "GPT2LMHeadModel", "LlamaForCausalLM"])
def test_llm_int8_saves_what_naive_w8a8_breaks(name):
    lm = tiny(name)
    expected = logits(lm.model, probe(lm))

    def change(scheme):
        return float((logits(sqviz.quantize(lm, scheme).model, probe(lm)) - expected).norm() / expected.norm())

    mixed, naive = change(sqviz.LLM_INT8), change(sqviz.W8A8)
    assert mixed < 0.05
    assert mixed < 0.6 * naive
    everything = change(sqviz.LLM_INT8.replace(outliers=1e-9))  # all channels kept: nothing is quantised
    assert everything < 1e-5
    nothing = change(sqviz.LLM_INT8.replace(outliers=1e9))
    assert nothing == pytest.approx(change(sqviz.SMOOTHQUANT_LLAMA), rel=1e-6)


def test_llm_int8_keeps_the_model_and_refuses_what_it_cannot_do():
    lm = tiny("MixtralForCausalLM")
    with pytest.raises(SqvizError, match=r"skip='model.layers.0.mlp.experts\.\*'"):
        sqviz.quantize(lm, sqviz.LLM_INT8)
    sqviz.quantize(lm, sqviz.LLM_INT8, skip="*.experts.*")
    with pytest.raises(SqvizError, match="outliers"):
        sqviz.quantize(tiny("LlamaForCausalLM"), sqviz.LLM_INT8, backend="auto")


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "OPTForCausalLM", "MixtralForCausalLM"])
def test_norms_lose_their_gain_and_the_logits_stay(name):
    lm = tiny(name)
    after = sqviz.non_scaling_norms(lm)
    assert float((logits(after.model, probe(lm)) - logits(lm.model, probe(lm))).abs().max()) < 1e-4
    for group in groups(lm):
        if isinstance(group.fold, Norm):
            gain = after.model.get_submodule(group.fold.path).weight + float(group.fold.plus_one)
            torch.testing.assert_close(gain.abs(), torch.ones_like(gain))
            before = lm.model.get_submodule(group.fold.path).weight + float(group.fold.plus_one)
            torch.testing.assert_close(after.scales[group.name], before.detach().abs())


def test_outlier_suppression_on_the_whole():
    lm = tiny("OPTForCausalLM")
    expected = logits(lm.model, probe(lm))
    plain = sqviz.non_scaling_norms(lm)
    m = sqviz.capture(plain, TOKENS, length=80, progress=False)
    q = sqviz.quantize(plain, sqviz.OUTLIER_SUPPRESSION, m)
    static = sqviz.quantize(lm, sqviz.SMOOTHQUANT_O3, sqviz.capture(lm, TOKENS, length=80, progress=False))
    of = [float((logits(one.model, probe(lm)) - expected).norm()) for one in (q, static)]
    assert of[0] < of[1]

"""The check that runs by default notices each of the folds that prior tools got wrong; online scaling."""

import copy

import pytest
import torch
from torch import nn

from sqviz.errors import CannotFold, NotEquivalent
from sqviz.models.arch import Arch, Input, Norm
from sqviz.models.linears import groups
from sqviz.models.lm import LM, share
from sqviz.models.tiny import tiny
from sqviz.quant.equivalence import TOLERANCE, check_equivalence, logits, probe
from sqviz.quant.scaled_linear import ScaledLinear
from sqviz.quant.smooth import smooth

QKV = tuple(f"self_attn.{kind}_proj" for kind in "qkv")


def misread(name: str, *lines: Input) -> LM:
    """A tiny model with a wrong row: these lines in place of the right ones."""
    lm = tiny(name)
    return lm.replace(arch=Arch(lm.arch.name, lm.arch.blocks, lines))


WRONG = {
    "post-LN OPT taken for pre-LN": misread(
        "OPTForCausalLM/post-ln", Input(QKV, Norm("self_attn_layer_norm")), Input(("fc1",), Norm("final_layer_norm"))
    ),
    "Gemma's gain taken for w": misread("Gemma2ForCausalLM", Input(QKV, Norm("input_layernorm"))),
    "Gemma's norm after attention taken for the one before the MLP": misread(
        "Gemma3ForCausalLM", Input(("mlp.gate_proj", "mlp.up_proj"), Norm("post_attention_layernorm", plus_one=True))
    ),
    "the MLP forgotten in a parallel block": misread(
        "GPTJForCausalLM", Input(("attn.q_proj", "attn.k_proj", "attn.v_proj"), Norm("ln_1"))
    ),
    "the router scaled, the experts forgotten": misread(
        "MixtralForCausalLM", Input(("mlp.gate",), Norm("post_attention_layernorm"))
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mistake", WRONG)
def test_wrong_folds_are_noticed(mistake: str, dtype: torch.dtype, record):
    wrong = WRONG[mistake]
    magnitudes = record(wrong)
    wrong = wrong.replace(model=copy.deepcopy(wrong.model).to(dtype))  # Module.to writes in place
    with pytest.raises(NotEquivalent, match=r"logits changed by \d.*of their maximum"):
        smooth(wrong, magnitudes, 0.8)
    smooth(wrong, magnitudes, 0.8, check=False)


def test_the_error_is_measured_and_the_tolerance_counts():
    lm = tiny("LlamaForCausalLM")
    twin = share(lm.model)
    twin.lm_head.weight = nn.Parameter(lm.model.lm_head.weight * 1.01)
    after = lm.replace(model=twin)
    assert check_equivalence(lm, lm) == 0
    assert check_equivalence(lm, after, tolerance=0.1) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(NotEquivalent, match=r"0\.01 of their maximum, more than the 0\.0001.*float32"):
        check_equivalence(lm, after)


def test_logits_that_are_not_finite_are_not_equivalent():
    for dtype in TOLERANCE:
        lm = tiny("LlamaForCausalLM", dtype=dtype)
        twin = share(lm.model)
        twin.model.norm.weight = nn.Parameter(torch.full((48,), torch.inf, dtype=dtype))
        with pytest.raises(NotEquivalent):
            check_equivalence(lm, lm.replace(model=twin))


def test_float64_is_float64_throughout():
    """Gemma's norm casts to float32: its logits in float64 are only exact with the casts lifted."""
    lm = tiny("Gemma2ForCausalLM", dtype=torch.float64)
    with torch.no_grad():
        plain = lm.model(probe(lm)).logits
    exact = logits(lm.model, probe(lm))
    assert exact.dtype == torch.float64
    assert 1e-9 < float((exact - plain).abs().max()) < 1e-4


def test_experts_have_a_float64_product_in_the_check_and_keep_their_own():
    lm = tiny("MixtralForCausalLM", dtype=torch.float64)
    before = lm.model.config._experts_implementation
    wide = logits(lm.model, probe(lm))
    narrow = logits(tiny("MixtralForCausalLM").model, probe(lm))
    assert lm.model.config._experts_implementation == before
    torch.testing.assert_close(wide.float(), narrow, rtol=1e-3, atol=1e-4)


# --- online scaling ---


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Olmo2ForCausalLM", "self_attn.q_proj"),
        ("OPTForCausalLM/gelu", "fc2"),
        ("GPT2LMHeadModel", "mlp.c_proj"),
        ("FalconForCausalLM/old-multi-head", "mlp.dense_4h_to_h"),
    ],
)
def test_online_scaling_keeps_logits_names_and_smooths(name: str, kind: str, record):
    lm = tiny(name)
    magnitudes = record(lm)
    after = smooth(lm, magnitudes, {f"*.{kind}": 0.5}, online=True)
    assert check_equivalence(lm, after, tolerance=1e-5) > 0
    scaled = {name: module for name, module in after.model.named_modules() if isinstance(module, ScaledLinear)}
    assert set(scaled) == {consumer for group in groups(lm) if group.kind == kind for consumer in group.consumers}
    for path, module in scaled.items():
        assert isinstance(module, nn.Linear)
        assert torch.equal(module.input_scale, after.scales[path])
        assert (module.input_scale != 1).any()
        assert "divided by s" in repr(module)
    assert not any(isinstance(module, ScaledLinear) for module in lm.model.modules())


def test_online_scaling_adds_up(record):
    lm = tiny("Olmo2ForCausalLM")
    magnitudes = record(lm)
    once, directly = smooth(lm, magnitudes, 0.5, online=True), smooth(lm, magnitudes, 0.9, online=True)
    for again in (smooth(once, magnitudes, 0.9, online=True), smooth(once, record(once), 0.9, online=True)):
        name = "model.layers.1.mlp.up_proj"
        assert check_equivalence(lm, again, tolerance=1e-5) > 0
        torch.testing.assert_close(again.model.get_submodule(name).input_scale, again.scales[name])
        torch.testing.assert_close(again.scales[name], directly.scales[name])
        assert not torch.allclose(again.scales[name], once.scales[name], rtol=0.05)


def test_half_precision_divides_and_multiplies_by_the_same_s(record):
    lm = tiny("Olmo2ForCausalLM", dtype=torch.bfloat16)
    after = smooth(lm, record(lm), 0.5, online=True)
    module = after.model.get_submodule("model.layers.0.self_attn.k_proj")
    assert module.input_scale.dtype == module.weight.dtype == torch.bfloat16
    assert torch.equal(module.input_scale.float(), after.scales["model.layers.0.self_attn.k_proj"])


def test_what_is_no_layer_of_its_own_cannot_be_scaled_online(record):
    lm = tiny("MixtralForCausalLM")
    with pytest.raises(CannotFold, match=r"experts\.down_proj is not a linear layer of its own.*MixtralExperts"):
        smooth(lm, record(lm), {"*.experts.down_proj": 0.5}, online=True)

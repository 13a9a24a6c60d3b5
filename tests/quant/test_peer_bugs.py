"""Folds that other tools get or got wrong, each put back: sqviz's check notices it, and what sqviz does is exact.

Named after the tool and its issue where there is one. tests/quant/test_equivalence.py holds five more of them: post-LN
OPT, Gemma's gain and Gemma's norm, GPT-J's parallel MLP, and Mixtral's router scaled without its experts.
"""

import pytest
import torch
from torch import nn

from sqviz.errors import CannotFold, NotEquivalent
from sqviz.models.arch import HOMOGENEOUS, Arch, Input, Norm, Value
from sqviz.models.linears import groups, weight
from sqviz.models.lm import LM, share
from sqviz.models.tiny import TINY, tiny
from sqviz.observe.capture import capture
from sqviz.quant.equivalence import check_equivalence, logits, probe
from sqviz.quant.linear import quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA, SMOOTHQUANT_O3
from sqviz.quant.smooth import smooth, smoothing_scale

QKV = tuple(f"self_attn.{kind}_proj" for kind in "qkv")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"
MIXTURES = [name for name in TINY if name.startswith(("Mixtral", "Deepseek"))]
STREAM = torch.randint(3, 131, (240,), generator=torch.Generator().manual_seed(3))

PRE, POST = Norm("input_layernorm"), Norm("post_attention_layernorm")
BLOOM_QKV, NEOX_QKV = "self_attention.query_key_value", "attention.query_key_value"
MISREAD = {
    # smoothquant looks for ln_attn and ln_mlp, which the layout with one norm lacks
    "Falcon2: the MLP reads the attention's norm": ("FalconForCausalLM/new-one-norm", Input((BLOOM_QKV,), PRE)),
    "Cohere: the MLP reads the attention's norm": ("CohereForCausalLM", Input(QKV, PRE)),
    "Phi: the MLP reads the attention's norm": ("PhiForCausalLM", Input(QKV, PRE)),
    "BLOOM: the residual reads the norm": ("BloomForCausalLM/post-residual", Input((BLOOM_QKV,), PRE)),
    "BLOOM: and the second": ("BloomForCausalLM/post-residual", Input(("mlp.dense_h_to_4h",), POST)),
    "OLMo2 by llm-compressor's default: the norm behind attention": ("Olmo2ForCausalLM", Input(GATE_UP, POST)),
    "GLM-4: the norm behind attention": (
        "Glm4ForCausalLM",
        Input(("mlp.gate_up_proj",), Norm("post_self_attn_layernorm")),
    ),
    "DeepSeek: shared experts forgotten": (
        "DeepseekV2ForCausalLM",
        Input(("mlp.gate", "mlp.experts.gate_up_proj"), POST, where="mlp.experts"),
    ),
    "DeepSeek: compressed keys and values forgotten": ("DeepseekV2ForCausalLM", Input(("self_attn.q_a_proj",), PRE)),
    "NeoX: the last rows taken for the values": (
        "GPTNeoXForCausalLM",
        Input(("attention.dense",), Value(NEOX_QKV, "stacked")),
    ),
    "MPT: values that are clipped": (
        "MptForCausalLM/clip-qkv",
        Input(("attn.out_proj",), Value("attn.Wqkv", "stacked")),
    ),
}


def needs_online(name: str) -> bool:
    return any(group.entry and group.fold is None for group in groups(tiny(name)))


@pytest.mark.parametrize("mistake", MISREAD)
def test_a_misread_block_is_noticed_and_the_row_reads_it_right(mistake: str, record):
    name, line = MISREAD[mistake]
    right = tiny(name)
    wrong = right.replace(arch=Arch(right.arch.name, right.arch.blocks, (line,)))
    with pytest.raises(NotEquivalent, match="logits changed by"):
        smooth(wrong, record(wrong), 0.8, folds="all")
    smooth(right, record(right), 0.8, folds="all", online=needs_online(name))


@pytest.mark.parametrize("name", ["OPTForCausalLM/post-ln", "BloomForCausalLM/post-residual", "Olmo2ForCausalLM"])
def test_opt_350m_and_others_without_a_fold_are_refused_not_spoilt(name: str, record):
    lm = tiny(name)
    with pytest.raises(CannotFold, match="cannot be folded"):
        smooth(lm, record(lm), 0.5)


def test_query_heads_with_an_s_of_their_own_for_one_value_head(monkeypatch, record):
    """deepcompressor#11: v_proj -> o_proj without regard for grouped queries."""
    lm = tiny("LlamaForCausalLM")
    smooth(lm, record(lm), {"*.o_proj": 0.5}, folds="all")
    monkeypatch.setattr("sqviz.quant.smooth.tie", lambda values, rows: values)
    with pytest.raises(NotEquivalent):
        smooth(lm, record(lm), {"*.o_proj": 0.5}, folds="all")


def test_fc1_is_not_folded_through_gelu(monkeypatch, record):
    """fc1 -> fc2 is exact under relu only; AWQ-like mappings that fold through any activation are not."""
    lm = tiny("GPT2LMHeadModel")
    with pytest.raises(CannotFold, match="gelu_new between"):
        smooth(lm, record(lm), {"*.mlp.c_proj": 0.5}, folds="all")
    monkeypatch.setattr("sqviz.models.linears.HOMOGENEOUS", (*HOMOGENEOUS, "gelu_new"))
    with pytest.raises(NotEquivalent):
        smooth(lm, record(lm), {"*.mlp.c_proj": 0.5}, folds="all")


# --- zeros (sparseml#1872, neural-compressor#1427) and half precision ---


def by_the_bare_formula(x: torch.Tensor, w: torch.Tensor, alpha: float) -> torch.Tensor:
    """Equation 3.4 and nothing else."""
    return x.pow(alpha) / w.pow(1 - alpha)


def with_dead_channels() -> LM:
    """Channel 3 of the first norm is never anything but 0, channel 9 is never read."""
    lm = tiny("OPTForCausalLM")
    block = lm.model.model.decoder.layers[0]
    with torch.no_grad():
        block.self_attn_layer_norm.weight[3] = 0
        block.self_attn_layer_norm.bias[3] = 0
        for path in QKV:
            block.get_submodule(path).weight[:, 9] = 0
    return lm


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_dead_channel_gives_no_nan(alpha: float, monkeypatch):
    lm = with_dead_channels()
    m = capture(lm, STREAM, length=24, progress=False)
    assert float(m.absmax("model.decoder.layers.0.self_attn.q_proj")[3]) == 0
    after = smooth(lm, m, alpha, folds="all")
    assert logits(after.model, probe(lm)).isfinite().all()
    assert logits(quantize(after, SMOOTHQUANT_O3, m).model, probe(lm)).isfinite().all()
    assert after.scales["model.decoder.layers.0.self_attn.q_proj"][[3, 9]].tolist() == [1, 1]
    monkeypatch.setattr("sqviz.quant.smooth.smoothing_scale", by_the_bare_formula)
    spoilt = smooth(lm, m, alpha, check=False)
    if alpha != 0.0:  # 0 ** 0 = 1 spares the activations, and then the column of zeros divides
        assert not logits(spoilt.model, probe(lm)).isfinite().all()
    with pytest.raises(NotEquivalent):
        smooth(lm, m, 0.5)


def test_scales_of_a_half_precision_model_are_computed_in_float32(record):
    """smoothquant takes powers and their quotient in the model's dtype: beyond 65504 s is infinite."""
    lm, name, channel = tiny("OPTForCausalLM"), "model.decoder.layers.0.self_attn.q_proj", 11
    block = lm.model.model.decoder.layers[0]
    with torch.no_grad():
        for path in QKV:
            column = block.get_submodule(path).weight[:, channel]
            column.mul_(1e-5 / column.abs().max())
    lm.model.half()
    magnitudes = record(lm)
    magnitudes.found[name][channel] = 60_000
    x = magnitudes.absmax(name)
    w = torch.stack([weight(lm, group).detach().abs().amax(0) for group in groups(lm)[0].consumers]).amax(0)
    assert by_the_bare_formula(x.half(), w, 0.5)[channel].isinf()
    s = smoothing_scale(x, w.float(), 0.5)
    torch.testing.assert_close(s.double(), by_the_bare_formula(x.double(), w.double(), 0.5), rtol=1e-5, atol=0)
    after = smooth(lm, magnitudes, 0.5)
    assert after.scales[name].isfinite().all()
    assert 0.9 < float(after.scales[name][channel]) / 77_460 < 1.1
    assert all(parameter.isfinite().all() for parameter in after.model.parameters())


# --- mixtures ---


def fold_mlp_norm(lm: LM, s: torch.Tensor, router: bool, experts: slice, shared: bool = True) -> LM:
    """Norm before the last block's mixture divided by s, and of its readers only those named multiplied."""
    twin = share(lm.model)
    block = twin.model.layers[1]
    readers = [block.mlp.gate] if router else []
    if shared and hasattr(block.mlp, "shared_experts"):
        readers += [block.mlp.shared_experts.gate_proj, block.mlp.shared_experts.up_proj]
    block.post_attention_layernorm.weight = nn.Parameter(block.post_attention_layernorm.weight.detach() / s)
    for reader in readers:
        reader.weight = nn.Parameter(reader.weight.detach() * s)
    stacked = block.mlp.experts.gate_up_proj.detach().clone()
    stacked[experts] *= s
    block.mlp.experts.gate_up_proj = nn.Parameter(stacked)
    return lm.replace(model=twin)


@pytest.mark.parametrize("name", MIXTURES)
def test_router_and_every_expert_are_scaled_with_their_norm(name: str, record):
    """llm-compressor#1455: the router alone; #2084: of the experts only 0; its Cohere2-MoE today: not the router."""
    lm = tiny(name)
    after = smooth(lm, record(lm), {"*.mlp.experts.gate_up_proj": 0.7})
    s = after.scales[EXPERTS]
    assert ((s - 1).abs() > 0.1).any()
    everything = fold_mlp_norm(lm, s, True, slice(None))
    block, obvious = after.model.model.layers[1], everything.model.model.layers[1]
    torch.testing.assert_close(block.mlp.experts.gate_up_proj, obvious.mlp.experts.gate_up_proj)
    torch.testing.assert_close(block.mlp.gate.weight, obvious.mlp.gate.weight)
    check_equivalence(lm, everything)
    wrong = [(True, slice(0)), (True, slice(0, 1)), (False, slice(None))]
    for router, experts in wrong:
        with pytest.raises(NotEquivalent):
            check_equivalence(lm, fold_mlp_norm(lm, s, router, experts))


@pytest.mark.parametrize("name", MIXTURES)
def test_tokens_go_to_the_experts_they_went_to(name: str, record):
    lm = tiny(name)
    smoothed = smooth(lm, record(lm), 0.7, folds="all")
    assert torch.equal(choices(smoothed), choices(lm))
    scaled_norm_only = fold_mlp_norm(lm, smoothed.scales[EXPERTS], False, slice(None))
    assert not torch.equal(choices(scaled_norm_only), choices(lm))


def choices(lm: LM) -> torch.Tensor:
    """Which experts the tokens of the last block are sent to, sorted per token."""
    seen = []
    experts = lm.model.model.layers[1].mlp.experts
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    with torch.no_grad():
        lm.model(STREAM[None, :48], use_cache=False)
    handle.remove()
    return seen[0].sort(-1).values


@pytest.mark.parametrize("name", MIXTURES)
def test_fused_experts_are_no_linears_and_are_quantised_all_the_same(name: str):
    """bitsandbytes#1849, Model-Optimizer#1187: a walk over nn.Linear passes by most weights of a mixture."""
    lm = tiny(name)
    q = quantize(lm, SMOOTHQUANT_LLAMA)
    blocks = lm.model.model.layers
    linears = sum(m.weight.numel() for m in blocks.modules() if isinstance(m, nn.Linear))
    fused = sum(p.numel() for p in blocks.parameters() if p.ndim == 3)
    assert fused > linears / 2
    for path, parameter in blocks.named_parameters():
        if parameter.ndim == 3:
            new = q.model.model.layers.get_parameter(path).detach()
            step = parameter.detach().abs().amax(-1, keepdim=True) / 127  # of every expert and output
            torch.testing.assert_close(new, (parameter.detach() / step).round() * step)
            assert not torch.equal(new, parameter)


def test_an_expert_without_tokens_is_smoothed_and_has_a_step():
    """It takes what calibration saw at all experts together: with 0 it would stay rough, and its step be 0."""
    lm = tiny("MixtralForCausalLM", num_local_experts=24)
    m = capture(lm, STREAM[:6], length=6, progress=False)
    name = "model.layers.1.mlp.experts.down_proj"
    idle = m.idle_experts()[name]
    assert len(idle) >= 10
    assert f"{sum(len(experts) for experts in m.idle_experts().values())} experts saw no token" in repr(m)
    assert m.inputs[name].expert_absmax[idle].count_nonzero() == 0
    assert torch.equal(m.absmax(name)[idle[0]], m.inputs[name].absmax)
    after = smooth(lm, m, 0.5, folds="all")
    assert ((after.scales[name][idle] - 1).abs() > 0.1).any(1).all()
    inner = quantize(after, SMOOTHQUANT_O3, m).model.model.layers[1].mlp.experts.inner
    for expert in idle:
        reach = (m.inputs[name].absmax / after.scales[name][expert]).max()
        assert float(inner[expert].step) == pytest.approx(float(reach) / 127, rel=1e-4)
    busy = quantize(after, SMOOTHQUANT_O3, m)
    assert logits(busy.model, STREAM[None, :200]).isfinite().all()  # tokens reach the idle ones now

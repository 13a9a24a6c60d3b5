"""Mistakes of the original smoothquant, each put back: what sqviz does differs from it, and is what the paper says.

Quantisers that write in place, attention quantised before RoPE, calibration with gradients, an α that export knows
better, padding to 16 tokens, a lost project_in, and chains of isinstance over names of one version of transformers.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from sqviz.models.linears import groups, linear_names
from sqviz.models.lm import LM
from sqviz.models.load import load
from sqviz.models.tiny import tiny
from sqviz.observe.capture import capture
from sqviz.quant.checkpoint import load_int8, save_int8
from sqviz.quant.export import export
from sqviz.quant.linear import quantize
from sqviz.quant.quantize import fake_quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA, SMOOTHQUANT_O1, SMOOTHQUANT_O3
from sqviz.quant.simulated import SimulatedLinear
from sqviz.quant.smooth import smooth

IDS = torch.randint(3, 131, (1, 40), generator=torch.Generator().manual_seed(5))


def logits(lm: LM, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return lm.model(input_ids=ids, use_cache=False).logits


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- quantisers that write into what they are given ---


def in_place(x: Tensor, *rest, **options) -> Tensor:
    """smoothquant's quantisers: `t.div_(step).round_().mul_(step)`."""
    with torch.no_grad():
        return x.copy_(fake_quantize(x, *rest, **options))


def changed_by_quantising(lm: LM) -> list[str]:
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    quantize(lm, SMOOTHQUANT_LLAMA)
    return [name for name, tensor in lm.model.state_dict().items() if not torch.equal(tensor, before[name])]


def test_quantising_leaves_the_floating_point_model(monkeypatch):
    """quantize_opt and the others overwrite the weights of the model that they are given."""
    assert changed_by_quantising(tiny("LlamaForCausalLM")) == []
    monkeypatch.setattr("sqviz.quant.simulate.fake_quantize", in_place)
    damaged = changed_by_quantising(tiny("LlamaForCausalLM"))
    assert damaged == [f"{name}.weight" for name in linear_names(tiny("LlamaForCausalLM"))]


def norm_output_changed(lm: LM) -> bool:
    """Whether what the norm gave is another tensor's content once q_proj, k_proj and v_proj have read it."""
    given: list[tuple[Tensor, Tensor]] = []
    norm = lm.model.model.layers[0].input_layernorm
    handle = norm.register_forward_hook(lambda _, args, out: given.append((out, out.clone())))
    logits(lm)
    handle.remove()
    out, copied = given[0]
    return not torch.equal(out, copied)


def test_siblings_read_what_the_norm_gave(monkeypatch):
    """W8A8Linear.forward quantises its input in place: k_proj and v_proj read what q_proj left of it."""
    q = quantize(tiny("LlamaForCausalLM"), SMOOTHQUANT_LLAMA)
    assert not norm_output_changed(q)
    monkeypatch.setattr("sqviz.quant.simulated.fake_quantize", in_place)
    assert norm_output_changed(q)


# --- attention ---


def rounded(x: Tensor, dims: int | tuple[int, ...] = -1) -> Tensor:
    step = x.abs().amax(dims, keepdim=True) / 127
    return torch.where(step > 0, (x / step).round() * step, 0.0)


def first_attention(lm: LM, before_rope: bool = False, probabilities: bool = True, heads: bool = True) -> Tensor:
    """The obvious attention of a Llama's first block on quantised operands: its output [batch token channel].

    before_rope: queries and keys are quantised before RoPE. probabilities: they are quantised too. heads: each head has
    steps of its own.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention, states = lm.model.model.layers[0].self_attn, {}
    hooks = [
        attention.get_submodule(f"{kind}_proj").register_forward_hook(
            lambda _, args, out, kind=kind: states.__setitem__(kind, out)
        )
        for kind in "qkv"
    ]
    logits(lm)
    for hook in hooks:
        hook.remove()
    size, length = attention.head_dim, IDS.shape[1]
    q, k, v = (states[kind].unflatten(-1, (-1, size)).transpose(1, 2) for kind in "qkv")  # [batch head token dim]
    dims: tuple[int, ...] = (-1,) if heads else (1, -1)
    cos, sin = lm.model.model.rotary_emb(v, torch.arange(length)[None])
    if before_rope:
        q, k = apply_rotary_pos_emb(rounded(q, dims), rounded(k, dims), cos, sin)
    else:
        q, k = (rounded(x, dims) for x in apply_rotary_pos_emb(q, k, cos, sin))
    share = q.shape[1] // k.shape[1]
    k, step = k.repeat_interleave(share, 1), v.abs().amax(dims, keepdim=True).expand_as(v[..., :1]) / 127
    codes, step = (x.repeat_interleave(share, 1) for x in ((v / step).round(), step))
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    p = (q @ k.transpose(2, 3) * attention.scaling).masked_fill(hidden, -torch.inf).softmax(-1)
    p = p * step.transpose(2, 3)  # a step per token of V stands inside of the sum over tokens
    return ((rounded(p) if probabilities else p) @ codes).transpose(1, 2).flatten(2)


def attention_output(lm: LM) -> Tensor:
    """What o_proj of the first block reads."""
    seen: list[Tensor] = []
    o = lm.model.model.layers[0].self_attn.o_proj
    handle = o.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(lm)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("backend", ["simulate", "auto"])
def test_both_products_are_quantised_where_they_happen(backend: str):
    """smoothquant's quantize_bmm_input: before RoPE, over all heads, probabilities never."""
    lm = tiny("LlamaForCausalLM")
    got = attention_output(quantize(lm, SMOOTHQUANT_LLAMA, backend=backend, skip=["*"], attention=True))
    near = gap(got, first_attention(lm))
    assert near < 1e-3
    for mistake in ({"before_rope": True}, {"probabilities": False}, {"heads": False}):
        assert gap(got, first_attention(lm, **mistake)) > 3 * max(near, 3e-4), mistake


# --- calibration, export ---


def test_calibration_builds_no_graph():
    """get_act_scales lacks no_grad: every activation of every layer is kept for a backward pass that never comes."""
    lm, graphs = tiny("LlamaForCausalLM"), []
    assert all(parameter.requires_grad for parameter in lm.model.parameters())
    module = lm.model.model.layers[1].mlp.down_proj
    handle = module.register_forward_hook(lambda _, args, out: graphs.append(out.grad_fn is not None))
    capture(lm, IDS[0], length=20, progress=False)
    assert graphs == [False, False]
    lm.model(input_ids=IDS, use_cache=False)
    assert graphs[-1], "outside of it gradients flow as before"
    handle.remove()


def test_export_keeps_the_alpha_of_the_model(tmp_path):
    """export_int8_model.py smooths by 0.5 whatever was chosen."""
    lm = tiny("OPTForCausalLM")
    m = capture(lm, IDS[0], length=20, progress=False)
    chosen, fixed = (smooth(lm, m, alpha).model.state_dict() for alpha in (0.8, 0.5))
    found = load(export(smooth(lm, m, 0.8), tmp_path / "model").folder).model.state_dict()
    assert all(torch.equal(found[name], chosen[name]) for name in chosen)
    assert not torch.equal(found["model.decoder.layers.0.fc1.weight"], fixed["model.decoder.layers.0.fc1.weight"])


# --- Int8OPT ---


def decoded(model: nn.Module, parts: list[Tensor]) -> Tensor:
    """Logits of a text read piece by piece through a cache."""
    cache, found = None, []
    with torch.no_grad():
        for part in parts:
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    return torch.cat(found, 1)


def padded(part: Tensor) -> Tensor:
    """Int8OPTDecoder: every forward pass is filled up to a multiple of 16 tokens."""
    return nn.functional.pad(part, (0, -part.shape[1] % 16), value=1)


@pytest.mark.parametrize("scheme", [SMOOTHQUANT_LLAMA, SMOOTHQUANT_O1, SMOOTHQUANT_O3], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("backend", ["simulate", "auto"])
def test_opt_decodes_through_a_cache_at_any_length(scheme, backend: str):
    """Filled up to 16 tokens, what a step leaves in the cache is mostly padding."""
    lm = tiny("OPTForCausalLM")
    m = capture(lm, IDS[0], length=40, progress=False)
    q = quantize(smooth(lm, m, 0.5), scheme, m, backend)
    whole, parts = logits(q), list(IDS.split([17, 1, 1, 3, 1, 17], 1))
    assert gap(decoded(q.model, parts), whole) < 0.02
    last = decoded(q.model, [padded(parts[0]), parts[1]])[:, -1]
    assert gap(last, whole[:, 17]) > 0.1


def test_opt_with_narrow_embeddings_keeps_its_projections(tmp_path):
    """Int8OPTDecoder.from_float forgets project_in and project_out: opt-350m cannot be run."""
    lm = tiny("OPTForCausalLM/post-ln")
    decoder = lm.model.model.decoder
    assert decoder.project_in.weight.shape == (48, 22)
    q = quantize(lm, SMOOTHQUANT_LLAMA, backend="auto")
    assert gap(logits(q), logits(lm)) < 0.2
    save_int8(q, tmp_path / "model")
    for model in (quantize(lm, SMOOTHQUANT_LLAMA).model, q.model, load_int8(tmp_path / "model").model):
        for name in ("project_in", "project_out"):
            kept, original = model.model.decoder.get_submodule(name), decoder.get_submodule(name)
            assert torch.equal(kept.weight, original.weight)
    forgetful = copy.deepcopy(q.model)
    forgetful.model.decoder.project_in = None
    with pytest.raises(RuntimeError):
        forgetful(input_ids=IDS)


# --- what a model is told by ---


@pytest.mark.parametrize("name", ["BloomForCausalLM", "BloomForCausalLM/post-residual"])
def test_bloom_is_quantised_not_only_smoothed(name: str):
    """The README has perplexities of BLOOM, quantize_model raises for it."""
    lm = tiny(name)
    m = capture(lm, IDS[0], length=20, progress=False)
    q = quantize(smooth(lm, m, 0.5, folds="all", online=True), SMOOTHQUANT_LLAMA)
    assert all(isinstance(q.model.get_submodule(linear), SimulatedLinear) for linear in linear_names(lm))
    assert 1e-4 < gap(logits(q), logits(lm)) < 0.1


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM", "OPTForCausalLM", "FalconForCausalLM"])
def test_classes_inside_of_a_block_may_be_called_anything(name: str):
    """smooth_lm and quantize_model ask for classes by name, some of which transformers 5 no longer has."""
    lm, renamed = tiny(name), tiny(name)
    blocks = renamed.model.get_submodule(renamed.arch.blocks)
    for module in [*blocks.modules()][1:]:
        if type(module).__module__.startswith("transformers.models"):
            module.__class__ = type("Later" + type(module).__name__, (type(module),), {})
    names = {type(module).__name__ for module in tiny(name).model.get_submodule(lm.arch.blocks).modules()}
    assert sum(type(module).__name__ not in names for module in blocks.modules()) >= 2 * 2
    assert [group.consumers for group in groups(renamed)] == [group.consumers for group in groups(lm)]
    found = []
    for model in (lm, renamed):
        m = capture(model, IDS[0], length=20, progress=False)
        found.append(logits(quantize(smooth(model, m, 0.5, folds="all"), SMOOTHQUANT_O3, m)))
    assert torch.equal(*found)

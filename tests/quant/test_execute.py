"""Models that execute in integers against the same models acted out, linear by linear and as a whole."""

import copy

import pytest
import torch
from sqviz_kernels.dispatch import backends
from torch import nn

from sqviz.errors import NonFinite, SqvizError, Unavailable
from sqviz.models.linears import linear_names, weight
from sqviz.models.lm import share
from sqviz.models.tiny import TINY, tiny
from sqviz.observe.capture import capture
from sqviz.quant.checkpoint import load_int8, save_int8
from sqviz.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from sqviz.quant.linear import quantize
from sqviz.quant.quantize import fake_quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA, SMOOTHQUANT_O1, SMOOTHQUANT_O2, SMOOTHQUANT_O3, ZEROQUANT, Scheme
from sqviz.quant.simulated import SimulatedLinear
from sqviz.quant.smooth import smooth
from sqviz.quant.w8a8 import GatedMLP, W8A8Linear, W8A8Norm
from sqviz.quant.w8a8_experts import W8A8Experts

IDS = torch.randint(3, 131, (2, 40), generator=torch.Generator().manual_seed(5))
STREAM = torch.randint(3, 131, (400,), generator=torch.Generator().manual_seed(6))
GATED = ("Llama", "Mistral", "Qwen", "Phi3", "Glm", "Cohere", "Olmo2")
CPU = [name for name, why in backends().items() if why is None and name in ("vnni", "onednn", "plain")]


def logits(lm, ids=IDS, **more):
    with torch.no_grad():
        return lm.model(input_ids=ids, use_cache=False, **more).logits


def gap(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def pair(name, scheme, backend="auto", **how):
    lm = tiny(name)
    magnitudes = capture(lm, STREAM, samples=4, length=64) if scheme.static else None
    acted, executed = (quantize(lm, scheme, magnitudes, each) for each in ("simulate", backend))
    return lm, acted, quantize(lm, scheme, magnitudes, backend, **how) if how else executed


def linears_see(lm):
    """(name, input, output) of each simulated linear in one forward pass; copies, as some models write to outputs."""
    seen, hooks = [], []
    for name, module in lm.model.named_modules():
        if isinstance(module, SimulatedLinear):
            hooks.append(
                module.register_forward_hook(
                    lambda _, args, out, name=name: seen.append((name, args[0].clone(), out.clone()))
                )
            )
    logits(lm)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(
    "scheme", [SMOOTHQUANT_LLAMA, SMOOTHQUANT_O1, SMOOTHQUANT_O2, SMOOTHQUANT_O3], ids=lambda s: s.name
)
@pytest.mark.parametrize("name", TINY)
def test_each_linear_and_the_whole_are_what_simulation_says(name, scheme):
    lm, acted, executed = pair(name, scheme)
    for linear, x, y in linears_see(acted):
        assert gap(executed.model.get_submodule(linear)(x), y) < 1e-6, linear
    noise = gap(logits(acted), logits(lm))
    assert gap(logits(executed), logits(acted)) < max(
        1e-5, 0.15 * noise
    )  # a code that falls on a half may fall elsewhere


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM", "GPT2LMHeadModel"])
@pytest.mark.parametrize("backend", CPU)
def test_backends_agree(name, backend):
    _, acted, executed = pair(name, SMOOTHQUANT_O1, backend)
    for linear, x, y in linears_see(acted):
        assert gap(executed.model.get_submodule(linear)(x), y) < 1e-6, linear


@pytest.mark.parametrize("name", [name for name in TINY if name.startswith(GATED)])
def test_gated_mlps_are_fused_and_still_seen_by_hooks(name):
    _, _, executed = pair(name, SMOOTHQUANT_LLAMA)
    paths = [path for path, module in executed.model.named_modules() if isinstance(module, GatedMLP)]
    assert len(paths) == 2
    before, seen = logits(executed), []
    handles = [
        executed.model.get_submodule(f"{path}.down_proj").register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        for path in paths
    ]
    after = logits(executed)
    assert len(seen) == 2
    assert gap(after, before) < 0.05
    for handle in handles:
        handle.remove()
    assert torch.equal(logits(executed), before)


def test_norms_leave_codes_and_compute_what_they_did():
    lm, _, executed = pair("Gemma2ForCausalLM", SMOOTHQUANT_LLAMA)
    x = torch.randn(3, 5, 48)
    for path, module in executed.model.named_modules():
        if isinstance(module, W8A8Norm):
            y = module(x)
            assert torch.allclose(y, lm.model.get_submodule(path)(x), rtol=1e-5, atol=1e-6)
            assert y._sqviz_codes.site is module.site


def test_codes_of_a_tensor_that_was_written_to_are_made_anew():
    _, _, executed = pair("LlamaForCausalLM", SMOOTHQUANT_LLAMA)
    linear = executed.model.get_submodule("model.layers.0.self_attn.q_proj")
    x = torch.randn(2, 48)
    first = linear(x)
    x.mul_(3)
    assert torch.allclose(linear(x), 3 * first, rtol=1e-5)


def test_the_original_stays_and_a_copy_works():
    lm = tiny("LlamaForCausalLM")
    state = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    before = logits(lm)
    executed = quantize(lm, SMOOTHQUANT_LLAMA, backend="auto", head=True, attention=True)
    found = logits(executed)
    assert torch.equal(logits(lm), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in lm.model.state_dict().items())
    assert torch.equal(logits(executed.replace(model=share(executed.model))), found)
    assert torch.equal(logits(executed.replace(model=copy.deepcopy(executed.model))), found)


@pytest.mark.parametrize("name", ["LlamaForCausalLM/tied-bias", "OPTForCausalLM", "MixtralForCausalLM"])
def test_weights_as_codes_are_counted_among_the_parameters(name):
    lm, _, executed = pair(name, SMOOTHQUANT_LLAMA, head=True)
    size = f"{sum(p.numel() for p in lm.model.parameters()) / 1e6:.1f}M parameters"
    assert size in repr(lm)
    assert size in repr(executed)


def test_saving_codes_as_if_they_were_weights_is_refused(tmp_path):
    lm = tiny("LlamaForCausalLM")
    executed = quantize(lm, SMOOTHQUANT_LLAMA, backend="auto")
    read = load_int8(save_int8(executed, tmp_path / "kept"))
    for model in (executed.model, executed.model.base_model, share(executed.model), read.model):
        for save in (model.save_pretrained, model.push_to_hub):
            with pytest.raises(
                SqvizError, match=r"sqviz\.save_int8\(lm, folder\).* save the one it was quantised from"
            ):
                save(tmp_path / "codes")
    assert not (tmp_path / "codes").exists()
    lm.model.save_pretrained(tmp_path / "floats")
    assert (tmp_path / "floats" / "model.safetensors").exists()


@pytest.mark.parametrize("head", [False, True], ids=["float head", "INT8 head"])
def test_converting_an_executed_model_leaves_codes_and_the_original_as_they_were(head: bool, tmp_path):
    lm = tiny("LlamaForCausalLM/tied-bias")
    before, exact = logits(lm), {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    executed = quantize(lm, SMOOTHQUANT_LLAMA, backend="auto", head=head)
    expected, codes = logits(executed), executed.model.get_submodule("model.layers.0.mlp.down_proj").product.values
    executed.model.double()
    assert executed.dtype == logits(executed).dtype == torch.float64
    assert gap(logits(executed), expected) < 1e-4
    assert torch.equal(logits(load_int8(save_int8(executed, tmp_path / "float64"))), logits(executed))
    executed.model.to(torch.bfloat16)
    assert executed.dtype == logits(executed).dtype == torch.bfloat16
    assert executed.model.get_submodule("model.layers.0.mlp.down_proj").product.values is codes
    with pytest.raises(SqvizError, match="Move the model before quantising"):
        executed.model.to("meta")
    assert torch.equal(logits(lm), before)
    assert all(torch.equal(tensor, exact[name]) for name, tensor in lm.model.state_dict().items())


def test_norms_read_anew_what_was_loaded_into_them():
    _, _, executed = pair("LlamaForCausalLM", SMOOTHQUANT_LLAMA)
    expected, state = logits(executed), {name: x.clone() for name, x in executed.model.state_dict().items()}
    name = "model.layers.0.input_layernorm.weight"
    executed.model.load_state_dict({**state, name: 2 * state[name]})
    assert gap(logits(executed), expected) > 0.01
    executed.model.load_state_dict(state)
    assert torch.equal(logits(executed), expected)


def test_a_floating_point_head_reads_rows_that_lie_side_by_side():
    lm = tiny("LlamaForCausalLM")
    executed = quantize(lm, SMOOTHQUANT_LLAMA, backend="auto")
    seen = []
    with torch.no_grad():
        rows = torch.arange(2 * 3 * 48.0).view(2, 3, 48)[:, -1:]
        hook = executed.model.lm_head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        got = executed.model.lm_head(rows)
        hook.remove()
        assert torch.equal(got, lm.model.lm_head(rows))
    assert rows.stride() == (144, 48, 1)
    assert seen[0].stride() == (48, 48, 1)
    assert not lm.model.lm_head._forward_pre_hooks, "the user's own model is left alone"


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LlamaForCausalLM/tied-bias", "OPTForCausalLM"])
def test_the_head_in_integers(name):
    lm, _, executed = pair(name, SMOOTHQUANT_LLAMA, head=True)
    head, embedding = executed.model.get_output_embeddings(), executed.model.get_input_embeddings()
    original = lm.model.get_output_embeddings().weight
    assert isinstance(head, W8A8Linear)
    assert gap(head.weight, original) < 0.01
    ids = torch.tensor([[3, 130], [7, 7]])
    if lm.model.get_input_embeddings().weight is original:
        assert torch.equal(embedding(ids), head.weight[ids])
        assert not any(
            tensor.numel() >= original.numel() and tensor.is_floating_point() for tensor in executed.model.parameters()
        )
    else:
        assert torch.equal(embedding(ids), lm.model.get_input_embeddings()(ids))
    x = torch.randn(7, original.shape[1])
    assert gap(head(x), fake_quantize(x, PerToken()) @ head.weight.T) < 1e-6
    assert logits(executed).isfinite().all()


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cached_step_is_the_whole_text(dtype, attention):
    lm = tiny("LlamaForCausalLM")
    lm = lm.replace(model=copy.deepcopy(lm.model).to(dtype))
    executed = quantize(lm, SMOOTHQUANT_LLAMA, backend="auto", attention=attention)
    whole = logits(executed)
    assert whole.dtype == dtype
    with torch.no_grad():
        cache, steps = None, []
        for part in IDS.split([17, 1, 1, 9, 1, 11], 1):
            found = executed.model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            steps.append(found.logits)
    assert gap(torch.cat(steps, 1).float(), whole.float()) < (0.02 if dtype == torch.float32 else 0.1)


def test_generate_with_padding_on_the_left():
    _, _, executed = pair("Qwen2ForCausalLM", SMOOTHQUANT_LLAMA, attention=True, head=True)
    prompt = IDS[:1, :9]
    alone = executed.model.generate(prompt, max_new_tokens=8, do_sample=False)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), prompt], 1)
    both = executed.model.generate(
        torch.cat([padded, IDS[1:, :13]]),
        attention_mask=torch.cat([(padded > 0).long(), torch.ones(1, 13, dtype=torch.long)]),
        max_new_tokens=8,
        do_sample=False,
    )
    assert torch.equal(both[0, 13:], alone[0, 9:])


def test_online_scaling_divides_before_the_codes():
    lm = tiny("OPTForCausalLM/gelu")
    magnitudes = capture(lm, STREAM, samples=4, length=64)
    smoothed = smooth(lm, magnitudes, 0.5, folds="all", online=True)
    for scheme in (SMOOTHQUANT_LLAMA, SMOOTHQUANT_O3):
        acted, executed = (quantize(smoothed, scheme, magnitudes, each) for each in ("simulate", "auto"))
        assert gap(logits(executed), logits(acted)) < 0.02


def test_skipped_linears_and_routers_stay():
    lm, _, _ = pair("MixtralForCausalLM", SMOOTHQUANT_LLAMA)
    executed = quantize(lm, SMOOTHQUANT_LLAMA, backend="auto", skip=["*.0.mlp.experts.down_proj", "*.1.self_attn.*"])
    assert type(executed.model.get_submodule("model.layers.1.self_attn.q_proj")) is nn.Linear
    first = executed.model.get_submodule("model.layers.0.mlp.experts")
    assert isinstance(first, W8A8Experts)
    assert isinstance(first.down_proj, nn.Parameter)
    acted = quantize(lm, SMOOTHQUANT_LLAMA, skip=["*.0.mlp.experts.down_proj", "*.1.self_attn.*"])
    assert gap(logits(executed), logits(acted)) < 0.02


def test_weights_can_be_read_and_captured_from():
    _, acted, executed = pair("MixtralForCausalLM", SMOOTHQUANT_LLAMA)
    for name in linear_names(executed):
        assert gap(weight(executed, name).detach(), weight(acted, name).detach()) < 1e-6
    _, acted, executed = pair("LlamaForCausalLM", SMOOTHQUANT_LLAMA)
    seen = capture(executed, STREAM, samples=1, length=32)
    told = capture(acted, STREAM, samples=1, length=32)
    name = "model.layers.1.self_attn.o_proj"
    assert torch.allclose(seen.absmax(name), told.absmax(name), rtol=0.05)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (ZEROQUANT, r"weight=PerGroup\(size=64\)"),
        (Scheme(PerTensor(), PerChannel(), static=True), "PerTensor\\(\\) or PerToken"),
        (Scheme(symmetric=False), "zero points"),
        (Scheme(bits=4), "bits=4"),
        (Scheme(activation=None), "activation=None"),
        (Scheme(PerTensor(), PerGroup(8)), "PerGroup"),
    ],
)
def test_schemes_that_integers_cannot_compute_are_refused(scheme, words):
    lm = tiny("LlamaForCausalLM")
    magnitudes = capture(lm, STREAM, samples=1, length=32)
    with pytest.raises(SqvizError, match=words):
        quantize(lm, scheme, magnitudes, backend="auto")


def test_other_bad_input_is_told():
    lm = tiny("LlamaForCausalLM")
    with pytest.raises(SqvizError, match="there are 'simulate', 'auto', 'vnni'"):
        quantize(lm, SMOOTHQUANT_O1, backend="vnnii")
    missing = next((name for name, why in backends().items() if why), None)
    if missing:
        with pytest.raises((Unavailable, SqvizError), match=missing):
            quantize(lm, SMOOTHQUANT_O1, backend=missing)
    executed = quantize(lm, SMOOTHQUANT_O1, backend="auto")
    with pytest.raises(SqvizError, match="quantised already"):
        quantize(executed, SMOOTHQUANT_O1, backend="auto")
    with pytest.raises(SqvizError, match="head=True"):
        quantize(lm, SMOOTHQUANT_O1, head=True)
    with pytest.raises(SqvizError, match="packed for cpu"):
        executed.model.to("meta")
    with pytest.raises(SqvizError, match="CPU"):
        executed.model.get_submodule("model.layers.0.self_attn.o_proj")(torch.ones(1, 48, device="meta"))


def test_a_conversion_leaves_codes_and_steps_alone():
    _, _, executed = pair("LlamaForCausalLM", SMOOTHQUANT_LLAMA)
    linear = executed.model.get_submodule("model.layers.0.self_attn.o_proj")
    before = linear.product.step.clone()
    linear.to(torch.bfloat16)
    assert torch.equal(linear.product.step, before)
    x = torch.randn(3, 48)
    assert linear(x.bfloat16()).dtype == torch.bfloat16


def test_a_nan_is_refused_and_the_model_survives():
    _, _, executed = pair("LlamaForCausalLM", SMOOTHQUANT_LLAMA)
    before = logits(executed)
    embedded = torch.randn(1, 5, 48)
    embedded[0, 3, 7] = torch.nan
    with pytest.raises(NonFinite, match="NaN"), torch.no_grad():
        executed.model(inputs_embeds=embedded)
    assert torch.equal(logits(executed), before)

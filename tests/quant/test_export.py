"""Exported folders: what others read out of them is the model; codes are those of `quantize`; whole or not at all."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import sqviz
from sqviz.errors import Cancelled, NonFinite, NoSuchLayer, SqvizError
from sqviz.models.linears import groups, linear_names
from sqviz.models.load import load, wrap
from sqviz.models.tiny import TINY, tiny
from sqviz.observe.capture import capture
from sqviz.progress import CancelToken
from sqviz.quant import folder as folders
from sqviz.quant import shards
from sqviz.quant.alpha import search_alpha
from sqviz.quant.clipping import ClipTokens, LeastError
from sqviz.quant.export import export
from sqviz.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from sqviz.quant.kept_sinks import keep_sinks
from sqviz.quant.linear import quantize
from sqviz.quant.non_scaling_norm import non_scaling_norms
from sqviz.quant.recipe import scales_hash
from sqviz.quant.schemes import (
    LLM_INT8,
    SMOOTHQUANT_LLAMA,
    SMOOTHQUANT_O1,
    SMOOTHQUANT_O2,
    SMOOTHQUANT_O3,
    W8A8,
    ZEROQUANT,
    Scheme,
)
from sqviz.quant.shards import Piece, parse_size
from sqviz.quant.simulated import InputQuantizer
from sqviz.quant.smooth import smooth

IDS = torch.randint(3, 131, (2, 40), generator=torch.Generator().manual_seed(5))
STREAM = torch.randint(3, 131, (400,), generator=torch.Generator().manual_seed(6))
MIXTURES = ("MixtralForCausalLM", "DeepseekV2ForCausalLM")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def measured(lm):
    return capture(lm, STREAM, samples=4, length=64, progress=False)


def tensors_in(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return found


def config_in(folder):
    return json.loads((folder / "config.json").read_text())


def by_transformers(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def state(lm):
    """All that a change of the model would show in."""
    tensors = {name: (id(t), t.dtype, t.clone()) for name, t in lm.model.named_parameters(remove_duplicate=False)}
    return tensors, dict(lm.model.config.to_dict()), [sorted(vars(module)) for module in lm.model.modules()]


def same(before, after):
    names, other = before[0], after[0]
    assert names.keys() == other.keys()
    assert all(names[n][:2] == other[n][:2] and torch.equal(names[n][2], other[n][2]) for n in names)
    assert before[1:] == after[1:]


# --- floating point


@pytest.mark.parametrize("name", TINY)
def test_the_folder_is_what_save_pretrained_writes_and_computes_the_same(name, tmp_path):
    lm = tiny(name)
    before = state(lm)
    written = export(lm, tmp_path / "ours")
    same(before, state(lm))
    lm.model.save_pretrained(tmp_path / "theirs")
    ours, theirs = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) and ours[n].dtype == theirs[n].dtype for n in ours)
    assert config_in(tmp_path / "ours") == config_in(tmp_path / "theirs")
    assert torch.equal(logits(by_transformers(written.folder)), logits(lm.model))
    assert torch.equal(logits(load(written).model), logits(lm.model))


@pytest.mark.parametrize("name", ["LlamaForCausalLM/tied-bias", "OPTForCausalLM", "MixtralForCausalLM"])
def test_a_smoothed_model_in_sixteen_bits(name, tmp_path):
    original = tiny(name)
    lm = smooth(original, measured(original), 0.6, folds="all")
    before = state(lm)
    written = export(lm, tmp_path / "model", dtype="bfloat16")
    same(before, state(lm))
    assert lm.dtype == torch.float32
    assert written.dtype == config_in(written.folder)["dtype"] == "bfloat16"
    exact = {n: t.bfloat16() for n, t in tensors_in(export(lm, tmp_path / "exact").folder).items()}
    rounded = tensors_in(written.folder)
    assert rounded.keys() == exact.keys()
    assert all(torch.equal(rounded[n], exact[n]) for n in exact)
    converted = by_transformers(tmp_path / "exact", dtype=torch.bfloat16)
    assert torch.equal(logits(by_transformers(written.folder)), logits(converted))
    assert load(written, dtype="bfloat16").dtype == torch.bfloat16


def test_the_dtype_of_the_model_stays_unless_asked(tmp_path):
    lm = tiny("LlamaForCausalLM", dtype=torch.bfloat16)
    assert export(lm, tmp_path / "a").dtype == "bfloat16"
    assert {t.dtype for t in tensors_in(tmp_path / "a").values()} == {torch.bfloat16}
    assert export(lm, tmp_path / "b", dtype=torch.float32).dtype == "float32"
    assert {t.dtype for t in tensors_in(tmp_path / "b").values()} == {torch.float32}


def test_norms_without_gain_and_trained_models_are_ordinary(tmp_path):
    lm = non_scaling_norms(tiny("OPTForCausalLM"))
    assert torch.equal(logits(by_transformers(export(lm, tmp_path / "a").folder)), logits(lm.model))
    training = tiny("LlamaForCausalLM").model.train()
    lm = wrap(training)
    assert torch.equal(logits(by_transformers(export(lm, tmp_path / "b").folder)), logits(lm.model))
    assert training.training


def test_tied_embeddings_stand_there_once(tmp_path):
    folder = export(tiny("LlamaForCausalLM/tied-bias"), tmp_path / "model").folder
    assert not any("lm_head" in name for name in tensors_in(folder))
    model = by_transformers(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tokenizer_and_generation_configuration_come_along(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<s>": 0, "fox": 1, "dog": 2}, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    lm = tiny("LlamaForCausalLM").replace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<s>"))
    lm.model.generation_config = GenerationConfig(do_sample=True, top_k=7)
    folder = export(lm, tmp_path / "model").folder
    assert AutoTokenizer.from_pretrained(folder)("dog fox").input_ids == [2, 1]
    assert GenerationConfig.from_pretrained(folder).top_k == 7
    assert load(folder).tokenizer("fox").input_ids == [1]
    lm.model.generation_config = GenerationConfig(do_sample=False)
    lm.model.generation_config.temperature = 0.3
    with pytest.raises(SqvizError, match=r"generation_config right.*temperature"):
        export(lm, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_values_beyond_float16_are_refused(tmp_path):
    lm = tiny("LlamaForCausalLM")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.up_proj.weight[3, 4] = -1e5
    with pytest.raises(SqvizError, match=r"layers.1.mlp.up_proj.weight reaches 1e\+05.*bfloat16"):
        export(lm, tmp_path / "model", dtype="float16")
    assert not list(tmp_path.iterdir())
    export(lm, tmp_path / "model", dtype="bfloat16")


# --- models that no checkpoint can hold


def test_what_is_not_ordinary_is_refused_with_the_fix(tmp_path):
    lm = tiny("OPTForCausalLM/gelu")
    online = smooth(lm, measured(lm), 0.5, folds="all", online=True)
    with pytest.raises(SqvizError, match=r"layers.0.fc2, .*layers.1.fc2 divide.*online=True.*folds='all'"):
        export(online, tmp_path / "a")
    with pytest.raises(SqvizError, match="divide"):
        export(online, tmp_path / "a", scheme=SMOOTHQUANT_O1)
    llama = tiny("LlamaForCausalLM")
    for quantised in (
        quantize(llama, SMOOTHQUANT_LLAMA),
        quantize(llama, SMOOTHQUANT_LLAMA, backend="auto"),
        quantize(tiny("MixtralForCausalLM"), SMOOTHQUANT_LLAMA),
        quantize(llama, SMOOTHQUANT_LLAMA, skip="*", attention=True),
    ):
        with pytest.raises(SqvizError, match=r"quantised already.*save_int8"):
            export(quantised, tmp_path / "a")
    with pytest.raises(SqvizError, match="keeps sinks"):
        export(keep_sinks(llama, [5]), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_model_unlike_its_configuration_is_refused(tmp_path):
    lm = tiny("LlamaForCausalLM")
    lm.model.model.layers[0].mlp.register_parameter("extra", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(SqvizError, match=r"mlp.extra is \(3,\) and would be missing"):
        export(lm, tmp_path / "a")
    lm = tiny("LlamaForCausalLM")
    lm.model.config.intermediate_size = 51
    with pytest.raises(SqvizError, match=r"down_proj.weight is \(48, 53\) and would be \(48, 51\)"):
        export(lm, tmp_path / "a")
    lm = tiny("LlamaForCausalLM")
    lm.model.model.layers[1].mlp.up_proj.weight = lm.model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(SqvizError, match="one tensor though the configuration does not tie"):
        export(lm, tmp_path / "a")
    lm = tiny("LlamaForCausalLM")
    lm.model.model.layers[0].mlp.to("meta")
    with pytest.raises(SqvizError, match="not in memory"):
        export(lm, tmp_path / "a")
    assert not list(tmp_path.iterdir())


# --- compressed-tensors: what stands in the files


def slow_codes(matrix, per_channel):
    """Equation 3.1, element by element over rows."""
    rows = [row.tolist() for row in matrix.double()]
    every = max(abs(value) for row in rows for value in row)
    codes, steps = [], []
    for row in rows:
        most = max(map(abs, row)) if per_channel else every
        step = torch.tensor(most, dtype=torch.float32) / 127
        codes.append([round(float(torch.tensor(value, dtype=torch.float32) / step)) for value in row])
        steps.append([float(step)])
    return torch.tensor(codes, dtype=torch.int8), torch.tensor(steps if per_channel else steps[0])


@pytest.mark.parametrize("scheme", [SMOOTHQUANT_LLAMA, SMOOTHQUANT_O3], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("name", ["LlamaForCausalLM/tied-bias", "GPTNeoXForCausalLM", "Phi3ForCausalLM"])
def test_codes_and_steps_by_hand(name, scheme, tmp_path):
    lm = tiny(name)
    magnitudes = measured(lm)
    written = export(lm, tmp_path / "model", scheme=scheme, magnitudes=magnitudes)
    assert written.quantised == linear_names(lm)
    found = tensors_in(written.folder)
    for linear_name in linear_names(lm):
        codes, steps = slow_codes(lm.model.get_submodule(linear_name).weight, isinstance(scheme.weight, PerChannel))
        assert torch.equal(found.pop(f"{linear_name}.weight"), codes)
        assert torch.equal(found.pop(f"{linear_name}.weight_scale"), steps)
        if scheme.static:
            largest = float(magnitudes.inputs[linear_name].absmax.max())
            assert torch.equal(found.pop(f"{linear_name}.input_scale"), torch.tensor([largest]) / 127)
    rest = {n: t for n, t in tensors_in(export(lm, tmp_path / "floats").folder).items() if n in found}
    assert found.keys() == rest.keys()  # nothing else was added, and the rest is as it was
    assert all(torch.equal(found[n], rest[n]) for n in rest)


@pytest.mark.parametrize(
    "scheme",
    [
        SMOOTHQUANT_LLAMA,
        SMOOTHQUANT_O1,
        SMOOTHQUANT_O2,
        SMOOTHQUANT_O3,
        W8A8,
        Scheme(PerChannel(), PerTensor(), static=True, clip=ClipTokens(0.05), weight_clip=LeastError()),
        Scheme(PerTensor(), PerTensor(), static=True, clip=LeastError()),
    ],
    ids=repr,
)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "OPTForCausalLM"])
def test_codes_are_those_of_quantize(name, scheme, tmp_path):
    original = tiny(name)
    lm = smooth(original, measured(original), 0.5, folds="all")
    magnitudes, skip = measured(lm), ["*.0.*.v_proj", "*.0.*.[qk]_proj"]
    before = state(lm)
    written = export(lm, tmp_path / "model", scheme=scheme, magnitudes=magnitudes, skip=skip)
    same(before, state(lm))
    found = tensors_in(written.folder)
    simulated = quantize(lm, scheme, magnitudes, skip=skip)
    for linear_name in linear_names(lm):
        module = simulated.model.get_submodule(linear_name)
        stored = found[f"{linear_name}.weight"]
        assert (stored.dtype == torch.int8) == (linear_name in written.quantised) == hasattr(module, "quantizer")
        if linear_name not in written.quantised:
            assert torch.equal(stored, module.weight)
            assert linear_name in config_in(written.folder)["quantization_config"]["ignore"]
            continue
        assert torch.equal(stored * found[f"{linear_name}.weight_scale"], module.weight)
        if scheme.static:
            assert float(found[f"{linear_name}.input_scale"]) == float(module.quantizer.step)
    executed = quantize(lm, scheme, magnitudes, backend="auto", skip=skip)
    for linear_name in written.quantised:
        module = executed.model.get_submodule(linear_name)
        assert torch.equal(module.product.codes()[module.start : module.stop], found[f"{linear_name}.weight"])


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_stand_there_one_by_one(name, tmp_path):
    lm = tiny(name)
    written = export(lm, tmp_path / "model", scheme=SMOOTHQUANT_LLAMA, dtype="bfloat16")
    assert "transformers does not" in repr(written)
    found = tensors_in(written.folder)
    path, (gate, up, down) = {
        "MixtralForCausalLM": ("model.layers.1.block_sparse_moe", ("w1", "w3", "w2")),
        "DeepseekV2ForCausalLM": ("model.layers.1.mlp", ("gate_proj", "up_proj", "down_proj")),
    }[name]
    fused = lm.model.model.layers[1].mlp.experts
    for expert in range(5):
        gates, ups = fused.gate_up_proj[expert].chunk(2)
        for leaf, matrix in ((gate, gates), (up, ups), (down, fused.down_proj[expert])):
            codes, steps = slow_codes(matrix, per_channel=True)
            assert torch.equal(found[f"{path}.experts.{expert}.{leaf}.weight"], codes)
            assert torch.equal(found[f"{path}.experts.{expert}.{leaf}.weight_scale"], steps)
    ignored = config_in(written.folder)["quantization_config"]["ignore"]
    assert found[f"{path}.gate.weight"].dtype == torch.bfloat16  # the router
    assert {f"{path}.gate", "lm_head"} <= set(ignored)
    assert not any("experts." in entry for entry in ignored)


def test_experts_in_other_schemes_are_refused_or_left_out(tmp_path):
    lm = tiny("MixtralForCausalLM")
    with pytest.raises(SqvizError, match=r"gate_up_proj.*weight=PerChannel\(\).*SMOOTHQUANT_LLAMA.*mlp.experts.\*"):
        export(lm, tmp_path / "model", scheme=SMOOTHQUANT_O1)
    assert not list(tmp_path.iterdir())
    written = export(lm, tmp_path / "model", scheme=SMOOTHQUANT_O1, skip="*.experts.*")
    found, config = tensors_in(written.folder), config_in(written.folder)["quantization_config"]
    assert {n.rpartition(".")[2] for n in written.quantised} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for expert in range(5):
        for leaf in ("w1", "w2", "w3"):
            path = f"model.layers.1.block_sparse_moe.experts.{expert}.{leaf}"
            assert found[f"{path}.weight"].dtype == torch.float32
            assert path in config["ignore"]


def test_the_configuration_says_what_is_quantised_and_how(tmp_path):
    config = config_in(export(tiny("GPTNeoXForCausalLM"), tmp_path / "a", scheme=SMOOTHQUANT_O1).folder)
    said = config["quantization_config"]
    assert (said["quant_method"], said["format"]) == ("compressed-tensors", "int-quantized")
    assert set(said["ignore"]) == {"lm_head", "embed_out"}  # transformers' name, and the one in the files
    assert config["architectures"] == ["GPTNeoXForCausalLM"]
    lm = tiny("OPTForCausalLM/post-ln")
    for index, (scheme, weights, inputs, dynamic) in enumerate(
        [
            (SMOOTHQUANT_LLAMA, "channel", "token", True),
            (SMOOTHQUANT_O1, "tensor", "token", True),
            (SMOOTHQUANT_O2, "tensor", "tensor", True),
            (SMOOTHQUANT_O3, "tensor", "tensor", False),
        ]
    ):
        written = export(lm, tmp_path / f"{index}", scheme=scheme, magnitudes=measured(lm))
        group = config_in(written.folder)["quantization_config"]["config_groups"]["group_0"]
        plain = {"num_bits": 8, "type": "int", "symmetric": True}
        assert group["targets"] == ["Linear"]
        assert group["weights"] == {**plain, "strategy": weights, "dynamic": False}
        assert group["input_activations"] == {**plain, "strategy": inputs, "dynamic": dynamic}
        assert any("vLLM" in note for note in written.notes) == (scheme is SMOOTHQUANT_O2)
        ignored = config_in(written.folder)["quantization_config"]["ignore"]
        assert {"model.decoder.project_in", "model.decoder.project_out", "lm_head"} == set(ignored)


def test_part_of_what_vllm_fuses_is_noted(tmp_path):
    written = export(tiny("LlamaForCausalLM"), tmp_path / "a", scheme=SMOOTHQUANT_LLAMA, skip="*.1.*.up_proj")
    assert "gate_proj + up_proj as one product" in written.notes[0]
    assert not export(tiny("LlamaForCausalLM"), tmp_path / "b", scheme=SMOOTHQUANT_LLAMA, skip="*.down_proj").notes


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_step_is_zero(dtype, tmp_path):
    lm = tiny("OPTForCausalLM")
    layer = lm.model.model.decoder.layers[0]
    with torch.no_grad():
        layer.self_attn.q_proj.weight[5] = 0
        layer.fc1.weight.zero_()
        layer.fc1.bias.fill_(-1)  # after relu nothing arrives at fc2
        layer.fc2.weight.mul_(1e-7)
    written = export(lm, tmp_path / "model", scheme=SMOOTHQUANT_O3, magnitudes=measured(lm), dtype=dtype)
    found = tensors_in(written.folder)
    for name, scale in found.items():
        if name.endswith("_scale"):
            assert float(scale.min()) > 0, name
    assert not found["model.decoder.layers.0.fc1.weight"].any()
    assert float(found["model.decoder.layers.0.fc2.weight_scale"]) == float(layer.fc2.weight.detach().abs().max() / 127)
    assert float(found["model.decoder.layers.0.fc2.input_scale"]) == torch.finfo(getattr(torch, dtype)).tiny


@pytest.mark.parametrize(
    ("scheme", "match"),
    [
        (ZEROQUANT, r"weight=PerGroup\(size=64\): PerTensor\(\) or PerChannel\(\)"),
        (Scheme(weight=None), "weight=None"),
        (Scheme(activation=None), "activation=None"),
        (Scheme(activation=PerChannel()), r"activation=PerChannel\(\): PerToken\(\) or PerTensor\(\)"),
        (Scheme(activation=PerGroup(16)), "activation=PerGroup"),
        (Scheme(bits=4), "bits=4: 8 is needed"),
        (Scheme(weight_bits=4), "weight_bits=4: 8 is needed"),
        (Scheme(PerChannel(), PerToken(), symmetric=False), "symmetric=True is needed"),
        (LLM_INT8, "outliers=None is needed"),
        (Scheme(PerTensor(), PerTensor(), clip=LeastError()), r"clip=LeastError\(\): .* static=True or clip=None"),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_schemes_without_a_place_are_refused(scheme, match, tmp_path):
    with pytest.raises(SqvizError, match=match) as told:
        export(tiny("LlamaForCausalLM"), tmp_path / "model", scheme=scheme)
    assert "SMOOTHQUANT_LLAMA" in str(told.value)
    assert not list(tmp_path.iterdir())


def test_linears_without_a_place_are_refused(tmp_path):
    with pytest.raises(SqvizError, match=r"c_attn is a Conv1D.*\[channel out\].*save_int8"):
        export(tiny("GPT2LMHeadModel"), tmp_path / "a", scheme=SMOOTHQUANT_LLAMA)
    lm = tiny("LlamaForCausalLM")

    class Louder(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    lm.model.model.layers[0].mlp.up_proj.__class__ = Louder
    with pytest.raises(SqvizError, match=r"up_proj is a Louder.*skip=\['model.layers.0.mlp.up_proj'\]"):
        export(lm, tmp_path / "a", scheme=SMOOTHQUANT_LLAMA)
    with pytest.raises(NoSuchLayer, match="nothing_like_it"):
        export(tiny("LlamaForCausalLM"), tmp_path / "a", scheme=SMOOTHQUANT_LLAMA, skip="*.nothing_like_it")
    with pytest.raises(SqvizError, match="leaves nothing to quantise"):
        export(tiny("LlamaForCausalLM"), tmp_path / "a", scheme=SMOOTHQUANT_LLAMA, skip="*")
    with pytest.raises(SqvizError, match="Give the magnitudes"):
        export(tiny("LlamaForCausalLM"), tmp_path / "a", scheme=SMOOTHQUANT_O3)
    opt = tiny("OPTForCausalLM")
    with pytest.raises(SqvizError, match="another model"):
        export(tiny("LlamaForCausalLM"), tmp_path / "a", scheme=SMOOTHQUANT_O3, magnitudes=measured(opt))
    lm = tiny("LlamaForCausalLM")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(NonFinite, match=r"layers.1.mlp.down_proj"):
        export(lm, tmp_path / "a", scheme=SMOOTHQUANT_LLAMA)
    assert not list(tmp_path.iterdir())


# --- compressed-tensors: what transformers makes of it


def act_like_compressed_tensors(lm, scheme):
    """Give a simulated model the rounding of inputs that compressed-tensors 0.20 has: other steps, codes from −128."""

    def forward(x, quantizer):
        if quantizer.step is not None:
            step = quantizer.step.reshape(())
        elif isinstance(scheme.activation, PerToken) and x.ndim > 2:
            step = x.abs().amax(-1, keepdim=True) / 127.5
        else:  # two dimensions count as batch and token, so one step is left
            step = x.abs().amax() / 127.5
        return (x / step).round().clamp(-128, 127) * step

    for quantizer in lm.model.modules():
        if isinstance(quantizer, InputQuantizer):
            quantizer.forward = lambda x, quantizer=quantizer: forward(x, quantizer)
    return lm


READ = [
    "LlamaForCausalLM/tied-bias",
    "OPTForCausalLM",
    "OPTForCausalLM/post-ln",
    "GPTNeoXForCausalLM",
    "BloomForCausalLM",
    "Phi3ForCausalLM",
    "Gemma2ForCausalLM",
]


@pytest.mark.parametrize(
    "scheme", [SMOOTHQUANT_LLAMA, SMOOTHQUANT_O1, SMOOTHQUANT_O2, SMOOTHQUANT_O3], ids=lambda scheme: scheme.name
)
@pytest.mark.parametrize("name", READ)
def test_transformers_computes_the_quantised_model(name, scheme, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    original = tiny(name)
    lm = original if "post-ln" in name else smooth(original, measured(original), 0.5, folds="all")
    magnitudes = measured(lm)
    model = by_transformers(export(lm, tmp_path / "model", scheme=scheme, magnitudes=magnitudes).folder)
    got = logits(model)
    simulated = quantize(lm, scheme, magnitudes)
    for linear_name in linear_names(lm):
        assert torch.equal(model.get_submodule(linear_name).weight, simulated.model.get_submodule(linear_name).weight)
    ours = logits(simulated.model)
    expected = logits(act_like_compressed_tensors(simulated, scheme).model)
    assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max()))
    if not (isinstance(scheme.activation, PerToken) and "OPT" in name):  # its MLP hands over tokens without a batch
        error = float((ours - logits(lm.model)).norm())
        assert float((got - ours).norm()) < 2 * error  # two roundings, each as far from the floats


def test_transformers_reads_sixteen_bits_and_skipped_linears(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    lm, skip = tiny("LlamaForCausalLM"), "*.down_proj"
    magnitudes = measured(lm)
    folder = export(
        lm, tmp_path / "a", scheme=SMOOTHQUANT_O3, magnitudes=magnitudes, skip=skip, dtype="bfloat16"
    ).folder
    model = by_transformers(folder)
    got = logits(model)
    assert got.dtype == torch.bfloat16
    assert torch.equal(
        model.model.layers[0].mlp.down_proj.weight, lm.model.model.layers[0].mlp.down_proj.weight.bfloat16()
    )
    simulated = quantize(lm, SMOOTHQUANT_O3, magnitudes, skip=skip)
    for linear_name in linear_names(lm):
        exact = simulated.model.get_submodule(linear_name).weight
        read = model.get_submodule(linear_name).weight.float()
        assert torch.allclose(read, exact, rtol=2**-6, atol=0), linear_name  # codes · step, both rounded to 8 bits


# --- files


def test_files_of_limited_size_hold_the_same(tmp_path, monkeypatch):
    lm = tiny("MixtralForCausalLM")
    whole = tensors_in(export(lm, tmp_path / "whole").folder)
    held = []
    write = shards.write_tensors

    def noted(tensors, metadata, path):
        held.append(sum(t.nbytes for t in tensors.values()) if len(tensors) > 1 else 0)
        write(tensors, metadata, path)

    monkeypatch.setattr(shards, "write_tensors", noted)
    written = export(lm, tmp_path / "parts", max_shard_size="20KB")
    files = [name for name in written.files if name.endswith(".safetensors")]
    assert len(files) == len(held) > 5
    assert max(held) <= 20_000
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    parts = tensors_in(written.folder)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[n], whole[n]) for n in whole)
    index = json.loads((written.folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    assert torch.equal(logits(by_transformers(written.folder)), logits(lm.model))
    assert torch.equal(logits(load(written.folder).model), logits(lm.model))
    assert written.bytes == sum(path.stat().st_size for path in written.folder.iterdir())


@given(st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=1, max_size=12), st.integers(1, 60))
def test_tensors_are_split_in_order_and_within_the_limit(sizes, largest):
    named = [{f"{i}.{j}": size for j, size in enumerate(some)} for i, some in enumerate(sizes)]
    files = list(shards._split([Piece(piece, dict) for piece in named], largest))
    size = {name: bytes for piece in named for name, bytes in piece.items()}
    assert [name for file in files for name in file] == list(size)
    for file, following in zip(files, [*files[1:], None], strict=True):
        assert len(file) == 1 or sum(size[name] for name in file) <= largest
        if following:
            assert sum(size[name] for name in file) + size[following[0]] > largest


@given(st.integers(1, 9999), st.sampled_from([("", 1), ("KB", 1000), ("mb", 10**6), (" GiB", 2**30), ("MiB", 2**20)]))
def test_sizes_are_read(number, unit):
    size = number if not unit[0] else f"{number}{unit[0]}"
    assert parse_size(size) == number * unit[1]


@pytest.mark.parametrize("size", [0, -1, True, None, "", "5", "5TB", "GB", "0MB", "-1GB", 2.5])
def test_sizes_that_are_none(size):
    with pytest.raises(SqvizError, match=r"max_shard_size=.*'5GB'"):
        parse_size(size)


# --- whole or not at all


def test_what_is_there_stays(tmp_path):
    lm = tiny("LlamaForCausalLM")
    (tmp_path / "model").mkdir()
    folder = export(lm, tmp_path / "model").folder  # empty folders are taken
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SqvizError, match=r"there already.*another folder"):
        export(lm, folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(SqvizError, match="there already"):
        export(lm, tmp_path / "file")
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


@pytest.mark.parametrize("failing", [1, 3])
def test_a_failed_write_leaves_nothing(failing, tmp_path, monkeypatch):
    write, calls = shards.write_tensors, []

    def full(tensors, metadata, path):
        calls.append(path)
        if len(calls) == failing:
            raise OSError("no space left")
        write(tensors, metadata, path)

    monkeypatch.setattr(shards, "write_tensors", full)
    with pytest.raises(OSError, match="no space"):
        export(tiny("LlamaForCausalLM"), tmp_path / "deep" / "er" / "model", max_shard_size="20KB")
    assert len(calls) == failing
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    calls.clear()
    with pytest.raises(OSError, match="no space"):
        export(tiny("LlamaForCausalLM"), tmp_path / "model", max_shard_size="20KB")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not list((tmp_path / "model").iterdir())


def test_cancelled_between_two_tensors(tmp_path, monkeypatch):
    token, write = CancelToken(), shards.write_tensors
    monkeypatch.setattr(shards, "write_tensors", lambda *given: (write(*given), token.cancel()))
    with pytest.raises(Cancelled):
        export(tiny("LlamaForCausalLM"), tmp_path / "a", max_shard_size="20KB", cancel=token)
    with pytest.raises(Cancelled):
        export(tiny("LlamaForCausalLM"), tmp_path / "a", scheme=SMOOTHQUANT_LLAMA, cancel=token)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="no process can be killed like this, and no folder locked")
def test_what_a_killed_process_leaves_goes_with_the_next(tmp_path):
    """kill -9 in the middle of the second file: no folder of that name; the next export takes the leftovers away."""
    killed = """
import os, sys
from sqviz.models.tiny import tiny
from sqviz.quant import shards
from sqviz.quant.export import export
write = shards.write_tensors
def write_tensors(tensors, metadata, path):
    if "00002" in path.name:
        path.write_bytes(b"half of it")
        os.kill(os.getpid(), 9)
    write(tensors, metadata, path)
shards.write_tensors = write_tensors
export(tiny("LlamaForCausalLM"), sys.argv[1], max_shard_size="20KB")
"""
    target = tmp_path / "model [1]"
    assert subprocess.run([sys.executable, "-c", killed, str(target)], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".model [1].")
    assert not target.exists()
    lm = tiny("LlamaForCausalLM")
    with folders.filled(target), folders.filled(tmp_path / "model"):  # one is being written, and is left alone
        running = {path.name for path in tmp_path.iterdir()}
        assert len(running) == 2
        assert left.name not in running
        with folders.filled(target.with_name("other")):
            assert running < {path.name for path in tmp_path.iterdir()}
        folders._clear_abandoned(target)
        assert running == {path.name for path in tmp_path.iterdir() if path.name.startswith(".")}
    shutil.rmtree(target)
    (tmp_path / ".model [1].mine").mkdir()
    export(lm, target)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model [1]", "other", ".model [1].mine"}


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(SqvizError, match=r"has 1 MB free, and model takes 20 MB.*another disk"):
        export(tiny("LlamaForCausalLM"), tmp_path / "new" / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"format": "gguf"}, "format='gguf': 'smoothed' or 'compressed-tensors'"),
        ({"format": "compressed-tensors"}, "needs a scheme"),
        ({"format": "smoothed", "scheme": SMOOTHQUANT_LLAMA}, "leave scheme out"),
        ({"skip": "*.down_proj"}, "goes with a scheme"),
        ({"scheme": "o1"}, "a sqviz.Scheme is needed"),
        ({"dtype": "int8"}, "dtype='int8' is not one of"),
        ({"max_shard_size": "big"}, "max_shard_size='big'"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(arguments, match, tmp_path):
    with pytest.raises(SqvizError, match=match):
        export(tiny("LlamaForCausalLM"), tmp_path / "model", **arguments)
    assert not list(tmp_path.iterdir())


# --- the recipe


def test_the_recipe_says_how_it_came_about(tmp_path):
    original = tiny("LlamaForCausalLM")
    magnitudes = measured(original)
    lm = smooth(original, magnitudes, 0.6, folds="all")
    written = export(lm, tmp_path / "model", scheme=SMOOTHQUANT_O3, magnitudes=magnitudes, skip="*.0.*.down_proj")
    recipe = json.loads((written.folder / "sqviz.json").read_text())
    assert eval(recipe["scheme"]) == SMOOTHQUANT_O3
    assert recipe["note"] == "smoothed α=0.6 with linear folds"
    assert recipe["versions"] == {
        "sqviz": sqviz.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": __import__("transformers").__version__,
    }
    assert "Guangxuan Xiao" in recipe["reference"]
    assert recipe["model"] == "tiny/LlamaForCausalLM"
    assert recipe["quantised"] == len(written.quantised) == 13
    assert "model.layers.0.mlp.down_proj" in recipe["ignored"]
    raw = b"".join(int(token).to_bytes(8, "little") for token in STREAM[:256])
    found = recipe["calibration"]
    assert found.pop("tokens_sha256") == hashlib.sha256(raw).hexdigest()
    assert found == {"model": "tiny/LlamaForCausalLM", "samples": 4, "length": 64}
    assert recipe["history"] == [
        {
            "did": "smooth",
            "alpha": 0.6,
            "folds": "all",
            "online": False,
            "calibration": found | {"tokens_sha256": hashlib.sha256(raw).hexdigest()},
            "search": None,
        }
    ]
    with safe_open(written.folder / "model.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["sqviz"])["scheme"] == recipe["scheme"]
        assert file.metadata()["format"] == "pt"


def test_strengths_in_a_recipe_do_the_same_again(tmp_path):
    """However α was given, what the recipe holds makes the same model; what was searched says so."""
    original = tiny("LlamaForCausalLM")
    magnitudes = capture(original, STREAM, samples=7, length=48, progress=False)
    found = search_alpha(original, magnitudes, SMOOTHQUANT_O3, objective="layer", progress=False)
    ways = {
        "number": 0.3,
        "by pattern": {"*": 0.4, "*.1.*": None, "*.1.mlp.gate_proj": 0.7},
        "by group": lambda group: None if ".0.mlp" in group.name else 0.8,
        "searched": found,
    }
    for name, alpha in ways.items():
        lm = smooth(non_scaling_norms(original) if name == "number" else original, magnitudes, alpha)
        recipe = json.loads((export(lm, tmp_path / name).folder / "sqviz.json").read_text())
        assert recipe["history"] == json.loads(json.dumps(lm.history))
        step = recipe["history"][-1]
        again = smooth(lm if name == "number" else original, magnitudes, step["alpha"], folds=step["folds"])
        if name == "number":
            assert [one["did"] for one in recipe["history"]] == ["non_scaling_norms", "smooth"]
            assert [one["did"] for one in again.history] == ["non_scaling_norms", "smooth", "smooth"]
            continue
        assert scales_hash(again) == scales_hash(lm) == recipe["smoothing"]["sha256"]
        assert (step["search"] is None) == (name != "searched")
    assert step["search"] == {
        "objective": "layer",
        "scheme": "sqviz.SMOOTHQUANT_O3",
        "model": original.name,
        "tokens_sha256": step["calibration"]["tokens_sha256"],
        "complete": True,
        "tried": {},
    }
    assert set(step["alpha"]) == {group for group, value in found.alphas.items() if value is not None}
    assert step["folds"] == found.folds == "outliers"


def test_the_hash_tells_smoothings_apart(tmp_path):
    def smoothing(lm, name):
        return json.loads((export(lm, tmp_path / name).folder / "sqviz.json").read_text())["smoothing"]

    original = tiny("LlamaForCausalLM")
    magnitudes = measured(original)
    assert smoothing(original, "none") is None
    first = smoothing(smooth(original, magnitudes, 0.5), "a")
    assert first == smoothing(smooth(original, magnitudes, 0.5), "b")
    assert first["linears"] == sum(len(group.consumers) for group in groups(original) if group.entry) == 10
    assert first["sha256"] != smoothing(smooth(original, magnitudes, 0.51), "c")["sha256"]


def test_what_is_printed(tmp_path):
    written = export(tiny("LlamaForCausalLM"), tmp_path / "model", scheme=W8A8, dtype="bfloat16")
    head, note = repr(written).splitlines()
    assert head.startswith(f"{tmp_path / 'model'}: compressed-tensors, 14 linears in INT8, the rest in bfloat16, ")
    assert "MB" in head
    assert note.startswith("note: vLLM")
    assert str(written) == str(tmp_path / "model")
    shutil.rmtree(written)

"""Footprints: counted against real models and caches, split against slices, and the thesis's tables on paper."""

import copy
import math

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from sqviz.errors import SqvizError, UnknownArchitecture
from sqviz.evaluation.footprint import fewest_devices, footprint
from sqviz.evaluation.footprint_result import GB, GIB, Footprints
from sqviz.evaluation.kv_bytes import Heads, cache_bytes, cached, heads_of
from sqviz.evaluation.model_cost import _bytes
from sqviz.evaluation.published import PUBLISHED
from sqviz.evaluation.weight_bytes import weights_of
from sqviz.models.linears import experts, groups, linear_names, weight
from sqviz.models.tiny import TINY, tiny
from sqviz.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from sqviz.quant.int8_cache import Int8Cache
from sqviz.quant.linear import is_router, quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA, SMOOTHQUANT_O3, Scheme

PER_ARCHITECTURE = tuple(dict.fromkeys(name.partition("/")[0] for name in TINY))
FUSED = ("LlamaForCausalLM", "OPTForCausalLM", "GPTNeoXForCausalLM", "Qwen2ForCausalLM", "Phi3ForCausalLM")
FUSED += ("GlmForCausalLM", "Gemma3ForCausalLM", "CohereForCausalLM", "MixtralForCausalLM", "PhiForCausalLM/relu")
SCHEMES = (
    Scheme(PerTensor(), PerTensor()),
    Scheme(PerChannel(), PerToken()),
    Scheme(PerGroup(7), PerToken(), weight_bits=3),
    Scheme(PerGroup(7), PerToken(), symmetric=False),
    Scheme(None, PerToken()),
)


def routers(lm):
    return {name for group in groups(lm) for name in group.consumers if is_router(lm, group, name)}


# --- weights, counted ---


@pytest.mark.parametrize("name", TINY)
def test_parameters_are_those_of_the_real_model(name):
    lm = tiny(name)
    found = weights_of(lm.config)
    sizes = {id(parameter): parameter.numel() for parameter in lm.model.parameters()}
    names = [name for name in linear_names(lm) if name not in routers(lm)]
    assert found.parameters == sum(sizes.values())
    assert found.known
    linears = [(linear, count) for linear, count in found.linears if not linear.router]
    assert sum(count * one.copies * one.out * one.channels for one, count in linears) == sum(
        weight(lm, name).numel() for name in names
    )
    table, head = lm.model.get_input_embeddings().weight, lm.model.get_output_embeddings().weight
    assert (found.embedding, found.head) == (table.numel(), 0 if head is table else head.numel())
    shown = footprint(lm, dtype="float32", length=20)
    assert shown.weights == 4 * found.parameters
    assert shown.embeddings == 4 * (found.embedding + found.head)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("name", PER_ARCHITECTURE)
def test_bytes_of_quantised_linears_one_by_one(name, scheme):
    lm = tiny(name)
    bits, steps = 0, 0
    for linear in linear_names(lm):
        if linear in routers(lm):
            continue
        copies = experts(lm, linear) or 1
        for matrix in weight(lm, linear).chunk(copies):
            size = matrix.numel() * (16 if scheme.weight is None else scheme.bits_of_weights)
            bits += 8 * math.ceil(size / 8)
            out, channels = matrix.shape
            each = {PerTensor: 1, PerChannel: out}.get(type(scheme.weight), out * math.ceil(channels / 7))
            steps += 0 if scheme.weight is None else each * (1 if scheme.symmetric else 2)
    found = footprint(lm, scheme, length=20)
    assert (found.linears, found.steps) == (bits // 8, 4 * steps)
    unquantised = footprint(lm, length=20)
    assert (found.rest, found.embeddings) == (unquantised.rest, unquantised.embeddings)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "OPTForCausalLM", "BloomForCausalLM"])
def test_steps_are_those_that_an_executed_model_holds(name):
    lm = tiny(name)
    int8 = quantize(lm, SMOOTHQUANT_LLAMA, backend="auto").model
    held = [buffer.numel() for name, buffer in int8.named_buffers() if name.endswith("product.step")]
    assert footprint(lm, SMOOTHQUANT_LLAMA, length=20).steps == 4 * sum(held)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_an_executed_model_takes_little_more(tied, head):
    """A backend pads its layout and keeps sums of rows, which weigh less the wider the model."""
    wide = {"hidden_size": 384, "intermediate_size": 640, "vocab_size": 256, "num_key_value_heads": 6}
    lm = tiny("LlamaForCausalLM", tie_word_embeddings=tied, **wide)
    held = _bytes(quantize(lm, SMOOTHQUANT_LLAMA, backend="auto", head=head))
    found = footprint(lm, SMOOTHQUANT_LLAMA, length=20, dtype="float32", head=head).weights
    assert found <= held <= 1.05 * found


def test_a_config_of_530_billion_weights_takes_no_memory():
    footprint("opt-6.7b")  # imports
    before = psutil.Process().memory_info().rss
    assert footprint("mt-nlg-530b").parameters == pytest.approx(530e9, rel=0.001)
    assert psutil.Process().memory_info().rss - before < 200e6


# From the titles and papers: rounded names, so to 2 %; GLM calls 128.7 billion 130.
SIZES = {"opt-6.7b": 6.7, "opt-13b": 13, "opt-30b": 30, "opt-66b": 66, "opt-175b": 175, "bloom-176b": 176.2}
SIZES |= {"glm-130b": 130, "mt-nlg-530b": 530, "llama-2-7b": 6.74, "llama-2-70b": 69.0, "deepseek-67b": 67.4}
SIZES |= {"deepseek-v2": 236}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_size(name):
    assert footprint(name).parameters / 1e9 == pytest.approx(SIZES[name], rel=0.02)
    assert PUBLISHED[name].source


# --- keys and values ---


@pytest.mark.parametrize("name", TINY)
def test_keys_and_values_are_those_of_a_real_cache(name):
    """transformers keeps one token less than the window, and repeats keys for Falcon's newer decoder."""
    from transformers import DynamicCache

    lm, ids = tiny(name), torch.randint(3, 131, (3, 20))
    cache = DynamicCache(config=lm.model.config)
    with torch.inference_mode():
        lm.model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    held = sum(states.numel() * states.element_size() for pair in layers for states in pair)
    heads, one_less = heads_of(lm.config), 0
    for layer, (keys, values) in zip(cached(lm.config), layers, strict=True):
        if layer.window is not None:
            one_less += (keys[:, :, :1].numel() + values[:, :, :1].numel()) * 4
            assert keys.shape[2] == layer.window - 1
    repeats = heads.queries // heads.keys if getattr(lm.config, "new_decoder_architecture", False) else 1
    assert repeats * footprint(lm, batch=3, length=20, dtype="float32").cache == held + one_less


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "DeepseekV2ForCausalLM", "FalconForCausalLM/7b"])
def test_int8_keys_and_values_are_those_of_an_int8_cache(name):
    lm, length = tiny(name, max_position_embeddings=300), 256  # all that an Int8Cache has room for at first
    cache = Int8Cache(lm)
    with torch.inference_mode():
        lm.model(input_ids=torch.randint(3, 131, (2, length)), past_key_values=cache, use_cache=True)
    assert footprint(lm, batch=2, length=length, kv_bits=8).cache == cache.bytes


def test_windows_are_capped_and_short_texts_are_not():
    lm = tiny("Gemma2ForCausalLM")  # one layer slides over 7 tokens, one sees all
    token = footprint(lm, length=1).cache
    assert [footprint(lm, length=n).cache for n in (6, 7, 50)] == [6 * token, 7 * token, (50 + 7) * token // 2]


def test_latents_and_what_they_stand_for():
    lm = tiny("DeepseekV2ForCausalLM")
    assert footprint(lm, length=10).cache == 10 * 2 * 2 * (22 + 6)
    assert footprint(lm, length=10, latents=False).cache == 10 * 2 * 2 * 6 * (10 + 6 + 7)


def test_latents_lie_on_every_device_and_heads_do_not():
    lm = tiny("DeepseekV2ForCausalLM")
    for latents, share in ((True, 1), (False, 3)):
        one, three = (footprint(lm, devices=n, length=30, latents=latents).cache for n in (1, 3))
        assert one == share * three


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 24))
def test_a_device_holds_the_heads_that_its_queries_read(groups, group, devices):
    heads = Heads(groups * group, groups, 4, 4)
    if devices not in heads.fitting():
        return
    each = heads.queries // devices
    read = [{query // group for query in range(at * each, (at + 1) * each)} for at in range(devices)]
    assert heads.held(devices) == max(map(len, read))
    assert heads.held(1) == heads.keys


@given(st.integers(1, 3), st.integers(1, 200), st.integers(1, 3), st.integers(1, 50))
def test_a_cache_grows_with_all_that_it_is_given(batch, length, more, tokens):
    config = tiny_config()
    layers, heads = cached(config), heads_of(config)
    one = cache_bytes(layers, heads, batch, length, 16)
    assert cache_bytes(layers, heads, batch * more, length, 16) == more * one
    assert cache_bytes(layers, heads, batch, length + tokens, 16) > one
    assert cache_bytes(layers, heads, batch, length, 8) == one // 2 + batch * length * 2 * 2 * 2 * 4


def tiny_config():
    from transformers import LlamaConfig

    return LlamaConfig(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, num_hidden_layers=2)


# --- tensor parallelism ---


def test_a_device_holds_slices():
    """Llama with 6 heads and 2 key/value heads over 3 devices: queries apart, one or two key/value heads on each."""
    lm = tiny("LlamaForCausalLM")
    held = 0
    for name in linear_names(lm):
        matrix, leaf = weight(lm, name), name.rpartition(".")[2]
        if leaf in ("k_proj", "v_proj"):
            held += matrix.numel()  # the second device's queries, heads 2 and 3, read both
        elif leaf in ("o_proj", "down_proj"):
            held += matrix[:, : math.ceil(matrix.shape[1] / 3)].numel()
        else:
            held += matrix[: math.ceil(matrix.shape[0] / 3)].numel()
    found = footprint(lm, devices=3, length=20)
    whole = footprint(lm, length=20)
    assert found.linears == 2 * held
    assert found.rest == whole.rest
    assert found.embeddings == 2 * 2 * 44 * 48  # 131 tokens over 3
    assert found.cache == whole.cache
    assert found.total == 3 * found.per_device


@pytest.mark.parametrize("name", PER_ARCHITECTURE)
def test_devices_together_hold_all_and_each_holds_less(name):
    whole = footprint(tiny(name), SMOOTHQUANT_O3, length=20)
    for devices in (2, 3, 6):
        found = footprint(tiny(name), SMOOTHQUANT_O3, length=20, devices=devices)
        for part in ("linears", "embeddings", "cache"):
            assert getattr(found, part) <= getattr(whole, part) <= devices * getattr(found, part)
        assert found.rest == whole.rest
        assert found.activations < whole.activations


# --- activations ---


def peak_of_forward(lm, ids):
    """Most bytes that the allocator had given out during a forward pass, logits of the last token."""
    with torch.inference_mode():
        lm.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            lm.model(input_ids=ids, use_cache=False, logits_to_keep=1)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("name", FUSED)
def test_activations_are_those_that_a_forward_pass_takes(name):
    """An MLP four times as wide as the model, as real ones are: at the tiny models' own width attention takes most."""
    wide = {"ffn_dim": 192} if name.startswith("OPT") else {"intermediate_size": 96 if "Mixtral" in name else 192}
    lm = tiny(name, **wide)
    ids = torch.randint(3, 131, (32, 32))
    estimate = footprint(lm, batch=32, length=32, dtype="float32").activations
    assert estimate == pytest.approx(peak_of_forward(lm, ids), rel=0.03)


@pytest.mark.parametrize("name", ["BloomForCausalLM", "GPTJForCausalLM", "MptForCausalLM"])
def test_probabilities_are_most_where_attention_is_not_fused(name):
    """An estimate: transformers computes these step by step, and keeps more of the steps than the formula has."""
    lm, ids = tiny(name), torch.randint(3, 131, (4, 90))
    fused, estimate = (
        footprint(lm, batch=4, length=90, dtype="float32", probabilities=on).activations for on in (False, True)
    )
    assert 3 * fused < peak_of_forward(lm, ids)
    assert estimate <= peak_of_forward(lm, ids) <= 1.6 * estimate


def test_logits_of_all_tokens():
    lm = tiny("LlamaForCausalLM", vocab_size=9000)
    last, every = (footprint(lm, batch=2, length=50, all_logits=on).activations for on in (False, True))
    assert every == 2 * 100 * (4 * 48 + 9000)
    assert last == 2 * (100 * 4 * 48 + 2 * 9000)


# --- the thesis on paper ---

# Table 3.10, MT-NLG 530B: GB of all GPUs by length, 16-bit on 16 GPUs and INT8 on 8. The thesis does not say the batch;
# with the 4 sentences of its other context-stage figures what grows with the length comes to 70 to 80 % of that
# measured, with 8 it would be more.
TABLE_3_10 = {128: (1040, 527), 256: (1054, 533), 512: (1068, 545), 1024: (1095, 570)}

# Table 3.8: GB of a GPU by (batch, length), 16 bit and INT8; None: out of memory.
OPT_30B = {(1, 512): (57, 30), (1, 1024): (58, 31), (16, 512): (69, 44), (16, 1024): (None, 61)}
OPT_175B = {(1, 512): (44, 23), (1, 1024): (44, 24), (16, 512): (50, 30), (16, 1024): (56, 37)}


@pytest.mark.parametrize("length", TABLE_3_10)
def test_table_3_10(length):
    """4 to 7 % below what was measured, 3 to 5 GiB per GPU: context, NCCL's buffers, FasterTransformer's workspace.

    The measured numbers are GiB: 529.6 billion weights of 16 bits alone are 1059 GB, more than the 1040 measured.
    """
    half = footprint("mt-nlg-530b", None, 4, length, devices=16)
    int8 = footprint("mt-nlg-530b", SMOOTHQUANT_O3, 4, length, devices=8)
    for found, measured in zip((half, int8), TABLE_3_10[length], strict=True):
        assert 0.93 * measured < found.total / GIB < 0.97 * measured
    assert half.weights * 16 > 1040 * GB
    assert int8.fits(80)
    assert not footprint("mt-nlg-530b", None, 4, length, devices=8).fits(80)


@pytest.mark.parametrize(("name", "devices", "table"), [("opt-30b", 1, OPT_30B), ("opt-175b", 8, OPT_175B)])
def test_table_3_8(name, devices, table):
    """Below what was measured everywhere: by up to 3 GiB for one sequence, and by up to 10 for 16.

    These are GiB too: OPT-30B's weights of 16 bits alone are 59.9 GB, more than the 57 measured. What is missing is
    the context and NCCL's buffers on 8 GPUs, and for 16 sequences the workspace: FasterTransformer allocates it all at
    once, does not fuse attention in the context stage, and keeps the int32 sums of INT8 products, four bytes each.
    """
    for (batch, length), row in table.items():
        rows = footprint(name, [None, SMOOTHQUANT_O3], batch, length, devices).rows
        for found, measured in zip(rows, row, strict=True):
            if measured is None:
                assert not found.fits(79.15)  # what the driver leaves of 80
                continue
            assert found.per_device / GIB < measured
            assert measured - found.per_device / GIB < (3.0 if batch == 1 else 10.0)
            assert found.per_device / GIB > (0.85 if batch == 1 or measured != 37 else 0.84) * measured


def test_half_the_gpus():
    """Thesis §3.4.3 and §3.4.4: 1 GPU instead of 2 for OPT-66B, 4 instead of 8 for OPT-175B, 8 instead of 16."""
    for name, wanted in (("opt-66b", (2, 1)), ("opt-175b", (8, 4)), ("mt-nlg-530b", (16, 8))):
        found = [fewest_devices(name, scheme, length=512) for scheme in (None, SMOOTHQUANT_O3)]
        assert tuple(one.devices for one in found) == wanted
        assert all(one.fits(80) for one in found)
        assert not any(
            footprint(name, one.scheme, 1, 512, one.devices // 2).fits(80) for one in found if one.devices > 1
        )


def test_deepseek_v2_and_its_93_percent():
    """DeepSeek-V2's cache is said to be 93.3 % smaller than DeepSeek 67B's (arXiv:2405.04434, abstract).

    Latents of 16 bits against grouped keys and values of 16 bits: 82.2 %. The rest is that its deployment caches
    latents in 6 bits on average (section 3.2.3): 1 − 0.178 · 6/16 = 93.3 %. With a float32 step per token for each of
    the two latents, as this project caches codes, it is 93.2 %.
    """
    small, large = footprint("deepseek-v2"), footprint("deepseek-67b")
    assert (small.cache, large.cache) == (2048 * 60 * (512 + 64) * 2, 2048 * 95 * 2 * 8 * 128 * 2)
    assert 1 - small.cache / large.cache == pytest.approx(0.822, abs=5e-4)
    assert 1 - small.cache * 6 / 16 / large.cache == pytest.approx(0.933, abs=5e-4)
    assert 1 - footprint("deepseek-v2", kv_bits=6).cache / large.cache == pytest.approx(0.932, abs=5e-4)
    full = footprint("deepseek-v2", latents=False).cache
    assert full / small.cache == pytest.approx(71.1, abs=0.05)  # and 13 times DeepSeek 67B's
    assert full > 12 * large.cache


# --- what it shows ---


def test_a_footprint_shows_itself(tmp_path):
    found = footprint("opt-13b", SMOOTHQUANT_O3, length=512, devices=2)
    frame = found.to_frame()
    assert frame.loc["together", "per device, GB"] == pytest.approx(found.per_device / 1e9)
    assert frame["in total, GiB"].iloc[:-1].sum() == pytest.approx(found.total / 2**30)
    bundle = found._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"}
    for text in bundle.values():
        assert "OPT-13B" in text
        assert "SmoothQuant-O3" in text
        assert "2 devices" in text
        assert "per device, GiB" in text
    assert found.to_png(tmp_path / "one.png").stat().st_size > 1000
    assert "plotly" in found.to_html()


def test_names_from_outside_are_not_read_as_html():
    config = tiny_config()
    config._name_or_path = "<img src=x>"
    found = footprint(config)
    for shown in (found, footprint(config, [None])):
        assert "<img" not in shown._repr_mimebundle_()["text/html"]


def test_schemes_beside_each_other():
    found = footprint("opt-13b", [None, SMOOTHQUANT_O3, SMOOTHQUANT_O3], length=512)
    assert isinstance(found, Footprints)
    assert found.labels == ["float16", "SmoothQuant-O3", "SmoothQuant-O3 (2)"]
    assert list(found.to_frame().index) == found.labels
    assert found.to_frame()["weights, GB"].iloc[0] == pytest.approx(25.7, abs=0.01)
    assert "OPT-13B · 1 × 512 tokens · 1 device" in repr(found)
    assert repr(found) in found._repr_mimebundle_()["text/plain"]


def test_any_footprints_beside_each_other():
    rows = (footprint("mt-nlg-530b", None, devices=16), footprint("mt-nlg-530b", SMOOTHQUANT_O3, devices=8))
    found = Footprints(rows)
    assert found.labels == ["float16 · 16 devices", "SmoothQuant-O3 · 8 devices"]
    figure = found.figure(gib=80)
    assert [bar.name for bar in figure.data] == ["weights", "keys and values", "activations"]
    assert sum(bar.x[1] for bar in figure.data) == pytest.approx(rows[1].per_device / 2**30)
    assert figure.layout.shapes[0].x0 == 80
    assert figure.layout.shapes[0].line.color == figure.layout.template.layout.font.color  # legible on black too
    svg = found.still(gib=80).svg()
    for text in ("SmoothQuant-O3 · 8 devices", "GiB per device", "keys and values", ">80<"):
        assert text in svg
    assert "counted in GPT-2" in found._repr_mimebundle_()["text/html"]


# --- where it comes from, and what is refused ---


def test_every_source_gives_the_same(tmp_path):
    lm = tiny("LlamaForCausalLM")
    lm.model.config.save_pretrained(tmp_path)
    before = copy.deepcopy(lm.config.to_dict())
    sizes = {footprint(source, length=20).per_device for source in (lm, lm.model.config, tmp_path, str(tmp_path))}
    assert len(sizes) == 1
    assert lm.config.to_dict() == before
    assert footprint(" OPT 6.7B").parameters == footprint("opt-6.7b").parameters


def test_a_quantised_model_is_what_its_configuration_takes():
    lm = tiny("LlamaForCausalLM")
    int8 = quantize(lm, SMOOTHQUANT_LLAMA, backend="auto", attention=True)
    assert footprint(int8, length=20).per_device == footprint(lm, length=20).per_device


def test_a_model_without_a_row_is_told_by_type():
    from transformers import Qwen2MoeConfig, StableLmConfig

    sizes = {"vocab_size": 100, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
    stable = footprint(StableLmConfig(**sizes, num_hidden_layers=2, intermediate_size=96), SMOOTHQUANT_O3)
    assert stable.linears == 2 * (48 * 48 * 2 + 48 * 16 * 2 + 3 * 48 * 96)
    assert "no row in ARCHS" in stable.notes[0]
    moe = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 32, "num_experts": 4}
    mixture = weights_of(Qwen2MoeConfig(**sizes, num_hidden_layers=3, **moe))
    fused = [(linear, count) for linear, count in mixture.linears if linear.copies == 4]
    assert sum(4 * one.out * one.channels * count for one, count in fused) == 3 * 4 * 3 * 24 * 48


def test_unknown_names_are_told_with_near_ones(tmp_path):
    with pytest.raises(SqvizError, match=r"near: .*opt-175b"):
        footprint("opt-17b")
    with pytest.raises(SqvizError, match=r"none of the published models; near: opt-6\.7b.*openai-community/gpt2"):
        footprint("zzz")
    with pytest.raises(SqvizError, match=r"no folder with a config\.json"):
        footprint(tmp_path)
    with pytest.raises(SqvizError, match=r"not a OPTForCausalLM.*model\.config"):
        footprint(tiny("OPTForCausalLM").model)
    with pytest.raises(SqvizError, match="not a int"):
        footprint(7)


@pytest.mark.parametrize("field", ["batch", "length", "devices"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_numbers_out_of_range_are_told(field, value):
    with pytest.raises(SqvizError, match=f"{field}={value!r}: a whole number from 1"):
        footprint("opt-13b", **{field: value})


def test_other_bad_input_is_told():
    with pytest.raises(SqvizError, match=r"dtype='int8' is not one of 'float32'"):
        footprint("opt-13b", dtype="int8")
    for bits in (1, 9, 12, True):
        with pytest.raises(SqvizError, match=f"kv_bits={bits!r}: 2 to 8, 16"):
            footprint("opt-13b", kv_bits=bits)
    for scheme in ([], "W8A8", [SMOOTHQUANT_O3, 8], 8):
        with pytest.raises(SqvizError, match=r"a sqviz\.Scheme such as"):
            footprint("opt-13b", scheme)
    with pytest.raises(TypeError, match="lenght"):
        fewest_devices("opt-13b", lenght=3)


def test_devices_that_do_not_divide_the_heads_are_told():
    with pytest.raises(SqvizError, match=r"devices=3: OPT-13B has 40 heads.*allowed are 1, 2, 4, 5, 8, 10, 20, 40"):
        footprint("opt-13b", devices=3)


def test_more_tokens_than_positions():
    with pytest.raises(SqvizError, match=r"length=2049: OPT-13B learned a vector for each of 2048 positions"):
        footprint("opt-13b", length=2049)
    (note,) = footprint("llama-2-7b", length=4097).notes  # positions are computed: there is no end to them
    assert "more than the 4096 positions that Llama-2-7B knows" in note
    assert not footprint("llama-2-7b", length=4096).notes
    assert not footprint("bloom-176b", length=10**6).notes  # ALiBi, and no number in its configuration


def test_layers_that_keep_something_else_are_told():
    from transformers import MambaConfig, T5Config

    with pytest.raises(UnknownArchitecture, match="no causal language model"):
        footprint(T5Config())
    with pytest.raises(SqvizError, match=r"MambaConfig has num_attention_heads=None"):
        footprint(MambaConfig(num_hidden_layers=2, hidden_size=32))
    config = tiny_config()
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(SqvizError, match="'linear_attention'"):
        cached(config)
    config.num_kv_shared_layers = 1
    with pytest.raises(SqvizError, match="shares keys and values"):
        cached(config)


def test_what_fits_nowhere_is_told():
    with pytest.raises(SqvizError, match=r"GiB on each of 128 devices and 3 are allowed; its 128 heads"):
        fewest_devices("mt-nlg-530b", gib=3)
    assert fewest_devices("opt-13b", gib=23, length=64).devices == 2

"""INT8 attention in models, and the cache of codes, against the same acted out by the definition."""

import copy

import pytest
import torch
from sqviz_kernels.dispatch import backends

from sqviz.errors import SqvizError
from sqviz.models.tiny import TINY, tiny
from sqviz.quant.int8_cache import Int8Cache
from sqviz.quant.linear import quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA
from sqviz.streaming.cache import SinkCache
from sqviz.streaming.policies import Dense, Sinks

IDS = torch.randint(3, 131, (2, 40), generator=torch.Generator().manual_seed(5))
OWN = ("Bloom", "GPTJ", "Mpt", "Falcon", "Gemma2")
"""Their attention is computed inside of the model, or capped between the products."""


def logits(lm, ids=IDS, **more):
    with torch.no_grad():
        return lm.model(input_ids=ids, use_cache=False, **more).logits


def gap(a, b):
    return float((a - b).norm() / b.norm())


def attending(name, backend="auto"):
    """Attention in INT8 and nothing else."""
    lm = tiny(name)
    return lm, quantize(lm, SMOOTHQUANT_LLAMA, backend=backend, skip=["*"], attention=True)


@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith(OWN)])
def test_is_what_the_definition_says_and_near_to_floats(name):
    lm, executed = attending(name)
    _, acted = attending(name, "simulate")
    assert gap(logits(executed), logits(acted)) < 5e-3
    assert 1e-5 < gap(logits(executed), logits(lm)) < 0.2


@pytest.mark.parametrize("backend", [name for name, why in backends().items() if why is None])
def test_every_backend_computes_it_cached_and_not(backend):
    _, executed = attending("LlamaForCausalLM", backend)
    _, acted = attending("LlamaForCausalLM", "simulate")
    whole, cache = logits(acted), Int8Cache(executed)
    assert gap(logits(executed), whole) < 5e-3
    with torch.no_grad():
        steps = [
            executed.model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in IDS.split([30, 1, 1, 8], 1)
        ]
    assert gap(torch.cat(steps, 1), whole) < 5e-3


@pytest.mark.parametrize("name", [name for name in TINY if name.startswith(OWN)])
def test_models_that_compute_attention_themselves_are_refused(name):
    with pytest.raises(SqvizError, match="attention=False"):
        quantize(tiny(name), SMOOTHQUANT_LLAMA, attention=True)


def test_padding_is_hidden():
    _, executed = attending("LlamaForCausalLM")
    alone = logits(executed, IDS[:1, :20])
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), IDS[:1, :20]], 1)
    positions = torch.cat([torch.zeros(1, 7, dtype=torch.long), torch.arange(20)[None]], 1)
    found = logits(executed, padded, attention_mask=(padded > 0).long(), position_ids=positions)
    assert gap(found[:, 7:], alone) < 1e-5


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen3ForCausalLM", "DeepseekV2ForCausalLM"])
def test_a_cache_of_codes_is_one_of_floats_rounded(name, attention):
    lm = tiny(name)
    model = quantize(lm, SMOOTHQUANT_LLAMA, backend="auto", skip=["*"], attention=attention)
    whole, cache, steps = logits(model), Int8Cache(model), []
    for part in IDS.split([9, 1, 1, 20, 1, 8], 1):
        with torch.no_grad():
            steps.append(model.model(input_ids=part, past_key_values=cache, use_cache=True).logits)
    assert cache.get_seq_length() == 40
    found = torch.cat(steps, 1)
    latent = name.startswith("Deepseek")  # outliers planted in the one latent that all heads read
    same = attention and not latent  # the codes are those that INT8 attention makes without a cache
    assert gap(found, whole) < (1e-5 if same else 0.4 if latent else 0.1)
    kept = 2 * sum(layer.buffers[0].shape[2] for layer in cache.layers)
    heads = cache.layers[0].buffers[0].shape[1]
    sizes = {layer.buffers[i].shape[3] + 4 for layer in cache.layers for i in (0, 2)}
    assert min(sizes) * kept * 2 * heads // 2 <= cache.bytes <= max(sizes) * kept * 2 * heads


def test_a_cache_grows_is_cut_reordered_and_reset():
    _, model = attending("LlamaForCausalLM")
    cache = Int8Cache(model)
    long = torch.randint(3, 131, (2, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for part in (long[:, :60], long[:, 60:]):
            found = model.model(input_ids=part, past_key_values=cache, use_cache=True).logits
        before = found[:, -1:]
        cache.crop(-1)
        again = model.model(input_ids=long[:, -1:], past_key_values=cache, use_cache=True).logits
        assert gap(again, before) < 1e-5
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = model.model(input_ids=long[:, -1:].flip(0), past_key_values=cache, use_cache=True).logits
        assert gap(swapped.flip(0), before) < 1e-5
        cache.reset()
        assert cache.get_seq_length() == 0
        fresh = model.model(input_ids=long[:1], past_key_values=cache, use_cache=True).logits
        assert gap(fresh[:, -1:], before[:1]) < 1e-5


def test_room_doubles_and_keeps_what_is_there(monkeypatch):
    monkeypatch.setattr("sqviz.quant.int8_cache.FIRST", 4)
    _, model = attending("LlamaForCausalLM")
    cache = Int8Cache(model)
    with torch.no_grad():
        steps = [
            model.model(input_ids=part, past_key_values=cache, use_cache=True).logits
            for part in IDS.split([3, 1, 1, 12, 1, 22], 1)
        ]
    assert cache.layers[0].buffers[0].shape[2] == 64
    assert gap(torch.cat(steps, 1), logits(model)) < 1e-5


def test_beam_search_and_sampling():
    model = quantize(tiny("LlamaForCausalLM"), SMOOTHQUANT_LLAMA, backend="auto", attention=True, head=True)
    prompt = IDS[:, :9]
    greedy = model.model.generate(prompt, past_key_values=Int8Cache(model), max_new_tokens=6, do_sample=False)
    assert greedy.shape == (2, 15)
    beams = model.model.generate(
        prompt, past_key_values=Int8Cache(model), max_new_tokens=6, num_beams=3, do_sample=False
    )
    assert beams.shape == (2, 15)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPTNeoXForCausalLM"])
def test_inside_a_sink_cache(name, int8):
    lm, executed = attending(name)
    _, acted = attending(name, "simulate")
    logit = {}
    for which, model in (("floats", lm), ("executed", executed), ("acted", acted)):
        with torch.no_grad():
            cache = SinkCache(model, Sinks(2, 9), int8=int8 and which != "floats")
            found = [
                model.model(input_ids=part, past_key_values=cache, use_cache=True).logits
                for part in IDS[:1].split([4, 1, 1, 1, 6, 1, 1, 1, 1, 23], 1)
            ]
            cache.close()
        logit[which] = torch.cat(found, 1)
    assert gap(logit["executed"], logit["acted"]) < 0.02
    assert gap(logit["executed"], logit["floats"]) < 0.2


def test_a_dense_sink_cache_of_codes_is_the_whole_text():
    _, model = attending("LlamaForCausalLM")
    cache, steps = SinkCache(model, Dense(), int8=True), []
    for part in IDS.split([9, 1, 1, 20, 1, 8], 1):
        with torch.no_grad():
            steps.append(model.model(input_ids=part, past_key_values=cache, use_cache=True).logits)
    assert gap(torch.cat(steps, 1), logits(model)) < 0.02


def test_half_precision():
    lm = tiny("LlamaForCausalLM")
    lm = lm.replace(model=copy.deepcopy(lm.model).bfloat16())
    model = quantize(lm, SMOOTHQUANT_LLAMA, backend="auto", skip=["*"], attention=True)
    assert gap(logits(model).float(), logits(lm).float()) < 0.2

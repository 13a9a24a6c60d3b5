"""The cache in use: generation, beams, several caches on one model, and a model that is what it was afterwards."""

import gc
import threading

import pytest
import torch
from reference import reference
from streams import error, feed, model, text
from transformers import DynamicCache

from sqviz.streaming.cache import SinkCache
from sqviz.streaming.policies import Dense, Sinks, Window

LLAMA = model("LlamaForCausalLM")
GENERATING = [
    "LlamaForCausalLM",
    "GPTNeoXForCausalLM",
    "GPTJForCausalLM",
    "BloomForCausalLM",
    "MptForCausalLM",
    "FalconForCausalLM/rw",
    "Gemma2ForCausalLM",
    "Cohere2ForCausalLM",
    "DeepseekV2ForCausalLM",
]


def greedy(lm, ids: torch.Tensor, policy, count: int) -> torch.Tensor:
    """The obvious loop: logits of the whole text so far, by the reference; the best token is appended."""
    for _ in range(count):
        best = reference(lm, ids, policy.sinks, policy.recent)[-1].argmax()
        ids = torch.cat([ids, best[None]])
    return ids


def generate(lm, ids: torch.Tensor, cache, count: int, **kwargs) -> torch.Tensor:
    batch = ids if ids.ndim == 2 else ids[None]
    mask = kwargs.pop("attention_mask", torch.ones_like(batch))
    kwargs = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True, **kwargs}
    found = lm.model.generate(
        batch, attention_mask=mask, past_key_values=cache, max_new_tokens=count, min_new_tokens=count, **kwargs
    )
    return found if ids.ndim == 2 else found[0]


@pytest.mark.parametrize("name", GENERATING)
def test_generate_goes_where_a_greedy_loop_goes(name: str):
    """The prompt is longer than the cache. The same, not only close: no two logits of these models are that near."""
    lm, policy, ids = model(name), Sinks(2, 7), text(20)
    cache = SinkCache(lm, policy)
    assert generate(lm, ids, cache, 10).tolist() == greedy(lm, ids, policy, 10).tolist()
    assert cache.get_seq_length() == 29
    assert cache.kept == 9


@pytest.mark.parametrize("name", GENERATING)
def test_a_second_turn_is_given_the_whole_text_so_far(name: str):
    lm, policy, said = model(name), Sinks(3, 8), text(9)
    cache = SinkCache(lm, policy)
    for turn in range(3):
        answered = generate(lm, said, cache, 6)
        assert answered.tolist() == greedy(lm, said, policy, 6).tolist()
        said = torch.cat([answered, text(5, seed=turn)])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "FalconForCausalLM/rw"])
def test_a_padded_batch_generates_what_each_text_does(name: str):
    lm, policy, pads = model(name), Sinks(2, 7), [0, 6, 11]
    ids = torch.stack([text(16, seed) for seed in range(3)])
    mask = (torch.arange(16) >= torch.tensor(pads)[:, None]).long()
    got = generate(lm, ids * mask, SinkCache(lm, policy), 8, attention_mask=mask)
    for row, pad in enumerate(pads):
        assert got[row, pad:].tolist() == greedy(lm, ids[row, pad:], policy, 8).tolist()


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM"])
def test_beams_are_reordered_like_those_of_another_cache(name: str):
    lm, ids = model(name), text(12)
    options = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(lm, ids[None], DynamicCache(config=lm.config), 8, **options)
    assert torch.equal(generate(lm, ids[None], SinkCache(lm, Dense()), 8, **options), expected)
    assert torch.equal(generate(lm, ids[None], SinkCache(lm, Sinks(2, 40)), 8, **options), expected)
    assert generate(lm, ids[None], SinkCache(lm, Sinks(2, 5, tokens=(7, 9))), 8, **options).shape == (2, 20)


@pytest.mark.parametrize("policy", [Sinks(2, 5), Sinks(2, 5, tokens=tuple(range(3, 40)))])
def test_rows_in_another_order(policy):
    """Also with padding and sinks that differ by row; in inference mode, and on outside of it."""
    ids, order = torch.stack([text(30, seed) for seed in range(3)]), torch.tensor([2, 0, 0])
    mask = (torch.arange(12) >= torch.tensor([0, 4, 7])[:, None]).long()
    caches = [SinkCache(LLAMA, policy) for _ in range(2)]
    for cache in caches:
        feed(LLAMA, cache, ids[:, :12], attention_mask=mask)
    with torch.inference_mode():
        caches[1].reorder_cache(order)
        assert error(feed(LLAMA, caches[1], ids[order, 12:20]), feed(LLAMA, caches[0], ids[:, 12:20])[order]) < 1e-5
    got = feed(LLAMA, caches[1], ids[order, 20:], [1] * 10)
    assert error(got, feed(LLAMA, caches[0], ids[:, 20:], [1] * 10)[order]) < 1e-5


def test_embeddings_may_be_given_instead_of_ids():
    ids, cache = text(30), SinkCache(LLAMA, Sinks(2, 5))
    embedded = LLAMA.model.get_input_embeddings()(ids)[None]
    with torch.no_grad():
        got = [LLAMA.model(inputs_embeds=part, past_key_values=cache).logits[0] for part in embedded.split(11, 1)]
    assert error(torch.cat(got), reference(LLAMA, ids, 2, 5)) < 1e-4


def test_the_base_model_and_tuples_do_as_well():
    ids, cache, plain = text(30), SinkCache(LLAMA, Sinks(2, 5)), SinkCache(LLAMA, Sinks(2, 5))
    with torch.no_grad():
        got = [
            LLAMA.model.lm_head(LLAMA.model.model(part, past_key_values=cache, return_dict=False)[0])
            for part in ids[None].split(8, 1)
        ]
    assert torch.equal(torch.cat(got, 1)[0], feed(LLAMA, plain, ids, [8, 8, 8, 6]))


def test_gradients_on_and_inference_mode_may_alternate():
    ids, cache, got = text(30), SinkCache(LLAMA, Sinks(2, 5)), []
    modes = [torch.inference_mode, torch.enable_grad, torch.no_grad]
    for step, part in enumerate(ids[None].split(4, 1)):
        with modes[step % 3]():
            got.append(LLAMA.model(input_ids=part, past_key_values=cache).logits[0].detach().clone())
    assert error(torch.cat(got), reference(LLAMA, ids, 2, 5)) < 1e-4


def test_reset_forgets_everything():
    ids, cache = text(30), SinkCache(LLAMA, Sinks(2, 5))
    expected = feed(LLAMA, cache, ids, [9, 1, 20])
    feed(LLAMA, cache, text(7, 3))
    cache.reset()
    assert (cache.get_seq_length(), cache.kept, cache.bytes) == (0, 0, 0)
    assert torch.equal(feed(LLAMA, cache, ids, [9, 1, 20]), expected)
    cache.reset()
    feed(LLAMA, cache, torch.stack([ids, ids]))  # another number of rows


# --- the model is what it was ---


def hooks(lm) -> int:
    return sum(
        len(found)
        for module in lm.model.modules()
        for name, found in vars(module).items()
        if "hooks" in name and isinstance(found, dict)
    )


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "GPTJForCausalLM", "FalconForCausalLM/rw"])
def test_the_model_is_unchanged_after_close(name: str):
    lm = model(name)
    tensors = {key: (value.data_ptr(), value.clone()) for key, value in lm.model.state_dict().items()}
    buffers = {key: value.clone() for key, value in lm.model.named_buffers()}
    attributes = {path: set(vars(module)) for path, module in lm.model.named_modules()}
    config, before = lm.model.config.to_dict(), hooks(lm)
    cache = SinkCache(lm, Sinks(2, 5))
    feed(lm, cache, text(30), [13, 1, 16])
    generate(lm, text(34), cache, 3)
    assert hooks(lm) > before
    cache.close()
    cache.close()
    assert hooks(lm) == before
    for key, value in lm.model.state_dict().items():
        assert value.data_ptr() == tensors[key][0]
        assert torch.equal(value, tensors[key][1])
    assert all(torch.equal(value, buffers[key]) for key, value in lm.model.named_buffers())
    assert {path: set(vars(module)) for path, module in lm.model.named_modules()} == attributes
    assert lm.model.config.to_dict() == config


def test_a_cache_that_is_collected_takes_its_hooks_along():
    lm = model("BloomForCausalLM")
    before, cache = hooks(lm), SinkCache(lm, Sinks(2, 5))
    output = lm.model(input_ids=text(9)[None], past_key_values=cache)
    del cache
    assert hooks(lm) > before  # the output still holds it
    del output
    gc.collect()
    assert hooks(lm) == before


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "FalconForCausalLM/rw", "MptForCausalLM"])
def test_calls_without_the_cache_are_the_same_to_the_bit(name: str):
    lm, ids = model(name), text(40)

    def plain() -> list[torch.Tensor]:
        with torch.no_grad():
            past = DynamicCache(config=lm.config)
            found = [lm.model(input_ids=part, past_key_values=past).logits for part in ids[None].split(15, 1)]
            return [*found, lm.model(input_ids=ids[None], use_cache=False).logits]

    expected = plain()
    cache = SinkCache(lm, Sinks(2, 5))
    feed(lm, cache, ids, [20, 1, 19])
    assert all(map(torch.equal, plain(), expected))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM"])
def test_caches_on_one_model_do_not_disturb_one_another(name: str):
    lm = model(name)
    policies = [Sinks(2, 5), Window(7), Dense(), Sinks(1, 9)]
    texts = [text(30, seed) for seed in range(4)]
    caches, got = [SinkCache(lm, policy) for policy in policies], [[] for _ in policies]
    for part in range(6):
        for cache, ids, found in zip(caches, texts, got, strict=True):
            found.append(feed(lm, cache, ids[5 * part : 5 * part + 5], [1, 4]))
        if part == 3:
            caches[1].close()
            caches[1:2], texts[1:2], got[1:2], policies[1:2] = [], [], [], []
    for policy, ids, found in zip(policies, texts, got, strict=True):
        assert error(torch.cat(found), reference(lm, ids, policy.sinks, policy.recent)) < 1e-4


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM"])
def test_caches_come_and_go_while_another_thread_runs_the_model(name: str):
    """torch adds a hook before it notes that the hook wants keyword arguments, and a call may come in between."""
    lm, ids, stop, errors = model(name), text(12), threading.Event(), []
    expected = feed(lm, SinkCache(lm, Sinks(2, 5)), ids)

    def come_and_go() -> None:
        while not stop.is_set():
            SinkCache(lm, Sinks(1, 4)).close()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(60):
            cache = SinkCache(lm, Sinks(2, 5))
            errors.append(error(feed(lm, cache, ids), expected))
            cache.close()
    finally:
        stop.set()
        thread.join()
    assert max(errors) < 1e-5


def test_hooks_called_without_keywords_do_nothing():
    lm, before = model("BloomForCausalLM"), set()
    modules = list(lm.model.modules())
    cache = SinkCache(lm, Sinks(2, 5))
    for module in modules:
        for hook in module._forward_pre_hooks.values():
            assert hook(module, (1, 2)) is None
            before.add(hook)
        for hook in module._forward_hooks.values():
            assert hook(module, (1, 2), "output") is None
            before.add(hook)
    assert len(before) >= 4
    cache.close()


def test_it_says_what_it_is():
    cache = SinkCache(LLAMA, Sinks(2, 5))
    assert "SinkCache" in repr(cache)
    assert cache.policy == Sinks(2, 5)
    assert SinkCache(LLAMA).policy == Sinks(4, 252)
    assert len(cache) == 2
    assert (cache.get_max_length(), SinkCache(LLAMA, Dense()).get_max_length()) == (7, -1)
    assert not cache.is_compileable

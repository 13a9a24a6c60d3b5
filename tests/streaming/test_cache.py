"""The cache gives the logits of the slow and obvious computation, whatever the model, the policy and the chunks."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference, seeing
from streams import LIMIT, STREAMED, chunkings, error, exact, expected_size, feed, model, text

import sqviz.streaming.cache as cache_module
from sqviz.streaming.cache import SinkCache
from sqviz.streaming.policies import Dense, Policy, Sinks, Window

few = settings(deadline=None, derandomize=True, max_examples=4, database=None)
many = settings(deadline=None, derandomize=True, max_examples=25, database=None)
policies = st.one_of(
    st.builds(Sinks, st.integers(0, 4), st.integers(1, 14)), st.builds(Window, st.integers(1, 18)), st.just(Dense())
)
slacks = st.sampled_from([1, 3, 256])


def check(lm, policy: Policy, chunks: list[int], slack: int, limit: float | None = None) -> None:
    """A text fed in these chunks, against the reference; and what is held after each chunk."""
    ids = text(sum(chunks), seed=len(chunks))
    with exact(lm.dtype), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SLACK", slack)
        expected, cache, seen, got = reference(lm, ids, policy.sinks, policy.recent), SinkCache(lm, policy), 0, []
        for size in chunks:
            got.append(feed(lm, cache, ids[seen : seen + size]))
            seen += size
            assert cache.get_seq_length() == seen
            assert cache.kept == expected_size(policy, seen)
        cache.close()
    assert error(torch.cat(got), expected) < (limit or LIMIT[lm.dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", STREAMED)
def test_every_architecture_is_exact(name: str, dtype: torch.dtype):
    lm = model(name, dtype)

    @few
    @given(policies, chunkings(), slacks)
    def agrees(policy: Policy, chunks: list[int], slack: int) -> None:
        check(lm, policy, chunks, slack)

    agrees()
    check(lm, Sinks(4, 5), [9, 1, 1, 1, 14, 1, 1, 1, 1, 1, 1, 1, 6], slack=1)


@many
@given(policies, chunkings(40, 80), slacks)
def test_chunks_and_steps_of_any_size(policy: Policy, chunks: list[int], slack: int):
    check(LLAMA, policy, chunks, slack)


LLAMA = model("LlamaForCausalLM")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(
    "name",
    ["LlamaForCausalLM", "GPTNeoXForCausalLM", "Gemma3ForCausalLM", "FalconForCausalLM/rw", "DeepseekV2ForCausalLM"],
)
def test_either_way_to_compute_attention(name: str, attention: str):
    lm = model(name, attn_implementation=attention)
    assert lm.config._attn_implementation == attention
    check(lm, Sinks(3, 6), [7, 1, 1, 12, 1, 3], slack=3)


ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": [1.0, 1.5, 2.0, 2.5],
        "long_factor": [3.0, 4.0, 5.0, 6.0],
        "original_max_position_embeddings": 48,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("rope", ROPES)
def test_scaled_rotary_embeddings(rope: str, dtype: torch.dtype):
    lm = model("LlamaForCausalLM", dtype, rope_parameters={"rope_theta": 10000.0, **ROPES[rope]})
    plain = model("LlamaForCausalLM", dtype)
    if rope not in ("dynamic", "longrope"):
        assert not torch.allclose(lm.model.model.rotary_emb.inv_freq, plain.model.model.rotary_emb.inv_freq)
    check(lm, Sinks(3, 9), [13, 1, 1, 20, 1, 1, 1, 1], slack=3)
    check(lm, Window(11), [1] * 30, slack=2)


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_frequencies_that_a_long_text_has_changed_are_not_taken_over(rope: str):
    """Such models change `inv_freq` in place when they read a long text, and back when they read a short one."""
    lm = model("LlamaForCausalLM", rope_parameters={"rope_theta": 10000.0, **ROPES[rope]})
    with torch.no_grad():
        lm.model(input_ids=text(120)[None])
    ids, cache = text(30), SinkCache(lm, Sinks(2, 6))
    got = [feed(lm, cache, ids[:20])]
    with torch.no_grad():
        lm.model(input_ids=text(120)[None])
    got.append(feed(lm, cache, ids[20:], [1] * 10))
    assert error(torch.cat(got), reference(lm, ids, 2, 6)) < 1e-4


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "MptForCausalLM", "FalconForCausalLM/rw"])
def test_bfloat16_is_as_close_as_its_rounding(name: str):
    half = model(name, torch.bfloat16)
    full = half.replace(model=copy.deepcopy(half.model).float())
    ids = text(80)
    expected = reference(full, ids, 3, 9)
    got = feed(half, SinkCache(half, Sinks(3, 9)), ids, [20] + [1] * 40 + [20])
    same = reference(half, ids, 3, 9)
    assert got.dtype == torch.bfloat16
    assert error(got, expected) < 1.5 * error(same, expected) + 0.02 < 0.2


def test_turning_sinks_again_and_again_adds_no_rounding():
    """They are turned from where position 0 would be, in float32, and not on from their last place."""
    lm, cache = LLAMA, SinkCache(LLAMA, Sinks(3, 4))
    ids = text(700)
    got = feed(lm, cache, ids, [1] * 700)
    late = ids[-20:]
    expected = reference(lm, ids, 3, 4)
    assert error(got, expected) < 1e-5
    assert error(got[-20:], expected[-len(late) :]) < 1e-5


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "DeepseekV2ForCausalLM"])
def test_a_window_that_moves_many_times_stays_exact(name: str, monkeypatch):
    monkeypatch.setattr(cache_module, "SLACK", 3)
    lm, ids = model(name), text(160)
    cache, bases, got = SinkCache(lm, Sinks(2, 5)), set(), []
    for token in ids:
        got.append(feed(lm, cache, token[None]))
        bases.add(cache.state.base)
    assert len(bases) > 20
    assert error(torch.cat(got), reference(lm, ids, 2, 5)) < 1e-4


def test_a_chunk_longer_than_the_buffer(monkeypatch):
    monkeypatch.setattr(cache_module, "SLACK", 3)
    ids, cache = text(150), SinkCache(LLAMA, Sinks(2, 5))
    got = [feed(LLAMA, cache, ids[:4])]
    small = cache.bytes
    got.append(feed(LLAMA, cache, ids[4:124]))
    assert cache.bytes > 5 * small
    got.append(feed(LLAMA, cache, ids[124:], [1] * 26))
    assert cache.bytes < 2 * small
    assert error(torch.cat(got), reference(LLAMA, ids, 2, 5)) < 1e-4


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM", "GPTJForCausalLM", "BloomForCausalLM", "MptForCausalLM", "FalconForCausalLM/rw"]
)
def test_rows_of_a_batch_are_texts_of_their_own(name: str):
    lm, ids = model(name), torch.stack([text(30, seed) for seed in range(3)])
    got = feed(lm, SinkCache(lm, Sinks(2, 5)), ids, [11, 1, 1, 9, 8])
    for row in range(3):
        assert error(got[row], reference(lm, ids[row], 2, 5)) < 1e-4


PADDED = ["LlamaForCausalLM", "GPTNeoXForCausalLM", "GPTJForCausalLM", "Gemma3ForCausalLM", "Cohere2ForCausalLM"]
PADDED += ["DeepseekV2ForCausalLM", "BloomForCausalLM", "FalconForCausalLM/rw", "FalconForCausalLM/rw-multi-query"]


@pytest.mark.parametrize("name", PADDED)
def test_padding_on_the_left_is_not_seen(name: str):
    lm = model(name)

    @few
    @given(policies, chunkings(20, 30), slacks, st.lists(st.integers(0, 9), min_size=3, max_size=3), st.booleans())
    def agrees(policy: Policy, chunks: list[int], slack: int, pads: list[int], told: bool) -> None:
        first, total = 12, 12 + sum(chunks)
        ids = torch.stack([text(total, seed) for seed in range(3)])
        mask = (torch.arange(total) >= torch.tensor(pads)[:, None]).long()
        ids[mask == 0] = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_module, "SLACK", slack)
            cache = SinkCache(lm, policy)
            got, seen = [feed(lm, cache, ids[:, :first], attention_mask=mask[:, :first])], first
            for size in chunks:
                more = {"attention_mask": mask[:, : seen + size]} if told else {}
                got.append(feed(lm, cache, ids[:, seen : seen + size], **more))
                seen += size
        for row, pad in enumerate(pads):
            expected = reference(lm, ids[row, pad:], policy.sinks, policy.recent)
            assert error(torch.cat(got, 1)[row, pad:], expected) < 1e-4

    agrees()


@pytest.mark.parametrize("name", ["MistralForCausalLM", "Gemma2ForCausalLM", "Cohere2ForCausalLM"])
@pytest.mark.parametrize("pads", [[0, 0], [0, 5]])
def test_a_dense_cache_leaves_the_models_own_sliding_window_in_force(name: str, pads: list[int]):
    lm = model(name, sliding_window=7)
    ids, mask = torch.stack([text(30, 1), text(30, 2)]), torch.arange(30) >= torch.tensor(pads)[:, None]
    cache = SinkCache(lm, Dense())
    got = [feed(lm, cache, ids[:, :12], attention_mask=mask[:, :12].long()), feed(lm, cache, ids[:, 12:], [9, 1, 1, 7])]
    for row, pad in enumerate(pads):
        with torch.no_grad():
            expected = lm.model(input_ids=ids[row : row + 1, pad:]).logits[0]
        assert error(torch.cat(got, 1)[row, pad:], expected) < 1e-4


# --- which keys are kept ---


@many
@given(st.data())
def test_a_policy_that_changes_while_the_stream_runs(data):
    """What is held stays, as long as there is room: the simulation below says the same in another way."""
    rules = data.draw(st.lists(policies, min_size=2, max_size=5))
    chunks = [data.draw(chunkings(9, 14)) for _ in rules]
    slack = data.draw(slacks)
    keeps, sinks, held = [], [], 0
    for rule, sizes in zip(rules, chunks, strict=True):
        seen = len(keeps)
        sinks = [s for s in sinks if s < held] if rule == Dense() else sinks[: rule.sinks]
        sinks += [t for t in range(held, seen) if t not in sinks][: rule.sinks - len(sinks)]
        for t in range(seen, seen + sum(sizes)):
            sinks += [t] if len(sinks) < rule.sinks else []
            held = held if rule.recent is None else max(held, t - rule.recent + 1)
            keeps.append([s for s in sinks if s < held] + list(range(held, t + 1)))
    ids = text(len(keeps), seed=slack)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SLACK", slack)
        cache, seen, got = SinkCache(LLAMA, rules[0]), 0, []
        for rule, sizes in zip(rules, chunks, strict=True):
            cache.policy = rule
            assert cache.policy == rule
            got.append(feed(LLAMA, cache, ids[seen : seen + sum(sizes)], sizes))
            seen += sum(sizes)
            assert cache.kept == len(keeps[seen - 1])
    assert error(torch.cat(got), seeing(LLAMA, ids, keeps)) < 1e-4


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "MptForCausalLM"])
@pytest.mark.parametrize("chunks", [[40], [1] * 40, [7, 1, 12, 20]])
def test_sinks_chosen_by_position(name: str, chunks: list[int]):
    lm, ids = model(name), text(40)
    policy = Sinks(3, 6, positions=(2, 9, 11, 30))
    got = feed(lm, SinkCache(lm, policy), ids, chunks)
    assert error(got, reference(lm, ids, 3, 6, chosen=(2, 9, 11))) < 1e-4


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "DeepseekV2ForCausalLM"])
@pytest.mark.parametrize("chunks", [[40], [1] * 40, [7, 1, 12, 20]])
def test_sinks_chosen_by_token(name: str, chunks: list[int]):
    """Each row of a batch has its own, some rows find fewer than they may, and one finds none."""
    lm, ids = model(name), torch.stack([text(40, seed) for seed in range(4)])
    ids[(ids == 99) | (ids == 98)] = 97
    found = [(1, 8, 20, 33), (15,), (), (0, 1, 2, 3, 4)]
    for row, columns in enumerate(found):
        ids[row, list(columns)] = torch.tensor([99, 98])[torch.arange(len(columns)) % 2]
    got = feed(lm, SinkCache(lm, Sinks(3, 6, tokens=(98, 99))), ids, chunks)
    for row, columns in enumerate(found):
        assert error(got[row], reference(lm, ids[row], 3, 6, chosen=columns[:3])) < 1e-4


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM"])
def test_sinks_by_token_and_by_position_count_from_the_first_real_token(name: str):
    lm, pads = model(name), [0, 6]
    ids = torch.stack([text(40, seed) for seed in range(2)])
    ids[ids == 99] = 98
    ids[:, 8], ids[0, 20] = 99, 99
    mask = (torch.arange(40) >= torch.tensor(pads)[:, None]).long()
    for policy, found in (
        (Sinks(2, 5, tokens=(99,)), [(8, 20), (2,)]),
        (Sinks(2, 5, positions=(3, 5, 7)), [(3, 5), (3, 5)]),
        (Sinks(2, 5, tokens=(99,), positions=(2, 20)), [(20,), (2,)]),
    ):
        cache = SinkCache(lm, policy)
        got = [feed(lm, cache, ids[:, :15], attention_mask=mask[:, :15]), feed(lm, cache, ids[:, 15:], [1, 1, 12, 11])]
        for row, pad in enumerate(pads):
            expected = reference(lm, ids[row, pad:], 2, 5, chosen=found[row])
            assert error(torch.cat(got, 1)[row, pad:], expected) < 1e-4


def test_a_rule_that_changes_applies_to_what_comes():
    ids = text(40)
    ids[ids == 99] = 98
    ids[[4, 30]] = 99
    cache = SinkCache(LLAMA, Sinks(1, 5))
    got = [feed(LLAMA, cache, ids[:12])]
    cache.policy = Sinks(2, 5, tokens=(99,))
    got.append(feed(LLAMA, cache, ids[12:], [10, 1, 1, 16]))
    assert error(torch.cat(got), reference(LLAMA, ids, 2, 5, chosen=(0, 30))) < 1e-4


# --- constant cost ---


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM"])
def test_memory_stays_the_same_for_thousands_of_steps(name: str):
    lm = model(name, num_hidden_layers=1)
    cache, policy, sizes = SinkCache(lm, Sinks(4, 60)), Sinks(4, 60), set()
    feed(lm, cache, text(300))
    with torch.no_grad():
        for step, token in enumerate(text(2000)):
            lm.model(input_ids=token[None, None], past_key_values=cache, use_cache=True)
            assert cache.kept == expected_size(policy, 300 + step)
            assert cache.get_mask_sizes(1, 0) == (65, 0)
            sizes.add(cache.bytes)
    assert len(sizes) == 1
    assert cache.get_seq_length() == 2300
    assert cache.get_max_length() == 64

"""Generated streams against transformers' generate(), and against the model run by hand."""

import itertools

import pytest
import torch
from generation import CHAT, PROMPT, SMALL, byte_level, generated, mute, speaking, tokens
from transformers import DynamicCache

from sqviz.errors import NonFinite, NoTokenizer, SqvizError
from sqviz.models.tiny import tiny
from sqviz.streaming.cache import SinkCache
from sqviz.streaming.generate import CacheView, stream_generate
from sqviz.streaming.policies import Dense, Recompute, Sinks, Window


@pytest.fixture(scope="module")
def lm():
    return mute()


@pytest.fixture(scope="module", name="speaking")
def _speaking():
    return speaking()


def last_logits(lm, ids):
    with torch.no_grad():
        return lm.model(ids[None], use_cache=False).logits[0, -1]


# --- the same tokens as generate() ---


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "FalconForCausalLM/rw", "GPTNeoXForCausalLM"])
def test_greedy_equals_generate_while_nothing_is_evicted_and_beyond(name):
    lm = mute(name)
    expected = generated(lm, PROMPT, 20, past_key_values=DynamicCache())
    for policy in (Dense(), Sinks(), Window(40), Recompute(40)):
        assert tokens(stream_generate(lm, PROMPT, policy, max_tokens=20)) == expected
    for policy in (SMALL, Window(5), Sinks(12, 3)):
        cache = SinkCache(lm, policy)
        expected = generated(lm, PROMPT, 40, past_key_values=cache)
        cache.close()
        assert tokens(stream_generate(lm, PROMPT, policy, max_tokens=40)) == expected
        assert tokens(stream_generate(lm, PROMPT, policy, max_tokens=40, chunk=4)) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 3, "temperature": 1.5},
        {"top_k": 0, "top_p": 0.6},
        {"repetition_penalty": 1.7, "top_k": 0},
        {"repetition_penalty": 1.3, "top_k": 7, "top_p": 0.8, "temperature": 2.0},
    ],
)
def test_a_seed_draws_what_generate_draws(lm, options):
    torch.manual_seed(7)
    sampling = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, **options}
    expected = generated(lm, PROMPT, 25, do_sample=True, past_key_values=SinkCache(lm, SMALL), **sampling)
    state = torch.get_rng_state()
    drawn = tokens(stream_generate(lm, PROMPT, SMALL, max_tokens=25, do_sample=True, seed=7, **options))
    assert drawn == expected
    assert drawn == tokens(stream_generate(lm, PROMPT, SMALL, max_tokens=25, do_sample=True, seed=7, **options))
    assert drawn != tokens(stream_generate(lm, PROMPT, SMALL, max_tokens=25, do_sample=True, seed=8, **options))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_penalty_without_sampling(lm):
    expected = generated(lm, PROMPT, 20, repetition_penalty=2.5, past_key_values=DynamicCache())
    assert tokens(stream_generate(lm, PROMPT, max_tokens=20, repetition_penalty=2.5)) == expected
    assert expected != generated(lm, PROMPT, 20)


def test_recompute_runs_the_latest_tokens_anew():
    lm = mute("GPT2LMHeadModel")  # learned positions: no other policy
    ids = PROMPT
    for step in stream_generate(lm, PROMPT, Recompute(6), max_tokens=12):
        logits = last_logits(lm, ids[-6:])
        assert step.token == int(logits.argmax())
        assert step.nll == pytest.approx(-float(logits.log_softmax(-1)[step.token]), abs=1e-5)
        first = max(0, len(ids) - 6)
        assert step.cache == CacheView((), first, len(ids) - 1, len(ids) - first, 6, 0)
        ids = torch.cat([ids, torch.tensor([step.token])])
    with pytest.raises(SqvizError, match="learns an embedding"):
        stream_generate(lm, PROMPT)
    with pytest.raises(SqvizError, match=r"97.*more than the 96 positions"):
        stream_generate(lm, PROMPT, Recompute(97))


# --- what a step says ---


def test_the_nll_and_the_alternatives_are_the_models_own(lm):
    options = {"do_sample": True, "temperature": 3.0, "top_k": 4, "repetition_penalty": 1.5}
    ids = PROMPT
    for step in stream_generate(lm, PROMPT, Dense(), max_tokens=10, alternatives=3, **options):
        p = last_logits(lm, ids).log_softmax(-1)
        assert step.nll == pytest.approx(-float(p[step.token]), abs=1e-4)
        assert [other for other, _, _ in step.top] == p.topk(3).indices.tolist()
        assert [q for _, _, q in step.top] == pytest.approx(p.topk(3).values.exp().tolist(), rel=1e-3)
        assert step.position == len(ids)
        assert step.seconds > 0
        ids = torch.cat([ids, torch.tensor([step.token])])
    assert next(stream_generate(lm, PROMPT, alternatives=0)).top == ()
    assert len(next(stream_generate(lm, PROMPT, alternatives=1000)).top) == 131


def test_the_picture_of_the_cache(lm):
    steps = list(stream_generate(lm, PROMPT, SMALL, max_tokens=4))
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert [(v.sinks, v.first, v.last, v.keys, v.capacity) for v in (step.cache for step in steps)] == [
        ((0, 1), last - 5, last, 8, 8) for last in range(8, 12)
    ]
    assert steps[0].cache.bytes == steps[3].cache.bytes > 0
    view = next(stream_generate(lm, PROMPT, Dense())).cache
    assert (view.sinks, view.first, view.last, view.keys, view.capacity) == ((), 0, 8, 9, None)


def test_a_prompt_shorter_than_the_sinks(lm):
    steps = list(stream_generate(lm, PROMPT[:1], Sinks(3, 2), max_tokens=8))
    assert [step.cache.sinks for step in steps] == [(0,), (0, 1)] + [(0, 1, 2)] * 6
    assert [step.cache.keys for step in steps] == [1, 2, 3, 4, 5, 5, 5, 5]
    assert tokens(steps) == generated(lm, PROMPT[:1], 8, past_key_values=SinkCache(lm, Sinks(3, 2)))


def test_only_the_last_logits_are_computed(lm):
    sizes = []
    hook = lm.model.lm_head.register_forward_hook(lambda _, __, output: sizes.append(output.shape[1]))
    list(stream_generate(lm, PROMPT, max_tokens=3, chunk=4))
    hook.remove()
    assert sizes == [1] * 5


# --- the end ---


def test_ends(speaking):
    stream = stream_generate(speaking, "abc")
    endless = list(itertools.islice(stream, 60))
    assert stream.ended is None
    with_end = stream_generate(speaking, "abc", eos=[endless[20].token])
    first = next(i for i, step in enumerate(endless) if step.token == endless[20].token)
    assert len(list(with_end)) == first + 1
    assert with_end.ended == "eos"
    assert list(with_end) == []
    counted = stream_generate(speaking, "abc", max_tokens=5)
    assert tokens(counted) == tokens(endless)[:5]
    assert counted.ended == "max_tokens"
    assert counted.tokens.tolist() == [*speaking.tokenizer("abc").input_ids, *tokens(endless)[:5]]


def test_the_models_own_end_token(lm):
    usual = tokens(stream_generate(lm, PROMPT, max_tokens=10))
    for eos in (usual[4], [130, usual[4]]):
        ending = tiny("LlamaForCausalLM", eos_token_id=eos)
        stream = stream_generate(ending, PROMPT, max_tokens=10)
        assert tokens(stream) == usual[: usual.index(usual[4]) + 1]
        assert stream.ended == "eos"
        assert tokens(stream_generate(ending, PROMPT, max_tokens=10, eos=())) == usual


def test_stop_strings(speaking):
    text = "".join(step.text for step in stream_generate(speaking, "abc", max_tokens=80, do_sample=True))
    found = next(text[i : i + 3] for i in range(5, 70) if text[i : i + 3].isascii())  # three tokens
    stream = stream_generate(speaking, "abc", max_tokens=80, do_sample=True, stop=["no such text", found])
    assert "".join(step.text for step in stream) == stream.text
    assert stream.text == text[: text.index(found) + 3]
    assert stream.ended == "stop"
    assert stream_generate(speaking, found, max_tokens=1, stop=found).text == ""  # what was given does not count


# --- what is refused ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature=0: .*do_sample=False"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 1.5}, r"top_p=1\.5: a probability"),
        ({"top_k": -1}, "top_k=-1: .*0 for all"),
        ({"top_k": 2.0}, r"top_k=2\.0"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"seed": "x"}, "seed='x'"),
        ({"max_tokens": 0}, "max_tokens=0: .*at least 1"),
        ({"chunk": 0}, "chunk=0: .*at least 1"),
        ({"alternatives": -1}, "alternatives=-1"),
        ({"stop": [""]}, "stop=.*not empty"),
        ({"cache": DynamicCache()}, "must be a SinkCache.*DynamicCache"),
    ],
)
def test_bad_parameters(speaking, options, message):
    with pytest.raises(SqvizError, match=message):
        stream_generate(speaking, "abc", **options)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        (torch.tensor([], dtype=torch.long), "the prompt is empty"),
        ([], "the prompt is empty"),
        (torch.tensor([999]), r"0 … 260"),
        (torch.tensor([[1]]), "1-D integer tensor"),
        ([1, 2], r"torch\.tensor\(ids\)"),
        ([{"role": "user"}], "'role' and a 'content'"),
    ],
)
def test_bad_prompts(speaking, prompt, message):
    with pytest.raises(SqvizError, match=message):
        stream_generate(speaking, prompt)


def test_no_tokenizer_and_no_template(lm, speaking):
    for prompt, options in (("text", {}), (CHAT, {}), (PROMPT, {"stop": "x"})):
        with pytest.raises(NoTokenizer, match="has no tokenizer"):
            stream_generate(lm, prompt, **options)
    with pytest.raises(SqvizError, match="no chat template"):
        stream_generate(speaking.replace(tokenizer=byte_level(None)), CHAT)
    refusing = byte_level("{{ raise_exception('only one system message') }}")
    with pytest.raises(SqvizError, match="refused these messages: only one system message"):
        stream_generate(speaking.replace(tokenizer=refusing), CHAT)
    stream = stream_generate(lm, PROMPT, max_tokens=2)
    assert [step.text for step in stream] == ["", ""]
    assert stream.send(PROMPT).ended is None


def test_caches_that_do_not_fit(lm):
    other = SinkCache(tiny("LlamaForCausalLM", seed=1), SMALL)
    with pytest.raises(SqvizError, match="made for another model"):
        stream_generate(lm, PROMPT, cache=other)
    mine = SinkCache(lm, SMALL)
    with pytest.raises(SqvizError, match="the cache keeps Sinks"):
        stream_generate(lm, PROMPT, Window(3), cache=mine)
    with pytest.raises(SqvizError, match="keeps no cache"):
        stream_generate(lm, PROMPT, Recompute(3), cache=mine)
    one, two = stream_generate(lm, PROMPT, cache=mine), stream_generate(lm, PROMPT, cache=mine)
    next(one)
    with pytest.raises(SqvizError, match="used for something else too"):
        next(two)
    mine.close()
    with pytest.raises(SqvizError, match="closed"):
        stream_generate(lm, PROMPT, cache=mine)
    batch = SinkCache(lm, SMALL)
    with torch.no_grad():
        lm.model(PROMPT[None].repeat(2, 1), past_key_values=batch)
    with pytest.raises(SqvizError, match="holds 2 rows"):
        stream_generate(lm, PROMPT, cache=batch)
    batch.close()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(bad):
    lm = tiny("LlamaForCausalLM")
    with torch.no_grad():
        lm.model.lm_head.weight[7] = bad
    stream = stream_generate(lm, PROMPT)
    for _ in range(2):
        with pytest.raises(NonFinite, match=r"tiny/LlamaForCausalLM gave NaN.*float32 or bfloat16"):
            next(stream)

"""What a stream does beside giving tokens: stop and go on, serve an event loop, and take turns on one cache."""

import asyncio
import contextlib
import dataclasses
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from generation import CHAT, PROMPT, SMALL, TEMPLATE, byte_level, generated, mute, speaking, tokens
from transformers import DynamicCache

import sqviz
from sqviz.errors import SqvizError
from sqviz.progress import CancelToken
from sqviz.streaming.cache import SinkCache
from sqviz.streaming.generate import stream_generate
from sqviz.streaming.policies import Dense, Recompute, Sinks


def run(coroutine):
    """In a thread of its own: browser tests of the same session may have left a loop running in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


@pytest.fixture(scope="module")
def lm():
    return mute()


@pytest.fixture(scope="module", name="speaking")
def _speaking():
    return speaking()


# --- cancelling ---


def test_cancelled_and_gone_on_with(lm):
    whole = tokens(stream_generate(lm, PROMPT, SMALL, max_tokens=12))
    stream, got = stream_generate(lm, PROMPT, SMALL, max_tokens=12), []
    for step in stream:
        got.append(step.token)
        if step.index in (3, 4):
            stream.cancel()
    assert (got, stream.ended) == (whole[:4], "cancelled")
    got.append(next(stream).token)
    assert stream.ended is None
    stream.cancel()
    assert list(stream) == []
    assert got + tokens(stream) == whole


def test_a_token_cancels_once(lm):
    token = CancelToken()
    stream = stream_generate(lm, PROMPT, SMALL, max_tokens=6, cancel=token)
    got = [next(stream).token]
    token.cancel()
    assert list(stream) == []
    assert got + tokens(stream) == tokens(stream_generate(lm, PROMPT, SMALL, max_tokens=6))


def test_cancelled_while_the_prompt_is_read(lm):
    stream = stream_generate(lm, PROMPT.repeat(4), SMALL, max_tokens=5, chunk=4)
    hook = lm.model.register_forward_hook(lambda *_: stream.cancel())
    assert list(stream) == []
    hook.remove()
    assert stream.cache.state.seen == 4
    assert tokens(stream) == tokens(stream_generate(lm, PROMPT.repeat(4), SMALL, max_tokens=5))


class Interrupted(BaseException):
    """Not an Exception, as KeyboardInterrupt is not."""


@pytest.mark.parametrize("where", ["lm_head", "model.layers.1"])
@pytest.mark.parametrize("policy", [SMALL, Sinks(12, 3), Dense(), Recompute(6)], ids=str)
def test_a_step_that_failed_can_be_done_again(lm, where, policy):
    whole = tokens(stream_generate(lm, PROMPT, policy, max_tokens=12))
    stream, failing = stream_generate(lm, PROMPT, policy, max_tokens=12, chunk=4), [False]

    def fail(*_):
        failing[0] = not failing[0]
        if failing[0]:
            raise Interrupted

    hook = lm.model.get_submodule(where).register_forward_pre_hook(fail)
    got = []
    for _ in range(100):
        with contextlib.suppress(Interrupted):
            got.extend(step.token for step in itertools.islice(stream, 1))
    hook.remove()
    assert got == whole


# --- async ---


def test_async_equals_sync_and_leaves_the_loop_free(lm):
    async def collect():
        ticks, threads = 0, set()
        hook = lm.model.register_forward_hook(lambda *_: threads.add(threading.get_ident()))

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        got = [step.token async for step in stream_generate(lm, PROMPT, SMALL, max_tokens=12)]
        ticking.cancel()
        hook.remove()
        assert threading.get_ident() not in threads
        assert ticks > 12
        return got

    assert run(collect()) == tokens(stream_generate(lm, PROMPT, SMALL, max_tokens=12))


def test_several_consumers_share_the_steps(lm):
    async def collect():
        stream = stream_generate(lm, PROMPT, SMALL, max_tokens=30)
        got = []

        async def consume():
            got.extend([step async for step in stream])

        await asyncio.gather(*(consume() for _ in range(4)))
        return sorted(got, key=lambda step: step.index)

    got = run(collect())
    assert [step.index for step in got] == list(range(30))
    assert tokens(got) == tokens(stream_generate(lm, PROMPT, SMALL, max_tokens=30))


def test_a_task_that_is_cancelled_loses_no_step(lm):
    async def collect():
        stream, got = stream_generate(lm, PROMPT, SMALL, max_tokens=10), []
        while stream.ended is None or len(got) < 10:
            task = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.001)
            if len(got) % 2 and not task.done():
                task.cancel()
            try:
                got.append((await task).token)
            except asyncio.CancelledError:
                got.append((await anext(stream)).token)
        return got

    assert run(collect()) == tokens(stream_generate(lm, PROMPT, SMALL, max_tokens=10))


# --- text and turns ---


def test_the_texts_of_the_steps_are_the_text(speaking):
    stream = stream_generate(speaking, "hé 😀 你", max_tokens=120, do_sample=True, temperature=2.0, top_k=0)
    steps = list(stream)
    decoded = speaking.tokenizer.decode(tokens(steps), skip_special_tokens=True)
    assert "".join(step.text for step in steps) == stream.text == decoded
    assert "" in [step.text for step in steps]


@pytest.mark.parametrize("policy", [Dense(), Sinks(3, 20), Recompute(30)], ids=str)
def test_turns_equal_everything_at_once(speaking, policy):
    stream = stream_generate(speaking, CHAT, policy, max_tokens=6, do_sample=True, temperature=0.5)
    first = "".join(step.text for step in stream)
    before = stream.tokens
    second = list(stream.reply("and 你好?"))
    messages = [*CHAT, {"role": "assistant", "content": first}, {"role": "user", "content": "and 你好?"}]
    written = speaking.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    told = stream.tokens[: -len(second)]
    assert torch.equal(told[: len(before)], before)
    assert speaking.tokenizer.decode(told) == written
    assert [step.index for step in second] == list(range(6))
    assert second[0].position == len(told)
    assert second[0].cache.last == len(told) - 1
    assert stream.text == "".join(step.text for step in second)
    once = next(stream_generate(speaking, told, policy, alternatives=261))
    p = {token: p for token, _, p in once.top}
    assert second[0].nll == pytest.approx(-math.log(p[second[0].token]), abs=1e-4)
    assert [q for _, _, q in second[0].top] == pytest.approx([p[token] for token, _, _ in second[0].top], rel=1e-3)


def test_only_new_tokens_are_fed(speaking):
    sizes = []
    stream = stream_generate(speaking, CHAT, Sinks(3, 20), max_tokens=4)
    list(stream)
    told = len(stream.tokens)
    hook = speaking.model.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    list(stream.reply("x"))
    hook.remove()
    suffix = len(speaking.tokenizer("<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n").input_ids)
    assert sizes == [suffix + 1, 1, 1, 1]  # the token chosen last had not been read
    assert len(stream.tokens) == told + suffix + 4
    list(stream.send("yz"))
    assert speaking.tokenizer.decode(stream.tokens[-6:-4]) == "yz"
    with pytest.raises(SqvizError, match="no chat, or no longer"):
        stream.reply("x")


def test_a_turn_that_ended_by_itself_is_closed_once(speaking):
    end = speaking.tokenizer.convert_tokens_to_ids("<|im_end|>")
    stream = stream_generate(speaking, CHAT, max_tokens=4, eos=[end])
    stream._sampler.choose = _always(stream._sampler, end)
    assert [step.text for step in stream] == [""]
    assert stream.ended == "eos"
    stream.reply("x")
    decoded = speaking.tokenizer.decode(stream.tokens)
    assert decoded.endswith("assistant\n<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n")


def _always(sampler, token):
    choose = sampler.choose
    return lambda logits: dataclasses.replace(choose(logits), token=token)


def test_a_reply_may_be_cut_inside_a_character(speaking):
    stream = stream_generate(speaking, CHAT)
    stream._sampler.choose = _always(stream._sampler, speaking.tokenizer("é").input_ids[0])
    assert next(stream).text == ""
    stream.cancel()
    assert list(stream) == []
    assert "assistant\n\ufffd<|im_end|>" in speaking.tokenizer.decode(stream.reply("x").tokens)


def test_a_template_may_trim_a_reply(speaking):
    trimming = byte_level(TEMPLATE.replace("m.content", "m.content | trim"))
    stream = stream_generate(speaking.replace(tokenizer=trimming), CHAT, max_tokens=2)
    stream._sampler.choose = _always(stream._sampler, trimming(" ").input_ids[0])
    assert "".join(step.text for step in stream) == "  "
    assert "assistant\n  <|im_end|>" in trimming.decode(stream.reply("x").tokens)


def test_a_template_that_rewrites_is_refused(speaking):
    newest = byte_level("<s>{{ messages[-1].content }}</s><s>")
    stream = stream_generate(speaking.replace(tokenizer=newest), CHAT, max_tokens=2)
    list(stream)
    before = stream.tokens
    with pytest.raises(SqvizError, match="rewrites earlier turns"):
        stream.reply("x")
    assert torch.equal(stream.tokens, before)
    assert len(list(stream.send("x"))) == 2


def test_a_cache_that_has_read_something(lm):
    cache = SinkCache(lm, SMALL)
    with torch.no_grad():
        lm.model(PROMPT[None, :5], past_key_values=cache)
    with stream_generate(lm, PROMPT[5:], cache=cache, max_tokens=6) as stream:
        steps = list(stream)
    assert tokens(steps) == tokens(stream_generate(lm, PROMPT, SMALL, max_tokens=6))
    assert steps[0].position == len(PROMPT)
    assert cache.close.alive  # it is not the stream's own
    assert stream_generate(lm, PROMPT[:1], SMALL, cache=cache).cache is cache


def test_the_hooks_go_with_the_stream(lm):
    before = len(lm.model.model._forward_hooks)
    with stream_generate(lm, PROMPT, max_tokens=3) as stream:
        assert len(lm.model.model._forward_hooks) == before + 1
        next(stream)
    assert len(lm.model.model._forward_hooks) == before
    with pytest.raises(SqvizError, match="cache of this stream is closed"):
        next(stream)


# --- the embedded model ---


@pytest.mark.embedded
def test_the_embedded_model_chats():
    lm = sqviz.load()
    with sqviz.stream_generate(lm, [{"role": "user", "content": "Write: 😀 你好"}], max_tokens=12) as stream:
        steps = list(stream)
        ids = stream.tokens
        prompt = ids[: -len(steps)]
        assert tokens(steps) == generated(lm, prompt, 12, past_key_values=DynamicCache(), max_length=None)[: len(steps)]
        assert "".join(step.text for step in steps) == lm.tokenizer.decode(tokens(steps), skip_special_tokens=True)
        told = {"role": "assistant", "content": stream.text}
        list(stream.reply("Why?"))
        chat = [{"role": "user", "content": "Write: 😀 你好"}, told, {"role": "user", "content": "Why?"}]
        written = lm.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert lm.tokenizer.decode(stream.tokens).startswith(written)

"""A stream of codes: what INT8 attention is handed is what the model gave, quantised once; the float route agrees."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import STREAMED, chunkings, error, feed, model, text
from torch import Tensor

import sqviz.streaming.cache as cache_module
import sqviz.streaming.layer as layer_module
from sqviz.models.lm import LM
from sqviz.observe.capture import capture
from sqviz.quant.int8_attention import codes_of, steps_of
from sqviz.quant.linear import quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA, SMOOTHQUANT_O1, SMOOTHQUANT_O2, SMOOTHQUANT_O3
from sqviz.streaming.cache import SinkCache
from sqviz.streaming.checkpoint import cache_tensors, fill_cache, fingerprint
from sqviz.streaming.layer import SinkLayer
from sqviz.streaming.policies import Dense, Policy, Sinks, Window
from sqviz.streaming.positions import angles, turn
from sqviz.streaming.storage import CodeStore, Int8Store

many = settings(deadline=None, derandomize=True, max_examples=25, database=None)
policies = st.one_of(
    st.builds(Sinks, st.integers(0, 4), st.integers(1, 14)), st.builds(Window, st.integers(1, 18)), st.just(Dense())
)
slacks = st.sampled_from([1, 3, 256])
ROUNDED = 0.51
"""Steps by which a value is off that was quantised once."""


def executed(name: str = "LlamaForCausalLM") -> LM:
    return quantize(model(name), SMOOTHQUANT_LLAMA, backend="auto", attention=True)


LLAMA = executed()
WITH_CODES = [
    name for name in STREAMED if not name.startswith(("Bloom", "GPTJ", "Mpt", "Falcon", "Gemma2", "Deepseek"))
]


@contextlib.contextmanager
def as_floats() -> Iterator[None]:
    """Inside, caches make floats of their codes, which the attention quantises anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_module, "uses_codes", lambda _: False)
        yield


class Watch:
    """Checks every `update` of a cache's layers against the very keys and values that the model gave."""

    def __init__(self) -> None:
        self.given: dict[SinkLayer, list[tuple[Tensor, Tensor]]] = {}
        self.bases: dict[SinkLayer, list[list[int]]] = {}
        """Of each column: where `base` was in each pass since it was written."""
        self.exact = self.turned = 0

    def update(self, original: Any, layer: SinkLayer, keys: Tensor, values: Tensor, *rest: Any) -> Any:
        now, given = layer.cache.now, self.given.setdefault(layer, [])
        found = original(layer, keys, values, *rest)
        given += [(keys[:, :, t], values[:, :, t]) for t in range(keys.shape[2])]
        bases = self.bases.setdefault(layer, [])
        bases += [[] for _ in range(keys.shape[2])]
        for column in bases:
            column.append(layer.base)
        sinks = now.taken * (now.new if now.each else 1)
        columns = range(layer.base + now.window, layer.base + now.end)
        for which, codes in enumerate(found):
            assert codes.dtype == torch.int8
            assert codes.shape[2] == sinks + len(columns)
            self.window(layer, which, columns, codes[:, :, sinks:], steps_of(codes)[:, :, sinks:])
            if now.taken:
                self.sinks(layer, which, now, codes[:, :, :sinks], steps_of(codes)[:, :, :sinks])
        return found

    def window(self, layer: SinkLayer, which: int, columns: range, codes: Tensor, steps: Tensor) -> None:
        """Values, and keys of a window that has not moved: to the bit. Moved keys were turned and rounded once more."""
        for at, column in enumerate(columns):
            states = self.given[layer][column][which]
            expected, step = codes_of(states[:, :, None], layer.stores[which]._backend)
            bases = self.bases[layer][column]
            moved, rounded = bases[-1] - bases[0], len(set(bases))
            if which == 1 or not moved:
                self.exact += 1
                assert torch.equal(codes[:, :, at], expected[:, :, 0])
                assert torch.equal(steps[:, :, at], step[:, :, 0])
            else:
                self.turned += 1
                exact = turned(layer, states, -moved)
                limit = 1.2 * step[:, :, 0, None] * ROUNDED * rounded * 2**0.5  # turning adds up two values' errors
                assert ((codes[:, :, at] * steps[:, :, at, None] - exact).abs() < limit).all()

    def sinks(self, layer: SinkLayer, which: int, now: Any, codes: Tensor, steps: Tensor) -> None:
        """The first keys of the text where `targets` has them, quantised once."""
        got = (codes * steps[..., None]).unflatten(2, (-1, now.taken))
        for query in range(got.shape[2]):
            for sink in range(now.taken):
                states = self.given[layer][sink][which]
                if which == 0:
                    target = int(now.targets[0, query if now.each else -1, sink])
                    states = turned(layer, states, target - (sink - self.bases[layer][sink][0]))
                step = states.abs().amax(-1, keepdim=True) / 127
                assert ((got[:, :, query, sink] - states).abs() <= ROUNDED * step + 1e-5).all()


def turned(layer: SinkLayer, states: Tensor, by: int) -> Tensor:
    """[batch head dim] so many positions further on."""
    assert layer.omega is not None
    return turn(states[:, :, None], angles(torch.tensor([by]), layer.omega, states.dtype), layer._pairs)[:, :, 0]


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPTNeoXForCausalLM"])
def test_window_codes_are_those_of_the_keys_that_the_model_gave(name: str):
    lm, watches = executed(name), []

    @many
    @given(policies, chunkings(20, 50), slacks)
    def agrees(policy: Policy, chunks: list[int], slack: int) -> None:
        watch, original = Watch(), SinkLayer.update
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_module, "SLACK", slack)
            patch.setattr(SinkLayer, "update", lambda *given: watch.update(original, *given))
            feed(lm, SinkCache(lm, policy, int8=True), text(sum(chunks), seed=len(chunks)), chunks)
        watches.append(watch)

    agrees()
    assert sum(watch.exact for watch in watches) > 1_000
    assert sum(watch.turned for watch in watches) > 100, "windows that moved were among them"


@many
@given(policies, chunkings(20, 50), slacks)
def test_floats_made_of_the_codes_lead_to_the_same(policy: Policy, chunks: list[int], slack: int):
    """The old route: the same codes come out, but for a step's last bit and what stands at a half."""
    ids = text(sum(chunks), seed=len(chunks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SLACK", slack)
        got = feed(LLAMA, SinkCache(LLAMA, policy, int8=True), ids, chunks)
        with as_floats():
            expected = feed(LLAMA, SinkCache(LLAMA, policy, int8=True), ids, chunks)
    assert error(got, expected) < 0.05


@pytest.mark.parametrize("name", WITH_CODES)
def test_every_architecture_that_has_int8_attention(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache_module, "SLACK", 3)
    lm, ids, chunks = executed(name), text(40), [12, 1, 1, 1, 9, *[1] * 16]
    cache = SinkCache(lm, Sinks(2, 9), int8=True)
    got = feed(lm, cache, ids, chunks)
    assert all(type(store) is CodeStore for layer in cache.layers for store in layer.stores)
    with as_floats():
        assert error(got, feed(lm, SinkCache(lm, Sinks(2, 9), int8=True), ids, chunks)) < 0.05


def test_latents_are_not_keys_so_mla_gets_floats():
    lm = executed("DeepseekV2ForCausalLM")
    cache = SinkCache(lm, Sinks(2, 9), int8=True)
    feed(lm, cache, text(20))
    assert all(type(store) is Int8Store for layer in cache.layers for store in layer.stores)


def test_a_batch_padded_on_the_left():
    """Against floats: alone, a row's keys stand elsewhere before they are rounded."""
    ids = torch.stack([torch.cat([torch.zeros(5, dtype=torch.long), text(9, 1)]), text(14, 2)])
    mask, found = (torch.arange(14)[None] >= torch.tensor([[5], [0]])).long(), []
    for route in (contextlib.nullcontext(), as_floats()):
        with route:
            cache = SinkCache(LLAMA, Sinks(2, 6), int8=True)
            first = feed(LLAMA, cache, ids, attention_mask=mask)[:, 5:]
            found.append(torch.cat([first, feed(LLAMA, cache, text(16, 3).view(2, 8), [1, 1, 6])], 1))
    assert error(*found) < 0.05


def test_beams_take_their_codes_along():
    ids = torch.stack([text(12, 1), text(12, 2)])
    cache, other = (SinkCache(LLAMA, Sinks(2, 6), int8=True) for _ in range(2))
    feed(LLAMA, cache, ids)
    cache.reorder_cache(torch.tensor([1, 0]))
    feed(LLAMA, other, ids.flip(0))
    assert torch.equal(feed(LLAMA, cache, text(2)[:, None]), feed(LLAMA, other, text(2)[:, None]))


def test_memory_does_not_grow():
    cache = SinkCache(LLAMA, Sinks(2, 30), int8=True)
    held = []
    for part in text(2400).split(400):
        feed(LLAMA, cache, part, [100] * 3 + [1] * 100)
        held.append((cache.bytes, [tensor.shape for store in cache.layers[0].stores for tensor in store.tensors]))
    assert held[1:] == held[:-1]
    assert cache.kept == 32


def test_a_stream_that_was_kept_goes_on_in_codes():
    ids, cache, other = text(40), *(SinkCache(LLAMA, Sinks(2, 9), int8=True) for _ in range(2))
    feed(LLAMA, cache, ids[:25])
    state = cache.state
    fill_cache(
        other,
        {name: tensor.clone() for name, tensor in cache_tensors(cache).items()},
        {"seen": state.seen, "base": state.base, "held": state.held, "pads": None, "length": cache.length, "rows": 1}
        | {"sinks": state.sinks.flatten().tolist(), "sink_shape": list(state.sinks.shape)},
    )
    assert all(type(store) is CodeStore for layer in other.layers for store in layer.stores)
    assert torch.equal(feed(LLAMA, other, ids[25:], [1] * 15), feed(LLAMA, cache, ids[25:], [1] * 15))


@pytest.mark.parametrize("head", [False, True], ids=["float head", "INT8 head"])
def test_a_kept_stream_of_another_quantisation_is_told_apart(head: bool):
    lm = model("LlamaForCausalLM")
    static = capture(lm, text(64), samples=1, length=64)
    schemes = (SMOOTHQUANT_LLAMA, SMOOTHQUANT_O1, SMOOTHQUANT_O2, SMOOTHQUANT_O3)
    made = [quantize(lm, scheme, static, "auto", head=head) for scheme in schemes]
    other = lm.replace(model=copy.deepcopy(lm.model))
    other.model.model.layers[1].mlp.down_proj.weight.data.neg_()  # no parameter left of it, and the same note
    made += [quantize(other, SMOOTHQUANT_LLAMA, backend="auto", head=head)]
    made += [quantize(lm, SMOOTHQUANT_LLAMA, backend="auto", head=head, attention=True), lm]
    assert len({fingerprint(each) for each in made}) == len(made)
    assert fingerprint(made[0]) == fingerprint(quantize(lm, SMOOTHQUANT_LLAMA, backend="auto", head=head))

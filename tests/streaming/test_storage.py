"""Keys and values as INT8: each number against a loop, and the whole cache against one that rounds what it is given."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sqviz_kernels.dispatch import best
from streams import STREAMED, error, feed, model, text
from transformers import DynamicCache

import sqviz.streaming.cache as cache_module
import sqviz.streaming.layer as layer_module
from sqviz.errors import NonFinite
from sqviz.quant.int8_attention import steps_of
from sqviz.quant.linear import quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA
from sqviz.streaming.cache import SinkCache
from sqviz.streaming.perplexity import streaming_perplexity
from sqviz.streaming.policies import Dense, Sinks
from sqviz.streaming.storage import CodeStore, Int8Store, Store

LLAMA = model("LlamaForCausalLM")
MOVING = ["LlamaForCausalLM", "GPTNeoXForCausalLM", "BloomForCausalLM", "DeepseekV2ForCausalLM"]
few = settings(deadline=None, derandomize=True, max_examples=20, database=None)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Each token and head by itself, in float32, in the dtype of the tensor."""
    flat = x.float().flatten(0, -2)
    for row in flat:
        step = row.abs().max() / 127
        if step > 0:
            row[:] = torch.stack([(value / step).round() for value in row]) * step
    return flat.view(x.shape).to(x.dtype)


class RoundingCache(DynamicCache):
    """A dense cache that rounds every key and value that it is given."""

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(rounded(key_states), rounded(value_states), *args, **kwargs)


@few
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 3),
)
def test_what_is_read_is_what_a_loop_rounds_to(shape, dtype, start):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    x[0, 0, 0] = 0
    store = Int8Store(x, 8)
    store.write(start, x)
    got = store.read(start, start + shape[2])
    assert got.dtype == dtype
    assert torch.equal(got, rounded(x))
    assert not store.read(start + shape[2], 8).any()
    picked = store.pick(torch.tensor([shape[0] - 1]), torch.tensor([start]))
    assert torch.equal(picked[0].to(dtype), got[-1, :, 0])


@pytest.mark.parametrize("kind", [Store, Int8Store, CodeStore])
def test_copies_rows_and_parts(kind):
    x = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    store = kind(x, 7)
    store.write(1, x)
    other = store.empty(9)
    assert (type(other), other.length, other.dtype) == (kind, 9, x.dtype)
    other.copy(4, store, 2, 5)
    assert torch.equal(other.read(4, 7), store.read(2, 5))
    again = kind(x, 0)
    again.load([part.clone() for part in store.tensors])
    again.reorder(torch.tensor([2, 0]))
    assert torch.equal(again.read(0, 7), store.read(0, 7)[[2, 0]])


@pytest.mark.parametrize("name", STREAMED)
def test_nothing_but_the_rounding(name: str):
    """Rotary keys are rounded after they were turned, as in the other cache, where both have the same position."""
    lm, ids = model(name), text(30)
    expected = feed(lm, RoundingCache(config=lm.config), ids, [12, 1, 1, 16])
    assert error(feed(lm, SinkCache(lm, Dense(), int8=True), ids, [12, 1, 1, 16]), expected) < 1e-4


@pytest.mark.parametrize("name", MOVING)
@pytest.mark.parametrize("chunks", [[1] * 80, [33, 1, 1, 45]], ids=["steps", "chunks"])
def test_a_window_that_moves_stays_close(name: str, chunks: list[int], monkeypatch):
    """Keys that are turned back are rounded once more; the error stays that of rounding them once."""
    monkeypatch.setattr(cache_module, "SLACK", 3)
    lm, ids, off = model(name), text(80), {}
    for policy in (Dense(), Sinks(2, 9)):
        exact, got = (feed(lm, SinkCache(lm, policy, int8=int8), ids, chunks) for int8 in (False, True))
        off[policy] = [(a - b).abs().mean() / b.abs().mean() for a, b in ((got, exact), (got[40:], exact[40:]))]
    assert 0 < off[Sinks(2, 9)][0] < 1.5 * off[Dense()][0]
    assert off[Sinks(2, 9)][1] < 2 * off[Dense()][1]


def test_sinks_are_kept_as_they_were_computed():
    plain, int8 = (SinkCache(LLAMA, Sinks(2, 9), int8=int8) for int8 in (False, True))
    for cache in (plain, int8):
        feed(LLAMA, cache, text(2))
    for which in (0, 1):  # in the first layer; later ones have seen rounded keys
        assert torch.equal(int8.layers[0].sinks[which], plain.layers[0].sinks[which])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPTNeoXForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("chunks", [[1] * 60, [33, 1, 1, 25]], ids=["steps", "chunks"])
def test_int8_attention_reads_the_codes_as_they_lie(name: str, chunks: list[int], monkeypatch):
    """Floats made of the codes and quantised again are the same codes, up to a step's last bit."""
    monkeypatch.setattr(cache_module, "SLACK", 3)
    lm, ids = quantize(model(name), SMOOTHQUANT_LLAMA, backend="auto", attention=True), text(60)
    codes = SinkCache(lm, Sinks(2, 9), int8=True)
    got = feed(lm, codes, ids, chunks)
    assert all(type(store) is CodeStore for layer in codes.layers for store in layer.stores)
    monkeypatch.setattr(layer_module, "uses_codes", lambda _: False)
    floats = SinkCache(lm, Sinks(2, 9), int8=True)
    expected = feed(lm, floats, ids, chunks)
    assert all(type(store) is Int8Store for layer in floats.layers for store in layer.stores)
    assert error(got, expected) < 0.02  # a code that stands at a half may go the other way
    assert ((got - expected).abs().amax(-1) < 1e-4).float().mean() > 0.7
    for mine, its in zip(codes.layers[0].stores, floats.layers[0].stores, strict=True):
        there, mine_there = its.read(0, its.length), mine.read(0, mine.length)
        stop = int(there.abs().amax((0, 1, 3)).nonzero().max()) + 1
        window = slice(stop - 9, stop)  # before it, sinks stand where floats leave what was there
        assert (mine_there - there)[:, :, window].abs().max() < 1e-5


def test_codes_of_sinks_stand_before_those_of_the_window():
    x = torch.randn(2, 3, 6, 8, generator=torch.Generator().manual_seed(1))
    for backend in (None, best(torch.device("cpu"))):
        store, own = CodeStore(x, 9, backend=backend), torch.full((2, 3, 2, 8), 0.5)
        store.write(3, x)
        window = store.attended(3, 9)
        assert torch.equal(window * steps_of(window)[..., None], rounded(x))
        both = store.join(own, window)
        assert torch.equal(both[:, :, 2:], window)
        assert torch.equal(steps_of(both)[:, :, 2:], steps_of(window))
        assert torch.equal(both[:, :, :2] * steps_of(both)[:, :, :2, None], own)
        found = store.attended(1, 9)
        store.put(own, found)
        assert torch.equal(found, both)
        assert torch.equal(steps_of(found), steps_of(both))


def test_a_quarter_of_the_memory():
    lm = model("LlamaForCausalLM", head_dim=64)
    plain, int8 = (SinkCache(lm, Sinks(2, 500), int8=int8) for int8 in (False, True))
    for cache in (plain, int8):
        feed(lm, cache, text(600))
    assert int8.bytes / plain.bytes == pytest.approx((64 + 4) / 256, rel=0.02)


def test_a_key_that_is_no_number_is_refused_and_the_stream_goes_on(monkeypatch):
    cache, ids = SinkCache(LLAMA, Sinks(2, 5), int8=True), text(20)
    expected = feed(LLAMA, SinkCache(LLAMA, Sinks(2, 5), int8=True), ids, [9, 11])
    got = [feed(LLAMA, cache, ids[:9])]
    with monkeypatch.context() as patch:
        weight = LLAMA.model.model.layers[1].self_attn.k_proj.weight
        patch.setattr(weight, "data", weight.data * torch.nan)
        with pytest.raises(NonFinite):
            feed(LLAMA, cache, ids[9:])
    assert cache.get_seq_length() == 9
    got.append(feed(LLAMA, cache, ids[9:]))
    assert torch.equal(torch.cat(got), expected)


def test_a_stopped_run_goes_on(tmp_path):
    ids, file = text(60), tmp_path / "run.safetensors"
    whole = streaming_perplexity(LLAMA, ids, Sinks(2, 9), block=8, int8=True)

    def stop(read, _):
        if read > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        streaming_perplexity(LLAMA, ids, Sinks(2, 9), block=8, int8=True, checkpoint=file, on_block=stop)
    rest = streaming_perplexity(LLAMA, ids, Sinks(2, 9), block=8, int8=True, checkpoint=file)
    assert torch.equal(rest.nll, whole.nll)
    assert not torch.equal(whole.nll, streaming_perplexity(LLAMA, ids, Sinks(2, 9), block=8).nll)

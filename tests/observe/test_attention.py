"""Attention maps against what eager attention hands out by itself, averaged, pooled, saved."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sqviz
from sqviz.errors import Cancelled, NonFinite, SqvizError, TextTooShort
from sqviz.models.tiny import TINY, tiny
from sqviz.observe import attention
from sqviz.observe.attention import SINKS, AttentionMaps, attention_maps, head_scores
from sqviz.observe.attention_tap import Tap

IDS = torch.randint(3, 131, (96,), generator=torch.Generator().manual_seed(0))
LLAMA = tiny("LlamaForCausalLM")


def eager(name: str, ids: torch.Tensor, **overrides) -> torch.Tensor:
    """[layer head query key] probabilities, as the model gives them when it is asked for them."""
    lm = tiny(name, attn_implementation="eager", **overrides)
    with torch.no_grad():
        found = lm.model(input_ids=ids[None], use_cache=False, output_attentions=True).attentions
    return torch.stack([layer[0] for layer in found]).float()


def hooks(lm) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith("Falcon")])
def test_probabilities_are_those_of_eager_attention(name: str):
    got = attention_maps(tiny(name), IDS[:24], sentences=None, logits=False)
    assert torch.allclose(got.maps.nan_to_num(0), eager(name, IDS[:24]), atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TINY if name.startswith("Falcon")])
def test_falcons_scores_give_its_output(name: str):
    """Its eager attention adds ALiBi twice, so it is no yardstick: the scores have to give what its sdpa gives."""
    lm, outputs, got = tiny(name), [], []
    original = torch.nn.functional.scaled_dot_product_attention

    class Outputs(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if func is original:
                outputs.append((args[2], found))
            return found

    def see(scores) -> None:
        got.append(torch.cat([part for _, part in scores.lots(5)], 2))

    with torch.no_grad(), Outputs(), Tap(lm, see):
        lm.model(input_ids=IDS[None, :12], use_cache=False)
    assert len(got) == len(outputs) == lm.config.num_hidden_layers
    for scores, (value, found) in zip(got, outputs, strict=True):
        value = value.repeat_interleave(scores.shape[1] // value.shape[1], 1)
        assert torch.allclose(scores.softmax(-1) @ value, found, atol=1e-5)


def test_logits_are_queries_times_keys():
    """Of the first layer of a GPT-2, whose positions are in the embedding, from its weights."""
    lm = tiny("GPT2LMHeadModel")
    got = attention_maps(lm, IDS[:9], sentences=None)
    block = lm.model.transformer.h[0]
    with torch.no_grad():
        x = block.ln_1(lm.model.transformer.wte(IDS[:9]) + lm.model.transformer.wpe(torch.arange(9)))
        q, k, _ = block.attn.c_attn(x).split(x.shape[-1], -1)
    heads = lm.config.n_head
    for head in range(heads):
        here = slice(head * x.shape[-1] // heads, (head + 1) * x.shape[-1] // heads)
        for t in range(9):
            for j in range(9):
                expected = (
                    q[t, here] @ k[j, here] / (x.shape[-1] // heads) ** 0.5 if j <= t else torch.tensor(torch.nan)
                )
                assert torch.allclose(got.maps[0, head, t, j], expected, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "MistralForCausalLM"])
def test_averages_are_means_of_single_maps(name: str, logits: bool, monkeypatch):
    monkeypatch.setattr(attention, "TOKENS_PER_PASS", 40)
    lm = tiny(name)
    many = attention_maps(lm, IDS, sentences=6, length=16, logits=logits)
    single = [attention_maps(lm, IDS[16 * k : 16 * k + 16], sentences=None, logits=logits) for k in range(6)]
    for field in ("maps", "share", "entropy", "norms"):
        expected = torch.stack([getattr(one, field) for one in single]).mean(0)
        assert torch.allclose(getattr(many, field), expected, atol=1e-5, equal_nan=True), field
    assert (many.sentences, many.length, many.cell) == (6, 16, 1)


@settings(deadline=None, derandomize=True, max_examples=15, database=None)
@given(st.integers(1, 60), st.integers(1, 20), st.booleans(), st.integers(1, 30))
def test_pooled_maps_keep_every_maximum(length: int, cells: int, logits: bool, lot: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LOT", lot)
        got = attention_maps(LLAMA, IDS[:length], sentences=None, logits=logits, cells=cells)
    full = attention_maps(LLAMA, IDS[:length], sentences=None, logits=logits, cells=length)
    size = -(-length // got.cell)
    assert got.maps.shape[2:] == (size, size)
    assert size <= cells
    for row in range(size):
        for column in range(size):
            area = full.maps[:, :, row * got.cell : (row + 1) * got.cell, column * got.cell : (column + 1) * got.cell]
            expected = area.nan_to_num(-torch.inf).amax((2, 3))
            assert torch.allclose(got.maps[:, :, row, column].nan_to_num(-torch.inf), expected, atol=1e-6)


@pytest.mark.parametrize("length", [1, 3, 5, 24])
def test_share_and_entropy_by_the_definition(length: int):
    got = attention_maps(LLAMA, IDS[:length], sentences=None)
    chances = eager("LlamaForCausalLM", IDS[:length])
    first = min(SINKS, length - 1)
    for layer in range(got.layers):
        for head in range(got.heads):
            rows = [chances[layer, head, t, : t + 1] for t in range(first, length)]
            share = sum(torch.nn.functional.pad(row, (0, length - len(row))) for row in rows) / len(rows)
            assert torch.allclose(got.share[layer, head], share, atol=1e-5)
            entropy = -sum(float((row * row.clamp(min=1e-30).log()).sum()) for row in rows) / len(rows)
            assert float(got.entropy[layer, head]) == pytest.approx(entropy, abs=1e-4)
    assert torch.allclose(got.share.sum(-1), torch.ones(got.layers, got.heads), atol=1e-5)
    assert torch.allclose(got.sink_mass(2), got.share[:, :, :2].sum(-1))


def test_norms_are_the_largest_values_behind_each_layer():
    got = attention_maps(LLAMA, IDS[:12], sentences=None)
    with torch.no_grad():
        hidden = LLAMA.model(input_ids=IDS[None, :12], output_hidden_states=True).hidden_states
    assert torch.allclose(got.norms[0], hidden[1][0].abs().amax(-1), atol=1e-6)  # the last one is behind the norm


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "DeepseekV2ForCausalLM"])
@pytest.mark.parametrize("logits", [True, False])
def test_one_head_token_by_token(name: str, logits: bool):
    lm, before = tiny(name), hooks(tiny(name))
    maps = attention_maps(lm, IDS[:20], sentences=None, logits=logits, cells=20).maps
    for layer in range(len(maps)):
        got = head_scores(lm, IDS[:20], layer, 1, logits=logits)
        kept = ~torch.isnan(maps[layer, 1])
        assert torch.allclose(got[kept], maps[layer, 1][kept], atol=1e-6)
        assert (got[~kept] == (-torch.inf if logits else 0)).all()
    assert hooks(lm) == before
    with pytest.raises(SqvizError, match="no layer 9"):
        head_scores(lm, IDS[:20], 9, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "BloomForCausalLM", "Gemma2ForCausalLM"])
def test_half_precision_and_its_masks(name: str, dtype: torch.dtype):
    exact = attention_maps(tiny(name), IDS[:24], sentences=None)
    got = attention_maps(tiny(name, dtype=dtype), IDS[:24], sentences=None)
    assert torch.equal(torch.isnan(got.maps), torch.isnan(exact.maps))
    assert torch.isfinite(got.entropy).all()
    assert (got.share - exact.share).abs().max() < 0.05


def test_a_sliding_window_is_blank_beyond_it():
    lm = tiny("MistralForCausalLM", sliding_window=5)
    got = attention_maps(lm, IDS[:20], sentences=None)
    t, j = torch.arange(20)[:, None], torch.arange(20)[None]
    assert torch.equal(~torch.isnan(got.maps[0, 0]), (j <= t) & (j > t - 5))


def test_saved_and_loaded(tmp_path):
    file = tmp_path / "maps.safetensors"
    maps = attention_maps(LLAMA, IDS, sentences=3, length=16, logits=False)
    maps.save(file)
    again = AttentionMaps.load(file)
    for name in ("maps", "share", "entropy", "norms", "tokens"):
        assert torch.allclose(getattr(again, name), getattr(maps, name), equal_nan=True, atol=0)
    assert (again.logits, again.cell, again.sentences, again.model) == (False, 1, 3, maps.model)
    assert again.token_texts == maps.token_texts
    assert "probabilities over 3 x 16 tokens" in repr(again)
    kept = file.read_bytes()
    file.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(SqvizError, match="damaged"):
        AttentionMaps.load(file)
    file.write_bytes(kept.replace(b'"version":"1"', b'"version":"7"'))
    with pytest.raises(SqvizError, match="is sqviz-attention 7"):
        AttentionMaps.load(file)
    with pytest.raises(FileNotFoundError):
        AttentionMaps.load(tmp_path / "none")


def test_nothing_is_left_on_the_model_whatever_happens(monkeypatch):
    before = hooks(LLAMA)
    token = sqviz.CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        attention_maps(LLAMA, IDS, sentences=2, length=16, cancel=token)
    with monkeypatch.context() as patch:
        weight = LLAMA.model.model.layers[1].self_attn.q_proj.weight
        patch.setattr(weight, "data", weight.data * torch.nan)
        with pytest.raises(NonFinite, match="layer 1"):
            attention_maps(LLAMA, IDS, sentences=2, length=16)
    assert hooks(LLAMA) == before
    ids = IDS[None, :9]
    with torch.no_grad():
        assert torch.equal(LLAMA.model(input_ids=ids).logits, tiny("LlamaForCausalLM").model(input_ids=ids).logits)


def test_another_thread_on_the_same_model_changes_nothing():
    expected, stop = attention_maps(LLAMA, IDS, sentences=6, length=16), threading.Event()

    def others() -> None:
        with torch.no_grad():
            while not stop.is_set():
                LLAMA.model(input_ids=IDS[None, :7], use_cache=False)

    thread = threading.Thread(target=others)
    thread.start()
    try:
        for _ in range(10):
            got = attention_maps(LLAMA, IDS, sentences=6, length=16)
            for field in ("maps", "share", "norms"):
                assert torch.equal(getattr(got, field).nan_to_num(9), getattr(expected, field).nan_to_num(9)), field
    finally:
        stop.set()
        thread.join()


def test_a_layer_without_softmax_attention_is_named(monkeypatch):
    lm = tiny("LlamaForCausalLM")

    def linear(hidden_states, *_, **__):
        return hidden_states, None

    monkeypatch.setattr(lm.model.model.layers[1].self_attn, "forward", linear)
    with pytest.raises(SqvizError, match="no softmax attention to be seen in block 1 of 2"):
        attention_maps(lm, IDS, sentences=2, length=16)


def test_one_token_and_one_text_of_some_length():
    one = attention_maps(LLAMA, IDS[:1], sentences=None)
    assert one.maps.shape[2:] == (1, 1)
    assert torch.equal(one.share, torch.ones_like(one.share))
    assert torch.equal(one.entropy, torch.zeros_like(one.entropy))
    assert one.heatmap(LLAMA).to_png()
    seven = attention_maps(LLAMA, IDS, sentences=None, length=7)
    assert torch.equal(seven.maps.nan_to_num(9), attention_maps(LLAMA, IDS[:7], sentences=None).maps.nan_to_num(9))
    trained = LLAMA.config.max_position_embeddings
    assert attention_maps(LLAMA, IDS.repeat(9), sentences=None, length=10**6).length == trained


def test_bad_input():
    with pytest.raises(TextTooShort):
        attention_maps(LLAMA, IDS[:9], sentences=2, length=16)
    with pytest.raises(SqvizError, match="length=0"):
        attention_maps(LLAMA, IDS, length=0)
    with pytest.raises(TextTooShort):
        attention_maps(LLAMA, IDS[:0], sentences=None)
    with pytest.raises(SqvizError, match="cells=0"):
        attention_maps(LLAMA, IDS, cells=0)
    with pytest.raises(SqvizError, match="sentences=0"):
        attention_maps(LLAMA, IDS, sentences=0)

"""Kept sinks: what follows is what follows the same tokens written out in front of it."""

import pytest
import torch

import sqviz
from sqviz.errors import SqvizError
from sqviz.models.linears import groups
from sqviz.models.tiny import TINY, tiny
from sqviz.observe.hooks import activations
from sqviz.quant.kept_sinks import _candidates, choose_sinks, sinks_of

TEXT = torch.arange(96) * 37 % 131
SINKS = torch.tensor([7, 90, 3])


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_logits_are_those_behind_the_tokens_written_out(name):
    lm = tiny(name)
    kept = sqviz.keep_sinks(lm, SINKS)
    ids = torch.stack([TEXT[:20], TEXT[20:40]])
    expected = lm.model(torch.cat([SINKS.expand(2, 3), ids], 1)).logits[:, 3:]
    torch.testing.assert_close(kept.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kept.model(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "OPTForCausalLM", "BloomForCausalLM", "GPTNeoXForCausalLM"])
@torch.no_grad()
def test_cached_steps_and_padded_batches(name):
    lm = tiny(name)
    kept = sqviz.keep_sinks(lm, SINKS)
    ids = TEXT[None, :24]
    whole = kept.model(ids).logits
    cache, parts = None, []
    for some in ids.split(7, 1):
        out = kept.model(some, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    mask = torch.tensor([[0] * 5 + [1] * 24])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    extra = {} if name.startswith(("OPT", "Bloom")) else {"position_ids": positions}
    padded = kept.model(torch.cat([ids.new_zeros(1, 5), ids], 1), attention_mask=mask, **extra).logits[:, 5:]
    torch.testing.assert_close(padded, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generate_goes_on_behind_the_sinks():
    lm = tiny("LlamaForCausalLM")
    kept = sqviz.keep_sinks(lm, SINKS)
    got = kept.model.generate(TEXT[None, 1:7], max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
    ids = TEXT[None, 1:7]
    for _ in range(9):
        logits = lm.model(torch.cat([SINKS[None], ids], 1)).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, ids)


def test_the_model_is_left_alone_and_capture_does_not_see_the_sinks():
    lm = tiny("LlamaForCausalLM")
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    kind = type(lm.model.model)
    kept = sqviz.keep_sinks(lm, SINKS)
    m = sqviz.capture(kept, TEXT, length=48, progress=False)
    assert m.tokens.tolist() == TEXT.tolist()
    assert len(m.inputs[m.names[0]].token_absmax) == len(TEXT)
    assert type(lm.model.model) is kind
    assert sinks_of(lm) is None
    assert sinks_of(kept).tolist() == SINKS.tolist()
    assert all(torch.equal(value, before[key]) for key, value in lm.model.state_dict().items())
    assert kept.model.state_dict().keys() == before.keys()
    assert all(a is b for a, b in zip(kept.model.parameters(), lm.model.parameters(), strict=True))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "OPTForCausalLM"])
@torch.no_grad()
def test_smoothing_keeps_the_sinks_true(name):
    """The value fold rescales what the cache holds: the kept values follow."""
    lm = tiny(name)
    kept = sqviz.keep_sinks(lm, SINKS)
    smooth = sqviz.smooth(kept, sqviz.capture(kept, TEXT, length=48, progress=False), 0.6, folds="all")
    ids = TEXT[None, :20]
    torch.testing.assert_close(smooth.model(ids).logits, kept.model(ids).logits, rtol=1e-3, atol=1e-3)
    bare = sqviz.non_scaling_norms(kept)
    torch.testing.assert_close(bare.model(ids).logits, kept.model(ids).logits, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["simulate", "auto"])
def test_quantising_leaves_the_sinks_in_full_precision(backend):
    lm = tiny("LlamaForCausalLM")
    kept = sqviz.keep_sinks(lm, SINKS)
    m = sqviz.capture(kept, TEXT, length=48, progress=False)
    q = sqviz.quantize(kept, sqviz.SMOOTHQUANT_O3, m, backend=backend)
    for layer in range(lm.config.num_hidden_layers):
        for kind in ("key", "value"):
            name = f"sink_{kind}_{layer}"
            assert torch.equal(getattr(q.model.model, name), getattr(kept.model.model, name))
    assert bool(q.model(TEXT[None, :20]).logits.isfinite().all())


def test_sinks_are_chosen_greedily_among_those_that_lower_the_largest_inputs():
    """Against the loop that reads kept tokens and texts together, also texts that a tried token begins."""
    lm = tiny("LlamaForCausalLM")
    found = choose_sinks(lm, TEXT, samples=1, length=96)
    assert 1 <= len(found) <= 4
    tried = _candidates(lm, TEXT[None])
    begun = [torch.cat([one, TEXT[1:]]) for one in tried.split(1)]

    def height(tokens, texts):
        tallest = []
        for group in groups(lm):
            inputs = [activations(lm, torch.cat([tokens, text]), [group.name])[group.name] for text in texts]
            tallest.append(float(max(x[len(tokens) :].abs().max() for x in inputs)))
        return sum(tallest) / len(tallest)

    def nll(tokens):
        with torch.no_grad():
            chances = lm.model(torch.cat([tokens, TEXT])[None]).logits[0, len(tokens) :].double().log_softmax(-1)
        return -sum(float(chances[place, TEXT[place + 1]]) for place in range(95)) / 95

    expected, best = torch.empty(0, dtype=torch.int64), float("inf")
    while len(expected) < 4:
        texts = [TEXT, *begun] if len(expected) else [TEXT]
        if len(expected) == 1:
            best = height(expected, texts)
        longer = [torch.cat([expected, one]) for one in tried.split(1)]
        heights = [height(tokens, texts) for tokens in longer]
        if min(heights) > 0.95 * best:
            break
        near = [tokens for tokens, one in zip(longer, heights, strict=True) if one <= min(heights) / 0.95]
        expected, best = min(near, key=nll), min(heights)
    assert found.tolist() == expected.tolist()


@pytest.mark.embedded
def test_a_text_begun_by_a_kept_token_makes_no_sink_of_it():
    """One kept comma leaves the comma that begins a text as large as it was: it sees nothing but commas."""
    lm = sqviz.load()
    found = choose_sinks(lm, samples=4, length=48)
    name = "model.layers.11.mlp.down_proj"
    text = sqviz.text().tokens(lm.tokenizer, limit=64)

    def largest(sinks, first):
        ids = torch.cat([torch.tensor(sinks, dtype=torch.int64), torch.tensor([first]), text[1:]])
        return float(activations(lm, ids, [name])[name][len(sinks) :].abs().max())

    for token in found.tolist():
        assert largest([token], token) > 1000
        assert largest(found.tolist(), token) < 100
    assert largest(found.tolist(), int(text[0])) < 100
    assert largest([], int(text[0])) > 1000


def test_what_would_lose_or_miscount_the_sinks_is_refused(tmp_path):
    kept = sqviz.keep_sinks(tiny("LlamaForCausalLM"), SINKS)
    with pytest.raises(SqvizError, match="made from"):
        sqviz.SinkCache(kept, sqviz.Sinks(2, 16))
    q = sqviz.quantize(kept, sqviz.SMOOTHQUANT_LLAMA, backend="auto")
    with pytest.raises(SqvizError, match="keeps sinks"):
        sqviz.save_int8(q, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [[], [131], [-1], [[1, 2]]])
def test_bad_tokens_are_refused(tokens):
    with pytest.raises(SqvizError, match="tokens"):
        sqviz.keep_sinks(tiny("LlamaForCausalLM"), tokens)


def test_twice_and_with_foreign_masks_is_refused():
    kept = sqviz.keep_sinks(tiny("LlamaForCausalLM"), SINKS)
    with pytest.raises(SqvizError, match="already"):
        sqviz.keep_sinks(kept, SINKS)
    with pytest.raises(SqvizError, match="dimensions"):
        kept.model(TEXT[None, :4], attention_mask=torch.ones(1, 1, 4, 4))

"""Perplexity against a slow implementation: one token at a time, one segment at a time, in float64."""

import math

import pytest
import torch
from torch import nn

from sqviz.errors import Cancelled, NonFinite, NoTokenizer, SqvizError, TextTooShort
from sqviz.evaluation import perplexity as module
from sqviz.evaluation.perplexity import perplexity, segment_nll
from sqviz.models.lm import LM
from sqviz.models.tiny import tiny
from sqviz.progress import CancelToken
from sqviz.quant.linear import quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA, W8A8

IDS = torch.randint(3, 131, (101,), generator=torch.Generator().manual_seed(3))


def slow(lm, ids, length):
    """Every prediction from a forward pass of its own, over exactly the tokens before it in its segment."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - length + 1, length):
        segment = ids[start : start + length]
        for position in range(1, length):
            with torch.no_grad():
                logits = lm.model(segment[None, :position], use_cache=False).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[segment[position]])
            count += 1
    assert count == len(ids) // length * (length - 1)
    return math.exp(total / count)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "CohereForCausalLM", "GPT2LMHeadModel"])
def test_equals_one_token_at_a_time(name):
    lm = tiny(name)  # Gemma 2 caps its logits, Cohere scales them
    assert perplexity(lm, IDS, 25) == pytest.approx(slow(lm, IDS, 25), rel=1e-4)


def test_equals_one_token_at_a_time_when_quantised_per_token():
    lm = quantize(tiny("LlamaForCausalLM"), SMOOTHQUANT_LLAMA)
    assert perplexity(lm, IDS, 20) == pytest.approx(slow(lm, IDS, 20), rel=1e-3)


def test_the_tail_is_dropped_and_segments_are_independent():
    lm = tiny("LlamaForCausalLM")
    assert perplexity(lm, IDS, 30) == perplexity(lm, IDS[:90], 30)
    assert perplexity(lm, IDS[:99], 30) == perplexity(lm, IDS[:90], 30)
    parts = list(segment_nll(lm, IDS, 30))
    assert [part.shape for part in parts] == [(29,)] * 3
    for k, part in enumerate(parts):
        torch.testing.assert_close(part, next(segment_nll(lm, IDS[30 * k : 30 * k + 30], 30)))
    assert perplexity(lm, IDS, 30) == pytest.approx(float(torch.cat(parts).double().mean().exp()))
    swapped = torch.cat([IDS[30:60], IDS[:30], IDS[60:]])
    assert perplexity(lm, swapped, 30) == pytest.approx(perplexity(lm, IDS, 30), rel=1e-6)


def test_a_uniform_model_has_the_size_of_its_vocabulary():
    lm = tiny("LlamaForCausalLM")
    with torch.no_grad():
        lm.model.lm_head.weight.zero_()
    assert perplexity(lm, IDS, 25) == pytest.approx(131, rel=1e-5)


@pytest.mark.parametrize("positions", [1, 7, 24, 25, 1000])
def test_widening_in_pieces_changes_nothing(positions, monkeypatch):
    lm = tiny("LlamaForCausalLM")
    expected = perplexity(lm, IDS, 25)
    monkeypatch.setattr(module, "POSITIONS", positions)
    assert perplexity(lm, IDS, 25) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch", [2, 3, 4, 50])
def test_batches_score_the_same_segments(batch):
    lm = tiny("LlamaForCausalLM")
    one, many = list(segment_nll(lm, IDS, 25)), list(segment_nll(lm, IDS, 25, batch=batch))
    assert len(one) == len(many) == 4
    torch.testing.assert_close(torch.stack(many), torch.stack(one), rtol=1e-4, atol=1e-4)


def test_half_precision_is_summed_in_float32():
    lm = tiny("LlamaForCausalLM", dtype=torch.bfloat16)
    assert next(segment_nll(lm, IDS, 25)).dtype == torch.float32
    assert perplexity(lm, IDS, 25) == pytest.approx(slow(lm, IDS, 25), rel=0.05)


def test_model_and_gradient_mode_are_left_alone():
    lm = tiny("LlamaForCausalLM")
    before = {key: tensor.clone() for key, tensor in lm.model.state_dict().items()}
    for nll in segment_nll(lm, IDS, 25):
        assert torch.is_grad_enabled()
        assert not nll.requires_grad
    assert all(torch.equal(tensor, before[key]) for key, tensor in lm.model.state_dict().items())


class Spelling:
    """A tokenizer of one token per letter."""

    def __call__(self, text, add_special_tokens=True, **_):
        assert not add_special_tokens
        return {"input_ids": [3 + ord(letter) % 100 for letter in text]}


def test_text_is_accepted():
    lm = tiny("LlamaForCausalLM").replace(tokenizer=Spelling())
    words = "the quick brown fox jumps over the lazy dog " * 3
    ids = torch.tensor([3 + ord(letter) % 100 for letter in words])
    assert perplexity(lm, words, 32) == perplexity(lm, ids, 32)


# --- bad input ---


def test_too_short():
    lm = tiny("LlamaForCausalLM")
    with pytest.raises(TextTooShort, match="24"):
        perplexity(lm, IDS[:24], 25)
    assert perplexity(lm, IDS[:25], 25) > 1
    with pytest.raises(NoTokenizer):
        perplexity(lm, "some text", 4)


@pytest.mark.parametrize("arguments", [{"length": 1}, {"length": 0}, {"length": 2.5}, {"batch": 0}, {"batch": True}])
def test_bad_arguments_are_named_before_any_work(arguments):
    lm = tiny("LlamaForCausalLM")
    (name,) = arguments
    for function in (perplexity, segment_nll):
        with pytest.raises(SqvizError, match=f"{name}="):
            function(lm, IDS, **arguments)


def test_longer_than_the_model_can_take():
    with pytest.raises(SqvizError, match="96 positions"):
        perplexity(tiny("OPTForCausalLM"), IDS, 100)


def test_nan_logits():
    lm = tiny("LlamaForCausalLM")
    with torch.no_grad():
        lm.model.lm_head.weight[7, 0] = torch.nan
    with pytest.raises(NonFinite, match=r"tiny/LlamaForCausalLM gave NaN"):
        perplexity(lm, IDS, 25)


def test_a_hopeless_model_has_infinite_perplexity():
    lm = tiny("LlamaForCausalLM")
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(1e4)
    assert perplexity(lm, IDS, 25) == math.inf


def test_cancel():
    lm = tiny("LlamaForCausalLM")
    cancel = CancelToken()
    seen = []
    with pytest.raises(Cancelled):
        for nll in segment_nll(lm, IDS, 25, cancel=cancel):
            seen.append(nll)
            cancel.cancel()
    assert len(seen) == 1
    with pytest.raises(Cancelled):
        perplexity(lm, IDS, 25, cancel=cancel)
    assert torch.is_grad_enabled()
    assert perplexity(lm, IDS, 25, cancel=CancelToken()) > 1


def test_batches_couple_dynamic_per_tensor_steps():
    """Why `batch` is 1 by default."""
    lm = quantize(tiny("LlamaForCausalLM"), W8A8)
    assert perplexity(lm, IDS, 25) != perplexity(lm, IDS, 25, batch=4)


def test_memory_is_one_forward_pass_at_a_time():
    lm = tiny("LlamaForCausalLM")
    calls = []

    class Counted(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, **arguments):
            calls.append(tuple(arguments["input_ids"].shape))
            return self.inner(**arguments)

    counted = LM(Counted(lm.model), None, lm.arch)
    counted.model.config, counted.model.get_input_embeddings = lm.model.config, lm.model.get_input_embeddings
    scores = segment_nll(counted, IDS, 20, batch=2)
    assert calls == []
    next(scores)
    assert calls == [(2, 20)]
    assert len(list(scores)) == 4
    assert calls == [(2, 20), (2, 20), (1, 20)]

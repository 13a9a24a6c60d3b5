"""Logits of some tokens alone are those that the whole text gives them."""

import pytest
import torch

from sqviz.models.logits import logits_of
from sqviz.models.tiny import TINY, tiny
from sqviz.quant.divergence import STRIDE, Divergence

TEXT = torch.randint(3, 131, (17,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("which", [1, torch.tensor([3, 7, 16])], ids=["last", "some"])
def test_some_are_as_among_all(name, which):
    lm = tiny(name)
    whole = lm.model(TEXT[None], use_cache=False).logits[0]
    alone = lm.model(TEXT[None], use_cache=False, **logits_of(lm, which)).logits[0]
    expected = whole[-which:] if isinstance(which, int) else whole[which]
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [STRIDE, 17])
def test_a_model_that_always_gives_all_is_compared_at_the_same_places(length, monkeypatch):
    one, other = tiny("LlamaForCausalLM"), tiny("LlamaForCausalLM", seed=1)
    text = TEXT[None, :length]
    expected = Divergence(one, text)(other)
    for lm in (one, other):
        forward = lm.model.forward
        monkeypatch.setattr(
            lm.model, "forward", lambda ids, use_cache, forward=forward: forward(ids, use_cache=use_cache)
        )
        assert logits_of(lm, 1) == {}
    assert Divergence(one, text)(other) == pytest.approx(expected, rel=1e-4)
    assert expected > 1e-3

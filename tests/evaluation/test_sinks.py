"""Which tokens are sinks: the findings are those of the experiments that they rest on."""

import dataclasses
import types

import pytest
import torch

import sqviz
from sqviz.errors import Cancelled, SqvizError, TextTooShort
from sqviz.evaluation.sinks import ENOUGH, LOOKED_AT, SHARE, sinks
from sqviz.models.tiny import tiny
from sqviz.observe.attention import attention_maps
from sqviz.streaming.perplexity import streaming_perplexity
from sqviz.streaming.policies import Sinks

IDS = torch.randint(3, 131, (90,), generator=torch.Generator().manual_seed(1))
LM = tiny("LlamaForCausalLM")


class Letters:
    """A tokenizer of the tiny models: a letter is its code."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [min(ord(letter), 130) for letter in text]}

    def batch_decode(self, ids, clean_up_tokenization_spaces=False):
        return ["".join(map(chr, row)) for row in ids]

    def convert_ids_to_tokens(self, ids):
        return [chr(token) for token in ids]


def test_each_number_is_that_of_its_experiment():
    lm = LM.replace(tokenizer=Letters())
    found = sinks(lm, IDS, size=12, counts=(0, 2, 5))
    values = []
    for count, (label, result) in zip((0, 2, 5), found.counts.results.items(), strict=True):
        assert label == f"{count} + {12 - count}"
        expected = streaming_perplexity(lm, IDS, Sinks(count, 12 - count))
        assert torch.equal(result.nll, expected.nll)
        values.append(expected.perplexity)
    enough = next(count for count, value in zip((0, 2, 5), values, strict=True) if value <= ENOUGH * min(values))
    assert found.recommended == Sinks(enough, 12 - enough)
    changed = IDS.clone()
    changed[:5] = ord("\n")
    assert torch.equal(found.breaks.nll, streaming_perplexity(lm, changed, Sinks(5, 7)).nll)
    maps = attention_maps(lm, IDS[:LOOKED_AT], sentences=None)
    share = maps.share.mean(1).amax(0)
    assert set(found.positions) == {at for at in range(len(IDS)) if share[at] >= SHARE}
    assert list(found.positions) == sorted(found.positions, key=lambda at: -float(share[at]))
    assert repr(found.recommended) in repr(found)


def test_a_sink_is_found_where_one_is():
    """Shares made by hand: token 3 gets a third of the attention in one layer of two."""
    found = sinks(LM, IDS, size=12, counts=(0, 4))
    share = torch.full((2, 6, 90), 0.5 / 90)
    share[1, :, 3] = 1 / 3
    norms = torch.ones(2, 90)
    norms[1, 3] = 500.0
    made = dataclasses.replace(found, maps=dataclasses.replace(found.maps, share=share, norms=norms))
    assert made.positions == (3,)
    row = made.to_frame().loc[3]
    assert row["largest share %"] == pytest.approx(100 / 3)
    assert (row["layers"], row["largest |x|"], row["times the median token"]) == (1, 500, 500)
    assert made.to_frame().loc[3, "token"] == found.maps.token_texts[3]
    assert dataclasses.replace(made, maps=dataclasses.replace(made.maps, share=share * 0)).to_frame().empty


def test_the_verdict_says_place_or_meaning(tmp_path):
    found = sinks(LM, IDS, size=12, counts=(0, 4))
    assert found.breaks is None  # no tokenizer
    assert "so it is" not in found.verdict
    plain = found.counts.results["4 + 8"].perplexity
    for factor, said in ((1.01, "their place"), (3.0, "their meaning as well")):
        breaks = types.SimpleNamespace(perplexity=factor * plain)
        assert dataclasses.replace(found, breaks=breaks).verdict.endswith(said)
    bundle = found._repr_mimebundle_()
    assert {"image/svg+xml", "application/vnd.plotly.v1+json", "text/plain"} <= set(bundle)
    assert [trace.name for trace in found.figure().data] == ["0 + 12", "4 + 8"]
    assert "plotly" in found.to_html(tmp_path / "sinks.html").read_text(encoding="utf-8")


def test_bad_input():
    with pytest.raises(TextTooShort, match="nothing would leave it"):
        sinks(LM, IDS[:12], size=12, counts=(0, 4))
    with pytest.raises(SqvizError, match="ascending"):
        sinks(LM, IDS, size=12, counts=(4, 0))
    with pytest.raises(SqvizError, match="ascending"):
        sinks(LM, IDS, size=12, counts=())
    with pytest.raises(SqvizError, match="do not fit"):
        sinks(LM, IDS, size=12, counts=(0, 12))
    token = sqviz.CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        sinks(LM, IDS, size=12, counts=(0, 4), cancel=token)

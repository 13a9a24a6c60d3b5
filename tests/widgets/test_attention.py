"""The bytes that the attention view sends: codes, limits, opened heads, pages, the still."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from sqviz.models.tiny import tiny
from sqviz.observe.attention import AttentionMaps, attention_maps, head_scores
from sqviz.widgets.attention import BLANK, FLOOR, AttentionView, encode

IDS = torch.randint(3, 131, (60,), generator=torch.Generator().manual_seed(0))
LM = tiny("LlamaForCausalLM")


@pytest.fixture(scope="module", params=[True, False], ids=["logits", "probabilities"])
def maps(request) -> AttentionMaps:
    return attention_maps(LM, IDS, sentences=None, logits=request.param, cells=20)


def decode(codes: np.ndarray, scale) -> np.ndarray:
    at = (codes.astype(float) - 1) / 254
    return (
        scale["lo"] * (scale["hi"] / scale["lo"]) ** at
        if scale["log"]
        else scale["lo"] + at * (scale["hi"] - scale["lo"])
    )


def test_codes_are_within_half_a_step(maps):
    view = AttentionView(maps)
    scale = view.meta["scale"]
    codes = np.frombuffer(view.cells, np.uint8).reshape(maps.maps.shape)
    values = maps.maps.numpy()
    blank = np.isnan(values)
    assert (codes[blank] == BLANK).all()
    assert (codes[~blank] >= 1).all()
    inside = ~blank & (values > scale["lo"]) & (values < scale["hi"])
    shown = decode(codes, scale)[inside]
    if scale["log"]:
        assert np.abs(np.log(shown / values[inside])).max() <= np.log(scale["hi"] / scale["lo"]) / 254 / 2 * 1.01
    else:
        assert np.abs(shown - values[inside]).max() <= (scale["hi"] - scale["lo"]) / 254 / 2 * 1.01
    assert inside.mean() > 0.3


def test_limits_are_robust_and_say_what_they_cut():
    many = torch.linspace(-1, 1, 40_000).view(2, 2, 100, 100).clone()
    many[0, 0, 0, 0] = 500.0
    size = torch.zeros(2, 2, 100)
    made = AttentionMaps(many, True, size, size[..., 0], torch.ones(2, 100), IDS, ("x",) * 100, 1, 1, "m")
    scale = AttentionView(made).meta["scale"]
    assert -1 < scale["lo"] < -0.95
    assert 0.95 < scale["hi"] < 1
    assert (scale["below"], scale["above"]) == (True, True)
    codes = encode(np.array([np.nan, -9.0, 9.0, scale["lo"], scale["hi"]]), scale)
    assert codes.tolist() == [0, 1, 255, 1, 255]
    constant = AttentionMaps(many * 0 + 3, True, size, size[..., 0], torch.ones(2, 100), IDS, ("x",) * 100, 1, 1, "m")
    assert set(AttentionView(constant).cells) == {1}


def test_probabilities_have_a_floor(maps):
    scale = AttentionView(maps).meta["scale"]
    if not maps.logits:
        assert (scale["lo"], scale["hi"], scale["log"]) == (FLOOR, 1.0, True)
        assert encode(np.array([0.0, FLOOR / 3, FLOOR, 1.0]), scale).tolist() == [1, 1, 1, 255]


def test_an_opened_head_comes_token_by_token(maps):
    view = AttentionView(maps, LM)
    assert view.meta["detailed"]
    view.opened = [1, 2]
    assert view.detail["panel"] == [1, 2]
    assert view.detail["rows"] == 60
    codes = np.frombuffer(view.detail["cells"], np.uint8).reshape(60, 60)
    scores = head_scores(LM, maps.tokens, 1, 2, logits=maps.logits).numpy()
    seen = np.tri(60) > 0
    assert (codes[~seen] == BLANK).all()
    assert np.array_equal(codes[seen], encode(scores[seen], view.meta["scale"]))
    view.opened = []
    assert view.detail == {}


def test_what_goes_wrong_is_said_in_the_view(maps, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr("sqviz.widgets.attention.head_scores", fail)
    view = AttentionView(maps, LM, opened=[0, 1])
    assert view.detail == {"panel": [0, 1], "error": "RuntimeError: no memory"}


def test_a_page_promises_nothing_that_needs_a_kernel(maps):
    view = AttentionView(maps, LM, opened=[0, 1])
    state = view.page_state()
    assert state["detail"] == {}
    assert state["meta"]["detailed"] is False
    assert view.meta["detailed"] is True


def test_profiles_travel_as_they_are(maps):
    view = maps.heatmap()
    layers = maps.layers
    assert np.allclose(np.frombuffer(view.share, "<f4").reshape(layers, -1), maps.share.mean(1), atol=1e-7)
    assert np.allclose(np.frombuffer(view.mass, "<f4").reshape(layers, -1), maps.sink_mass(), atol=1e-7)
    assert np.allclose(np.frombuffer(view.entropy, "<f4").reshape(layers, -1), maps.entropy)
    assert np.allclose(np.frombuffer(view.norms, "<f4").reshape(layers, -1), maps.norms)
    assert view.tokens == list(maps.token_texts)


def test_averages_have_places_instead_of_tokens():
    view = attention_maps(LM, IDS, sentences=3, length=16).heatmap(LM)
    assert view.tokens[:2] == ["token 0", "token 1"]
    assert not view.meta["detailed"]
    assert view.meta["note"] == "2 layers × 6 heads · 3 sentences of 16 tokens"


def test_the_still_shows_every_head(maps):
    view = maps.heatmap()
    picture = np.asarray(Image.open(io.BytesIO(view.to_png())).convert("RGB"))
    assert picture.shape[1] == 2 * view.still().width
    data, metadata = view._repr_mimebundle_()
    assert "image/png" in data
    assert metadata["image/png"]["width"] == view.still().width
    bundle, _ = maps._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(bundle)

"""What the smoothing explorer hands out: packs, the code of a state, perplexity estimates, pages and stills."""

import base64
import json
import re
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from explorers import WAIT, explorers, ids, settle, tiny_capture, tiny_lm

import sqviz
from sqviz.errors import NoSuchLayer
from sqviz.models.linears import groups
from sqviz.models.tiny import tiny
from sqviz.quant.smooth import smoothing_scale
from sqviz.widgets.smoothing_estimate import LENGTH, SEGMENTS
from sqviz.widgets.smoothing_export import embed
from sqviz.widgets.smoothing_pack import unpack, vectors
from sqviz.widgets.smoothing_state import scheme_key
from sqviz.widgets.view import decode_log


@pytest.fixture
def explore():
    with explorers() as make:
        yield make


@pytest.fixture
def lm():
    return tiny_lm()


@pytest.fixture
def magnitudes():
    return tiny_capture()


# --- packs ---


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "OPTForCausalLM", "MixtralForCausalLM", "Olmo2ForCausalLM"]
)
def test_s_in_the_page_is_the_s_that_smooth_folds(architecture):
    lm = tiny(architecture)
    magnitudes = sqviz.capture(lm, ids(128, seed=1), samples=4, length=32, progress=False)
    smoothed = sqviz.smooth(lm, magnitudes, 0.6, folds="norm", online=True, check=False)
    linear_folds = sqviz.smooth(
        lm, magnitudes, {f"*{kind}": 0.6 for kind in _linear_kinds(lm)}, folds="all", check=False
    )
    for group in groups(lm):
        folded = linear_folds if group.fold_kind == "linear" else smoothed
        if group.name not in folded.scales:
            continue
        found = vectors(lm, magnitudes, group)
        s = folded.scales[group.name].float()
        ours = smoothing_scale(found.s_x, found.s_w, 0.6)
        assert ours == pytest.approx((s if found.expert is None else s[found.expert]).numpy(), rel=1e-4)


def _linear_kinds(lm) -> set[str]:
    return {group.kind for group in groups(lm) if group.fold_kind == "linear"}


def test_a_pack_holds_the_capture_pooled_without_losing_a_maximum(explore, magnitudes):
    name = "model.layers.1.self_attn.q_proj"
    explorer = explore(linear=name)
    header, arrays = unpack(explorer.picture)[0]
    stats = magnitudes.inputs[name]
    assert header["group"] == name
    assert [consumer["name"].rpartition(".")[2] for consumer in header["consumers"]] == ["q_proj", "k_proj", "v_proj"]
    assert np.array_equal(arrays["x_absmax"], stats.absmax.numpy())
    fold = torch.stack([magnitudes.weights[c["name"]].channel_absmax for c in header["consumers"]]).amax(0)
    assert np.array_equal(arrays["s_w"], fold.numpy())
    decoded = decode_log(arrays["x_map"].reshape(header["rows"], -1), *header["range"])
    half = 10 ** ((header["range"][1] - header["range"][0]) / 508)
    assert (np.abs(np.log10(decoded.max(0) / stats.map.float().amax(0).numpy())) <= np.log10(half) * 1.01).all()
    pooled, small = unpack(explorer._engine.pack(name, max_rows=5, weight_rows=3))[0]
    assert (pooled["rows"], pooled["consumers"][0]["rows"]) == (5, 3)
    coarse = decode_log(small["x_map"].reshape(5, -1), *pooled["range"])
    exact = stats.map.float().amax(0).numpy()
    assert (np.abs(np.log10(coarse.max(0) / exact)) <= np.log10(half) * 1.01).all()


def test_a_capture_without_maps_gets_them_measured(explore, lm, magnitudes, tmp_path):
    magnitudes.save(tmp_path / "m.safetensors", maps=())
    bare = sqviz.Magnitudes.load(tmp_path / "m.safetensors")
    assert not bare.has_map("model.layers.0.mlp.up_proj")
    with_maps = explore(linear="model.layers.0.mlp.up_proj")
    explorer = explore(magnitudes=bare, linear="model.layers.0.mlp.up_proj")
    settle(explorer)
    (header, arrays), (_, wanted) = unpack(explorer.picture)[0], unpack(with_maps.picture)[0]
    assert header["rows"] == 32
    assert np.array_equal(arrays["x_map"], wanted["x_map"])
    assert np.array_equal(arrays["w_map_0"], wanted["w_map_0"])


# --- the code that reproduces a state ---


@pytest.mark.parametrize("scheme", [sqviz.W8A8, sqviz.SMOOTHQUANT_O3, sqviz.Scheme(sqviz.PerGroup(64), None, bits=4)])
def test_the_copied_code_makes_the_model_that_the_estimate_scores(explore, lm, magnitudes, scheme):
    explorer = settle(explore(scheme=scheme, alpha=0.65, folds="norm"))
    names = {"sqviz": sqviz, "lm": lm, "magnitudes": magnitudes}
    exec(explorer.code.replace("{alpha}", str(explorer.alpha)), names)
    built: list[Any] = []
    engine = explorer._engine
    engine.worker.submit("estimate", lambda turn: built.append(engine._estimator._build(turn, explorer.state)))
    settle(explorer)
    with torch.no_grad():
        ours, theirs = (model.model(ids()[None]).logits for model in (built[0], names["quantized"]))
    assert torch.equal(ours, theirs)


# --- perplexity ---


def test_the_estimate_is_the_perplexity_of_the_smoothed_and_quantised_model(explore, lm, magnitudes):
    text = ids(SEGMENTS * LENGTH + 50)
    explorer = settle(explore(text=text, alpha=0.6))
    explorer._message(None, {"kind": "estimate"}, [])
    settle(explorer)
    found = explorer.estimate
    length = 96  # all the positions that the tiny model has
    held = text[: SEGMENTS * LENGTH // length * length]
    q = sqviz.quantize(sqviz.smooth(lm, magnitudes, 0.6, folds="all"), sqviz.W8A8)
    assert found["reference"] == pytest.approx(sqviz.perplexity(lm, held, length=length), rel=1e-5)
    assert found["value"] == pytest.approx(sqviz.perplexity(q, held, length=length), rel=1e-5)
    assert (found["alpha"], found["scheme"], found["folds"]) == (0.6, scheme_key(sqviz.W8A8), "all")
    assert explorer.status == {}


def test_cancelling_an_estimate_answers_at_once_and_leaves_the_rest(explore, monkeypatch):
    explorer = settle(explore())
    inside = threading.Event()

    def endless(turn: Any, state: Any) -> None:
        explorer._engine._report("estimate", 1, 9, "scoring")
        inside.set()
        while True:
            turn.check()
            time.sleep(0.001)

    monkeypatch.setattr(explorer._engine._estimator, "run", endless)
    explorer._message(None, {"kind": "estimate"}, [])
    assert inside.wait(WAIT)
    assert explorer.status["estimate"]["text"] == "scoring"
    explorer._message(None, {"kind": "cancel"}, [])
    assert "estimate" not in explorer.status
    settle(explorer)
    assert explorer.estimate == {}
    assert explorer.problem == ""


def test_estimates_follow_the_hand_only_when_asked_to(explore, monkeypatch):
    explorer = settle(explore())
    asked: list[Any] = []
    monkeypatch.setattr(explorer._engine, "estimate", asked.append)
    explorer.set_state({"alpha": 0.2, "moving": False})
    assert asked == []
    explorer.set_state({"estimate_on_release": True})
    explorer.set_state({"alpha": 0.3, "moving": True})
    assert asked == []
    explorer.set_state({"moving": False})
    assert [state.alpha for state in asked] == [0.3]


# --- kept pictures ---


def page_state(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="state">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_an_exported_page_carries_what_it_needs(explore, magnitudes, tmp_path):
    explorer = settle(explore(linear="model.layers.1.mlp.up_proj"))
    explorer.to_html(
        tmp_path / "view.html", linears=["*.mlp.up_proj", "model.layers.0.self_attn.?_proj"], progress=False
    )
    state = page_state((tmp_path / "view.html").read_text(encoding="utf-8"))
    carried = state["about"]["embedded"]
    assert "model.layers.1.mlp.up_proj" in carried
    assert {"model.layers.0.self_attn.k_proj", "model.layers.2.mlp.up_proj"} <= set(carried)
    assert "model.layers.2.mlp.gate_proj" not in carried
    packs = [header["group"] for header, _ in unpack(base64.b64decode(state["embedded"]["base64"]))]
    assert packs[0] == "model.layers.1.mlp.gate_proj"  # the group in view comes first
    rows = np.frombuffer(base64.b64decode(state["sweeps"]["base64"]), "<f4").reshape(len(magnitudes.names), -1)
    assert not np.isnan(rows[[magnitudes.names.index(name) for name in carried]]).any()


def test_a_page_within_a_budget_gets_coarser_and_keeps_the_linear_in_view(explore):
    explorer = settle(explore(linear="model.layers.2.mlp.down_proj"))
    whole = explorer.to_html(progress=False)
    small = explorer.to_html(budget_bytes=1, progress=False)
    assert len(small) < len(whole)
    assert page_state(small)["about"]["embedded"] == ["model.layers.2.mlp.down_proj"]
    assert len(page_state(whole)["about"]["embedded"]) == 21


def test_maps_get_coarser_but_for_those_in_view(magnitudes):
    asked: list[tuple[str, int]] = []

    def made(group: str, max_rows: int, weight_rows: int) -> bytes:
        asked.append((group, max_rows))
        return bytes(3 * (max_rows + weight_rows))

    groups, first = len(magnitudes.groups), magnitudes.groups[-1]
    fits = 4 * (192 + 96 * (groups - 1))  # at half the resolution, as base64
    packs, held = embed(magnitudes, magnitudes.names, first.consumers[0], made, fits)
    assert (4 * len(packs) // 3, held) == (fits, list(magnitudes.names))
    assert asked[-groups:][0] == (first.name, 128)
    assert {rows for _, rows in asked[-groups + 1 :]} == {64}


def test_the_export_button_sends_the_page(explore, monkeypatch):
    explorer = settle(explore())
    sent: list[Any] = []
    monkeypatch.setattr(explorer, "send", lambda content, buffers: sent.append((content, buffers)))
    explorer._message(None, {"kind": "export"}, [])
    settle(explorer)
    content, buffers = sent[0]
    assert content["kind"] == "page"
    assert content["name"].endswith(".html")
    assert page_state(buffers[0].decode())["about"]["embedded"]


def test_the_page_of_a_pattern_that_matches_nothing(explore):
    with pytest.raises(NoSuchLayer, match="matches no linear"):
        explore().to_html(linears="*.nothing")


def test_the_still_changes_with_alpha(explore):
    pytest.importorskip("PIL")
    explorer = settle(explore(alpha=0.1))
    first = explorer.to_png()
    explorer.alpha = 0.9
    assert first.startswith(b"\x89PNG")
    assert explorer.to_png() != first
    bundle, _ = explorer._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/png"} <= bundle.keys()

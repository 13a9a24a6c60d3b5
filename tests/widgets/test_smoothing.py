"""The smoothing explorer in the kernel: its numbers against the definitions, its states, other threads, its errors."""

import json
import threading

import numpy as np
import pytest
import torch
import traitlets
from explorers import WAIT, explorers, ids, settle, sweeps, tiny_capture, tiny_lm

import sqviz
from sqviz.errors import NoSuchLayer, SqvizError
from sqviz.models.linears import groups, weight
from sqviz.models.lm import share
from sqviz.models.tiny import tiny
from sqviz.observe.hooks import activations
from sqviz.quant.error import ALPHAS, output_error
from sqviz.quant.smooth import smoothing_scale
from sqviz.widgets import smoothing_engine, smoothing_sample
from sqviz.widgets.smoothing import explore_smoothing
from sqviz.widgets.smoothing_pack import unpack, vectors
from sqviz.widgets.smoothing_state import scheme_from_page, scheme_key, scheme_to_page


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


def definition(lm, magnitudes, linear: str, alpha: float | None, scheme=sqviz.W8A8) -> float:
    """The error from its definition: X measured with plain hooks, s from equation 3.4 (None: no smoothing)."""
    x = activations(lm, ids(), [linear])[linear]
    found = vectors(lm, magnitudes, next(group for group in groups(lm) if linear in group.consumers))
    s = torch.ones(x.shape[1]) if alpha is None else smoothing_scale(found.s_x, found.s_w, alpha)
    stats = magnitudes.inputs[linear]
    return output_error(x, weight(lm, linear).detach(), s, scheme, (stats.minimum, stats.maximum)).frobenius


# --- the numbers ---


@pytest.mark.parametrize("linear", ["model.layers.1.mlp.up_proj", "model.layers.2.self_attn.o_proj"])
def test_the_answer_at_rest_is_the_error_by_its_definition(explore, lm, magnitudes, linear):
    explorer = settle(explore(linear=linear, alpha=0.35))
    assert explorer.answer["linear"] == linear
    assert explorer.answer["how"] == "exact"
    assert explorer.answer["error"] == pytest.approx(definition(lm, magnitudes, linear, 0.35), rel=1e-4)


def test_the_sweep_holds_every_alpha_of_the_same_linear_in_every_layer(explore, lm, magnitudes):
    explorer = settle(explore(linear="model.layers.1.mlp.gate_proj"))
    rows = dict(zip(magnitudes.names, sweeps(explorer), strict=True))
    swept = {name for name, row in rows.items() if not np.isnan(row).any()}
    assert swept == {f"model.layers.{block}.mlp.gate_proj" for block in range(3)}
    for name in swept:
        wanted = [definition(lm, magnitudes, name, alpha) for alpha in [*ALPHAS, None]]
        assert rows[name] == pytest.approx(wanted, rel=1e-4)


def test_the_stops_of_the_slider_are_computed_ahead(explore, lm, magnitudes, monkeypatch):
    explorer = settle(explore(linear="model.layers.1.mlp.gate_proj"))
    stops = np.frombuffer(explorer.stops["errors"], "<f4")
    assert explorer.stops["for"] == f"{explorer.linear}|{scheme_key(sqviz.W8A8)}"
    assert (explorer.stops["how"], explorer.stops["tokens"]) == ("exact", len(ids()))
    assert len(stops) == 101
    for stop in (0, 37, 100):
        assert stops[stop] == pytest.approx(definition(lm, magnitudes, explorer.linear, stop / 100), rel=1e-4)
    monkeypatch.setattr(explorer._engine, "_probe", lambda *_: pytest.fail("nothing is left to compute"))
    explorer.set_state({"alpha": 0.37, "moving": True})
    assert explorer.answer["error"] == pytest.approx(float(stops[37]))
    assert explorer.answer["how"] == "exact"


def test_a_large_linear_is_sampled_under_the_hand_and_exact_at_rest(explore, monkeypatch):
    monkeypatch.setattr(smoothing_engine, "QUICK_PRODUCT", 0)
    explorer = settle(explore())
    seen = []
    explorer.observe(lambda change: seen.append(change["new"]["how"]), names=["answer"])
    explorer.set_state({"alpha": 0.7, "moving": True})
    settle(explorer)
    assert seen == ["sampled"]
    assert explorer.answer["tokens"] < len(ids())
    explorer.set_state({"moving": False})
    settle(explorer)
    assert seen[-1] == "exact"
    assert explorer.answer["alpha"] == 0.7


def test_static_schemes_take_their_steps_from_calibration(explore, lm, magnitudes):
    linear = "model.layers.0.mlp.down_proj"
    explorer = settle(explore(linear=linear, scheme=sqviz.SMOOTHQUANT_O3))
    wanted = definition(lm, magnitudes, linear, 0.5, sqviz.SMOOTHQUANT_O3)
    assert explorer.answer["error"] == pytest.approx(wanted, rel=1e-4)
    assert wanted != pytest.approx(definition(lm, magnitudes, linear, 0.5, sqviz.SMOOTHQUANT_O2), rel=1e-3)


# --- states ---


def test_where_it_opens(explore):
    explorer = explore()
    assert explorer.linear.endswith(("q_proj", "gate_proj"))  # an input that the thesis smooths
    assert explorer.alpha == 0.5
    assert scheme_from_page(explorer.scheme) == sqviz.W8A8
    assert explore(linear=2).linear.startswith("model.layers.2.")
    assert explore(linear="0.mlp.up_proj").linear == "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan"), "half", None])
def test_alpha_outside_its_range_is_refused_and_changes_nothing(explore, alpha):
    explorer = explore()
    with pytest.raises((SqvizError, traitlets.TraitError), match="alpha"):
        explorer.alpha = alpha
    assert explorer.alpha == 0.5
    with pytest.raises(SqvizError, match="alpha"):
        explore(alpha=alpha)


def test_other_bad_input_is_named(explore, lm, magnitudes):
    explorer = explore()
    with pytest.raises(SqvizError, match=r"folds='both'.*'norm'"):
        explorer.folds = "both"
    with pytest.raises(NoSuchLayer, match=r"model\.layers\.9\.x"):
        explorer.linear = "model.layers.9.x"
    with pytest.raises(SqvizError, match="per-row"):
        explorer.scheme = {**scheme_to_page(sqviz.W8A8), "weight": "per-row"}
    with pytest.raises(SqvizError, match="lacks 'bits'"):
        explorer.scheme = {"weight": "per-tensor", "activation": "per-tensor", "static": False}
    with pytest.raises(SqvizError, match="scheme='W8A8'"):
        explore(scheme="W8A8")
    with pytest.raises(NoSuchLayer, match=r"Capture this model"):
        explore(lm=tiny("OPTForCausalLM"))
    with pytest.raises(SqvizError, match="smoothed differently"):
        explore(lm=sqviz.smooth(lm, magnitudes, 0.5, check=False))
    assert scheme_from_page(explorer.scheme) == sqviz.W8A8


def test_a_scheme_crosses_to_the_page_and_back():
    own = sqviz.Scheme(sqviz.PerGroup(64), sqviz.PerToken(), bits=6, weight_bits=3, symmetric=False)
    schemes = [sqviz.W8A8, sqviz.ZEROQUANT, sqviz.SMOOTHQUANT_O3, sqviz.SMOOTHQUANT_LLAMA, own]
    for scheme in schemes:
        assert scheme_from_page(json.loads(json.dumps(scheme_to_page(scheme)))) == scheme
    assert len({scheme_key(scheme) for scheme in schemes}) == len(schemes)


def test_changing_the_scheme_changes_sweep_and_answer_and_going_back_finds_them(explore):
    explorer = settle(explore())
    before, answer = sweeps(explorer).copy(), explorer.answer
    explorer.scheme = sqviz.SMOOTHQUANT_LLAMA
    settle(explorer)
    assert explorer.sweeps_for == scheme_key(sqviz.SMOOTHQUANT_LLAMA)
    assert explorer.answer["scheme"] == explorer.sweeps_for
    assert explorer.answer["error"] < answer["error"]
    assert np.nanmax(sweeps(explorer)) < np.nanmax(before)
    explorer.scheme = sqviz.W8A8
    assert np.array_equal(sweeps(explorer), before, equal_nan=True)  # at once: they were kept
    assert settle(explorer).answer == answer


def test_opening_another_linear_sends_its_picture_and_its_curve(explore, magnitudes):
    explorer = settle(explore(linear="model.layers.0.mlp.gate_proj"))
    explorer.set_state({"linear": "model.layers.2.mlp.down_proj"})
    settle(explorer)
    assert unpack(explorer.picture)[0][0]["group"] == "model.layers.2.mlp.down_proj"
    assert explorer.answer["linear"] == "model.layers.2.mlp.down_proj"
    assert not np.isnan(sweeps(explorer)[magnitudes.names.index("model.layers.0.mlp.down_proj")]).any()


def test_moves_during_a_running_computation_end_with_the_last(explore):
    explorer = explore()  # still measuring
    for step in range(101):
        explorer.set_state({"alpha": step / 100, "moving": step < 100})
    settle(explorer)
    assert explorer.answer["alpha"] == 1.0
    assert explorer.problem == ""


def test_activations_beyond_the_budget_are_kept_for_one_block_at_a_time(explore, lm, magnitudes):
    explorer = settle(explore(linear="model.layers.0.mlp.up_proj", budget_bytes=96 * 4 * 250))
    held = set(explorer._engine._sample._held)
    assert {name.split(".")[2] for name in held} == {"0"}
    explorer.linear = "model.layers.2.mlp.up_proj"
    settle(explorer)
    assert {name.split(".")[2] for name in explorer._engine._sample._held} == {"2"}
    assert explorer.answer["error"] == pytest.approx(definition(lm, magnitudes, explorer.linear, 0.5), rel=1e-4)


def test_two_explorers_do_not_disturb_each_other(explore, lm, magnitudes):
    first, second = explore(linear="model.layers.0.mlp.up_proj"), explore(linear="model.layers.2.self_attn.o_proj")
    for step in range(10):
        first.alpha, second.alpha = step / 10, 1 - step / 10
    settle(first), settle(second)
    for explorer in (first, second):
        wanted = definition(lm, magnitudes, explorer.linear, explorer.alpha)
        assert explorer.answer["error"] == pytest.approx(wanted, rel=1e-4)


# --- the model, and other threads ---


def test_the_model_is_left_alone_and_its_own_passes_are_not_seen(explore, lm, magnitudes):
    state = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    hooked, stop = [], threading.Event()

    def use_the_model() -> None:
        while not stop.is_set():
            with torch.no_grad():
                lm.model(ids(40, seed=9)[None])
            hooked.extend(name for name, module in lm.model.named_modules() if module._forward_pre_hooks)

    other = threading.Thread(target=use_the_model)
    other.start()
    try:
        explorer = settle(explore(linear="model.layers.1.mlp.up_proj"))
    finally:
        stop.set()
        other.join(WAIT)
    assert hooked == []
    assert explorer.answer["error"] == pytest.approx(definition(lm, magnitudes, explorer.linear, 0.5), rel=1e-4)
    assert all(torch.equal(tensor, state[name]) for name, tensor in lm.model.state_dict().items())


def test_an_error_in_the_worker_is_shown_and_the_view_goes_on(explore, monkeypatch):
    explorer = settle(explore())
    monkeypatch.setattr(explorer._engine, "_probe", lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck")))
    explorer.alpha = 0.905  # no stop of the slider: the error there is not known yet
    settle(explorer)
    assert explorer.problem == "RuntimeError: out of luck"
    monkeypatch.undo()
    explorer.alpha = 0.805
    assert settle(explorer).answer["alpha"] == 0.805
    assert explorer.problem == ""


def test_infinite_activations_give_a_message_and_no_number(explore, lm, magnitudes, monkeypatch):
    measured = smoothing_sample.Sample.get
    monkeypatch.setattr(
        smoothing_sample.Sample, "get", lambda self, name: None if (x := measured(self, name)) is None else x / 0.0
    )
    explorer = settle(explore())
    assert "NaN or an infinity" in explorer.problem
    assert explorer.answer == {}
    row = sweeps(explorer)[magnitudes.names.index(explorer.linear)]
    assert (row == -1).all()
    assert "NaN" not in json.dumps(explorer.answer)


def test_dead_channels_have_s_one_and_a_finite_error(lm):
    model = share(lm.model)
    norm = model.get_submodule("model.layers.0.input_layernorm")
    gain = norm.weight.detach().clone()
    gain[[0, 7]] = 0.0
    norm.weight = torch.nn.Parameter(gain)
    dead = lm.replace(model=model)
    magnitudes = sqviz.capture(dead, ids(64, seed=1), samples=2, length=32, progress=False)
    explorer = settle(explore_smoothing(dead, magnitudes, text=ids(), linear="model.layers.0.self_attn.q_proj"))
    _, arrays = unpack(explorer.picture)[0]
    assert (arrays["x_absmax"][[0, 7]] == 0).all()
    assert 0 < explorer.answer["error"] < 1
    explorer.close()


def test_what_cannot_be_folded_says_why_and_is_explored_all_the_same():
    lm = tiny("Olmo2ForCausalLM")
    magnitudes = sqviz.capture(lm, ids(64, seed=1), samples=2, length=32, progress=False)
    explorer = settle(explore_smoothing(lm, magnitudes, text=ids(), linear="0.self_attn.q_proj"))
    row = next(row for row in explorer.about["linears"] if row["name"] == explorer.linear)
    assert row["fold"] == ""
    assert row["reason"]
    assert explorer.answer["error"] > 0
    assert "online=True" in explorer.code
    explorer.close()


def test_close_stops_the_worker_in_the_middle_of_its_work(lm, magnitudes):
    explorer = explore_smoothing(lm, magnitudes, text=ids())
    explorer.close()
    explorer._engine.worker.join(WAIT)
    assert not explorer._engine.worker.alive

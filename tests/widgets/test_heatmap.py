import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import synthetic
import torch
from PIL import Image

from sqviz.errors import NoSuchLayer
from sqviz.observe.magnitudes import Magnitudes
from sqviz.widgets.heatmap import HeatmapView, Maps, maps_of, pack
from sqviz.widgets.view import decode_log

NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def capture() -> Magnitudes:
    return synthetic.magnitudes()


def cells(view: HeatmapView, which: str) -> np.ndarray:
    meta = view.meta[which]
    codes = np.frombuffer(getattr(view, f"{which}_cells"), np.uint8).reshape(meta["rows"], view.meta["columns"])
    return decode_log(codes, *meta["range"])


@pytest.mark.parametrize("which", ["x", "w"])
def test_cells_are_the_captured_map_within_the_codes_precision(capture: Magnitudes, which: str) -> None:
    view = HeatmapView.of(capture, NAME)
    source = capture.inputs[NAME] if which == "x" else capture.weights[NAME]
    lo, hi = view.meta[which]["range"]
    np.testing.assert_allclose(cells(view, which), source.map.float(), rtol=10 ** ((hi - lo) / 508) - 1 + 1e-3)


def test_vectors_are_exact_and_weights_are_those_of_the_whole_group(capture: Magnitudes) -> None:
    name = "model.layers.0.self_attn.k_proj"
    view = HeatmapView.of(capture, name)
    np.testing.assert_array_equal(np.frombuffer(view.x_max, "<f4"), capture.inputs[name].absmax)
    shared = torch.stack([capture.weights[name.replace("k_proj", f"{k}_proj")].channel_absmax for k in "qkv"]).amax(0)
    np.testing.assert_array_equal(np.frombuffer(view.w_max, "<f4"), shared)
    assert view.title.startswith(name)  # the linear asked for, not the first of its group


def test_rows_say_how_many_tokens_they_hold(capture: Magnitudes) -> None:
    meta = HeatmapView.of(capture, NAME).meta
    assert meta["x"] == meta["x"] | {"rows": 32, "units": 2, "total": 64}
    assert meta["w"] == meta["w"] | {"rows": 80, "units": 1, "total": 80}
    assert "64 tokens pooled by 2" in meta["note"]
    assert "192 input channels" in meta["note"]


def test_a_block_number_means_its_worst_input(capture: Magnitudes) -> None:
    worst = max((g for g in capture.groups if g.block == 2), key=lambda g: capture.inputs[g.name].outlier_ratio)
    assert HeatmapView.of(capture, 2).meta["name"] == worst.name


def test_a_name_that_fits_nothing_is_answered_with_those_that_do(capture: Magnitudes) -> None:
    with pytest.raises(NoSuchLayer, match=r"down_prj.*down_proj"):
        HeatmapView.of(capture, "model.layers.1.mlp.down_prj")


def without_map(capture: Magnitudes, name: str) -> Magnitudes:
    empty = capture.inputs[name].map[:0]
    inputs = dict(capture.inputs) | {name: dataclasses.replace(capture.inputs[name], map=empty)}
    return dataclasses.replace(capture, inputs=inputs)


def test_without_a_token_map_the_weights_are_still_shown(capture: Magnitudes) -> None:
    view = HeatmapView.of(without_map(capture, NAME), NAME)
    assert view.meta["x"] is None
    assert view.meta["w"]["rows"] == 80
    assert view.x_cells == b""
    assert len(view.to_png()) > 1000  # draws |W|, though the state says x
    maps = dataclasses.replace(maps_of(capture, NAME), x=None, w=None)
    with pytest.raises(ValueError, match="map_tokens"):
        HeatmapView(maps)


def test_an_expert_input_is_not_smoothed_by_one_scale(capture: Magnitudes) -> None:
    stats = capture.inputs[NAME]
    experts = torch.stack([stats.absmax, stats.absmax / 2])
    inputs = dict(capture.inputs) | {NAME: dataclasses.replace(stats, expert_absmax=experts)}
    maps = maps_of(dataclasses.replace(capture, inputs=inputs), NAME)
    assert pack(maps)["meta"]["smooths"] is False
    assert maps.x is not None
    np.testing.assert_array_equal(maps.operand("x", 0.5), maps.x)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_smoothing_keeps_every_product(capture: Magnitudes, alpha: float) -> None:
    maps = maps_of(capture, NAME)
    x, w = maps.operand("x"), maps.operand("w")
    before = x.max(0) * w.max(0)
    after = maps.operand("x", alpha).max(0) * maps.operand("w", alpha).max(0)
    np.testing.assert_allclose(after, before, rtol=1e-5)
    if alpha == 1.0:  # all difficulty moves: s is the input's maximum, so no channel of the calibration exceeds 1
        assert (maps.x_max / maps.scale(1.0)).max() == pytest.approx(1.0, rel=1e-6)


def test_values_too_large_for_float16_are_drawn_at_the_peak() -> None:
    capture = synthetic.magnitudes(1, outlier=120_000.0)
    name = capture.groups[0].name
    assert torch.isinf(capture.inputs[name].map).any()
    view = HeatmapView.of(capture, name)
    assert cells(view, "x").max() == pytest.approx(120_000.0, rel=0.05)


def colours_at(view: HeatmapView, x: float, y: float) -> tuple[int, ...]:
    return tuple(int(v) for v in np.asarray(Image.open(io.BytesIO(view.to_png())))[int(2 * y), int(2 * x)])


@pytest.mark.parametrize(
    "change", [{"smoothed": True}, {"operand": "w"}, {"log_colours": False}, {"clip": True}, {"palette": "cividis"}]
)
def test_the_still_follows_the_controls(capture: Magnitudes, change: dict[str, Any]) -> None:
    assert HeatmapView.of(capture, NAME).to_png() != HeatmapView.of(capture, NAME, **change).to_png()


def test_the_still_shows_the_planted_outlier_in_the_last_colour(capture: Magnitudes) -> None:
    view = HeatmapView.of(capture, NAME)
    x = 70 + (7 + 0.5) / 192 * 640  # channel 7, row 0: where the box of the still puts it
    assert colours_at(view, x, 62) == (0xFD, 0xE7, 0x25)
    assert sum(colours_at(view, 70 + 120.5 / 192 * 640, 200)) < 400


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_alpha_stays_between_zero_and_one(capture: Magnitudes, value: float) -> None:
    view = HeatmapView.of(capture, NAME)
    with pytest.raises(Exception, match="alpha"):
        view.alpha = value


def test_dead_inputs_are_drawn() -> None:
    zeros = np.zeros((4, 8), np.float32)
    view = HeatmapView(Maps("dead", zeros, zeros, zeros[0], zeros[0], (), 4, 4))
    assert len(view.to_png()) > 1000
    assert cells(view, "x").max() == 0.0

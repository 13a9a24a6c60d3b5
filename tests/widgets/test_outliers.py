import dataclasses
import io
import math

import numpy as np
import pytest
import synthetic
from PIL import Image

from sqviz.observe.magnitudes import Magnitudes
from sqviz.widgets import outliers as outliers_module
from sqviz.widgets.outliers import OutliersView
from sqviz.widgets.view import decode_log


@pytest.fixture(scope="module")
def capture() -> Magnitudes:
    return synthetic.magnitudes()


def test_all_maxima_of_all_groups_travel_in_order(capture: Magnitudes) -> None:
    view = OutliersView.of(capture)
    x, w = np.frombuffer(view.x_max, "<f4"), np.frombuffer(view.w_max, "<f4")
    owner = np.frombuffer(view.channel_token, "<i4")
    at = 0
    assert [entry["name"] for entry in view.meta["groups"]] == [group.name for group in capture.groups]
    for entry, group in zip(view.meta["groups"], capture.groups, strict=True):
        stats = capture.inputs[group.name]
        part = slice(at, at + entry["channels"])
        np.testing.assert_array_equal(x[part], stats.absmax)
        np.testing.assert_array_equal(w[part], capture.fold_weight_absmax(group.name))
        np.testing.assert_array_equal(owner[part], stats.channel_token)
        assert entry["ratio"] == pytest.approx(float(stats.absmax.max() / stats.absmax.median()))
        at += entry["channels"]
    assert at == len(x) == len(w) == len(owner)


def test_top_tokens_come_with_their_text(capture: Magnitudes) -> None:
    entry = OutliersView.of(capture).meta["groups"][0]
    value, channel, token, text, position = entry["top"][0]
    assert (value, channel, token, text, position) == (300.0, 7, 1, "·people", 1)


def test_the_shared_scale_holds_the_largest_and_nearly_all(capture: Magnitudes) -> None:
    lo, hi = OutliersView.of(capture).meta["scale"]
    maxima = np.concatenate([capture.inputs[group.name].absmax for group in capture.groups])
    assert hi == maxima.max()
    assert np.mean(maxima[maxima > 0] < lo) <= 0.02
    assert math.log10(lo) == pytest.approx(round(math.log10(lo)))


def test_opening_a_layer_sends_its_map_and_closing_takes_it_back(capture: Magnitudes) -> None:
    view = OutliersView.of(capture)
    assert view.details == {}
    name = "model.layers.2.mlp.down_proj"
    view.opened = name
    assert list(view.details) == [name]
    entry = view.details[name]
    codes = np.frombuffer(entry["x_cells"], np.uint8).reshape(32, 192)
    decoded = decode_log(codes, *entry["meta"]["x"]["range"])
    np.testing.assert_allclose(decoded, capture.inputs[name].map.float(), rtol=0.05)
    view.opened = ""
    assert view.details == {}
    assert OutliersView.of(capture, opened=name).details


def test_a_page_carries_the_maps_of_all_layers_pooled_to_fit(
    capture: Magnitudes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = OutliersView.of(capture).page_state()["details"]
    assert set(whole) == {group.name for group in capture.groups}
    assert whole["model.layers.0.mlp.down_proj"]["meta"]["x"]["rows"] == 32
    budget = 30_000
    monkeypatch.setattr(outliers_module, "PAGE_MAP_BYTES", budget)
    small = OutliersView.of(capture).page_state()["details"]
    assert set(small) == set(whole)
    size = sum(len(value) for entry in small.values() for value in entry.values() if isinstance(value, bytes))
    assert size <= 1.3 * budget  # the last run of each map may be a part
    for name, entry in small.items():
        meta = entry["meta"]["x"]
        codes = np.frombuffer(entry["x_cells"], np.uint8).reshape(meta["rows"], -1)
        peaks = decode_log(codes, *meta["range"]).max(0)
        np.testing.assert_allclose(peaks, capture.inputs[name].map.float().amax(0), rtol=0.05)  # no outlier lost
        assert meta["units"] * meta["rows"] >= meta["total"] > meta["units"] * (meta["rows"] - 1)


def test_the_still_has_a_tile_for_every_group(capture: Magnitudes) -> None:
    image = np.asarray(Image.open(io.BytesIO(OutliersView.of(capture).to_png()))).astype(int)
    orange = (abs(image - np.array([0xD5, 0x5E, 0x00])).sum(-1) < 12).any(0)
    # two planted channels in each of four tiles, one column of tiles per kind: eight runs of orange at the least
    assert np.count_nonzero(np.diff(orange.astype(int)) == 1) >= 8


def test_a_capture_without_maps_makes_a_page_without_maps(capture: Magnitudes) -> None:
    bare = {name: dataclasses.replace(s, map=s.map[:0]) for name, s in capture.inputs.items()}
    view = OutliersView.of(dataclasses.replace(capture, inputs=bare))
    assert view.page_state()["details"] == {}
    assert not any(entry["map"] for entry in view.meta["groups"])


def test_an_unknown_order_is_refused(capture: Magnitudes) -> None:
    with pytest.raises(Exception, match="sort"):
        OutliersView.of(capture, sort="size")

import dataclasses

import numpy as np
import pytest
import synthetic

from sqviz.errors import NoSuchLayer, SqvizError
from sqviz.observe.magnitudes import Magnitudes
from sqviz.widgets.heatmap import HeatmapView, maps_of
from sqviz.widgets.surface import SurfaceView, panels_of

NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def capture() -> Magnitudes:
    return synthetic.magnitudes()


def test_four_panels_hold_the_maps_and_what_smoothing_makes_of_them(capture: Magnitudes) -> None:
    maps = maps_of(capture, NAME)
    assert maps.x is not None
    assert maps.w is not None
    x, w, smooth_x, smooth_w = (panel.values for panel in panels_of(maps, 0.5))
    s = np.sqrt(np.where(maps.x_max > 0, maps.x_max, 1.0)) / np.sqrt(np.where(maps.x_max > 0, maps.w_max, 1.0))
    np.testing.assert_array_equal(x, maps.x)
    np.testing.assert_array_equal(w, maps.w)
    np.testing.assert_allclose(smooth_x, maps.x / s, rtol=1e-5)
    np.testing.assert_allclose(smooth_w, maps.w * s, rtol=1e-5)


def test_the_figure_keeps_the_planted_outlier(capture: Magnitudes) -> None:
    heights = np.asarray(SurfaceView.of(capture, NAME).figure().data[0].z)
    assert heights.max() == 600.0
    row, column = np.unravel_index(heights.argmax(), heights.shape)
    assert (row, column) == (0, 7)  # 32 rows and 192 channels need no pooling


def test_plotly_js_is_in_the_page_and_not_in_the_state(capture: Magnitudes) -> None:
    view = SurfaceView.of(capture, NAME)
    state = sum(
        len(value) if isinstance(value, bytes | str) else len(repr(value)) for value in view.get_state().values()
    )
    assert state < 300_000
    page = view.to_html()
    assert isinstance(page, str)
    assert page.count("plotly.js v") == 1
    assert "cdn.plot.ly" not in page.split("</head>", 1)[1]


def test_a_page_that_asks_gets_plotly_js_once(capture: Magnitudes, monkeypatch: pytest.MonkeyPatch) -> None:
    view = SurfaceView.of(capture, NAME)
    sent: list[tuple[object, list[bytes]]] = []
    monkeypatch.setattr(view, "send", lambda content, buffers=None: sent.append((content, buffers or [])))
    view._handle_custom_msg({"need": "something else"}, [])
    assert sent == []
    view._handle_custom_msg({"need": "plotly"}, [])
    assert sent[0][0] == {"plotly": True}
    assert b"plotly.js v" in sent[0][1][0][:2000]


def test_the_layout_travels_without_heights(capture: Magnitudes) -> None:
    figure = SurfaceView.of(capture, NAME).figure_json
    assert len(figure["data"]) == 4
    assert all("z" not in trace and "x" in trace for trace in figure["data"])
    assert {"scene", "scene2", "scene3", "scene4"} <= set(figure["layout"])


def test_peaks_are_exact(capture: Magnitudes) -> None:
    view = SurfaceView.of(capture, NAME)
    np.testing.assert_array_equal(np.frombuffer(view.x_peak, "<f4"), capture.inputs[NAME].map.float().amax(0))


def test_the_still_changes_with_alpha_and_the_heatmap_is_at_hand(capture: Magnitudes) -> None:
    view = SurfaceView.of(capture, NAME, alpha=0.8)
    assert view.to_png() != SurfaceView.of(capture, NAME, alpha=0.2).to_png()
    heatmap = view.heatmap(smoothed=True)
    assert isinstance(heatmap, HeatmapView)
    assert not isinstance(heatmap, SurfaceView)
    assert (heatmap.alpha, heatmap.smoothed) == (0.8, True)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_alpha_outside_its_range_is_refused(capture: Magnitudes, alpha: float) -> None:
    with pytest.raises(SqvizError, match="alpha"):
        SurfaceView.of(capture, NAME, alpha=alpha)


def test_no_map_no_surface(capture: Magnitudes) -> None:
    with pytest.raises(ValueError, match="map_tokens"):
        SurfaceView(dataclasses.replace(maps_of(capture, NAME), x=None))
    with pytest.raises(NoSuchLayer):
        SurfaceView.of(capture, "lm_head")

"""What a user sees and can do in the heatmap, the outliers and the surfaces, as pages from disk."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# helpers of the tests lie beside them, and beside those of the widgets
sys.path.insert(0, str(Path(__file__).parents[1] / "widgets"))
sys.path.insert(0, str(Path(__file__).parent))
import synthetic
from view_drive import decoded, hover_cell, pixels, settle, tip

from sqviz.plots.pool import max_pool
from sqviz.widgets.heatmap import HeatmapView, Maps
from sqviz.widgets.outliers import OutliersView
from sqviz.widgets.still import colour_map, number
from sqviz.widgets.surface import SurfaceView, panels_of

pytestmark = pytest.mark.browser

NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def capture() -> Any:
    return synthetic.magnitudes()


# ---- heatmap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_heatmap_page_draws_in_both_themes_and_switches(capture, view_page, screenshots, theme) -> None:
    page = view_page(HeatmapView.of(capture, NAME), theme=theme)
    canvas = page.locator("canvas")
    paper = {"light": [255, 255, 255], "dark": [17, 17, 17]}
    image = pixels(canvas)
    assert image[2, -2].tolist() == paper[theme]
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 100  # not blank
    page.screenshot(path=screenshots / f"heatmap_page_{theme}.png")
    page.locator("#page-theme").click()
    page.wait_for_timeout(400)
    other = "dark" if theme == "light" else "light"
    assert pixels(canvas)[2, -2].tolist() == paper[other]


@pytest.mark.parametrize(("row", "column"), [(0, 7), (0, 41), (13, 100), (31, 191)])
def test_hover_tells_the_value_that_python_has(capture, view_page, row, column) -> None:
    view = HeatmapView.of(capture, NAME)
    page = view_page(view, width=1100)  # wider than the channels are many: a cell is several pixels
    text = hover_cell(page, page.locator("canvas"), row, column)
    exact = float(capture.inputs[NAME].map[row, column])
    shown = float(re.search(r"≈ (\S+)", text)[1])
    lo, hi = view.meta["x"]["range"]
    assert number(float(decoded(view)[row, column])) == re.search(r"≈ (\S+)", text)[1]
    assert shown == pytest.approx(exact, rel=10 ** ((hi - lo) / 508) - 1 + 0.006)
    assert f"channel {column} (its max |X|: {number(float(capture.inputs[NAME].absmax[column]))})" in text
    assert f"token {2 * row}–{2 * row + 1}: “{capture.token_texts[2 * row]}”" in text


def test_smoothing_in_the_page_is_smoothing_in_python(capture, view_page) -> None:
    view = HeatmapView.of(capture, NAME)
    page = view_page(view, width=1100)
    canvas = page.locator("canvas")
    before = pixels(canvas)
    slider = page.get_by_label("Migration strength α")
    slider.focus()
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    settle(page)
    assert page.get_by_role("button", name="Smooth").get_attribute("aria-pressed") == "true"
    assert slider.input_value() == "0.8"
    assert not np.array_equal(before, pixels(canvas))
    smoothed = view.maps.operand("x", 0.8)
    for row, column in [(0, 7), (5, 60), (20, 150)]:
        text = hover_cell(page, canvas, row, column)
        assert text.startswith("|X| / s")
        assert float(re.search(r"≈ (\S+)", text)[1]) == pytest.approx(smoothed[row, column], rel=0.04)
    page.get_by_role("button", name="|W|").click()
    text = hover_cell(page, canvas, 3, 7)
    assert text.startswith("s · |W|")
    assert float(re.search(r"≈ (\S+)", text)[1]) == pytest.approx(view.maps.operand("w", 0.8)[3, 7], rel=0.04)


@pytest.mark.parametrize("control", ["|W|", "Smooth", "Log colours", "Clip at 99.9 %", "cividis"])
def test_each_control_changes_the_picture(capture, view_page, control) -> None:
    page = view_page(HeatmapView.of(capture, NAME))
    canvas = page.locator("canvas")
    before = pixels(canvas)
    if control == "cividis":
        page.locator("label", has_text="Colours").locator("select").select_option("cividis")
    else:
        page.get_by_role("button", name=control).click()
    settle(page)
    assert not np.array_equal(before, pixels(canvas))


def test_the_keyboard_moves_zooms_and_resets(capture, view_page) -> None:
    page = view_page(HeatmapView.of(capture, NAME))
    canvas = page.locator("canvas")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    settle(page)
    assert tip(page).startswith("|X| ≈")
    for _ in range(4):
        page.keyboard.press("+")
    settle(page)
    view = canvas.evaluate("c => c.view()")
    assert view["c1"] - view["c0"] == pytest.approx(192 * 0.7**4, rel=0.01)
    page.keyboard.press("Shift+ArrowRight")
    assert canvas.evaluate("c => c.view()")["c0"] > view["c0"]
    page.keyboard.press("Escape")
    assert page.locator(".sqviz-tip").is_hidden()
    page.keyboard.press("0")
    assert canvas.evaluate("c => c.view()") == {"r0": 0, "r1": 32, "c0": 0, "c1": 192}


def test_the_mouse_zooms_pans_and_leaves_the_page_its_wheel(capture, view_page) -> None:
    page = view_page(HeatmapView.of(capture, NAME), height=300)
    canvas = page.locator("canvas")
    hover_cell(page, canvas, 5, 50)
    whole = canvas.evaluate("c => c.view()")
    page.mouse.wheel(0, 100)  # not clicked yet: the page scrolls, the heatmap stays
    page.wait_for_function("() => window.scrollY > 0")
    assert canvas.evaluate("c => c.view()") == whole
    page.evaluate("scrollTo(0, 0)")
    hover_cell(page, canvas, 5, 50)
    page.mouse.down()
    page.mouse.up()
    page.mouse.wheel(0, -200)
    page.wait_for_function("() => { const v = document.querySelector('canvas').view(); return v.c1 - v.c0 < 192; }")
    zoomed = canvas.evaluate("c => c.view()")
    assert zoomed["c1"] - zoomed["c0"] == pytest.approx(96)
    assert zoomed["c0"] < 50.5 < zoomed["c1"]
    frame = canvas.bounding_box()
    page.mouse.down()
    page.mouse.move(frame["x"] + 100, frame["y"] + 60, steps=4)
    page.mouse.up()
    assert canvas.evaluate("c => c.view()")["c0"] != zoomed["c0"]
    canvas.dblclick()
    assert canvas.evaluate("c => c.view()") == whole


def test_one_outlier_among_eight_million_cells_is_seen_and_found(view_page, capsys) -> None:
    random = np.random.default_rng(0)
    x = np.abs(random.standard_normal((2048, 4096), dtype=np.float32))
    x[1234, 3210] = 900.0
    w = np.abs(random.standard_normal((128, 4096), dtype=np.float32))
    page = view_page(HeatmapView(Maps("large", x, w, x.max(0), w.max(0), (), 2048, 11008)), width=1000)
    canvas = page.locator("canvas")
    last = colour_map()[255]
    rows, columns = np.nonzero(
        (pixels(canvas) == last).all(-1)[: int(canvas.evaluate("c => c.plot.y + c.plot.height"))]
    )
    plot = canvas.evaluate("c => c.plot")
    assert len(rows) >= 1
    assert np.all(abs(columns - (plot["x"] + 3210.5 / 4096 * plot["width"])) <= 2)
    assert np.all(abs(rows - (plot["y"] + 1234.5 / 2048 * plot["height"])) <= 2)
    text = hover_cell(page, canvas, 1234, 3210)
    assert "channel 3210" in text
    assert "token 1234" in text
    assert "cells under the pointer" in text
    page.mouse.down()
    page.mouse.up()
    page.mouse.wheel(0, -200)
    times = []
    page.mouse.down()
    for step in range(20):
        page.mouse.move(500 + 4 * step, 300 + 2 * step)
        settle(page)
        times.append(canvas.evaluate("c => c.paintMilliseconds"))
    page.mouse.up()
    with capsys.disabled():
        print(f"\npanning 2048 × 4096 cells: {np.median(times):.1f} ms of drawing per frame (median of {len(times)})")


# ---- every view, narrow --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [HeatmapView, OutliersView, SurfaceView])
def test_a_narrow_window_shows_everything_without_scrolling_sideways(capture, view_page, screenshots, make) -> None:
    view = OutliersView.of(capture) if make is OutliersView else make.of(capture, NAME)
    page = view_page(view, width=400, height=800)
    if make is SurfaceView:
        page.wait_for_selector(".sqviz-surfaces[data-drawn]", timeout=120_000)
    page.wait_for_timeout(200)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.screenshot(path=screenshots / f"{make.__name__}_narrow.png", full_page=True)


# ---- outliers ------------------------------------------------------------------------------------------------------


def test_outliers_open_by_keyboard_and_close_again(capture, view_page) -> None:
    page = view_page(OutliersView.of(capture), width=1000)
    overview = page.locator("canvas").first
    overview.focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert "largest 600" in tip(page)
    page.keyboard.press("Enter")
    page.wait_for_selector(".sqviz-detail canvas")
    settle(page)
    assert page.locator(".sqviz-detail .sqviz-title").inner_text() == "model.layers.1.mlp.gate_proj"
    assert page.locator(".sqviz-detail canvas").count() == 2  # its maxima and its heatmap
    page.keyboard.press("ArrowRight")
    assert tip(page).startswith("channel 7: max |X| 600")
    page.keyboard.press("Escape")
    assert page.locator(".sqviz-detail").count() == 0
    assert overview.is_visible()
    assert overview.evaluate("c => document.activeElement === c")


def test_outliers_hover_and_tokens_are_pythons(capture, view_page, screenshots) -> None:
    page = view_page(OutliersView.of(capture), width=1100)
    overview = page.locator("canvas").first
    frame = overview.bounding_box()
    tile = next(t for t in overview.evaluate("c => c.tiles()") if t["name"] == NAME)
    page.mouse.move(frame["x"] + tile["x"] + 7.5 / 192 * tile["width"], frame["y"] + tile["y"] + 30)
    assert f"channel 7: max |X| {number(float(capture.inputs[NAME].absmax[7]))}, token 1: “·people”" in tip(page)
    page.screenshot(path=screenshots / "outliers_page.png")
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector(".sqviz-tokens")
    rows = page.locator(".sqviz-tokens tbody tr").all_inner_texts()
    top = capture.inputs[NAME].top
    assert [row.split("\t") for row in rows] == [
        [number(t.value), str(t.channel), str(t.token), f"“{t.text}”"] for t in top
    ]
    page.screenshot(path=screenshots / "outliers_page_open.png", full_page=True)
    page.get_by_role("button", name="The layer after").click()
    assert page.locator(".sqviz-detail .sqviz-title").inner_text() == "model.layers.2.self_attn.q_proj"


@pytest.mark.parametrize("order", ["absmax", "ratio", "name"])
def test_sorting_puts_the_tiles_in_pythons_order(capture, view_page, order) -> None:
    page = view_page(OutliersView.of(capture))
    overview = page.locator("canvas").first
    before = pixels(overview)
    page.get_by_label("Sort by").select_option(order)
    settle(page)
    assert not np.array_equal(before[:80], pixels(overview)[:80])
    inputs = capture.inputs
    keys = {
        "absmax": lambda g: -float(inputs[g.name].absmax.max()),
        "ratio": lambda g: -inputs[g.name].outlier_ratio,
        "name": lambda g: g.name,
    }
    expected = [group.name for group in sorted(capture.groups, key=keys[order])]
    assert [tile["name"] for tile in overview.evaluate("c => c.tiles()")] == expected


def test_the_picture_can_be_saved(capture, view_page, tmp_path) -> None:
    page = view_page(OutliersView.of(capture))
    with page.expect_download() as download:
        page.get_by_role("button", name="PNG").click()
    assert download.value.suggested_filename == "outliers.png"
    download.value.save_as(tmp_path / "saved.png")
    assert (tmp_path / "saved.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---- surfaces ------------------------------------------------------------------------------------------------------


def test_surfaces_have_pythons_heights_and_follow_alpha(capture, view_page, screenshots) -> None:
    view = SurfaceView.of(capture, NAME)
    page = view_page(view, width=1000, height=900)
    page.wait_for_selector(".sqviz-surfaces[data-drawn]", timeout=120_000)
    space = page.locator(".sqviz-surfaces")
    assert page.locator(".js-plotly-plot").count() == 1  # one figure ...
    assert space.evaluate("s => s.data.map(t => t.scene)") == ["scene", "scene2", "scene3", "scene4"]  # ... of four
    slider = page.get_by_label("Migration strength α").first
    slider.focus()
    page.keyboard.press("PageUp")  # + 0.1
    alpha = float(slider.input_value())
    assert alpha == pytest.approx(0.6)
    page.wait_for_function(
        "() => document.querySelector('.sqviz-surfaces').layout.annotations[2].text.includes('0.6')", timeout=120_000
    )
    shown = space.evaluate("s => s.data.map(t => t.z.map(row => [...row]))")
    for heights, panel in zip(shown, panels_of(view.maps, alpha), strict=True):
        expected = max_pool(panel.values, 96, 192)
        np.testing.assert_allclose(heights, expected, rtol=0.04, atol=1e-6 * expected.max())
    titles = space.evaluate("s => s.layout.annotations.map(a => a.text)")
    for title, panel in zip(titles, panels_of(view.maps, alpha), strict=True):
        assert title == f"<b>{panel.title}</b>"
    page.screenshot(path=screenshots / "surface_page.png")


def test_surfaces_turn_by_keyboard_and_show_the_heatmap(capture, view_page) -> None:
    page = view_page(SurfaceView.of(capture, NAME), width=1000)
    page.wait_for_selector(".sqviz-surfaces[data-drawn]", timeout=120_000)
    space = page.locator(".sqviz-surfaces")
    eye = space.evaluate("s => s.layout.scene4.camera.eye.x")
    space.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"() => document.querySelector('.sqviz-surfaces').layout.scene4.camera.eye.x !== {eye}")
    page.locator("summary").click()
    page.wait_for_selector("details canvas")
    assert hover_cell(page, page.locator("details canvas"), 0, 7).startswith("|X| ≈ ")

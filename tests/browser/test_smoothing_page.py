"""The smoothing explorer as a page from disk: no kernel, no network, and the slider works."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# ruff: noqa: E402 - helpers of the tests lie beside them, and beside those of the widgets
sys.path[:0] = [str(Path(__file__).parents[1] / "widgets"), str(Path(__file__).parent)]
from explorers import explorers, settle, sweeps, tiny_capture
from smoothing_drive import LINEAR, assert_curve, assert_map, canvases, drag_to, error_shown, frame, pixels, press

from sqviz.quant.smooth import smoothing_scale
from sqviz.widgets.smoothing_pack import unpack
from sqviz.widgets.still import number

pytestmark = pytest.mark.browser


@pytest.fixture
def explorer():
    with explorers() as make:
        yield settle(make(linear=LINEAR))


def test_a_page_from_disk_has_a_working_slider(explorer, view_page):
    page = view_page(explorer, width=1150, height=900)
    row = sweeps(explorer)[tiny_capture().names.index(LINEAR)]
    assert error_shown(page) == f"{number(100 * explorer.answer['error'])} %"
    assert "exact" in page.locator(".sm-source").inner_text()
    assert_map(page, explorer.picture, 0.5)
    assert_curve(page, row)

    # The linear in view comes with its exact error at every stop; the others are read off their curves.
    press(page, "End")
    assert error_shown(page) == f"{number(100 * row[20])} %"
    assert_map(page, explorer.picture, 1.0)
    press(page, "PageDown", "PageDown", "ArrowLeft", "ArrowRight")
    assert page.locator(".sm-range").input_value() == "0.9"
    press(page, "Home", "ArrowLeft")
    assert page.locator(".sm-range").input_value() == "0"
    assert error_shown(page) == f"{number(100 * row[0])} %"

    before = pixels(canvases(page)["maxima"])
    drag_to(page, page.locator(".sm-range"), 0.75, 8, 8)
    assert page.locator(".sm-range").input_value() == "0.75"
    assert error_shown(page) == f"{number(100 * row[15])} %"
    assert not np.array_equal(before, pixels(canvases(page)["maxima"]))
    assert_map(page, explorer.picture, 0.75)
    drag_to(page, canvases(page)["error"], 0.25, 52, 14)
    assert page.locator(".sm-range").input_value() == "0.25"
    assert_map(page, explorer.picture, 0.25)
    assert len(page.evaluate("document.querySelector('.sm').__sqviz_timings")) > 5


def test_the_largest_values_beside_the_map_are_python_s(explorer, view_page):
    page = view_page(explorer, width=1150)
    _, arrays = unpack(explorer.picture)[0]
    for key, alpha in (("End", 1.0), ("Home", 0.0)):
        press(page, key)
        s = smoothing_scale(torch.tensor(arrays["s_x"]), torch.tensor(arrays["s_w"]), alpha).numpy()
        facts = page.locator(".sm-facts").all_inner_texts()
        before, after = arrays["x_absmax"].max(), (arrays["x_absmax"] / s).max()
        assert any(f"largest {number(before)} → {number(after)}" in text for text in facts)


def test_pickers_of_a_page_offer_what_it_carries(explorer, view_page):
    page = view_page(explorer, width=1150)
    page.get_by_label("Linear", exact=True).select_option("mlp.down_proj")
    frame(page)
    row = sweeps(explorer)[tiny_capture().names.index("model.layers.1.mlp.down_proj")]
    assert error_shown(page) == f"≈ {number(100 * row[10])} %"
    page.get_by_role("button", name="Next layer").click()
    frame(page)
    assert page.locator(".sm-layer-value").inner_text() == "2"
    row = sweeps(explorer)[tiny_capture().names.index("model.layers.2.mlp.down_proj")]
    assert error_shown(page) == f"≈ {number(100 * row[10])} %"
    assert page.get_by_role("button", name="Next layer").is_disabled()
    strip = canvases(page)["strip"].bounding_box()
    assert strip
    page.mouse.click(strip["x"] + strip["width"] / 2, strip["y"] + 8)  # the first row of three
    frame(page)
    assert page.locator(".sm-layer-value").inner_text() == "0"
    assert page.get_by_label("Scheme", exact=True).is_disabled()
    assert "no kernel" in page.locator(".sm-scheme").inner_text()
    page.get_by_role("button", name="Reset").click()
    frame(page)
    assert page.locator(".sm-layer-value").inner_text() == "1"


def test_code_can_be_copied_by_hand_where_there_is_no_clipboard(explorer, view_page):
    page = view_page(explorer, width=1150)
    press(page, "PageUp")
    page.evaluate("() => Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    page.get_by_role("button", name="Copy code").click()
    box = page.locator("textarea.sm-code")
    box.wait_for()
    assert "sqviz.smooth(lm, magnitudes, 0.55, folds='all')" in box.input_value()
    assert "sqviz.quantize(smoothed, sqviz.W8A8, magnitudes)" in box.input_value()


@pytest.mark.parametrize("width", [400, 480, 760, 1150])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_cut_off_at_any_width(explorer, view_page, screenshots, width, theme):
    page = view_page(explorer, theme=theme, width=width)
    overflow = page.evaluate(
        """() => [...document.querySelectorAll('.sm *')].filter(node => {
            const box = node.getBoundingClientRect();
            return box.width > 0 && !node.hidden && box.right > document.documentElement.clientWidth + 1;
        }).map(node => node.className || node.tagName)"""
    )
    assert overflow == []
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    page.screenshot(path=screenshots / f"smoothing_page_{width}_{theme}.png", full_page=True)


def test_every_control_has_a_name(explorer, view_page):
    page = view_page(explorer, width=1150)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('.sm :is(button, select, input, canvas[tabindex])')].filter(node =>
            !(node.getAttribute('aria-label') || node.textContent.trim() || node.labels?.[0]?.textContent.trim())
        ).map(node => node.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    page.get_by_role("button", name="Help").click()
    assert page.locator(".sm-help dt").count() >= 9

"""The smoothing explorer in JupyterLab: what the hand does, the kernel knows; what the kernel finds, the page shows."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from playwright.sync_api import Page

# ruff: noqa: E402 - helpers of the tests lie beside them, and beside those of the widgets
sys.path[:0] = [str(Path(__file__).parents[1] / "widgets"), str(Path(__file__).parent)]
from explorers import ids, tiny_capture
from smoothing_drive import (
    LINEAR,
    WAIT_MS,
    assert_curve,
    assert_map,
    canvases,
    drag_to,
    error_shown,
    pixels,
    press,
    wait_for_hand,
)

from sqviz.widgets.still import number

pytestmark = pytest.mark.browser

TINY = [
    """
import torch, sqviz
from sqviz.models.tiny import tiny
lm = tiny("LlamaForCausalLM", num_hidden_layers=3)
ids = torch.randint(0, 131, (192,), generator=torch.Generator().manual_seed(1))
m = sqviz.capture(lm, ids, samples=6, length=32, progress=False)
view = sqviz.explore_smoothing(lm, m, text=ids[:96], linear="model.layers.1.mlp.gate_proj")
view""",
]
EMBEDDED = [
    """
import sqviz
lm = sqviz.load()
view = sqviz.explore_smoothing(lm, sqviz.Magnitudes.embedded())
view""",
]


def kernel(lab: Any, expression: str) -> Any:
    """The value of an expression in the kernel, once the view's worker has come to rest."""
    return json.loads(lab.run(f"import json\nassert view._engine.worker.wait(60)\nprint(json.dumps({expression}))"))


def wait_for_exact(page: Page) -> None:
    page.wait_for_function(
        "() => /^exact/.test(document.querySelector('.sm-source').textContent)", timeout=WAIT_MS, polling=20
    )


def test_in_jupyterlab_hand_and_kernel_agree(lab_page, screenshots):
    lab = lab_page(TINY, width=1280, height=1000)
    lab.run_all()
    page = lab.page
    page.locator(".sm-range").wait_for(timeout=WAIT_MS)
    wait_for_exact(page)
    pack = bytes.fromhex(kernel(lab, "view.picture.hex()"))
    assert_map(page, pack, 0.5)
    row = np.frombuffer(bytes.fromhex(kernel(lab, "view.sweeps.hex()")), "<f4").reshape(-1, 22)
    assert_curve(page, row[tiny_capture().names.index(LINEAR)])

    drag_to(page, page.locator(".sm-range"), 0.8, 8, 8, steps=15)
    wait_for_exact(page)
    wait_for_hand(lab, "view", 0.8)
    answer = kernel(lab, "view.answer")
    assert error_shown(page) == f"{number(100 * answer['error'])} %"
    assert_map(page, pack, 0.8)

    cells = page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.length")
    press(page, "ArrowLeft", "ArrowLeft", "ArrowDown", "PageDown")
    wait_for_exact(page)
    wait_for_hand(lab, "view", 0.72)
    assert error_shown(page) == f"{number(100 * kernel(lab, 'view.answer')['error'])} %"
    assert page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.length") == cells

    kernel(lab, "setattr(view, 'alpha', 0.35)")  # Python moves the slider
    page.wait_for_function("() => document.querySelector('.sm-range').value === '0.35'", timeout=WAIT_MS)
    wait_for_exact(page)
    assert_map(page, pack, 0.35)
    page.screenshot(path=screenshots / "smoothing_tiny.png")


def test_scheme_linear_and_perplexity_from_the_page(lab_page):
    lab = lab_page(TINY, width=1280, height=1000)
    lab.run_all()
    page = lab.page
    page.locator(".sm-range").wait_for(timeout=WAIT_MS)
    wait_for_exact(page)
    naive = error_shown(page)
    page.get_by_label("Scheme", exact=True).select_option("SMOOTHQUANT_LLAMA")
    page.wait_for_function("(old) => document.querySelectorAll('.sm-big')[1].textContent !== old", arg=naive)
    wait_for_exact(page)
    assert kernel(lab, "repr(sqviz.SMOOTHQUANT_LLAMA == view.state.scheme)") == "True"
    page.get_by_label("Bits of the activations", exact=True).select_option("4")
    page.get_by_label("Activations", exact=True).select_option("per-tensor")
    page.get_by_role("button", name="Static").click()
    wait_for_exact(page)
    assert kernel(lab, "view.scheme")["static"] is True
    assert kernel(lab, "[view.scheme['bits'], view.scheme['weight_bits']]") == [4, 8]
    assert page.get_by_label("Scheme", exact=True).input_value() == ""

    page.get_by_label("Linear", exact=True).select_option("self_attn.o_proj")
    wait_for_exact(page)
    assert kernel(lab, "view.linear") == "model.layers.1.self_attn.o_proj"
    assert error_shown(page) == f"{number(100 * kernel(lab, 'view.answer')['error'])} %"

    page.get_by_role("button", name="Estimate").click()
    result = page.locator(".sm-estimate")
    result.filter(has_text="→").wait_for(timeout=WAIT_MS)
    estimate = kernel(lab, "view.estimate")
    assert result.inner_text().startswith(f"{number(estimate['reference'])} → {number(estimate['value'])}")

    with page.expect_download(timeout=WAIT_MS) as download:
        page.get_by_role("button", name="HTML").click()
    saved = Path(download.value.path()).read_text(encoding="utf-8")
    assert re.search(r'"embedded":\s*\["model\.layers', saved)
    with page.expect_download(timeout=WAIT_MS) as download:
        page.get_by_role("button", name="PNG").click()
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")


def test_the_slider_works_while_a_cell_computes(lab_page):
    lab = lab_page(TINY, width=1280, height=1000)
    lab.run_all()
    page = lab.page
    page.locator(".sm-range").wait_for(timeout=WAIT_MS)
    wait_for_exact(page)
    busy = "import time\nend = time.monotonic() + 20\nwhile time.monotonic() < end: sum(range(1000))"
    start = """(code) => { window.cellDone = false;
        const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
        kernel.requestExecute({ code }).done.then(() => { window.cellDone = true; }); }"""
    page.evaluate(start, busy)
    page.wait_for_timeout(500)
    before = pixels(canvases(page)["x"])
    press(page, "PageUp", "PageUp")
    assert not np.array_equal(before, pixels(canvases(page)["x"]))
    wait_for_exact(page)  # through the widget's own thread in the kernel, past the busy cell
    assert page.evaluate("window.cellDone") is False
    assert page.locator(".sm-range").input_value() == "0.6"


def test_what_fails_in_the_kernel_is_shown_in_the_view(lab_page):
    lab = lab_page(TINY, width=1280, height=1000)
    lab.run_all()
    page = lab.page
    page.locator(".sm-range").wait_for(timeout=WAIT_MS)
    wait_for_exact(page)
    lab.run("def broken(*_): raise RuntimeError('the kernel is out of luck')\nview._engine._probe = broken")
    page.get_by_label("Scheme", exact=True).select_option("ZEROQUANT")
    problem = page.locator(".sm-problem")
    problem.wait_for(timeout=WAIT_MS)
    assert "the kernel is out of luck" in problem.inner_text()
    problem.get_by_role("button").click()
    assert problem.is_hidden()


@pytest.mark.embedded
def test_the_embedded_model_in_light_dark_and_narrow(lab_page, screenshots):
    lab = lab_page(EMBEDDED, width=1280, height=1060)
    lab.run_all()
    page = lab.page
    page.locator(".sm-range").wait_for(timeout=WAIT_MS)
    wait_for_exact(page)
    kernel(lab, "None")  # all layers are swept
    page.locator(".sm").scroll_into_view_if_needed()
    page.screenshot(path=screenshots / "smoothing_lab_light.png")
    before = error_shown(page)
    press(page, "PageUp", "PageUp", "PageUp")
    wait_for_exact(page)
    assert error_shown(page) != before
    page.get_by_label("Linear", exact=True).select_option("mlp.down_proj")
    wait_for_exact(page)
    kernel(lab, "None")
    lab.theme("dark")
    page.screenshot(path=screenshots / "smoothing_lab_dark.png")
    page.set_viewport_size({"width": 480, "height": 1600})
    page.wait_for_timeout(500)
    page.screenshot(path=screenshots / "smoothing_lab_narrow.png")
    assert page.locator(".sqviz-error:visible").count() == 0


def test_ids_are_those_of_the_notebook():
    """The tests above compare pages of this process with kernels of another: both must make the same tiny capture."""
    again = torch.randint(0, 131, (192,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(again, ids(192, seed=1))

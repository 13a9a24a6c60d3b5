"""The heatmap, the outliers and the surfaces inside JupyterLab, with a kernel behind them."""

import json
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
from view_drive import decoded, hover_cell, pixels, settle

from sqviz.widgets.heatmap import HeatmapView
from sqviz.widgets.still import number

pytestmark = pytest.mark.browser

NAME = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def capture() -> Any:
    return synthetic.magnitudes()


SETUP = f"""import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / "widgets")!r})
import synthetic
m = synthetic.magnitudes()"""


def test_views_live_in_jupyterlab(capture, lab_page, screenshots) -> None:
    lab = lab_page([SETUP, f"h = m.heatmap({NAME!r}); h", "o = m.outliers(); o"], height=1300)
    lab.run_all()
    heat = lab.page.locator(".sqviz").nth(0).locator("canvas")
    lab.page.wait_for_function("() => document.querySelector('.sqviz canvas')?.paints > 0")
    assert hover_cell(lab.page, heat, 0, 7).startswith(
        f"|X| ≈ {number(float(decoded(HeatmapView.of(capture, NAME))[0, 7]))}"
    )
    lab.page.screenshot(path=screenshots / "lab_light.png")

    before = pixels(heat)
    lab.run("h.operand = 'w'; h.smoothed = True")
    lab.page.wait_for_selector(".sqviz button[aria-pressed=true]:text('|W|')")
    settle(lab.page)
    assert not np.array_equal(before, pixels(heat))
    lab.page.get_by_role("button", name="|X|").click()
    lab.page.locator(".sqviz label", has_text="Colours").locator("select").first.select_option("cividis")
    wait_for(lab, "print(h.operand, h.palette)", "x cividis")

    lab.theme("dark")
    assert pixels(heat)[2, -2].max() < 40
    lab.page.screenshot(path=screenshots / "lab_dark.png")


def wait_for(lab: Any, code: str, expected: str) -> None:
    """Until the kernel prints what is expected: traits cross on a thread of their own."""
    for _ in range(50):
        if (printed := lab.run(code).strip()) == expected:
            return
        lab.page.wait_for_timeout(100)
    assert printed == expected


def test_outliers_fetch_their_map_and_keys_stay_in_the_view(capture, lab_page, screenshots) -> None:
    lab = lab_page([SETUP, "o = m.outliers(); o"], height=1200)
    lab.run_all()
    canvas = lab.page.locator(".sqviz canvas").first
    lab.page.wait_for_function("() => document.querySelector('.sqviz canvas')?.paints > 0")
    canvas.focus()
    cells = """() => { const notebook = window.jupyterapp.shell.currentWidget.content;
        return [notebook.widgets.length, notebook.activeCellIndex]; }"""
    state = lab.page.evaluate(cells)
    for key in ("ArrowRight", "ArrowDown", "b", "a", "d", "d", "ArrowRight", "ArrowRight"):
        lab.page.keyboard.press(key)
    assert lab.page.evaluate(cells) == state  # no cell added, deleted or selected
    lab.page.keyboard.press("Enter")
    lab.page.wait_for_selector(".sqviz-has-map canvas")
    wait_for(lab, "print(o.opened)", "model.layers.1.mlp.gate_proj")
    heat = lab.page.locator(".sqviz-has-map canvas").nth(1)
    exact = float(capture.inputs["model.layers.1.mlp.gate_proj"].map[0, 7])
    settle(lab.page)
    assert float(re.search(r"≈ (\S+)", hover_cell(lab.page, heat, 0, 7))[1]) == pytest.approx(exact, rel=0.03)
    lab.page.screenshot(path=screenshots / "lab_outliers_open.png")


def test_surfaces_get_plotly_from_the_kernel_and_a_saved_notebook_shows_a_picture(lab_page, screenshots) -> None:
    lab = lab_page([SETUP, f"s = m.surface({NAME!r}); s"], height=1100)
    lab.run_all()
    lab.page.wait_for_selector(".sqviz-surfaces[data-drawn]", timeout=180_000)
    lab.page.screenshot(path=screenshots / "lab_surface.png")
    saved = lab.save()
    size = saved.stat().st_size
    assert size < 1_500_000  # plotly.js, 5 MB, is not in it
    notebook = json.loads(saved.read_text())
    assert "image/png" in notebook["cells"][1]["outputs"][0]["data"]

    # Someone else's notebook is not trusted, so no widget runs: the picture has to be there.
    notebook["cells"][0]["source"] = "# changed by another hand"
    strange = saved.with_name("strange.ipynb")
    strange.write_text(json.dumps(notebook))
    other = lab_page(strange, height=1100)
    picture = other.page.locator(".jp-OutputArea img")
    picture.wait_for(timeout=60_000)
    assert picture.evaluate("img => img.naturalWidth") == 1760
    other.page.screenshot(path=screenshots / "lab_untrusted.png")


def test_a_result_is_an_interactive_figure_and_not_its_picture(lab_page):
    """Also right after the cell ran; the picture inside the notebook is for where plotly is not."""
    setup = """import torch
from sqviz.models.tiny import tiny
from sqviz.evaluation.sinks import sinks
ids = torch.randint(3, 131, (90,), generator=torch.Generator().manual_seed(0))"""
    lab = lab_page([setup, "sinks(tiny('LlamaForCausalLM'), ids, size=16, tokens=90)"])
    lab.run_all()
    lab.page.locator(".jp-RenderedPlotly .plot-container").wait_for(timeout=60_000)
    assert not lab.page.locator(".jp-RenderedPlotly img.plot-img").is_visible()
    saved = json.loads(lab.save().read_text())
    assert "<svg" in "".join(saved["cells"][1]["outputs"][0]["data"]["image/svg+xml"])

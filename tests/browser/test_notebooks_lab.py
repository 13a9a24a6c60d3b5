"""The notebooks as their reader runs them: in JupyterLab, top to bottom; then α is dragged and typed in 02."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

# helpers of the tests lie beside them
sys.path.insert(0, str(Path(__file__).parent))
from smoothing_drive import WAIT_MS, accent, canvases, curve_height, drag_to, error_shown, pixels, press, wait_for_hand

from sqviz.quant.error import ALPHAS
from sqviz.widgets.still import number

pytestmark = [pytest.mark.browser, pytest.mark.embedded, pytest.mark.notebook]
NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
MINUTES = 8  # for a loaded machine; alone each takes under two


def at_rest(lab, expression: str):
    """The value of an expression in the kernel once the explorer's worker has come to rest."""
    code = f"import json\nassert explorer._engine.worker.wait(120)\nprint(json.dumps({expression}))"
    return json.loads(lab.run(code, timeout_seconds=150))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["00_start", "01_outliers"])
def test_runs_in_jupyterlab(name, lab_page, screenshots):
    lab = lab_page(NOTEBOOKS / f"{name}.ipynb", width=1280, height=1000)
    lab.run_all(timeout_seconds=60 * MINUTES)
    lab.page.locator(".sqviz canvas").first.wait_for(timeout=WAIT_MS)
    assert lab.page.locator(".sqviz-error:visible").count() == 0
    lab.page.screenshot(path=screenshots / f"notebook_{name}.png")


@pytest.mark.timeout(900)
def test_alpha_moves_by_mouse_and_keyboard_in_02(lab_page, screenshots):
    lab = lab_page(NOTEBOOKS / "02_smoothing.ipynb", width=1280, height=1000)
    lab.run_all(timeout_seconds=60 * MINUTES)
    page = lab.page
    slider = page.locator(".sm-range")
    lab.command("notebook:move-cursor-up")  # anything that makes Lab draw cells above the last one again
    page.locator(".sm").scroll_into_view_if_needed(timeout=WAIT_MS)
    slider.wait_for(timeout=WAIT_MS)
    rows = np.frombuffer(bytes.fromhex(at_rest(lab, "explorer.sweeps.hex()")), "<f4").reshape(-1, 22)
    row = rows[at_rest(lab, "list(explorer._magnitudes.names).index(explorer.linear)")]
    page.wait_for_timeout(1000)  # the last rows of the strip are on their way to the page
    image, colour = pixels(canvases(page)["error"]), accent(page)
    for easy, hard in ((8, 2), (8, 17), (6, 3), (13, 18)):  # places on the curve; rows of pixels count downwards
        lower = curve_height(image, ALPHAS[easy], colour) > curve_height(image, ALPHAS[hard], colour)
        assert lower == (row[easy] < row[hard]), (ALPHAS[easy], ALPHAS[hard])
    seen = {name: pixels(canvas) for name, canvas in canvases(page).items() if name in ("x", "maxima", "error")}

    drag_to(page, slider, 0.8, 8, 8, steps=15)
    wait_for_hand(lab, "explorer", 0.8)
    assert error_shown(page) == f"{number(100 * at_rest(lab, 'explorer.answer')['error'])} %"
    for name, image in seen.items():
        assert (pixels(canvases(page)[name]) != image).any(), name

    press(page, "ArrowLeft", "PageDown", "PageDown")
    wait_for_hand(lab, "explorer", 0.69)
    assert error_shown(page) == f"{number(100 * at_rest(lab, 'explorer.answer')['error'])} %"
    page.screenshot(path=screenshots / "notebook_02_light.png")
    lab.theme("dark")
    page.screenshot(path=screenshots / "notebook_02_dark.png")

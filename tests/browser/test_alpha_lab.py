"""α in JupyterLab: the curve grows until the button stops it, the map of a search answers, notebook 04 runs."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "04_alpha.ipynb"

SETUP = """import torch, sqviz
from sqviz.models.tiny import tiny
lm = tiny("LlamaForCausalLM")
ids = torch.randint(3, 131, (208 * 40,), generator=torch.Generator().manual_seed(0))
m = sqviz.capture(lm, ids[:320], length=40, progress=False)"""
CURVE = """grid = [None, *(k / 500 for k in range(501))]
curve = sqviz.alpha_curve(lm, m, ids[320:], alphas=grid, length=40, samples=200, live=True)
curve"""
SEARCH = 'found = sqviz.search_alpha(lm, m, sqviz.SMOOTHQUANT_O2, "logits")\nfound'
WAIT_MS = 240_000  # for a loaded machine; alone a second or two
STATUS = ".jp-OutputArea-output .widget-label"


def points_drawn(page) -> int:
    """What the line below the figure says."""
    return int(page.locator(STATUS).last.inner_text().split(" of")[0].replace(",", ""))


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_curve_grows_until_the_button_stops_it(theme, lab_page, screenshots) -> None:
    lab = lab_page([SETUP, CURVE], theme=theme, width=900, height=900)
    page = lab.page
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_function(
        f"() => /of 2008 points/.test([...document.querySelectorAll('{STATUS}')].at(-1)?.innerText ?? '')",
        timeout=WAIT_MS,
    )
    page.locator(".js-plotly-plot .scatterlayer .points path").first.wait_for(timeout=WAIT_MS)
    first = points_drawn(page)
    page.wait_for_timeout(3000)
    page.screenshot(path=screenshots / f"lab_live_alpha_{theme}.png")
    assert points_drawn(page) > first
    page.get_by_role("button", name="Cancel").click()
    lab.run("pass", timeout_seconds=90)  # the kernel is free again
    told = json.loads(lab.run("import json; print(json.dumps([len(curve.points), curve.complete]))"))
    assert first <= told[0] < 2008
    assert told[1] is False
    assert lab.errors() == []
    page.locator(".jp-RenderedPlotly .plot-container").last.wait_for(timeout=WAIT_MS)
    page.wait_for_timeout(500)
    page.screenshot(path=screenshots / f"lab_live_alpha_stopped_{theme}.png")
    assert page.get_by_role("button", name="Cancel").count() == 0
    assert "(not finished)" in page.locator(".jp-RenderedPlotly .gtitle").last.text_content()


def hover(page, name: str) -> list[str]:
    """What the map says of a cell under the pointer."""
    canvas = page.locator(".sqviz canvas").last
    canvas.scroll_into_view_if_needed()
    tile = canvas.evaluate("(c, name) => c.tiles().find(tile => tile.name === name)", name)
    frame = canvas.bounding_box()
    page.mouse.move(frame["x"] + tile["x"] + tile["width"] / 2, frame["y"] + tile["y"] + tile["height"] / 2)
    return page.locator(".sqviz-tip:visible").inner_text().splitlines()


def told(alpha: float | None) -> str:
    return "not smoothed" if alpha is None else f"α = {alpha:g}"


def test_the_map_of_a_search_answers_to_the_pointer_and_to_keys(lab_page, screenshots) -> None:
    lab = lab_page([SETUP, SEARCH], width=640, height=800)
    lab.run_all()
    page = lab.page
    page.wait_for_function("() => document.querySelector('.sqviz canvas')?.paints > 0")
    alphas = json.loads(lab.run("import json; print(json.dumps(dict(found.alphas)))"))
    for name in ("model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
        assert hover(page, name)[:2] == [told(alphas[name]), name]
    page.screenshot(path=screenshots / "lab_alpha_map_light.png")
    page.locator(".sqviz canvas").last.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    reached = page.locator(".sqviz-tip:visible").inner_text().splitlines()
    assert reached[:2] == [told(alphas[reached[1]]), reached[1]]
    assert reached[1].startswith("model.layers.1.")
    lab.theme("dark")
    page.screenshot(path=screenshots / "lab_alpha_map_dark.png")


@pytest.mark.embedded
@pytest.mark.notebook
@pytest.mark.timeout(1500)
def test_notebook_04_runs_and_its_map_answers(lab_page, screenshots) -> None:
    lab = lab_page(NOTEBOOK, width=1280, height=1000)
    lab.run_all(timeout_seconds=1200)
    page = lab.page
    lab.command("notebook:move-cursor-up")  # anything that makes Lab draw cells above the last one again
    page.locator(".sqviz").last.scroll_into_view_if_needed(timeout=60_000)
    alphas = json.loads(lab.run("import json; print(json.dumps(dict(found.alphas)))"))
    name = "model.layers.11.mlp.down_proj"
    assert hover(page, name)[:2] == [told(alphas[name]), name]
    page.screenshot(path=screenshots / "notebook_04_map.png")
    page.locator(".jp-RenderedPlotly").first.scroll_into_view_if_needed(timeout=60_000)
    page.wait_for_timeout(800)
    page.screenshot(path=screenshots / "notebook_04_curve.png")

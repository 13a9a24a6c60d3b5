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


@pytest.mark.timeout(900)
def test_an_operator_is_clicked_in_05(lab_page, screenshots):
    lab = lab_page(NOTEBOOKS / "05_precision_map.ipynb", width=1280, height=1100)
    lab.run_all(timeout_seconds=60 * MINUTES)
    page = lab.page
    lab.command("notebook:move-cursor-up")
    page.locator(".pm-block").scroll_into_view_if_needed(timeout=WAIT_MS)
    for name in ("self_attn.v_proj", "qk", "add"):
        page.locator(f".pm-op[data-name='{name}']").click()
        code = (
            f"import json; one = found.operator(28, {name!r}); print(json.dumps([one.title, one.local, one.in_model]))"
        )
        title, local, in_model = json.loads(lab.run(code))
        page.locator(".pm-about h4", has_text=title).wait_for(timeout=WAIT_MS)
        shown = page.locator(".pm-about table").last.locator("td.number").all_inner_texts()
        assert [shown[0], shown[2]] == [number(local), number(in_model)]
    page.screenshot(path=screenshots / "notebook_05_light.png")
    lab.theme("dark")
    page.screenshot(path=screenshots / "notebook_05_dark.png")


@pytest.mark.timeout(900)
def test_heads_open_and_sinks_move_in_08(lab_page, screenshots):
    lab = lab_page(NOTEBOOKS / "08_attention_sinks.ipynb", width=1280, height=1000)
    lab.run_all(timeout_seconds=60 * MINUTES)
    page = lab.page
    heads, explorer = page.locator(".sqviz").nth(0), page.locator(".sqviz").nth(1)
    lab.command("notebook:move-cursor-up")
    heads.scroll_into_view_if_needed(timeout=WAIT_MS)
    page.screenshot(path=screenshots / "notebook_08_heads.png")
    canvas = heads.locator("canvas").first
    canvas.scroll_into_view_if_needed()
    seen = canvas.evaluate("c => c.panels()")
    tile = next(one for one in seen["tiles"] if (one["layer"], one["head"]) == (4, 6))
    frame = canvas.bounding_box()
    page.mouse.move(frame["x"] + tile["x"] + seen["side"] * 0.5 / 16, frame["y"] + tile["y"] + seen["side"] * 9.5 / 16)
    lines = page.locator(".sqviz-tip:visible").inner_text().splitlines()
    assert lines[1:3] == ["query token 9", "key token 0"]
    step = json.loads(
        lab.run("import json; s = maps.heatmap().meta['scale']; print(json.dumps((s['hi'] - s['lo']) / 254))")
    )
    value = json.loads(lab.run("print(float(maps.maps[4, 6, 9, 0].clamp(s['lo'], s['hi'])))"))
    assert float(lines[0].split()[-1]) == pytest.approx(value, abs=step + 0.006 * abs(value))
    page.mouse.down()
    page.mouse.up()
    page.get_by_text("Layer 4, head 6").wait_for(timeout=WAIT_MS)
    page.keyboard.press("Escape")

    explorer.scroll_into_view_if_needed(timeout=WAIT_MS)
    for _ in range(2):  # away, and back
        before = lab.run("print(explorer.chosen, explorer.scores['sinks']['perplexity'])").strip()
        explorer.locator(".sx-token").first.click()
        for _ in range(200):
            page.wait_for_timeout(100)
            after = lab.run("explorer.wait(60); print(explorer.chosen, explorer.scores['sinks']['perplexity'])").strip()
            if after != before:
                break
        assert after != before
        shown = explorer.locator(".sx-numbers b").last
        size = "n = explorer.recent + len(explorer.chosen)"
        nll = "import numpy, base64; x = numpy.frombuffer(base64.b64decode(explorer.scores['sinks']['nll']), '<f4')"
        behind = float(lab.run(f"{nll}; {size}; print(float(numpy.exp(x[n:].astype(float).mean())))"))
        page.wait_for_timeout(500)
        assert float(shown.inner_text()) == pytest.approx(behind, rel=6e-3)
    page.screenshot(path=screenshots / "notebook_08_explorer.png")


@pytest.mark.timeout(900)
def test_streams_go_on_by_hand_in_09(lab_page, screenshots):
    lab = lab_page(NOTEBOOKS / "09_streaming_live.ipynb", width=1280, height=1000)
    lab.run_all(timeout_seconds=60 * MINUTES)
    page = lab.page
    lab.command("notebook:move-cursor-up")
    page.locator(".st-lanes").scroll_into_view_if_needed(timeout=WAIT_MS)
    before = json.loads(lab.run("print(streams.tracks['sinks'].count)"))
    page.get_by_role("button", name="Go on", exact=True).click()
    page.wait_for_function(
        "count => [...document.querySelectorAll('.st-lane[data-lane=sinks] .st-token')].at(-1)?.token.position > count",
        arg=before + 5,
        timeout=WAIT_MS,
    )
    page.get_by_role("button", name="Pause", exact=True).click()
    page.get_by_role("button", name="Go on", exact=True).wait_for()
    lab.run("assert streams.wait(60)")
    page.wait_for_timeout(500)
    shown = page.locator(".st-lane[data-lane=sinks] .st-token").evaluate_all("all => all.map(one => one.token.nll)")
    code = (
        "import json; n = streams.tracks['sinks'].count + 1; ids = sqviz.text().tokens(lm.tokenizer, limit=n)\n"
        "print(json.dumps(sqviz.streaming_perplexity(lm, ids, sqviz.Sinks(4, 44)).nll.tolist()))"
    )
    nll = json.loads(lab.run(code, timeout_seconds=120))
    assert shown == pytest.approx(nll[-len(shown) :], abs=2e-3)
    page.screenshot(path=screenshots / "notebook_09_light.png")
    lab.theme("dark")
    page.screenshot(path=screenshots / "notebook_09_dark.png")

"""The attention view in an exported page and in JupyterLab: what is shown is what Python computed."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))  # helpers of the tests lie beside them
from view_drive import pixels, settle, tip

from sqviz.models.tiny import tiny
from sqviz.observe.attention import attention_maps, head_scores
from sqviz.widgets.still import number
from sqviz.widgets.view import read_files

pytestmark = pytest.mark.browser

LM = tiny("LlamaForCausalLM")
IDS = torch.randint(3, 131, (60,), generator=torch.Generator().manual_seed(0))
WORDS = ["<img src=x onerror=alert(1)>", "שלום", "👩‍🚀", "\ufffd", "·the", "</script>"]


@pytest.fixture(scope="module")
def maps():
    import dataclasses

    found = attention_maps(LM, IDS, sentences=None, cells=20)
    return dataclasses.replace(found, token_texts=tuple(WORDS * 10))


def tile(page, layer: int, head: int) -> dict:
    found = page.locator(".sqviz canvas").first.evaluate("c => c.panels()")
    return next(t for t in found["tiles"] if (t["layer"], t["head"]) == (layer, head)) | found


def hover(page, layer: int, head: int, row: int, column: int) -> list[str]:
    """The tooltip over one cell of one head."""
    at, frame = tile(page, layer, head), page.locator(".sqviz canvas").first.bounding_box()
    cells = at["view"]["to"] - at["view"]["from"]
    x = frame["x"] + at["x"] + (column - at["view"]["from"] + 0.5) / cells * at["side"]
    y = frame["y"] + at["y"] + (row - at["view"]["from"] + 0.5) / cells * at["side"]
    page.mouse.move(x, y)
    settle(page)
    return tip(page).splitlines()


@pytest.mark.parametrize(("theme", "width"), [("light", 1000), ("dark", 480)])
def test_every_cell_says_its_value_query_and_key(maps, view_page, screenshots, theme, width):
    page = view_page(maps.heatmap(), theme=theme, width=width, height=900)
    for layer, head, row, column in ((0, 0, 10, 3), (1, 4, 19, 0), (1, 5, 7, 7)):
        lines = hover(page, layer, head, row, column)
        value = float(re.search(r"logit [≈≤≥] (\S+)", lines[0])[1])
        scale = maps.heatmap().meta["scale"]
        expected = float(np.clip(float(maps.maps[layer, head, row, column]), scale["lo"], scale["hi"]))
        assert value == pytest.approx(expected, abs=(scale["hi"] - scale["lo"]) / 254 + 0.006 * abs(expected))
        assert lines[1].startswith(f"query {3 * row}–{3 * row + 2}: “")
        assert lines[2].startswith(f"key {3 * column}–{3 * column + 2}: “{WORDS[3 * column % 6]}”")
        assert f"layer {layer} · head {head}" in lines[3]
        assert f"{number(100 * float(maps.sink_mass()[layer, head]))} %" in lines[3]
    assert "not looked at" in hover(page, 0, 1, 2, 9)[0]
    page.mouse.move(0, 0)
    settle(page)
    page.screenshot(path=screenshots / f"attention_{theme}_{width}.png", full_page=True)


def test_sorting_opening_and_keys(maps, view_page, screenshots):
    page = view_page(maps.heatmap(), width=900, height=900)
    canvas = page.locator(".sqviz canvas").first
    page.locator("select").first.select_option("sink")
    settle(page)
    order = [(t["layer"], t["head"]) for t in canvas.evaluate("c => c.panels().tiles")]
    mass = maps.sink_mass()
    assert order == sorted(order, key=lambda at: -float(mass[at]))
    assert len(set(order)) == maps.layers * maps.heads
    page.locator("select").first.select_option("layer")
    settle(page)
    canvas.focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Enter"):  # the first key picks the first head
        page.keyboard.press(key)
    settle(page)
    assert page.locator(".sqviz b").first.inner_text() == "Layer 1, head 1"
    shown = number(100 * float(mass[1, 1]))
    assert f"{shown} % of the attention" in page.locator(".sqviz-note:visible").nth(1).inner_text()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert page.locator(".sqviz b").first.inner_text() == "Layer 0, head 0"
    page.screenshot(path=screenshots / "attention_open.png", full_page=True)
    page.keyboard.press("Escape")
    settle(page)
    assert canvas.is_visible()
    assert page.evaluate("document.activeElement === document.querySelector('.sqviz canvas')")


def test_zooming_one_head_zooms_all_and_the_profile(maps, view_page):
    """The token under the pointer stays there; without focus or Ctrl the wheel belongs to the page."""
    page = view_page(maps.heatmap(), width=1000, height=1200)
    canvas, profile = page.locator(".sqviz canvas").first, page.locator(".sqviz canvas").last
    view = lambda: canvas.evaluate("c => c.panels().view")  # noqa: E731
    hover(page, 1, 2, 15, 12)
    page.mouse.wheel(0, -200)
    settle(page)
    assert view() == {"from": 0, "to": 20}
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    settle(page)
    assert view() == {"from": 6, "to": 16}  # 30 of 60 tokens, 36 … 38 where they were: 18 … 47
    assert f"key 36–38: “{WORDS[0]}”" in hover(page, 0, 5, 13, 12)[2]
    strip, frame = profile.evaluate("c => c.strips()[0]"), profile.bounding_box()
    page.mouse.move(frame["x"] + strip["x"] + 1, frame["y"] + strip["y"] + 2)
    settle(page)
    assert tip(page).startswith("layer 0 · 18: ")
    canvas.focus()
    page.keyboard.press("+")
    settle(page)
    assert view() == {"from": 8, "to": 14}  # tokens 25 … 39
    page.keyboard.press("-")
    page.keyboard.press("-")
    settle(page)
    assert view() == {"from": 0, "to": 20}
    page.keyboard.press("+")
    page.keyboard.press("0")
    settle(page)
    assert view() == {"from": 0, "to": 20}


@given(
    length=st.integers(1, 3000),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    at=st.floats(0, 1),
    factors=st.lists(st.sampled_from([0.5, 0.9, 0.999, 1.1, 2.0]), min_size=1, max_size=8),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_zoomed_span_stays_inside_and_keeps_the_token(zoomed, length, ends, at, factors):
    span = sorted(int(end * (length - 1)) for end in ends)
    span = span if span[1] > span[0] else []
    for factor in factors:
        old = span or [0, length - 1]
        token = old[0] + round(at * (old[1] - old[0]))
        span = zoomed(span, token, factor, length)
        if not span:
            assert factor > 1 or length <= 2
            continue
        assert 0 <= span[0] < span[1] < length
        size, before = span[1] - span[0] + 1, old[1] - old[0] + 1
        assert size > before if factor > 1 else size < before or before == 2
        if factor < 1:
            assert span[0] <= token <= span[1]


@pytest.fixture
def zoomed(chromium):
    page = chromium.new_page()
    page.add_script_tag(content=read_files(("attention_zoom.js",)))
    yield lambda *given: page.evaluate("given => zoomedSpan(...given)", list(given))
    page.close()


def test_dragging_over_the_profile_filters_all_heads(maps, view_page):
    page = view_page(maps.heatmap(), width=1000, height=1200)
    canvas, profile = page.locator(".sqviz canvas").first, page.locator(".sqviz canvas").last
    profile.scroll_into_view_if_needed()
    strip = profile.evaluate("c => c.strips()[0]")
    frame = profile.bounding_box()
    y = frame["y"] + strip["y"] + strip["height"] * 0.75  # the second of two layers
    x = lambda token: frame["x"] + strip["x"] + (token + 0.5) / 60 * strip["width"]  # noqa: E731
    page.mouse.move(x(7), y)
    settle(page)
    lines = tip(page).splitlines()
    assert lines[0].startswith("layer 1 · 7: “")
    assert f"gets {number(100 * float(maps.share.mean(1)[1, 7]))} %" in lines[1]
    assert lines[2] == f"largest |x| {number(float(maps.norms[1, 7]))}"
    before = pixels(canvas)
    page.mouse.down()
    page.mouse.move(x(20), y)
    page.mouse.move(x(29), y)
    page.mouse.up()
    settle(page)
    assert canvas.evaluate("c => c.panels().view") == {"from": 2, "to": 10}  # tokens 7 … 29, three to a cell
    assert (pixels(canvas) != before).any()
    page.get_by_role("button", name="All tokens").click()
    settle(page)
    assert canvas.evaluate("c => c.panels().view") == {"from": 0, "to": 20}
    assert np.array_equal(pixels(canvas), before)


def test_text_of_tokens_is_shown_and_never_run(maps, view_page):
    page = view_page(maps.heatmap(), width=1000, height=900)
    assert page.evaluate("document.querySelectorAll('.sqviz img').length") == 0
    assert "<img src=x onerror=alert(1)>" in hover(page, 0, 0, 10, 0)[2]
    assert page.evaluate("document.querySelectorAll('.sqviz img').length") == 0


SETUP = f"""import torch
from sqviz.models.tiny import tiny
from sqviz.observe.attention import attention_maps
lm = tiny("LlamaForCausalLM")
maps = attention_maps(lm, torch.tensor({IDS.tolist()}), sentences=None, cells=20)"""


def test_an_opened_head_is_fetched_token_by_token_in_jupyterlab(lab_page, screenshots):
    lab = lab_page([SETUP, "view = maps.heatmap(lm); view"], height=1400, theme="dark")
    lab.run_all()
    page = lab.page
    page.wait_for_function("() => document.querySelector('.sqviz canvas')?.paints > 0")
    lab.run("view.opened = [1, 3]")
    page.wait_for_selector(".sqviz b:text('Layer 1, head 3')")
    canvas = page.locator(".sqviz canvas").nth(2)
    page.wait_for_function("() => !document.querySelector('.sqviz').innerText.includes('computing it')")
    page.wait_for_timeout(500)
    box, frame = canvas.evaluate("c => c.box()"), canvas.bounding_box()
    scores = head_scores(LM, IDS, 1, 3)
    scale = attention_maps(LM, IDS, sentences=None, cells=20).heatmap().meta["scale"]
    for query, key in ((40, 5), (59, 0)):
        x = frame["x"] + box["x"] + (key + 0.5) / 60 * box["width"]
        y = frame["y"] + box["y"] + (query + 0.5) / 60 * box["height"]
        page.mouse.move(x, y)
        settle(page)
        lines = tip(page).splitlines()
        assert lines[1].startswith(f"query {query}: ")
        assert lines[2].startswith(f"key {key}: ")
        value = float(re.search(r"logit [≈≤≥] (\S+)", lines[0])[1])
        expected = float(np.clip(float(scores[query, key]), scale["lo"], scale["hi"]))
        assert value == pytest.approx(expected, abs=(scale["hi"] - scale["lo"]) / 254 + 0.006 * abs(expected))
    page.screenshot(path=screenshots / "attention_lab_open_dark.png")

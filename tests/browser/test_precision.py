"""The precision map in an exported page and in JupyterLab: a click shows the number that the kernel computed."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # helpers of the tests lie beside them
from smoothing_drive import WAIT_MS
from view_drive import settle, tip

from sqviz.models.tiny import tiny
from sqviz.quant.precision_map import precision_map
from sqviz.quant.schemes import SMOOTHQUANT_O1
from sqviz.widgets.still import number

pytestmark = pytest.mark.browser

IDS = (torch.arange(40) * 37 % 128) + 3
MEASURES = ["local", "in_block", "in_model", "everywhere"]


def made(name):
    return precision_map(tiny(name), SMOOTHQUANT_O1, text=IDS, length=20, blocks=[1], progress=False)


@pytest.fixture(scope="module")
def llama():
    return made("LlamaForCausalLM")


def errors(page) -> list[str]:
    """The four errors of the operator that is explained."""
    return page.locator(".pm-about table").last.locator("td.number").all_inner_texts()


def expected(found, block: int, name: str) -> list[str]:
    one = found.operator(block, name)
    values = [*(getattr(one, key) for key in MEASURES[:3]), found.everywhere[name]]
    return [number(value) if math.isfinite(value) else "not measured" for value in values]


@pytest.mark.parametrize(("theme", "width"), [("light", 1000), ("dark", 1000), ("light", 480)])
def test_every_operator_says_what_was_measured(llama, view_page, screenshots, theme, width):
    page = view_page(llama.view(), theme=theme, width=width, height=900)
    for one in llama.blocks[0]:
        button = page.locator(f".pm-op[data-name='{one.name}']")
        shown = number(one.in_block) if one.quantised else f"({number(one.in_block)})"
        assert button.inner_text().splitlines() == [one.title, shown]
        button.click()
        settle(page)
        assert page.locator(".pm-about h4").inner_text() == f"{one.title} · {one.precision}"
        assert errors(page) == expected(llama, 0, one.name)
        assert page.locator(".pm-op[aria-pressed=true]").get_attribute("data-name") == one.name
        assert ("pm-int" in button.get_attribute("class")) == one.quantised
    frame = page.locator(".pm-block").bounding_box()
    for box in (one.bounding_box() for one in page.locator(".pm-op").all()):
        assert frame["x"] - 1 <= box["x"]
        assert box["x"] + box["width"] <= frame["x"] + frame["width"] + 1
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    page.screenshot(path=screenshots / f"precision_{theme}_{width}.png", full_page=True)


def test_by_keyboard(llama, view_page):
    page = view_page(llama.view(operator="input_layernorm"), width=1000, height=900)
    page.locator(".pm-op").first.focus()
    page.keyboard.press("ArrowDown")
    settle(page)
    assert page.evaluate("document.activeElement.dataset.name") == "self_attn.q_proj"
    page.keyboard.press("ArrowRight")
    settle(page)
    assert page.get_by_text("self_attn.q_proj, block 1").is_visible()
    assert page.evaluate("document.activeElement.dataset.name") == "self_attn.q_proj"
    assert errors(page) == expected(llama, 1, "self_attn.q_proj")
    page.keyboard.press("ArrowRight")  # the last block
    page.keyboard.press("ArrowUp")
    settle(page)
    assert errors(page) == expected(llama, 1, "input_layernorm")


def test_other_errors_and_the_strip_of_all_blocks(llama, view_page):
    page = view_page(llama.view(), width=1000, height=1300)
    page.locator("label", has_text="Error of").locator("select").select_option("everywhere")
    settle(page)
    button = page.locator(".pm-op[data-name='mlp.down_proj']")
    assert button.inner_text().splitlines()[1] == number(llama.everywhere["mlp.down_proj"])
    page.locator("label", has_text="Error of").locator("select").select_option("in_model")
    settle(page)
    assert button.inner_text().splitlines()[1] == "–"  # measured in block 1 only
    canvas = page.locator("canvas")
    canvas.scroll_into_view_if_needed()
    box, frame = canvas.evaluate("c => c.box()"), canvas.bounding_box()
    names = [one.name for one in llama.blocks[0]]
    row = names.index("self_attn.v_proj")
    at = frame["x"] + box["x"] + 0.75 * box["width"], frame["y"] + box["y"] + (row + 0.5) * 17
    page.mouse.move(*at)
    settle(page)
    one = llama.operator(1, "self_attn.v_proj")
    assert tip(page).splitlines() == ["v_proj · block 1", f"error {number(one.in_model)}"]
    page.mouse.click(*at)
    settle(page)
    assert errors(page) == expected(llama, 1, "self_attn.v_proj")
    canvas.focus()
    page.keyboard.press("ArrowUp")
    settle(page)
    assert errors(page) == expected(llama, 1, "self_attn.k_proj")


@pytest.mark.parametrize("name", ["DeepseekV2ForCausalLM", "CohereForCausalLM", "BloomForCausalLM"])
def test_other_blocks(name, view_page, screenshots):
    found = made(name)
    page = view_page(found.view(block=1), theme="dark", width=640, height=900)
    for one in found.blocks[1]:
        page.locator(f".pm-op[data-name='{one.name}']").click()
        settle(page)
        assert errors(page) == expected(found, 1, one.name)
        if not one.quantised:
            assert page.get_by_text(f"Stays in 16 bit: {one.reason}.").is_visible()
    page.screenshot(path=screenshots / f"precision_{name}.png", full_page=True)


@pytest.mark.timeout(600)
def test_a_click_in_jupyterlab_reaches_the_kernel(lab_page, screenshots):
    cells = [
        "import torch, sqviz\nfrom sqviz.models.tiny import tiny\nids = (torch.arange(40) * 37 % 128) + 3",
        (
            "found = sqviz.precision_map(tiny('LlamaForCausalLM'), sqviz.SMOOTHQUANT_O1, text=ids, length=20)\n"
            "v = found.view(); v"
        ),
    ]
    lab = lab_page(cells, width=1200, height=1200)
    lab.run_all()
    page = lab.page
    button = page.locator(".pm-op[data-name='pv']")
    button.wait_for(timeout=WAIT_MS)
    button.click()
    page.locator(".pm-about h4", has_text="PV").wait_for(timeout=WAIT_MS)
    code = (
        "import json; one = found.operator(v.block, v.operator); print(json.dumps([one.name, one.local, one.in_block]))"
    )
    for _ in range(100):
        name, local, in_block = json.loads(lab.run(code))
        if name == "pv":
            break
        page.wait_for_timeout(100)
    assert errors(page)[:2] == [number(local), number(in_block)]
    lab.run("v.block = 1; v.operator = 'mlp.up_proj'")
    page.get_by_text("mlp.up_proj, block 1").wait_for(timeout=WAIT_MS)
    page.screenshot(path=screenshots / "precision_lab.png")
    lab.theme("dark")
    page.screenshot(path=screenshots / "precision_lab_dark.png")

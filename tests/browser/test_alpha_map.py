"""The map of α as a page: colours, hatching, the tooltip by mouse and by keyboard, both themes, narrow."""

import sys
from pathlib import Path

import numpy as np
import pytest

# helpers of the tests lie beside them, and beside those of the widgets
sys.path.insert(0, str(Path(__file__).parents[1] / "widgets"))
sys.path.insert(0, str(Path(__file__).parent))
from synthetic import found_alpha as found
from view_drive import pixels, settle, tip

from sqviz.widgets.still import colour_map

pytestmark = pytest.mark.browser


def tiles(page) -> dict[str, dict]:
    return {tile["name"]: tile for tile in page.locator("canvas").evaluate("canvas => canvas.tiles()")}


def corner(page, tile) -> np.ndarray:
    """A few points of a cell, off its number. The pictures of these pages have a pixel per point."""
    x, y = round(tile["x"]) + 3, round(tile["y"]) + 3
    return pixels(page.locator("canvas"))[y : y + 6, x : x + 6].reshape(-1, 3)


def hover(page, tile) -> str:
    frame = page.locator("canvas").bounding_box()
    page.mouse.move(frame["x"] + tile["x"] + tile["width"] / 2, frame["y"] + tile["y"] + tile["height"] / 2)
    settle(page)
    return tip(page)


@pytest.mark.parametrize(("theme", "width"), [("light", 900), ("dark", 900), ("light", 480), ("dark", 480)])
def test_cells_have_their_colour_and_say_their_strength(theme, width, view_page, screenshots) -> None:
    given = found(30)
    page = view_page(given.map(), theme=theme, width=width, height=560)
    drawn = tiles(page)
    assert drawn.keys() == given.alphas.keys()
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj", "model.layers.5.self_attn.o_proj"):
        assert (corner(page, drawn[name]) == colour_map()[int(255 * given.alphas[name] + 0.5)]).all()
        assert hover(page, drawn[name]).splitlines()[:2] == [f"α = {given.alphas[name]:g}", name]
        page.mouse.move(1, 1)
        settle(page)
    bare = "model.layers.1.mlp.down_proj"
    hatched = corner(page, drawn[bare]).astype(int)
    assert len(np.unique(hatched, axis=0)) > 2  # lines on the paper
    assert (np.ptp(hatched, axis=1) < 12).all()  # and no colour of the scale
    assert hover(page, drawn[bare]).splitlines() == ["not smoothed", bare, "block 1 · mlp.down_proj"]
    page.screenshot(path=screenshots / f"alpha_map_{theme}_{width}.png")
    assert page.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")


def test_every_cell_is_reached_by_keys(view_page) -> None:
    page = view_page(found(), height=560)
    page.locator("canvas").focus()

    def press(*keys: str) -> str:
        for key in keys:
            page.keyboard.press(key)
        settle(page)
        return tip(page).splitlines()[1]

    assert press("ArrowRight") == "model.layers.0.self_attn.q_proj"
    assert press("ArrowRight", "ArrowDown") == "model.layers.1.mlp.down_proj"
    assert press("ArrowDown") == "model.layers.1.self_attn.o_proj"
    assert press("ArrowLeft") == "model.layers.1.self_attn.o_proj"  # block 0 has none
    assert press("End") == "model.layers.3.self_attn.o_proj"
    assert press("Home") == "model.layers.1.self_attn.o_proj"
    assert press("ArrowUp", "ArrowUp") == "model.layers.1.self_attn.q_proj"
    page.keyboard.press("Escape")
    settle(page)
    assert page.locator(".sqviz-tip:visible").count() == 0
    assert "arrow keys" in page.locator("canvas").get_attribute("aria-label")


def test_candidates_stand_above_the_map_and_the_kept_one_is_marked(view_page) -> None:
    page = view_page(found(), height=560)
    rows = [row.inner_text().split("\t") for row in page.locator(".am-tried tr").all()]
    assert rows[0][:4] == ["candidate", "KL held, nats per token", "± to flat α", "KL searched, nats per token"]
    assert [[cell.strip() for cell in row] for row in rows[1:]] == [
        ["logits", "0.123", "0.0321", "0.11", "★ kept"],
        ["flat 0.5", "0.5", "", "", ""],
        ["layer", "0.75", "0.04", "0.09", ""],
    ]
    before = pixels(page.locator("canvas"))
    page.locator("select").select_option("cividis")
    settle(page)
    assert (pixels(page.locator("canvas")) != before).any()

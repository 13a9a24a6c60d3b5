"""The map of α: what travels to the page, and the picture that stands in for it."""

import dataclasses
import io
import json
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from synthetic import found_alpha as found

from sqviz.quant.found_alpha import FoundAlpha, Tried
from sqviz.widgets.alpha_map import LEFT, ROW, WIDTH, AlphaMapView, _short
from sqviz.widgets.still import colour_map

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def test_every_strength_travels_as_it_is_with_its_name() -> None:
    given = found()
    meta = AlphaMapView(given).meta
    assert meta["kinds"] == ["self_attn.q_proj", "mlp.down_proj", "self_attn.o_proj"]  # as they first occur
    assert meta["blocks"] == [0, 1, 2, 3]
    assert {cell["name"]: cell["alpha"] for cell in meta["cells"]} == given.alphas
    for cell in meta["cells"]:
        assert cell["name"] == f"model.layers.{meta['blocks'][cell['column']]}.{meta['kinds'][cell['row']]}"
    assert len({(cell["row"], cell["column"]) for cell in meta["cells"]}) == len(given.alphas)
    assert [one["kept"] for one in meta["tried"]] == [True, False, False]
    broken = dataclasses.replace(given, tried=(*given.tried, Tried("block", math.inf)))
    assert AlphaMapView(broken).meta["tried"][-1]["divergence"] is None
    json.dumps([meta, AlphaMapView(broken).meta], allow_nan=False)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.decoder.layers.11.fc1", (11, "fc1")),
        ("transformer.h.3.attn.c_attn", (3, "attn.c_attn")),
        ("model.layers.2.mlp.experts.7.gate_proj", (2, "mlp.experts.7.gate_proj")),
        ("odd", (0, "odd")),
    ],
)
def test_block_and_kind_are_read_off_the_name(name: str, place: tuple[int, str]) -> None:
    assert found().place(name) == place


def test_the_picture_has_the_colours_of_the_strengths_and_hatches_what_is_not_smoothed() -> None:
    view = AlphaMapView(found())
    picture = np.asarray(Image.open(io.BytesIO(view.to_png())).convert("RGB"))
    each = (WIDTH - LEFT - 24) / 4

    def corner(row: int, column: int) -> np.ndarray:
        """A few points inside of a cell, off its number."""
        x, y = LEFT + each * column + 4, 66 + ROW * row + 4
        return picture[round(2 * y) : round(2 * y) + 16, round(2 * x) : round(2 * x) + 16].reshape(-1, 3)

    for cell in view.meta["cells"]:
        pixels = corner(cell["row"], cell["column"])
        if cell["alpha"] is None:
            assert (pixels == 255).all(1).mean() > 0.5
            assert (pixels < 200).all(1).any()
        else:
            assert (pixels == colour_map()[round(255 * cell["alpha"])]).all()
    missing = corner(view.meta["kinds"].index("self_attn.o_proj"), 0)
    assert (missing == 255).all()  # block 0 has none


def test_what_it_was_searched_for_is_not_cut_off() -> None:
    """A scheme of one's own has a long name: lines of it, each within the picture."""
    given = dataclasses.replace(found(), scheme=f"Scheme({', '.join(['weight_clip=sqviz.LeastError()'] * 8)})")
    texts = [element.text or "" for element in ElementTree.fromstring(str(given.to_svg()))]
    lines = [text for text in texts if len(text) > 20 and text in given.describe()]
    assert " ".join(lines) == given.describe()
    assert len(lines) > 1
    assert max(map(len, lines)) <= 125


def test_the_picture_says_everything_in_words() -> None:
    texts = [element.text or "" for element in ElementTree.fromstring(str(found().to_svg()))]
    figures = ("0.123", "0.75", "0.09", "0.0321")
    for wanted in (*KINDS, "block", "α", "not smoothed", "logits  ★ kept", "flat 0.5", *figures):
        assert wanted in texts
    assert any("searched by logits for SMOOTHQUANT_O2" in text for text in texts)
    bare = FoundAlpha({"model.layers.0.mlp.down_proj": None}, "layer", "sqviz.W8A8", "all", "m", "")
    assert not any("candidate" in (element.text or "") for element in ElementTree.fromstring(str(bare.to_svg())))
    assert bare.map(palette="cividis").palette == "cividis"


def test_it_shows_itself_as_the_widget_with_a_picture_and_short_text(tmp_path) -> None:
    data, _ = found()._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "image/png" in data
    assert data["text/plain"] == repr(found())
    page = found().to_html(tmp_path / "alpha.html")
    assert "not smoothed" in page.read_text(encoding="utf-8")
    assert found().to_png(tmp_path / "alpha.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("alpha", "shown"), [(0, "0"), (0.45, ".45"), (0.6, ".6"), (1, "1"), (0.125, ".12")])
def test_numbers_in_cells_are_short(alpha: float, shown: str) -> None:
    assert _short(alpha) == shown

import base64
import json
import re
import struct
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import traitlets
from hypothesis import given, settings
from hypothesis import strategies as st

from sqviz.widgets import still as still_module
from sqviz.widgets.still import Axis, Box, Still
from sqviz.widgets.view import View, code_range, decode_log, encode_log, float32_bytes, script_json

SETTINGS = settings(deadline=None, derandomize=True, max_examples=200)


class Example(View):
    """A view with a trait of each sort."""

    _scripts = ("draw.js", "smoothing_formula.js", "cells.js", "heatmap_panel.js", "heatmap.js")

    data = traitlets.Bytes(b"\x00\xff\x10").tag(sync=True)
    nested = traitlets.Dict({"more": b"\x01", "text": "</script><b>"}).tag(sync=True)
    kept = traitlets.Int(3)

    def still(self) -> Still:
        picture = Still(200, 100, self.title)
        picture.axes(Box(50, 50, 100, 20), Axis(0, 1, "channel"), Axis(0, 1, "token"))
        return picture


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">2I", png[16:24])


def state_of(page: str) -> dict[str, object]:
    found = re.search(r'<script type="application/json" id="state">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found.group(1))


def test_one_module_and_one_style_sheet_are_made_of_the_files() -> None:
    view = Example(title="t")
    assert view._esm.startswith("// draw.js")
    assert view._esm.count("export default") == 1
    assert "import " not in re.sub(r"//.*", "", view._esm)
    assert ".sqviz-canvas" in view._css


def test_a_page_holds_every_synced_trait_and_nothing_else() -> None:
    state = state_of(Example(title="A <title> & more").to_html())
    assert set(state) == {"title", "data", "nested"}
    assert state["data"] == {"base64": base64.b64encode(b"\x00\xff\x10").decode()}
    assert state["nested"] == {"more": {"base64": "AQ=="}, "text": "</script><b>"}


def test_text_of_the_user_cannot_break_out_of_the_page() -> None:
    page = Example(title="A <title> & more", nested={"text": "</script><script>alert(1)</script>"}).to_html()
    assert "<title>A &lt;title&gt; &amp; more</title>" in page
    assert "alert(1)</script>" not in page
    assert json.loads(script_json({"a": "<!--</script>"})) == {"a": "<!--</script>"}


def test_a_page_loads_nothing(tmp_path: Path) -> None:
    path = Example(title="t").to_html(tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert path == tmp_path / "page.html"
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text)
    assert not re.search(r"@import|url\(\s*['\"]?https?:", text)


def test_the_notebook_gets_the_widget_and_a_picture() -> None:
    data, metadata = Example(title="t")._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"]
    assert data["text/plain"] == "Example('t')"
    assert size_of(base64.b64decode(data["image/png"])) == (400, 200)  # twice the points, for sharp screens
    assert metadata["image/png"] == {"width": 200, "height": 100}


def test_without_pillow_there_is_no_picture_and_asking_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqviz.widgets.view.have_pillow", lambda: False)
    monkeypatch.setattr(still_module, "have_pillow", lambda: False)
    view = Example(title="t")
    assert "image/png" not in view._repr_mimebundle_()[0]
    with pytest.raises(ImportError, match="pip install pillow"):
        view.to_png()
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "channel" in view.to_svg()


def test_the_pictures_are_written_where_they_are_wanted(tmp_path: Path) -> None:
    view = Example(title="α < β")
    for save, name in ((view.to_png, "still.png"), (view.to_svg, "still.svg")):
        path = save(tmp_path / name)
        assert path == tmp_path / name
        content = save()
        assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    texts = [element.text for element in ElementTree.parse(tmp_path / "still.svg").getroot()]
    assert {"α < β", "channel", "token"} <= set(texts)


def test_a_view_without_a_still_says_so() -> None:
    with pytest.raises(NotImplementedError, match="View"):
        View().still()


# ---- bytes ---------------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.lists(st.floats(2.0**-13, 2.0**13, width=32), min_size=1, max_size=30))
def test_codes_are_within_half_a_step_of_the_values(values: list[float]) -> None:
    array = np.array(values, np.float32)
    lo, hi = code_range(array)
    error = 10 ** ((hi - lo) / 508) - 1
    decoded = decode_log(encode_log(array, lo, hi), lo, hi)
    assert np.all(np.abs(decoded / array - 1) <= error * 1.01 + 1e-5)


def test_zero_is_zero_and_the_smallest_end_is_cut_first() -> None:
    values = np.array([0.0, 1e-12, 1e-3, 5e4], np.float32)
    lo, hi = code_range(values, decades=8)
    assert hi - lo == pytest.approx(8.0, abs=1e-3)
    decoded = decode_log(encode_log(values, lo, hi), lo, hi)
    assert decoded[0] == 0.0
    assert decoded[1] == 0.0  # eight decades below the largest is nothing
    np.testing.assert_allclose(decoded[2:], values[2:], rtol=0.04)


@pytest.mark.parametrize("values", [[0.0, 0.0], [], [3.0]])
def test_dead_empty_and_single_arrays_have_a_range(values: list[float]) -> None:
    array = np.array(values, np.float32)
    lo, hi = code_range(array)
    assert hi > lo
    np.testing.assert_allclose(decode_log(encode_log(array, lo, hi), lo, hi), array, rtol=1e-4)


def test_vectors_travel_as_little_endian_float32() -> None:
    assert float32_bytes([1.0, -2.5]) == struct.pack("<2f", 1.0, -2.5)

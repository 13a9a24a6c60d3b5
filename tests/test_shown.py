"""Results that show themselves: a figure where scripts run, a picture where none can."""

import io
from xml.etree import ElementTree

import pytest
from PIL import Image

from sqviz.evaluation.stream_cost import CostRow, StreamCost
from sqviz.shown import Shown

ROWS = tuple(CostRow(name, size, 2.0 * size, 10**9, 100 * size) for size in (64, 128) for name in ("sinks", "dense"))
COST = StreamCost(ROWS, "a <model> & more", "cpu")


def test_a_result_is_saved_as_a_page_and_as_pictures(tmp_path):
    for save, name in ((COST.to_html, "cost.html"), (COST.to_png, "cost.png"), (COST.to_svg, "cost.svg")):
        assert save(tmp_path / name) == tmp_path / name
    assert "plotly" in COST.to_html()
    assert (tmp_path / "cost.png").read_bytes() == COST.to_png()
    assert (tmp_path / "cost.svg").read_text(encoding="utf-8") == COST.to_svg()
    still = COST.still()
    assert Image.open(io.BytesIO(COST.to_png())).size == (2 * still.width, 2 * still.height)
    texts = [element.text for element in ElementTree.fromstring(COST.to_svg())]
    assert {"Cost of a token · a <model> & more on cpu", "keys in the cache", "sinks", "dense"} <= set(texts)


def test_a_notebook_gets_the_figure_the_text_and_the_picture(monkeypatch):
    """No PNG: plotly's extension of JupyterLab would show that in place of its figure."""
    monkeypatch.setattr("sqviz.widgets.still.have_pillow", lambda: False)
    for bundle in (COST._repr_mimebundle_(), COST._repr_mimebundle_(include=None, exclude=None)):
        assert set(bundle) == {"application/vnd.plotly.v1+json", "text/plain", "image/svg+xml"}
        assert bundle["image/svg+xml"] == COST.to_svg()
    with pytest.raises(ImportError, match="to_svg"):
        COST.to_png()


def test_a_result_that_shows_nothing_says_so():
    for show in (Shown().to_html, Shown().to_png, Shown().to_svg):
        with pytest.raises(NotImplementedError, match="Shown"):
            show()

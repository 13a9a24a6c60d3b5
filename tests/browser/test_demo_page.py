"""Pages of `sqviz demo` in Chromium: views draw, formulas show, and nothing leaves the disk."""

import nbformat
import pytest

from sqviz import demo

VIEW = """
import traitlets
from sqviz.widgets.view import View

class Dot(View):
    _esm = '''export default { render({ model, el }) {
        const box = document.createElement("div");
        box.style.height = "777px";
        box.textContent = "drawn " + model.get("title");
        el.appendChild(box);
    } };'''
    _css = ""

Dot(title="here & <now>")
"""


@pytest.mark.browser
def test_a_page_needs_no_network_and_its_views_are_alive(tmp_path, chromium, screenshots):
    text = nbformat.v4.new_markdown_cell(
        "# Demo\n\n$$ s_j = \\max|X_j|^{\\alpha} / \\max|W_j|^{1-\\alpha} \\tag{3.4} $$"
    )
    book = nbformat.v4.new_notebook(cells=[text, nbformat.v4.new_code_cell(VIEW)])
    nbformat.write(book, tmp_path / "00_dot.ipynb")
    demo.make([tmp_path / "00_dot.ipynb"], tmp_path)
    context = chromium.new_context(offline=True)
    try:
        page = context.new_page()
        asked, troubles = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.goto((tmp_path / "index.html").as_uri())
        page.click("text=Demo")
        frame = page.frame_locator("iframe.sqviz-page")
        frame.locator("text=drawn here & <now>").wait_for(timeout=20_000)
        page.wait_for_function("document.querySelector('iframe.sqviz-page').offsetHeight >= 777")
        assert page.locator("math").count() == 1
        assert page.locator("math").bounding_box()["height"] > 10
        assert "$$" not in page.inner_text("body")
        page.screenshot(path=screenshots / "demo_page.png")
    finally:
        context.close()
    assert [url for url in asked if not url.startswith(("file:", "about:", "data:", "blob:"))] == []
    assert troubles == []

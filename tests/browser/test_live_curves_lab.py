"""Figure 4.1 while it runs, in JupyterLab: curves grow, the button stops the work, what was read is kept."""

import json

import pytest

pytestmark = pytest.mark.browser

SETUP = """import torch, sqviz
from sqviz.models.tiny import tiny
lm = tiny("LlamaForCausalLM")
ids = torch.randint(3, 131, (400_000,), generator=torch.Generator().manual_seed(0))"""
RUN = """found = sqviz.compare_policies(lm, ids, {"window": sqviz.Window(64), "4 sinks": sqviz.Sinks(4, 60)}, live=True)
found"""
STATUS = ".jp-OutputArea-output .widget-label"


def tokens_read(page) -> int:
    """What the line below the figure says."""
    return int(page.locator(STATUS).last.inner_text().split(": ")[1].split(" of")[0].replace(",", ""))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_curves_grow_until_the_button_stops_them(theme, lab_page, screenshots) -> None:
    lab = lab_page([SETUP, RUN], theme=theme, width=900, height=800)
    page = lab.page
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")
    page.wait_for_function(
        f"() => /window: .* of 400,000/.test([...document.querySelectorAll('{STATUS}')].at(-1)?.innerText ?? '')",
        timeout=120_000,
    )
    page.locator(".js-plotly-plot .scatterlayer .js-line").first.wait_for(timeout=60_000)
    first = tokens_read(page)
    page.wait_for_timeout(1500)
    page.screenshot(path=screenshots / f"lab_live_curves_{theme}.png")
    assert tokens_read(page) > first
    page.get_by_role("button", name="Cancel").click()
    lab.run("pass", timeout_seconds=60)  # the kernel is free again
    told = json.loads(
        lab.run("import json; print(json.dumps([{k: len(v.nll) for k, v in found.results.items()}, found.refused]))")
    )
    assert first <= told[0]["window"] < 399_999
    assert told[1]["window"].startswith("window: stopped after")
    assert told[1]["4 sinks"] == "4 sinks: stopped after 0 tokens"
    assert lab.errors() == []
    page.locator(".jp-OutputArea .js-plotly-plot").last.wait_for(timeout=60_000)
    page.wait_for_timeout(500)
    page.screenshot(path=screenshots / f"lab_live_curves_stopped_{theme}.png")
    assert page.get_by_role("button", name="Cancel").count() == 0
    assert "stopped after" in page.locator(".jp-OutputArea").last.inner_text() or page.locator(".gtitle").count()

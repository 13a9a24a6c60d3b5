"""Notebook 03 as its reader runs it: integers in the picture, the table that fills, sorted by hand, both themes."""

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.embedded, pytest.mark.notebook]
NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "03_schemes.ipynb"
WAIT_MS = 60_000


@pytest.mark.timeout(1200)
def test_the_table_of_schemes_fills_and_sorts_in_03(lab_page, screenshots):
    lab = lab_page(NOTEBOOK, width=1280, height=1000)
    lab.run_all(timeout_seconds=900)
    page = lab.page
    lab.command("notebook:move-cursor-up")
    table = page.locator(".sqviz-inline .mt")
    table.scroll_into_view_if_needed(timeout=WAIT_MS)
    assert table.locator("tbody tr.mt-is-done").count() == 8
    rows = json.loads(lab.run("print(table.to_frame()['perplexity perplexity'].to_json())"))
    table.get_by_role("button", name="perplexity", exact=True).click()
    order = table.locator("tbody tr").evaluate_all("rows => rows.map(row => row.dataset.name)")
    assert order == sorted(rows, key=rows.get)
    assert float(table.locator("tr[data-name=W8A8] td").first.inner_text()) == pytest.approx(rows["W8A8"], abs=0.006)
    for theme in ("light", "dark"):
        lab.theme(theme)
        table.scroll_into_view_if_needed(timeout=WAIT_MS)
        page.screenshot(path=screenshots / f"notebook_03_{theme}.png")
    lab.theme("light")
    for _ in range(30):
        lab.command("notebook:move-cursor-up")
    page.locator(".js-plotly-plot").first.scroll_into_view_if_needed(timeout=WAIT_MS)
    page.wait_for_timeout(1000)
    page.screenshot(path=screenshots / "notebook_03_granularity.png")

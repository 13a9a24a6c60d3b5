"""The exported page of a table of methods: what it says is what the rows hold, columns sort, nothing is cut off."""

import csv
import io
import math
import sys
from pathlib import Path

import pytest

# helpers of the tests lie beside those of the widgets
sys.path.insert(0, str(Path(__file__).parents[1] / "widgets"))
import synthetic_methods

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def table():
    return synthetic_methods.table()


def names(page):
    return page.locator("tbody tr").evaluate_all("rows => rows.map(row => row.dataset.name)")


@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 1280), ("light", 480)])
def test_the_page_says_what_the_rows_hold(table, view_page, screenshots, theme, width):
    page = view_page(table.view(), theme, width, 620)
    page.screenshot(path=screenshots / f"methods_{theme}_{width}.png")
    assert names(page) == [row.name for row in table.rows]
    frame = table.to_frame()
    for row in table.rows[1:-1]:
        line = page.locator(f"tr[data-name='{row.name}']").inner_text()
        assert f"{frame.loc[row.name, 'perplexity perplexity']:.2f}" in line
        assert frame.loc[row.name, "perplexity perplexity: change"] in line
        assert frame.loc[row.name, "hellaswag accuracy, %: 95 % interval"] in line
        assert f"{row.bytes / 1e6:.1f}" in line
    assert table.rows[-1].error in page.locator("tr.mt-is-cannot").inner_text()
    box = page.locator(".mt").bounding_box()
    assert box["x"] + box["width"] <= width  # the table scrolls inside its frame, the page does not
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".mt-frame").focus()
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    if width < 600:
        page.wait_for_function("document.querySelector('.mt-frame').scrollLeft > 100")
    assert page.locator("tbody th").first.bounding_box()["x"] < 40  # names stay
    page.screenshot(path=screenshots / f"methods_{theme}_{width}_scrolled.png")


def test_dots_and_intervals_lie_where_the_numbers_are(table, view_page):
    page = view_page(table.view(), width=1280)
    cells = {row["name"]: row["cells"].get("change perplexity perplexity") for row in table.sheet()["rows"]}
    cells = {name: cell for name, cell in cells.items() if cell}
    ends = [0.0, *(cell[end] for cell in cells.values() for end in ("low", "value", "high"))]
    lo, hi = math.asinh(min(ends)), math.asinh(max(ends))
    at = lambda value: 9 + (176 - 18) * (math.asinh(value) - lo) / (hi - lo)  # noqa: E731
    for name, cell in cells.items():
        row = page.locator(f"tr[data-name='{name}'] .mt-plot").first
        assert float(row.locator("circle").get_attribute("cx")) == pytest.approx(at(cell["value"]), abs=0.01)
        assert float(row.locator(".mt-interval").get_attribute("x1")) == pytest.approx(at(cell["low"]), abs=0.01)
        assert float(row.locator(".mt-interval").get_attribute("x2")) == pytest.approx(at(cell["high"]), abs=0.01)
        full = "mt-worse" in row.locator("circle").get_attribute("class")
        assert full == ("worse" in cell["note"])


def test_columns_sort_by_mouse_and_keyboard(table, view_page):
    page = view_page(table.view(), width=1280)
    asked = names(page)
    frame = table.to_frame().drop(index="fused experts")
    button = page.get_by_role("button", name="perplexity", exact=True)
    button.click()
    assert names(page) == [*frame["perplexity perplexity"].sort_values().index, "fused experts"]
    assert page.locator("thead th[aria-sort=ascending]").inner_text().startswith("perplexity")
    page.keyboard.press("Enter")  # the heading keeps the focus
    assert names(page) == [*frame["perplexity perplexity"].sort_values(ascending=False).index, "fused experts"]
    page.keyboard.press("Enter")
    assert names(page) == asked
    page.get_by_role("button", name="faster, ×").click()
    fastest = frame["× faster"].dropna().sort_values(ascending=False).index
    assert names(page)[: len(fastest)] == list(fastest)
    page.get_by_role("button", name="method", exact=True).click()
    assert names(page)[:-1] == sorted(frame.index, key=str.casefold)


def test_the_csv_has_the_numbers_in_full(table, view_page):
    page = view_page(table.view(), width=1280)
    with page.expect_download() as download:
        page.get_by_role("button", name="CSV").click()
    rows = list(csv.DictReader(io.StringIO(Path(download.value.path()).read_text(encoding="utf-8"))))
    assert [row["method"] for row in rows] == [row.name for row in table.rows]
    assert float(rows[1]["perplexity"]) == table.rows[1].evaluation["perplexity"].value
    cell = table.sheet()["rows"][1]["cells"]["change perplexity perplexity"]
    assert [float(rows[1][key]) for key in ("change, %", "change, %: low", "change, %: high")] == [
        cell["value"],
        cell["low"],
        cell["high"],
    ]
    assert rows[-1]["why not"] == table.rows[-1].error


def test_help_explains_every_column(table, view_page):
    page = view_page(table.view(), width=1280)
    page.get_by_text("What the columns say").click()
    for column in table.sheet()["columns"]:
        assert page.get_by_text(column["help"]).first.is_visible()

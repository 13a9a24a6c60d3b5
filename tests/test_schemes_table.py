"""The figures of the long run that stand in notebook 03 are those of benchmarks/results/schemes.csv."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("schemes_table", ROOT / "scripts" / "schemes_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_notebook_03_has_the_figures_of_the_last_run(script):
    book = nbformat.read(ROOT / "notebooks" / "03_schemes.ipynb", as_version=4)
    (cell,) = [cell for cell in book.cells if cell.source.startswith(script.HEADING)]
    assert cell.source.endswith(f"\n{script.markdown()}"), "run scripts/schemes_table.py"


def test_another_table_takes_the_place_of_the_one_there(script, tmp_path):
    file = tmp_path / "schemes.csv"
    file.write_text('method,perplexity perplexity,"weights, MB",× faster\nnone,31.8841,269.03,\nW8A8,67.252,162.863,\n')
    table = script.markdown(file)
    assert table.splitlines() == [
        "| method | perplexity | weights, MB |",
        "| --- | ---: | ---: |",
        "| none | 31.88 | 269.0 |",
        "| W8A8 | 67.25 | 162.9 |",
    ]
    before = "## Heading\n\nText. `python -m benchmarks.schemes`, 2026-01-02, two cores.\n\n| method | old |\n| --- |"
    after = script.with_table(before, table, "2026-03-04")
    assert after == f"## Heading\n\nText. `python -m benchmarks.schemes`, 2026-03-04, two cores.\n\n{table}"
    with pytest.raises(ValueError, match="the date behind it"):
        script.with_table("## Heading\n\n| method |", table, "2026-03-04")

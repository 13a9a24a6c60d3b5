"""The figures of the long run that stand in notebooks 03 and 04 are those of benchmarks/results."""

import importlib.util
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("result_tables", ROOT / "scripts" / "result_tables.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("which", [0, 1], ids=["schemes", "objectives"])
def test_notebooks_have_the_figures_of_the_last_run(script, which):
    table = script.TABLES[which]
    book = nbformat.read(ROOT / "notebooks" / table.notebook, as_version=4)
    (cell,) = [cell for cell in book.cells if cell.source.startswith(table.heading)]
    assert cell.source.endswith(f"\n{table.draw(table.file)}"), "run scripts/result_tables.py"
    assert script.COMMAND in cell.source


def test_another_table_takes_the_place_of_the_one_there(script, tmp_path):
    file = tmp_path / "schemes.csv"
    file.write_text('method,perplexity perplexity,"weights, MB",× faster\nnone,31.8841,269.03,\nW8A8,67.252,162.863,\n')
    table = script.schemes(file)
    assert table.splitlines() == [
        "| method | perplexity | weights, MB |",
        "| --- | ---: | ---: |",
        "| none | 31.88 | 269.0 |",
        "| W8A8 | 67.25 | 162.9 |",
    ]
    before = f"## Heading\n\nText. {script.COMMAND}2026-01-02, two cores.\n\n| method | old |\n| --- |"
    after = script.with_table(before, table, "2026-03-04")
    assert after == f"## Heading\n\nText. {script.COMMAND}2026-03-04, two cores.\n\n{table}"
    with pytest.raises(ValueError, match="the date behind it"):
        script.with_table("## Heading\n\n| method |", table, "2026-03-04")


def test_objectives_side_by_side(script, tmp_path):
    file = tmp_path / "objectives.csv"
    file.write_text(
        'method,candidate,"KL held, nats per token",± to flat α,kept\n'
        '"O1, clipped",logits,0.03121,0.0012,True\n"O1, clipped",none,0.05,,False\n'
        '"O3, clipped",none,0.7,,False\n"O3, clipped",logits,0.0481,0.00249,True\n'
    )
    assert script.objectives(file).splitlines() == [
        "| candidate | O1 | O3 |",
        "| --- | ---: | ---: |",
        "| logits | **0.0312** ± 0.0012 | **0.0481** ± 0.0025 |",
        "| none | 0.0500 | 0.7000 |",
    ]

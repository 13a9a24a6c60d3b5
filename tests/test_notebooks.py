"""Notebooks are stored without outputs, and every one runs from top to bottom."""

from pathlib import Path

import nbformat
import pytest

from sqviz import demo

FOLDER = Path(__file__).parents[1] / "notebooks"
notebooks = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", notebooks, ids=lambda path: path.stem)


def test_the_first_notebook_is_there():
    assert (FOLDER / "00_start.ipynb") in notebooks


@each
def test_stored_without_outputs(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert "widgets" not in book.metadata, "strip metadata.widgets: GitHub cannot show such a notebook"
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert book.metadata.kernelspec.name == "python3"


@each
def test_links_lead_somewhere(path):
    import re

    for cell in nbformat.read(path, as_version=4).cells:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", cell.source if cell.cell_type == "markdown" else ""):
            assert (FOLDER / target).exists(), target


@each
@pytest.mark.notebook
@pytest.mark.embedded
@pytest.mark.timeout(1200)
def test_runs(path):
    book = demo.execute(path, pages=False)
    shown = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in shown if {"image/png", "image/svg+xml"} & set(output.get("data", {}))]
    assert pictures, "a notebook shows at least one picture, also where no widget can be shown"
    warned = [output.text for output in shown if output.output_type == "stream" and output.name == "stderr"]
    assert warned == []

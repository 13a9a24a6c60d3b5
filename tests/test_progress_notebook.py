"""The progress bar as a notebook keeps it: no dead widgets once the work is done, and a Cancel button while it runs."""

import nbformat
import pytest
from nbclient import NotebookClient


@pytest.mark.notebook
def test_a_finished_bar_leaves_a_line_of_text_in_the_notebook() -> None:
    source = """
from sqviz.progress import progress
with progress(3, "work", unit="segments") as bar:
    for _ in range(3):
        bar.step()
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=120).execute()
    (output,) = notebook.cells[0].outputs
    assert set(output["data"]) == {"text/plain"}
    assert "3 of 3 segments" in output["data"]["text/plain"]


@pytest.mark.notebook
def test_the_cancel_button_stops_the_work() -> None:
    source = """
import ipywidgets, time, threading
from sqviz.errors import Cancelled
from sqviz.progress import progress
stopped_at = None
def press():
    time.sleep(0.2)
    (button,) = [w for w in ipywidgets.widget._instances.values() if isinstance(w, ipywidgets.Button)]
    button.click()
threading.Thread(target=press).start()
try:
    with progress(None, "work") as bar:
        while bar.done < 1000:
            time.sleep(0.01)
            bar.step()
except Cancelled as error:
    print("stopped:", error, bar.done < 1000)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=120).execute()
    text = "".join(o.get("text", "") for o in notebook.cells[0].outputs)
    assert text == "stopped: work was cancelled True\n"

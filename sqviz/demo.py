"""`sqviz demo`: execute notebooks headless, and leave pages that need no kernel and no network.

Each view becomes its own exported page (`to_html()`) in a frame, so sliders still work; other widgets (progress bars)
leave nothing. Formulas become MathML. Nothing is fetched when such a page is opened.
"""

import html
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sqviz.errors import SqvizError

WIDGET = "application/vnd.jupyter.widget-view+json"
SETUP = "from sqviz import demo; demo.show_pages(); del demo"
CELL_SECONDS = 900
EMPTY = ("require_js_url", "mathjax_url", "jquery_url", "mermaid_js_url", "mermaid_layout_elk_js_url")
# the frame is as high as what is in it; it can look, because a srcdoc frame has its parent's origin
FIT = "this.style.height=this.contentDocument.documentElement.scrollHeight+8+'px'"
FRAME = (
    "<iframe class='sqviz-page' srcdoc=\"{page}\" style='width:100%;border:0' height='600' "
    'onload="const fit=()=>{{{fit}}};fit();new ResizeObserver(fit).observe(this.contentDocument.body)"></iframe>'
)
MARK = re.compile("\ue000(\\d+)\ue001")  # stands for a formula; private-use characters, so no text has it
FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*?[^\s$])?)\$(?!\w)", re.DOTALL)


def make(notebooks: Iterable[Path], output: Path) -> list[Path]:
    """Execute each notebook whose page is older than it or than sqviz, and write the pages and an index.

    Args:
        notebooks: .ipynb files.
        output: the folder for NAME.html and index.html.

    Returns:
        The pages written now.

    Raises:
        SqvizError: a cell raised; the message has its traceback. The other pages stay as they were.
    """
    output.mkdir(parents=True, exist_ok=True)
    notebooks = list(notebooks)
    written = []
    for notebook in notebooks:
        page = output / f"{notebook.stem}.html"
        if page.exists() and page.stat().st_mtime > _newest(notebook):
            print(f"{page} is up to date")
            continue
        print(f"{notebook} -> {page}", flush=True)
        _replace(page, to_page(execute(notebook), {other.stem for other in notebooks}))
        written.append(page)
    _replace(output / "index.html", index(notebooks))
    return written


def _newest(notebook: Path) -> float:
    package = [path for path in Path(__file__).parent.rglob("*") if path.suffix != ".pyc" and path.is_file()]
    return max(path.stat().st_mtime for path in [notebook, *package])


def _replace(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def execute(notebook: Path, *, pages: bool = True) -> Any:
    """The notebook with outputs, run by this Python's kernel in a folder of its own. The file stays as it is.

    Args:
        notebook: an .ipynb file.
        pages: show each view as its exported page; else as in JupyterLab.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    book = nbformat.read(notebook, as_version=4)
    book.cells.insert(0, nbformat.v4.new_code_cell(SETUP if pages else ""))

    def say(cell: Any, cell_index: int) -> None:
        if cell_index:
            print(f"    cell {cell_index} of {len(book.cells) - 1}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:  # what a notebook writes does not stay beside it
        client = NotebookClient(
            book,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
            store_widget_state=False,
            on_cell_start=say,
        )
        try:
            client.execute()
        except CellExecutionError as error:
            raise SqvizError(f"{notebook}: {error}") from error
    book.cells.pop(0)
    _count_from_one(book)
    return book


def _count_from_one(book: Any) -> None:
    """Number the cells as if the one that prepared the kernel had not been there."""
    count = 0
    for cell in book.cells:
        if cell.cell_type == "code" and cell.execution_count is not None:
            count += 1
            cell.execution_count = count
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count


def show_pages() -> None:
    """In a kernel: show views as exported pages from now on. Called by `execute` before the first cell."""
    from IPython import get_ipython

    formatter = get_ipython().display_formatter.mimebundle_formatter
    formatter.for_type_by_name("sqviz.widgets.view", "View", _frame)


def _frame(view: Any, include: Any = None, exclude: Any = None) -> dict[str, str]:
    page = html.escape(view.to_html(), quote=True)
    return {"text/html": FRAME.format(page=page, fit=FIT), "text/plain": repr(view)}


def to_page(book: Any, siblings: set[str]) -> str:
    """An executed notebook as one page. Links to `siblings` (notebook names) lead to their pages."""
    from nbconvert import HTMLExporter

    formulas: list[str] = []
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_live_widget(output)]
        elif cell.cell_type == "markdown":
            cell.source = _page_links(set_aside(cell.source, formulas), siblings)
    exporter = HTMLExporter(embed_images=True, **dict.fromkeys(EMPTY, ""))
    page, _ = exporter.from_notebook_node(book, resources={"metadata": {"name": _title(book)}})
    page = re.sub(r"<[^<>]*\ue000[^<>]*>", lambda tag: MARK.sub("", tag[0]), page)  # in a heading's id, say
    return MARK.sub(lambda mark: formulas[int(mark[1])], page)


def _is_live_widget(output: Any) -> bool:
    data = output.get("data", {})
    return WIDGET in data and "text/html" not in data and "image/png" not in data


def _page_links(markdown: str, siblings: set[str]) -> str:
    return re.sub(r"\]\(([\w-]+)\.ipynb", lambda m: f"]({m[1]}.html" if m[1] in siblings else m[0], markdown)


def set_aside(markdown: str, formulas: list[str]) -> str:
    """Replace $…$ and $$…$$ outside of code by marks, and append the MathML of each, which browsers draw by themselves.

    nbconvert would take MathML in markdown apart, so it is put in afterwards.
    """
    try:
        from latex2mathml.converter import convert
    except ModuleNotFoundError as error:
        raise SqvizError(
            "formulas need latex2mathml: pip install latex2mathml, or sqviz with its extra `dev`"
        ) from error

    def draw(match: re.Match[str]) -> str:
        formula = re.sub(r"\\tag\{([^{}]*)\}", r"\\qquad (\1)", match["block"] or match["inline"])
        formulas.append(convert(formula, display="block" if match["block"] else "inline"))
        return f"\ue000{len(formulas) - 1}\ue001"

    pieces = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.DOTALL)
    return "".join(piece if piece.startswith("`") else FORMULA.sub(draw, piece) for piece in pieces)


def _title(book: Any) -> str:
    lines = (line for cell in book.cells if cell.cell_type == "markdown" for line in cell.source.splitlines())
    return next((line.removeprefix("# ").strip() for line in lines if line.startswith("# ")), "sqviz")


def index(notebooks: Iterable[Path]) -> str:
    """The page that lists the others, by the title and first paragraph of each notebook."""
    import nbformat

    items = []
    for notebook in notebooks:
        book = nbformat.read(notebook, as_version=4)
        first = book.cells[0].source.split("\n\n") if book.cells else []
        about = re.sub(r"[*_`#]|\[([^\]]*)\]\([^)]*\)", r"\1", " ".join(first[1].split())) if len(first) > 1 else ""
        items.append(
            f'<li><a href="{html.escape(notebook.stem)}.html">{html.escape(_title(book))}</a>'
            f"<p>{html.escape(about)}</p></li>"
        )
    return INDEX.format(items="\n".join(items))


INDEX = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>sqviz</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 3rem auto; padding: 0 1rem; }}
a {{ font-weight: 600; }} p {{ margin: .2rem 0 1rem; }}
</style></head><body>
<h1>sqviz</h1>
<p>The notebooks as executed. The pages need no kernel and no network; sliders in them work.</p>
<ol>
{items}
</ol></body></html>
"""

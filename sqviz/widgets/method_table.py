"""`MethodTableView`: a table of methods that sorts, with changes drawn as dots and 95 % intervals; live while it fills.

Traits, all from the kernel: sheet (columns and rows, see sqviz/evaluation/method_sheet.py), state, running ({number,
what, done, total} of the row under way), note, problem. Messages from the page: {"kind": "cancel"}; to the page:
{"kind": "heard"}.
"""

from html import escape
from typing import Any

import traitlets

from sqviz.widgets.inline import inline
from sqviz.widgets.still import Still
from sqviz.widgets.view import View


class MethodTableView(View):
    """See `MethodTable.view`."""

    _scripts = ("draw.js", "method_table.js")
    _styles = ("base.css", "method_table.css")

    sheet = traitlets.Dict().tag(sync=True)
    state = traitlets.Enum(["running", "stopped", "failed", "done"], "done").tag(sync=True)
    running = traitlets.Dict().tag(sync=True)
    note = traitlets.Unicode("").tag(sync=True)
    problem = traitlets.Unicode("").tag(sync=True)

    def still(self) -> Still:
        """The same table as a picture."""
        from sqviz.widgets.method_table_still import method_table_still

        return method_table_still(self.sheet, self.title)


def as_html(title: str, sheet: dict[str, Any], state: str = "done", note: str = "", problem: str = "") -> str:
    """The table as HTML for a notebook: sorts where scripts run, and is a plain table where they do not."""
    traits = {"title": title, "sheet": sheet, "state": state, "running": {}, "note": note, "problem": problem}
    return inline(MethodTableView, traits, plain_table(title, sheet, note, problem))


def plain_table(title: str, sheet: dict[str, Any], note: str = "", problem: str = "") -> str:
    """A table without styles: it takes its colours from the page."""
    columns, rows = sheet.get("columns", []), sheet.get("rows", [])
    lines = "".join(f"<p>{escape(line)}</p>" for line in (title, note, problem) if line)
    if not rows:
        return f"{lines}<p>no row is finished</p>"
    names = ["method", *(_named(column) for column in columns), "what"]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    body = "".join(f"<tr>{_cells(row, columns)}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'{lines}<div style="overflow-x: auto">{table}</div>'


def _named(column: dict[str, str]) -> str:
    return f"{column['label']}, {column['unit']}" if column["unit"] else column["label"]


def _cells(row: dict[str, Any], columns: list[dict[str, str]]) -> str:
    texts = []
    for column in columns:
        cell = row["cells"].get(column["key"], {})
        interval = f" ({cell['interval']})" if cell.get("interval") else ""
        texts.append(f"{cell.get('text', '')}{interval}")
    why = {"cannot": f"cannot: {row['why']}", "stopped": "not computed"}.get(row["state"], "")
    last = f"{row['what']}; {why}" if why else row["what"]
    name = f'<th scope="row">{escape(row["name"])}</th>'
    return name + "".join(f"<td>{escape(text)}</td>" for text in [*texts, last])

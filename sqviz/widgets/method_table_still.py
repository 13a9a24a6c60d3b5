"""A table of methods drawn without a browser: the picture of `MethodTableView`."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from sqviz.widgets.still import BLUE, DIM, FAINT, INK, ORANGE, PAPER, PURPLE, Axis, Box, Still, number

ROW, TOP, MARGIN, WIDEST = 34, 84, 16, 1600
PLOT = 150
TONES = {"worse": ORANGE, "better": BLUE, "noise": DIM, "same": DIM}
WIDTHS = {"number": 92, "bar": 96, "change": PLOT + 128}


def change_axis(cells: Iterable[dict[str, Any]]) -> tuple[Callable[[float], float], list[float]]:
    """Where a change lies, 0 to 1, and the ticks: linear up to ±5, compressed beyond. The twin of method_table.js."""
    ends = [value for cell in cells for value in (cell["low"], cell["value"], cell["high"]) if value is not None]
    lo, hi = min([0.0, *ends]), max([0.0, *ends])
    if max(-lo, hi) <= 5:
        axis = Axis(lo, hi)
        return axis.fraction, axis.ticks(3)
    first, last = math.asinh(lo), math.asinh(hi)
    powers = [10.0**power for power in range(math.floor(math.log10(max(-lo, hi))) + 1)]
    ticks = sorted(tick for tick in [0.0, *powers, *(-power for power in powers)] if lo <= tick <= hi)
    return lambda value: (math.asinh(value) - first) / (last - first), ticks


def method_table_still(sheet: dict[str, Any], title: str) -> Still:
    """A line per method: name, numbers, the change with its interval, bars for size and time.

    Columns that find no room are left out from the right: metrics beyond the first of a task come last.
    """
    rows = sheet.get("rows", [])
    left = MARGIN + 20 + 7.2 * max([12, *(len(row["name"]) for row in rows)])
    columns, room = [], WIDEST - left - MARGIN
    for column in sheet.get("columns", []):
        if _wide(column) <= room:
            room -= _wide(column)
            columns.append(column)
    subtitle = "the first row is the model itself; a full dot can be told apart from noise, a ring cannot"
    width = round(max(640, left + sum(map(_wide, columns)) + MARGIN))
    still = Still(width, TOP + ROW * len(rows) + 12, title, subtitle)
    x = left
    for column in columns:
        _column(still, column, [row for row in rows if row["state"] == "done"], rows, x)
        x += _wide(column)
    for place, row in enumerate(rows):
        y = TOP + ROW * (place + 0.5)
        still.line([(MARGIN, y - ROW / 2), (width - MARGIN, y - ROW / 2)], colour=FAINT, width=0.5)
        still.text(MARGIN, y, row["name"], size=12, anchor="lm")
        if row["state"] != "done":
            why = f"cannot: {row['why']}" if row["state"] == "cannot" else "not computed"
            most = int((width - left - MARGIN) / 6.2)
            shown = why if len(why) <= most else f"{why[: most - 1]}…"
            still.rectangle(Box(left, y - ROW / 2 + 1, width - left, ROW), fill=PAPER)
            still.text(left, y, shown, size=10, colour=DIM, anchor="lm")
    return still


def _wide(column: dict[str, str]) -> float:
    """Points of a column: of its cells, or of its heading."""
    return max(WIDTHS[column["kind"]], 18 + 6.6 * len(_heading(column)))


def _heading(column: dict[str, str]) -> str:
    return f"{column['label']}, {column['unit']}" if column["unit"] else column["label"]


def _column(still: Still, column: dict[str, str], done: list[Any], rows: list[Any], x: float) -> None:
    still.text(x, 50, _heading(column), size=11, colour=DIM)
    cells = {id(row): row["cells"][column["key"]] for row in done if column["key"] in row["cells"]}
    middles = {id(row): TOP + ROW * (place + 0.5) for place, row in enumerate(rows)}
    if column["kind"] == "change":
        at, ticks = change_axis(cells.values())
        across = lambda value: x + 6 + (PLOT - 12) * at(value)  # noqa: E731
        _ticks(still, ticks, across, len(rows))
        for row, cell in cells.items():
            _change(still, cell, across, middles[row], x)
        return
    most = max((cell["value"] or 0.0 for cell in cells.values()), default=0.0) or 1.0
    for row, cell in cells.items():
        y = middles[row]
        still.text(x, y - (4 if column["kind"] == "bar" else 0), cell["text"], size=12, anchor="lm")
        if column["kind"] == "bar" and cell["value"] is not None:
            still.rectangle(Box(x, y + 7, max(1.0, 78 * cell["value"] / most), 3), fill=PURPLE)


def _ticks(still: Still, ticks: list[float], across: Callable[[float], float], rows: int) -> None:
    placed: list[float] = []
    for tick in sorted(ticks, key=abs):
        x = across(tick)
        still.line([(x, TOP), (x, TOP + ROW * rows)], colour=FAINT if tick else DIM, width=0.5)
        if all(abs(x - other) > 18 for other in placed):
            placed.append(x)
            sign = "+" if tick > 0 else ""
            still.text(x, 67, f"{sign}{number(tick)}".replace("-", "−"), size=9, colour=DIM, anchor="ma")


def _change(still: Still, cell: dict[str, Any], across: Callable[[float], float], y: float, x: float) -> None:
    colour = TONES[cell["tone"]]
    if cell["low"] is not None and cell["high"] is not None:
        still.line([(across(cell["low"]), y), (across(cell["high"]), y)], colour=colour, width=2)
    if cell["value"] is not None:
        full = cell["tone"] in ("worse", "better")
        still.polygon(_circle(across(cell["value"]), y, 4), fill=colour)
        if not full:
            still.polygon(_circle(across(cell["value"]), y, 2.5), fill=PAPER)
    still.text(x + PLOT + 4, y - 7, cell["text"], size=11, colour=INK, anchor="lm")
    still.text(x + PLOT + 4, y + 8, cell["interval"], size=9, colour=DIM, anchor="lm")


def _circle(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    angles = [2 * math.pi * step / 24 for step in range(24)]
    return [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles]

"""Where the operators of a block stand in a drawing, and how the lines between them run. Numbers only: no drawing.

Data flows downwards. An operator's row is one below the lowest that it reads from; in a row operators stand side by
side, each as near as can be below what it reads. A line that would cross an operator runs along a lane on the left.
"""

import dataclasses
from collections.abc import Mapping, Sequence

INPUT = "input"
Point = tuple[float, float]
"""Column and row; whole numbers are the middles of operators."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A block on a grid.

    Attributes:
        places: operator → its place; "input" is the top.
        lines: (from, to, corners) of each line, both ends included.
        columns: leftmost and rightmost column, lanes included.
        rows: how many.
    """

    places: Mapping[str, Point]
    lines: tuple[tuple[str, str, tuple[Point, ...]], ...]
    columns: tuple[float, float]
    rows: int


def lay_out(sources: Mapping[str, Sequence[str]]) -> Layout:
    """Place the operators of a block.

    Args:
        sources: operator → those it reads from, in execution order; "input" among sources is what the block reads.
    """
    row = {INPUT: 0}
    for name, read in sources.items():
        row[name] = 1 + max((row[one] for one in read), default=0)
    rows = 1 + max(row.values())
    column: dict[str, float] = {INPUT: 0.0}
    lanes: list[tuple[str, str]] = []
    for at in range(1, rows):
        here = [name for name in sources if row[name] == at]
        wanted: dict[str, float] = {}
        for name in here:
            near = []
            for one in sources[name]:
                if _crossed(one, name, row, column):
                    lanes.append((one, name))
                else:
                    near.append(column[one])
            wanted[name] = sum(near) / len(near) if near else 0.0
        column.update(_spread(here, wanted))
    left, right = min(column.values()), max(column.values())
    lines, depth = [], 0
    for name, read in sources.items():
        for one in read:
            start, end = (column[one], float(row[one])), (column[name], float(row[name]))
            if (one, name) in lanes:
                lane = _lane(one, name, lanes, row)
                depth = max(depth, lane + 1)
                x = left - 0.62 - 0.16 * lane
                corners: tuple[Point, ...] = (start, (start[0], start[1] + 0.5), (x, start[1] + 0.5))
                corners = (*corners, (x, end[1]), end)
            elif end[1] - start[1] > 1 and start[0] != end[0]:
                corners = (start, (start[0], end[1]), end)  # down its own column, then across
            else:
                corners = (start, end)
            lines.append((one, name, corners))
    edge = left - 0.5 - (0.2 + 0.16 * (depth - 1) if depth else 0.0)
    return Layout({name: (column[name], float(row[name])) for name in row}, tuple(lines), (edge, right + 0.5), rows)


def _crossed(start: str, end: str, row: Mapping[str, int], column: Mapping[str, float]) -> bool:
    """Whether a line straight down from `start` would meet another operator above the row of `end`."""
    between = range(row[start] + 1, row[end])
    return any(row[name] in between and abs(column[name] - column[start]) < 0.6 for name in column)


def _spread(names: Sequence[str], wanted: Mapping[str, float]) -> dict[str, float]:
    """Columns at least 1 apart, in the order given where two want the same, their middle where it was."""
    order = sorted(names, key=lambda name: (wanted[name], names.index(name)))
    at: list[float] = []
    for name in order:
        at.append(max(wanted[name], at[-1] + 1) if at else wanted[name])
    shift = sum(at) / len(at) - sum(wanted.values()) / len(wanted) if at else 0.0
    return {name: value - shift for name, value in zip(order, at, strict=True)}


def _lane(start: str, end: str, lanes: Sequence[tuple[str, str]], row: Mapping[str, int]) -> int:
    """The number of the lane: as many as there are earlier lines beside this one that end elsewhere."""
    mine, taken = lanes.index((start, end)), set()
    for at, (other_start, other_end) in enumerate(lanes[:mine]):
        if row[other_start] < row[end] and row[start] < row[other_end]:
            taken.add(_lane(*lanes[at], lanes, row))
    return next(number for number in range(len(lanes)) if number not in taken)

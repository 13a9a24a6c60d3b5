"""Put what `python -m benchmarks.schemes --searched` wrote into notebooks 03 and 04, as tables that need no run.

    .venv/bin/python scripts/result_tables.py [--check]

Notebooks are stored without outputs, so the figures of the long run stand in cells of text. `--check` only says whether
they are those of benchmarks/results.
"""

import argparse
import csv
import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
COMMAND = "`python -m benchmarks.schemes --searched`, "
COLUMNS = {
    "method": "method",
    "perplexity perplexity": "perplexity",
    "perplexity perplexity: change": "change",
    "perplexity perplexity: 95 % interval": "95 % interval",
    "weights, MB": "weights, MB",
    "128 tokens, ms": "128 tokens, ms",
    "× faster": "× faster",
}
DIGITS = {"perplexity perplexity": 2, "weights, MB": 1, "128 tokens, ms": 1, "× faster": 2}
HELD, NOISE = "KL held, nats per token", "± to flat α"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of results in a notebook: in the cell that begins with `heading`, to its end."""

    notebook: str
    heading: str
    results: str
    draw: Callable[[Path], str]

    @property
    def file(self) -> Path:
        """Where the figures come from."""
        return ROOT / "benchmarks" / "results" / self.results

    @property
    def date(self) -> str:
        """The day on which the file was last committed."""
        command = ["git", "log", "-1", "--format=%cs", "--", str(self.file)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def schemes(file: Path) -> str:
    """Every row; columns that are empty throughout are left out."""
    rows = _read(file)
    names = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    return _markdown([[COLUMNS[name] for name in names], *([_cell(row, name) for name in names] for row in rows)])


def objectives(file: Path) -> str:
    """A row per candidate, a column per scheme: KL, and the noise of searches; what was kept is bold."""
    rows = _read(file)
    methods, candidates = (list(dict.fromkeys(row[name] for row in rows)) for name in ("method", "candidate"))
    known = {}
    for row in rows:
        figure = f"{float(row[HELD]):.4f}"
        figure = f"**{figure}**" if row["kept"] == "True" else figure
        known[row["candidate"], row["method"]] = f"{figure} ± {float(row[NOISE]):.4f}" if row[NOISE] else figure
    head = ["candidate", *(method.partition(",")[0] for method in methods)]
    return _markdown([head, *([one, *(known.get((one, method), "") for method in methods)] for one in candidates)])


TABLES = (
    Table("03_schemes.ipynb", "## What the full run gave", "schemes.csv", schemes),
    Table("04_alpha.ipynb", "## What each objective came to", "objectives.csv", objectives),
)


def with_table(source: str, table: str, date: str) -> str:
    """The text of the cell with another table; what stands before the table stays, but for its date."""
    before = source[: source.index("\n| ")]
    words = before.split(COMMAND)
    if len(words) != 2:
        raise ValueError(f"the cell has to say {COMMAND}and the date behind it")
    return f"{words[0]}{COMMAND}{date}{words[1][len('2026-01-01') :]}\n{table}"


def _read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def _cell(row: dict[str, str], name: str) -> str:
    text = row.get(name) or ""
    return f"{float(text):.{DIGITS[name]}f}" if text and name in DIGITS else text


def _markdown(lines: list[list[str]]) -> str:
    """Lines as a table, the first one its head; the first column is text, the others are figures."""
    rule = ["---", *["---:"] * (len(lines[0]) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))


def main() -> None:
    """Write the tables into the notebooks, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, end with 1 if figures differ")
    check = parser.parse_args().check
    stale = []
    for table in TABLES:
        path = ROOT / "notebooks" / table.notebook
        book = nbformat.read(path, as_version=4)
        cell = next(cell for cell in book.cells if cell.source.startswith(table.heading))
        drawn = table.draw(table.file)
        if cell.source.endswith(f"\n{drawn}"):
            continue
        stale.append(f"{table.notebook} had other figures than {table.results}")
        if not check:
            cell.source = with_table(cell.source, drawn, table.date)
            path.write_text(nbformat.writes(book) + "\n", encoding="utf-8")
    if check and stale:
        sys.exit("; ".join([*stale, "run scripts/result_tables.py"]))
    print("; ".join(stale) or "the notebooks have the figures of benchmarks/results")


if __name__ == "__main__":
    main()

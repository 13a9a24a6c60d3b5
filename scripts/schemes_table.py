"""Put what `python -m benchmarks.schemes` wrote into notebook 03, as a table that needs no run.

    .venv/bin/python scripts/schemes_table.py [--check]

The notebook is stored without outputs, so the figures of the long run stand in a cell of text. `--check` only says
whether they are those of benchmarks/results/schemes.csv.
"""

import argparse
import csv
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
CSV = ROOT / "benchmarks" / "results" / "schemes.csv"
NOTEBOOK = ROOT / "notebooks" / "03_schemes.ipynb"
HEADING = "## What the full run gave"
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


def markdown(file: Path = CSV) -> str:
    """The rows as a table in markdown; columns that are empty throughout are left out."""
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    names = [name for name in COLUMNS if any(row.get(name) for row in rows)]
    lines = [[COLUMNS[name] for name in names], ["---" if name == "method" else "---:" for name in names]]
    lines += [[_cell(row.get(name) or "", name) for name in names] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str, name: str) -> str:
    return f"{float(text):.{DIGITS[name]}f}" if text and name in DIGITS else text


def date_of(file: Path = CSV) -> str:
    """The day on which the file was last committed."""
    command = ["git", "log", "-1", "--format=%cs", "--", str(file)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def with_table(source: str, table: str, date: str) -> str:
    """The text of the cell with another table; what stands before the table stays, but for its date."""
    before = source[: source.index("\n| method")]
    words = before.split("`python -m benchmarks.schemes`, ")
    if len(words) != 2:
        raise ValueError("the cell has to say `python -m benchmarks.schemes`, and the date behind it")
    return f"{words[0]}`python -m benchmarks.schemes`, {date}{words[1][len('2026-01-01') :]}\n{table}"


def main() -> None:
    """Write the table into the notebook, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, end with 1 if the figures differ")
    check = parser.parse_args().check
    book = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(cell for cell in book.cells if cell.source.startswith(HEADING))
    table = markdown()
    if cell.source.endswith(f"\n{table}"):
        print(f"{NOTEBOOK.name} has the figures of {CSV.name}")
        return
    if check:
        sys.exit(f"{NOTEBOOK.name} has other figures than {CSV.name}: run scripts/schemes_table.py")
    cell.source = with_table(cell.source, table, date_of())
    NOTEBOOK.write_text(nbformat.writes(book) + "\n", encoding="utf-8")
    print(f"{NOTEBOOK.name} has the figures of {CSV.name} now")


if __name__ == "__main__":
    main()

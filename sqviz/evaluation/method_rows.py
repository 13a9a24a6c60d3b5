"""The rows that `compare` keeps on disk: one small JSON each, whole or not there at all.

Two processes may share a folder: each writes under a name of its own and renames, so a reader meets the old file or the
new one. What a kill or a full disk has left, and what is no row at all, counts as not there, and is computed again.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqviz.errors import SqvizError
from sqviz.evaluation.method_table import MethodRow
from sqviz.tensorfile import write_bytes

FORMAT = "sqviz.compare/1"
"""What a kept row calls itself; the number changes when older ones can no longer be read."""


def row_folder(given: str | Path | None) -> Path:
    """The folder, made if need be; sqviz's cache folder for None.

    Raises:
        SqvizError: it cannot be made, or nothing can be written there.
    """
    import platformdirs

    place = Path(platformdirs.user_cache_dir("sqviz")) / "compare" if given is None else Path(given).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise SqvizError(
            f"folder={os.fspath(place)!r}: finished rows could not be kept there ({error.strerror or error}). "
            "Give a folder that can be written to: compare(…, folder='rows')."
        ) from error
    return place


def read_row(path: Path) -> MethodRow | None:
    """A row that was finished before; None if there is none, or one that cannot be read."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(held, Mapping) or held.get("format") != FORMAT:
            return None
        return _checked(MethodRow.read(held))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_row(row: MethodRow, path: Path) -> None:
    """Keep a row, unless it only says why there is none.

    Raises:
        SqvizError: it could not be written; rows kept before stay.
    """
    if row.error:
        return
    held: dict[str, Any] = {"format": FORMAT, **row.plain()}
    try:
        write_bytes(json.dumps(held).encode(), path)
    except OSError as error:
        raise SqvizError(
            f"the row {row.name!r} could not be written to {os.fspath(path.parent)!r} ({error.strerror or error}). The "
            "rows finished before are kept: make room there and call compare again, or give another folder=."
        ) from error


def _checked(row: MethodRow) -> MethodRow:
    """The row, if its numbers are numbers. Raises `TypeError`."""
    for name in ("bytes", "milliseconds", "itself"):
        value = getattr(row, name)
        if isinstance(value, bool) or not isinstance(value, int | float | None) or (name == "bytes" and value is None):
            raise TypeError(f"{name}={value!r}")
    return row

"""What the `to_…` methods do with a path."""

from pathlib import Path
from typing import TypeVar

Content = TypeVar("Content", str, bytes)


def saved(content: Content, path: str | Path | None) -> Content | Path:
    """Write the content there, text as UTF-8, and return the path; return the content itself where `path` is None."""
    if path is None:
        return content
    Path(path).write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)

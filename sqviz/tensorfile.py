"""Writing files so that one is there whole or not at all: safetensors, and any bytes."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write a safetensors file, in place of what may be there once it is complete.

    Raises `OSError` if it could not be written; what was there stays.
    """
    try:
        _write(path, lambda part: save_file(tensors, part, metadata=metadata))
    except SafetensorError as failed:
        raise OSError(f"could not write {str(path)!r}: {failed}") from failed


def write_bytes(content: bytes, path: Path) -> None:
    """Write a file, in place of what may be there once it is complete. Raises `OSError` if it could not be written."""
    _write(path, lambda part: part.write_bytes(content))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Under another name beside the target first, then renamed: a full disk or a kill leaves the old file as it was."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

"""Writing safetensors files so that one is there whole or not at all."""

import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Under another name beside the target first, then renamed: a full disk or a kill leaves the old file as it was.

    Raises `OSError` if it could not be written.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        save_file(tensors, name, metadata=metadata)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except SafetensorError as failed:
        raise OSError(f"could not write {str(path)!r}: {failed}") from failed
    finally:
        Path(name).unlink(missing_ok=True)

"""A model's folder, which is there whole or not at all; what stands in it beside the weights."""

import copy
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqviz.errors import SqvizError
from sqviz.models.lm import LM


def new_place(folder: str | Path) -> Path:
    """The path of a folder to be written. Raises `SqvizError` if something is there already; an empty folder is not."""
    target = Path(folder).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise SqvizError(f"{str(target)!r} is there already. Nothing was written; give another folder.")
    return target


@contextmanager
def filled(target: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder beside `target`, which it becomes at the end of the `with` block.

    After an exception nothing is left, created parents included.

    Args:
        target: what `new_place` returned.
        needed_bytes: how much will be written, where it is known.

    Raises:
        SqvizError: the disk has not as much room; nothing was written.
        OSError: it cannot be written.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    part: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _require_room(target, needed_bytes)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield part
        part.chmod(0o755)
        if target.exists():
            target.rmdir()  # empty, or it raises
        part.rename(target)
    except BaseException:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
        for parent in made:  # the deepest first
            with suppress(OSError):
                parent.rmdir()
        raise


def _require_room(target: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if needed_bytes > free:
        raise SqvizError(
            f"{target.parent} has {free / 1e6:.0f} MB free, and {target.name} takes {needed_bytes / 1e6:.0f} MB. "
            "Nothing was written; free some space, or give a folder on another disk."
        )


def write_companions(lm: LM, part: Path, config: Any = None) -> None:
    """Write config.json (the model's own, or `config`), generation_config.json and the tokenizer's files.

    Raises `SqvizError` for a generation configuration that transformers does not let anyone save.
    """
    chosen: Any = lm.model.config if config is None else config
    copy.deepcopy(chosen).save_pretrained(part)  # a copy: saving drops an attribute
    generation: Any = getattr(lm.model, "generation_config", None)
    if generation is not None:
        try:
            generation.save_pretrained(part)
        except ValueError as error:
            raise SqvizError(
                "transformers refuses to save this generation configuration. Put lm.model.generation_config "
                f"right, then write again. It says: {' '.join(str(error).split())}"
            ) from error
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(part)

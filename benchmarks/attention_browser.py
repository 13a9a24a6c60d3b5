"""What attention.py measures in Chromium: the view in JupyterLab, and saved pages opened from disk."""

import dataclasses
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
from playwright.sync_api import Error, Page, Route, sync_playwright

from benchmarks.lab import FLAGS, chromium, kernel, notebook
from benchmarks.slider import alone, measure

SETUP = """
import logging, time, warnings
import sqviz
from IPython.display import display
from sqviz.observe.hooks import body
warnings.filterwarnings("ignore")
lm = sqviz.load()
ids = sqviz.text().tokens(lm.tokenizer, limit={length})
maps = sqviz.attention_maps(lm, ids, sentences=None)
ready, ended = False, []
handle = body(lm).register_forward_hook(lambda *_: ended.append(time.time()))
"""
VIEW = "maps.heatmap(lm) if ready else None"
WHOLE = """
if ready:
    maps = sqviz.attention_maps(lm, ids, sentences=None)
    display(maps.heatmap(lm))
"""
VIEW_CELL, WHOLE_CELL = 1, 2
SCRIPT = (Path(__file__).parent / "attention_page.js").read_text(encoding="utf-8")


@dataclasses.dataclass
class Seen:
    """Seconds to the painted view, of the first one of a session and of more; milliseconds of hand movements."""

    first: float
    from_cell: list[float]
    from_pass: list[float]
    hover: list[float]
    large: list[float]
    detailed: list[float]


def in_lab(length: int, rounds: int, hovers: int, clicks: int) -> Seen:
    """The view of a text of `length` tokens in JupyterLab."""
    with notebook([SETUP.format(length=length), VIEW, WHOLE]) as page:
        page.evaluate(SCRIPT)
        kernel(page, "ready = True")
        alone(page, VIEW_CELL)
        seen = Seen(run_cell(page, VIEW_CELL)[0], [], [], [], [], [])
        for _ in range(rounds):
            seen.from_cell.append(run_cell(page, VIEW_CELL)[0])
            alone(page, WHOLE_CELL)
            painted = run_cell(page, WHOLE_CELL)[1]
            seen.from_pass.append(painted - float(kernel(page, "print(ended[-1])")))
            alone(page, VIEW_CELL)
        run_cell(page, VIEW_CELL)
        places = spread(centres(page), hovers)
        seen.hover = [hover(page, x, y) for x, y in places]
        for x, y in spread(places, clicks):
            large, detailed = click(page, x, y)
            seen.large.append(large)
            seen.detailed.append(detailed)
    return seen


def run_cell(page: Page, cell: int) -> tuple[float, float]:
    """Run a cell that shows a view: seconds until it is painted, and when that was."""
    seconds, when = page.evaluate("cell => window.attention.run(cell)", cell)
    page.wait_for_timeout(300)
    return float(seconds), float(when)


def centres(page: Page) -> list[tuple[float, float]]:
    """A place in the lower left of every head that is in view: there a query looks at a key."""
    page.evaluate("() => window.attention.show()")
    page.wait_for_timeout(300)
    return [(x + 0.3 * side, y + 0.7 * side) for x, y, side in page.evaluate("() => window.attention.places()")]


def spread(places: list[tuple[float, float]], count: int) -> list[tuple[float, float]]:
    """`count` of the places, evenly."""
    return [places[at * len(places) // count] for at in range(min(count, len(places)))]


def hover(page: Page, x: float, y: float) -> float:
    """Milliseconds from the move of the mouse to the painted tooltip."""
    found = measure(page, "window.attention.tip()", lambda: page.mouse.move(x, y))
    page.wait_for_timeout(60)
    return found


def click(page: Page, x: float, y: float) -> tuple[float, float]:
    """Milliseconds from a click on a head to the head shown large, and to the same token by token."""
    page.mouse.move(x, y)
    page.wait_for_timeout(200)
    page.evaluate("() => { window.measured = window.attention.head(); }")
    page.mouse.click(x, y)
    large, detailed = page.evaluate("() => window.measured")
    page.get_by_role("button", name="← All heads").last.click()
    page.wait_for_timeout(400)
    return float(large), float(detailed)


# ---- saved pages -----------------------------------------------------------------------------------------------------

OURS = "() => [...document.querySelectorAll('.sqviz canvas')].some(canvas => canvas.paints > 0)"


@dataclasses.dataclass(frozen=True)
class Opened:
    """How opening a page went: seconds to its picture, or what came in between; the browser's largest memory."""

    seconds: float | None
    trouble: str
    bytes: int


def open_page(
    path: Path, ready: str, *, limit: float, most: float = 10e9, files: Mapping[str, Path] | None = None
) -> Opened:
    """Open a page from disk in a Chromium of its own.

    Args:
        path: the page.
        ready: a function in JavaScript, true once the picture is there.
        limit: seconds after which the browser is ended.
        most: bytes of memory at which the browser is ended.
        files: by the last part of an address, what stands in for files that the page wants from the net; None: the net.
    """

    def serve(route: Route) -> None:
        name = route.request.url.rpartition("/")[2]
        if files and name in files:
            route.fulfill(path=files[name])
        else:
            route.continue_()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 1200})
        if files:
            page.route(lambda address: not address.startswith("file:"), serve)
        crashes: list[str] = []
        page.on("crash", lambda _: crashes.append("the tab crashed"))
        page.on("pageerror", lambda error: crashes.append(f"the page failed: {str(error).splitlines()[0]}"))
        start = time.perf_counter()
        with watchdog(limit, most) as guard:
            try:
                page.goto(path.absolute().as_uri(), wait_until="commit", timeout=2000 * limit)
                page.wait_for_function(ready, timeout=2000 * limit)
                page.evaluate("() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))")
                seconds: float | None = time.perf_counter() - start
            except Error as error:
                seconds = None
                trouble = ", ".join(filter(None, [*crashes, guard.why])) or str(error).splitlines()[0]
        if seconds is not None:
            browser.close()
            return Opened(seconds, "", guard.bytes)
    return Opened(None, trouble, guard.bytes)


@dataclasses.dataclass
class Guard:
    """What the watchdog saw."""

    bytes: int = 0
    why: str = ""


@contextmanager
def watchdog(limit: float, most: float) -> Iterator[Guard]:
    """End the browser that this process started if it takes too long or too much: it may no longer answer then."""
    guard, done = Guard(), threading.Event()
    browser = [child for child in psutil.Process().children(recursive=True) if "chrom" in child.name().lower()]
    family = browser[:1]
    until = time.monotonic() + limit

    def watch() -> None:
        while not done.wait(0.2):
            guard.bytes = max(guard.bytes, _resident(family))
            if time.monotonic() > until:
                guard.why = f"not within {limit:.0f} s"
            elif guard.bytes > most:
                guard.why = f"ended at {most / 1e9:.0f} GB of memory"
            if guard.why:
                _kill(family)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield guard
    finally:
        done.set()
        thread.join()


def _resident(family: list[psutil.Process]) -> int:
    """Of the largest process: what the processes share would be counted many times in a sum."""
    largest = 0
    for process in family:
        try:
            largest = max([largest, *(one.memory_info().rss for one in [process, *process.children(recursive=True)])])
        except psutil.NoSuchProcess:
            continue
    return largest


def _kill(family: list[psutil.Process]) -> None:
    for process in family:
        try:
            for one in [*process.children(recursive=True), process]:
                one.kill()
        except psutil.NoSuchProcess:
            continue

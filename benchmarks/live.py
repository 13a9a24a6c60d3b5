"""What the live stream costs and how soon it answers, in JupyterLab in Chromium.

python -m benchmarks.live [--rounds 5] [--tokens 20000] [--model tiny]

lane           tokens per second of one lane with the page open, against the same steps in a bare loop; in turns
slider         a slider moved in the page while it runs → the first step under the new policy is painted
pause          the button clicked → the page says so, and nothing runs any more in the kernel
watched        `--tokens` tokens per lane in one page: memory of the browser and of its scripts, nodes of the page,
               frames per second while the text is scrolled, at ten places on the way. `--model embedded` watches one
               lane of the embedded model (half an hour) instead of three of a tiny one. Rows go to `--csv`.
"""

import argparse
import csv
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
from playwright.sync_api import CDPSession, Page

from benchmarks.lab import kernel, notebook

SETUP = """
import json, time, torch
import sqviz
from sqviz.corpus.segments import as_tokens
from sqviz.models.tiny import tiny
from sqviz.streaming.lane import Reading
from sqviz.streaming.policies import Sinks
from sqviz.widgets.stream_explorer import explore_stream
lm = sqviz.load()
ids = as_tokens(lm, sqviz.text(), 30_000)
view = explore_stream(lm, ids, lanes=["sinks"], sinks=4, recent=252)
view
"""
HEADLESS = """
lane = Reading(lm, ids, Sinks(4, 252), 3)
for _ in range({warm}): lane.step()
began = time.perf_counter()
for _ in range({steps}): lane.step()
print({steps} / (time.perf_counter() - began))
lane.close()
"""
LIVE = """
view.reset(); view.start()
while "sinks" not in view.tracks or view.tracks["sinks"].count < {warm}: time.sleep(0.005)
began, first = time.perf_counter(), view.tracks["sinks"].count
while view.tracks["sinks"].count < first + {steps}: time.sleep(0.005)
print((view.tracks["sinks"].count - first) / (time.perf_counter() - began))
view.pause(); view.wait()
"""
# Milliseconds from the input event until a lane has drawn a cache of the new size.
SLIDER = """value => new Promise(done => {
    const input = document.querySelectorAll('.sqviz-bar input[type=range]')[1];
    const canvas = document.querySelector('.st-lane[data-lane=sinks] canvas');
    const look = began => {
        if (canvas.cache()?.capacity === value + 4) return done(performance.now() - began);
        requestAnimationFrame(() => look(began));
    };
    input.value = value;
    const began = performance.now();
    input.dispatchEvent(new Event('input', { bubbles: true }));
    look(began);
})"""
PAUSE = """() => new Promise(done => {
    const button = document.querySelector('.sqviz-bar button');
    const look = began => button.textContent === 'Go on' ? done(performance.now() - began)
        : requestAnimationFrame(() => look(began));
    const began = performance.now();
    button.click();
    look(began);
})"""
# Frames per second while the text of the first lane is scrolled up and down for a while, and the slowest frame in ms.
SCROLL = """milliseconds => new Promise(done => {
    const text = document.querySelector('.st-text');
    const times = [];
    const step = now => {
        times.push(now);
        text.scrollTop = (Math.sin((now - times[0]) / 150) + 1) / 2 * (text.scrollHeight - text.clientHeight);
        if (now - times[0] < milliseconds) return requestAnimationFrame(step);
        text.scrollTop = text.scrollHeight;
        const gaps = times.slice(1).map((at, i) => at - times[i]).sort((a, b) => a - b);
        done([1000 * gaps.length / (times.at(-1) - times[0]), gaps.at(-1)]);
    };
    requestAnimationFrame(step);
})"""


def rates(page: Page, rounds: int, warm: int = 20, steps: int = 120) -> tuple[list[float], list[float]]:
    """Tokens per second (headless, live), in turns."""
    headless, live = [], []
    for _ in range(rounds):
        headless.append(float(kernel(page, HEADLESS.format(warm=warm, steps=steps))))
        live.append(float(kernel(page, LIVE.format(warm=warm, steps=steps))))
    return headless, live


def sliders(page: Page, lanes: list[str], rounds: int) -> list[float]:
    """Milliseconds from a moved slider to its effect, with these lanes running."""
    kernel(page, f"view.reset(); view.recent = 252; view.on = {lanes!r}; view.start()")
    page.wait_for_function("() => document.querySelectorAll('.st-lane[data-lane=sinks] .st-token').length > 20")
    found = []
    for i in range(rounds):
        page.wait_for_timeout(350 + 37 * i)
        found.append(float(page.evaluate(SLIDER, 100 if i % 2 else 60)))
    kernel(page, "view.pause(); view.wait()")
    return found


def pauses(page: Page, rounds: int) -> tuple[list[float], list[float]]:
    """Milliseconds from the click until the page says so, and from `pause()` until the kernel is at rest."""
    shown, rested = [], []
    wait = "began = time.perf_counter(); view.pause(); view.wait(); print(1000 * (time.perf_counter() - began))"
    for i in range(rounds):
        kernel(page, "view.start()")
        page.wait_for_timeout(900 + 41 * i)
        shown.append(float(page.evaluate(PAUSE)))
        kernel(page, "view.wait(); view.start()")
        page.wait_for_timeout(900 + 41 * i)
        rested.append(float(kernel(page, wait)))
    return shown, rested


@dataclasses.dataclass(frozen=True)
class Watched:
    """One look at the page: tokens of a lane, nodes, frames per second and the slowest in a scroll; memory in MB.

    `own_mb` is the memory of the browser's process for this page alone, as its task manager shows it; `resident_mb` has
    the libraries that its processes share as well. JupyterLab itself is in both: the first row is without a stream.
    """

    tokens: int
    seconds: float
    per_second: float
    own_mb: float
    resident_mb: float
    scripts_mb: float
    nodes: int
    frames_per_second: float
    slowest_frame_ms: float


def renderer() -> psutil.Process:
    """The browser's process that draws the page: the largest of its renderers."""
    family = [
        child for child in psutil.Process().children(recursive=True) if "--type=renderer" in " ".join(child.cmdline())
    ]
    return max(family, key=lambda child: child.memory_info().rss)


def look(page: Page, devtools: CDPSession, process: psutil.Process, tokens: int, began: float, speed: float) -> Watched:
    """Collect garbage, then measure."""
    devtools.send("HeapProfiler.collectGarbage")
    metrics = {one["name"]: one["value"] for one in devtools.send("Performance.getMetrics")["metrics"]}
    frames, slowest = page.evaluate(SCROLL, 3000) if tokens else (0.0, 0.0)
    memory, heap = process.memory_full_info(), metrics["JSHeapUsedSize"]
    sizes = (memory.uss / 1e6, memory.rss / 1e6, heap / 1e6)
    return Watched(tokens, time.monotonic() - began, speed, *sizes, int(metrics["Nodes"]), frames, slowest)


def watch(page: Page, tokens: int) -> list[Watched]:
    """Run `view` until every lane has read so many tokens."""
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable")
    began, process = time.monotonic(), renderer()
    rows = [look(page, devtools, process, 0, began, 0.0)]
    kernel(page, "view.start()")
    count = "min((t.count for t in view.tracks.values()), default=0)"
    before, then = 0, time.monotonic()
    while before < tokens:
        page.wait_for_timeout(1000)
        now = int(kernel(page, f"print({count})"))
        if now < rows[-1].tokens + tokens / 10 and now < tokens:
            continue
        speed = (now - before) / (time.monotonic() - then)
        rows.append(look(page, devtools, process, now, began, speed))
        before, then = int(kernel(page, f"print({count})")), time.monotonic()
        print(rows[-1], flush=True)
    kernel(page, "view.pause(); view.wait()")
    return rows


def watched_cells(model: str, tokens: int) -> list[str]:
    """The notebook whose page is watched."""
    if model == "embedded":
        return [SETUP.replace("30_000", str(tokens + 1000))]
    drawn = f"torch.randint(3, 131, ({tokens + 1000},), generator=torch.Generator().manual_seed(0))"
    made = f'view = explore_stream(tiny("LlamaForCausalLM"), {drawn}, sinks=4, recent=60)\nview'
    return [SETUP.split("lm = ")[0] + made]


def line(name: str, values: list[float], wanted: str, form: str = ".0f") -> str:
    """A row: median and largest."""
    return f"| {name} | {statistics.median(values):{form}} | {max(values):{form}} | {wanted} |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--model", choices=["tiny", "embedded"], default="tiny")
    parser.add_argument("--only-watch", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if not options.only_watch:
        with notebook([SETUP]) as page:
            headless, live = rates(page, options.rounds)
            ratio = statistics.median(b / a for a, b in zip(headless, live, strict=True))
            print("| | median | most | wanted |\n|---|---|---|---|")
            print(line("one lane without a page, tokens per second", headless, "", ".1f"))
            print(line("… with the page open", live, "", ".1f"))
            print(f"| … ratio | {ratio:.3f} | | ≥ 0.9 |")
            print(line("slider → effect, one lane, ms", sliders(page, ["sinks"], 4 * options.rounds), "≤ 250"))
            three = sliders(page, ["dense", "window", "sinks"], 4 * options.rounds)
            print(line("slider → effect, three lanes, ms", three, "≤ 250"))
            shown, rested = pauses(page, 2 * options.rounds)
            print(line("pause → said in the page, ms", shown, "≤ 200"))
            print(line("pause → kernel at rest, ms", rested, "≤ 200"), flush=True)
    with notebook(watched_cells(options.model, options.tokens)) as page:
        page.get_by_role("button", name="Start", exact=True).wait_for()
        rows = [dataclasses.asdict(row) for row in watch(page, options.tokens)]
    print(
        "\n| tokens per lane | s | tokens/s | own MB | resident MB | scripts MB | nodes | frames/s | slowest frame ms |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(_short(value) for value in row.values()) + " |")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    print(json.dumps({"wanted": {"own MB": "≤ 300", "frames/s": "≥ 30"}}, ensure_ascii=False))


def _short(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}"


if __name__ == "__main__":
    main()

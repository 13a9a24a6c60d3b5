"""Attention maps: what they cost, how soon they are seen, how large they are, and what others need for the same.

    python -m benchmarks attention      or      python -m benchmarks.attention [--parts cost long lab] [--rounds 8]

Prints a Markdown table, a row as soon as it is known, with what is wanted beside it. Everything that is compared is
taken in turns within one run; a ratio is the median over rounds of the ratio within a round. Parts:
    cost        256 sentences of 16 tokens, a lot of them each round, beside bare forward passes over the same batches;
                TransformerLens on the same lots, beside its own bare passes
    text        a text of 512 tokens: ours, `output_attentions` with eager attention, TransformerLens
    long        a text of 4096 tokens
    lab         the view of 512 tokens in JupyterLab in Chromium: first paint, tooltip, a head opened
    pages       saved pages: size, seconds to open in Chromium
    bertviz     its model_view of a text, with the same model
TransformerLens and bertviz run in environments of their own (peer_process.py), which need PyPI on the first use; the
page of bertviz wants three libraries from the net, which npm provides.
"""

import argparse
import base64
import copy
import dataclasses
import datetime
import json
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

import sqviz
from benchmarks.attention_browser import OURS, Opened, in_lab, open_page
from benchmarks.peer_process import BUILD, PeerProcess, Unavailable, model_folder
from sqviz.memory import peak_memory
from sqviz.observe.attention import TOKENS_PER_PASS
from sqviz.observe.hooks import body
from sqviz.widgets.smoothing_pack import unpack

SENTENCES, LENGTH = 256, 16
TEXT, LONG = 512, 4096
BERTVIZ, LENS = "bertviz==1.4.1", "transformer-lens==4.3.0"
LENS_BARE = f"{LENS}, bare"
LIBRARIES = {  # what bertviz's page asks for, and where npm puts it
    "require.min.js": "requirejs/require.js",
    "d3.min.js": "d3/dist/d3.min.js",
    "jquery.min.js": "jquery/dist/jquery.min.js",
}
PACKAGES = ("requirejs@2.3.6", "d3@5.7.0", "jquery@2.2.4")
MISSING = "no figure"
BYTES_PER_VALUE = 180  # of memory, in Python lists and in the text of the page


class Row(NamedTuple):
    """A line of the table."""

    what: str
    figure: str
    wanted: str = ""


@dataclasses.dataclass
class Bench:
    """What all parts share."""

    lm: sqviz.LM
    rounds: int
    lot: int
    limit: float
    most: float
    sizes: tuple[int, ...]

    @property
    def few(self) -> int:
        """Rounds of what takes long."""
        return max(2, self.rounds // 2)

    @cached_property
    def ids(self) -> Tensor:
        """The beginning of the embedded text."""
        return sqviz.text().tokens(self.lm.tokenizer, limit=LONG)

    @cached_property
    def sentences(self) -> Tensor:
        """The sentences that `attention_maps` takes by default."""
        return torch.stack(list(sqviz.text().segments(self.lm.tokenizer, LENGTH, SENTENCES)))

    @cached_property
    def folder(self) -> Path:
        """Where pages are written."""
        folder = BUILD / "bench" / "attention"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @cached_property
    def lens(self) -> PeerProcess | Unavailable:
        """TransformerLens with the model loaded, or why there is none."""
        try:
            peer = PeerProcess("transformer_lens", (LENS,), model_folder(self.lm))
            peer.ask(what="bare", batches=[self.ids[None, :LENGTH].tolist()])
        except Unavailable as why:
            return why
        return peer

    def give_up(self, why: Unavailable) -> None:
        """Go on without TransformerLens."""
        self.close()
        self.lens = why

    def close(self) -> None:
        """End the process of TransformerLens if there is one."""
        if isinstance(peer := self.__dict__.get("lens"), PeerProcess):
            peer.close()


# ---- in numbers ------------------------------------------------------------------------------------------------------


def cost(bench: Bench) -> Iterator[Row]:
    """Averaged maps beside bare forward passes over the same batches."""
    seconds = interleaved_cost(bench)

    def per_all(*names: str) -> str:
        return " / ".join(f"{SENTENCES / bench.lot * statistics.median(seconds[name]):.2f}" for name in names)

    what = f"averaged logits, {bench.rounds} rounds of {bench.lot} of {SENTENCES} sentences of {LENGTH} tokens"
    yield Row(f"{what}: against bare forward passes", times(seconds, "maps", "bare"), "≤ 1.5 ×")
    yield Row(
        "… against passes without the output layer, which no map needs", times(seconds, "maps", "body"), "≤ 1.5 ×"
    )
    yield Row(f"… seconds per {SENTENCES}: bare, without output layer, maps", per_all("bare", "body", "maps"))
    if isinstance(bench.lens, Unavailable):
        yield Row(f"{LENS}, the same", f"{MISSING}: {bench.lens}")
        return
    yield Row(f"{LENS}, scores cached and averaged: against its own bare passes", times(seconds, "cache", "their bare"))
    yield Row("… against bare passes of transformers", times(seconds, "cache", "bare"))
    yield Row(f"… seconds per {SENTENCES}: bare, cached", per_all("their bare", "cache"))
    yield from memory_of_averages(bench, bench.lens)


def interleaved_cost(bench: Bench) -> dict[str, list[float]]:
    """Seconds of each way, round by round; a round before is thrown away. Each round has the next lot of sentences."""
    lots = bench.sentences.split(bench.lot)
    seconds: dict[str, list[float]] = {}
    for turn in range(bench.rounds + 1):
        took = one_lot(bench, lots[turn % len(lots)], check=not turn)
        for name, value in took.items():
            seconds.setdefault(name, []).extend([value] if turn else [])
    return seconds


def one_lot(bench: Bench, lot: Tensor, check: bool) -> dict[str, float]:
    """Seconds of each way for some of the sentences; `check` that all average the same scores."""
    lm, batches = bench.lm, lot.split(TOKENS_PER_PASS // LENGTH)
    took = {
        "bare": clock(lambda: bare(lm.model, batches)),
        "body": clock(lambda: bare(body(lm), batches)),
        "maps": clock(lambda: averaged(lm, lot)),
    }
    if isinstance(bench.lens, PeerProcess):
        given = [batch.tolist() for batch in batches]
        try:
            took["their bare"] = bench.lens.ask(what="bare", batches=given)["seconds"]
            cached = bench.lens.ask(what="average", batches=given)
        except Unavailable as why:
            bench.give_up(why)
        else:
            took["cache"] = cached["seconds"]
            if check:
                check_same(averaged(lm, lot), cached["mean"])
    return took


def averaged(lm: sqviz.LM, sentences: Tensor) -> sqviz.AttentionMaps:
    return sqviz.attention_maps(lm, sentences.flatten(), sentences=len(sentences), length=LENGTH, logits=True)


def check_same(maps: sqviz.AttentionMaps, theirs: float) -> None:
    """Fail unless both averaged the same scores."""
    ours = maps.maps.nanmean(dtype=torch.float64).item()
    if abs(ours - theirs) > 1e-3 * (1 + abs(ours)):
        raise SystemExit(f"mean logit {ours} here, {theirs} there: not the same thing is compared")


def memory_of_averages(bench: Bench, lens: PeerProcess) -> Iterator[Row]:
    """What each way adds to its process's memory, over all sentences."""
    batches = bench.sentences.split(TOKENS_PER_PASS // LENGTH)
    _, ours = grown(bench.lm, lambda: averaged(bench.lm, bench.sentences))
    _, theirs = lens.ask_measured(what="average", batches=[batch.tolist() for batch in batches])
    yield Row("memory added by 256 sentences: ours, TransformerLens", f"{megabytes(ours)} / {megabytes(theirs)}")


def text(bench: Bench) -> Iterator[Row]:
    """One text of 512 tokens: maps of all heads at once, with what transformers offers, and with TransformerLens."""
    lm, ids = bench.lm, bench.ids[:TEXT]
    eager: Any = copy.deepcopy(lm.model)
    eager.set_attn_implementation("eager")
    ways: dict[str, Callable[[], Any]] = {
        "bare": lambda: bare(lm.model, (ids[None],)),
        "attention_maps": lambda: sqviz.attention_maps(lm, ids, sentences=None),
        "transformers' output_attentions": lambda: all_attentions(eager, ids),
    }
    found: dict[str, list[tuple[float, int | None]]] = {}
    for turn in range(bench.few + 1):
        took = {name: grown(lm, way) for name, way in ways.items()} | lens_text(bench, ids)
        for name, value in took.items():
            found.setdefault(name, []).extend([value] if turn else [])
    seconds = {name: [took for took, _ in values] for name, values in found.items()}
    if isinstance(bench.lens, Unavailable):
        yield Row(f"{TEXT} tokens: {LENS}", f"{MISSING}: {bench.lens}")
        seconds = {name: seconds[name] for name in ways}
    for name, values in seconds.items():
        unit = LENS_BARE if name == LENS else "bare"
        added = [more for _, more in found[name] if more is not None]
        memory = megabytes(int(statistics.median(added)) if added else None)
        figure = f"{statistics.median(values):.2f} s, {times(seconds, name, unit)}, {memory}"
        yield Row(f"{TEXT} tokens; {name}: seconds, × its bare pass, memory added", figure)


def lens_text(bench: Bench, ids: Tensor) -> dict[str, tuple[float, int | None]]:
    """Seconds and memory of TransformerLens, bare and with the scores cached; nothing without it."""
    if isinstance(bench.lens, Unavailable):
        return {}
    try:
        plain = bench.lens.ask_measured(what="bare", batches=[ids[None].tolist()])
        cached = bench.lens.ask_measured(what="cache", batches=[ids[None].tolist()])
    except Unavailable as why:
        bench.give_up(why)
        return {}
    return {name: (answer["seconds"], added) for name, (answer, added) in ((LENS_BARE, plain), (LENS, cached))}


@torch.inference_mode()
def all_attentions(model: Any, ids: Tensor) -> Any:
    return model(ids[None], output_attentions=True, use_cache=False).attentions


def long(bench: Bench) -> Iterator[Row]:
    """One text of 4096 tokens: seconds, memory, the saved page."""
    lm, ids = bench.lm, bench.ids[:LONG]
    plain, plainly = grown(lm, lambda: bare(body(lm), (ids[None],)))
    found: list[sqviz.AttentionMaps] = []
    took, added = grown(lm, lambda: found.append(sqviz.attention_maps(lm, ids, sentences=None)))
    yield Row(
        f"{LONG} tokens: attention_maps, once", f"{took:.1f} s, {took / plain:.1f} × a pass without the output layer"
    )
    yield Row("… memory added: the pass, maps", f"{megabytes(plainly)} / {megabytes(added)}")
    yield from saved(bench, found[0], "")


# ---- in the browser --------------------------------------------------------------------------------------------------


def lab(bench: Bench) -> Iterator[Row]:
    """The view in JupyterLab."""
    seen = in_lab(TEXT, bench.few, hovers=50, clicks=10)
    what = f"JupyterLab, {TEXT} tokens"
    yield Row(f"{what}: end of the forward pass → all heads painted", spread(seen.from_pass, "s", 2), "≤ 2 s")
    yield Row("… cell that shows the view run → painted", spread(seen.from_cell, "s", 2), "≤ 2 s")
    yield Row("… the first view of the session", f"{seen.first:.2f} s", "≤ 2 s")
    yield Row("… mouse moved → tooltip painted", spread(seen.hover, "ms", 1), "≤ 50 ms")
    yield Row("… head clicked → shown large", spread(seen.large, "ms", 0))
    yield Row("… head clicked → token by token, from the kernel", spread(seen.detailed, "ms", 0))


def pages(bench: Bench) -> Iterator[Row]:
    """Saved pages of a text, and of the smoothing explorer."""
    yield from saved(bench, sqviz.attention_maps(bench.lm, bench.ids[:TEXT], sentences=None), "≤ 10 MB")
    explorer = sqviz.explore_smoothing(bench.lm, sqviz.Magnitudes.embedded())
    try:
        page = str(explorer.to_html(progress=False))
    finally:
        explorer.close()
    size = len(page.encode())
    yield Row("saved page of the smoothing explorer", f"{size:,} bytes", "≤ 5 MB")
    yield Row("… of which", "; ".join(f"{name} {count / 1e6:.2f} MB" for name, count in shares(page)))


def saved(bench: Bench, maps: sqviz.AttentionMaps, wanted: str) -> Iterator[Row]:
    """Size of the page of a text's maps, and how soon it is open."""
    path = bench.folder / f"attention-{maps.length}.html"
    maps.heatmap(bench.lm).to_html(path)
    yield Row(f"saved page, {maps.length} tokens", f"{path.stat().st_size / 1e6:.2f} MB", wanted)
    opened = [open_page(path, OURS, limit=bench.limit, most=bench.most) for _ in range(3)]
    yield Row("… opened in Chromium", told(opened))


def shares(page: str) -> list[tuple[str, int]]:
    """The largest parts of a page of the smoothing explorer, in bytes of the page: arrays by name, script, the rest."""
    found = dict(re.findall(r'<script type="application/json" id="(state|module)">(.*?)</script>', page, re.DOTALL))
    packs = unpack(base64.b64decode(json.loads(found["state"])["embedded"]["base64"]))
    sizes = {"script": len(found["module"].encode())}
    for _, arrays in packs:
        for name, array in arrays.items():
            kind = re.sub(r"_\d+$", "", name)  # one for each linear of a group
            sizes[kind] = sizes.get(kind, 0) + array.nbytes * 4 // 3  # as base64
    sizes["everything else"] = len(page.encode()) - sum(sizes.values())
    return sorted(sizes.items(), key=lambda item: -item[1])[:6]


# ---- bertviz ---------------------------------------------------------------------------------------------------------


def bertviz(bench: Bench) -> Iterator[Row]:
    """Its model_view of the first tokens of the text, and whether Chromium opens it."""
    made: dict[int, Path] = {}
    try:
        peer = PeerProcess("bertviz", (BERTVIZ,), model_folder(bench.lm))
    except Unavailable as why:
        yield Row(BERTVIZ, f"{MISSING}: {why}")
        return
    try:
        peer.ask(**question(bench, 16, bench.folder / "bertviz.html"))  # the model is loaded now
        for size in bench.sizes:
            what = f"{BERTVIZ} model_view, {size} tokens: page, seconds to make it, memory added"
            if psutil.virtual_memory().available < BYTES_PER_VALUE * heads(bench.lm) * size**2:
                yield Row(what, f"{MISSING}: too little memory is free")
                continue
            made[size] = bench.folder / f"bertviz-{size}.html"
            answer, added = peer.ask_measured(**question(bench, size, made[size]))
            figure = f"{answer['bytes'] / 1e6:.0f} MB, {answer['view']:.1f} s, {megabytes(added)}"
            yield Row(what, figure)
    except Unavailable as why:
        yield Row(BERTVIZ, f"{MISSING}: {why}")
    finally:
        peer.close()  # before a browser takes as much memory again
    yield from opened_bertviz(bench, made)


def opened_bertviz(bench: Bench, made: dict[int, Path]) -> Iterator[Row]:
    """Its pages in Chromium, up to the first that does not open."""
    ready = f"() => document.querySelectorAll('.attn_background').length >= {heads(bench.lm)}"
    files, failed = libraries(), 0
    for size, path in sorted(made.items()):
        if failed:
            figure = f"not tried: that of {failed} tokens did not open"
        else:
            opened = open_page(path, ready, limit=bench.limit, most=bench.most, files=files)
            figure, failed = told([opened]), 0 if opened.seconds is not None else size
        yield Row(f"{BERTVIZ}, {size} tokens: opened in Chromium", figure)
        path.unlink(missing_ok=True)


def question(bench: Bench, size: int, path: Path) -> dict[str, Any]:
    tokenizer: Any = bench.lm.tokenizer
    ids = bench.ids[:size].tolist()
    return {"ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids), "html": str(path.absolute())}


def heads(lm: sqviz.LM) -> int:
    return int(lm.config.num_hidden_layers * lm.config.num_attention_heads)


def libraries() -> dict[str, Path] | None:
    """The libraries that bertviz's page wants, from npm; None if npm cannot: then the browser asks the net."""
    home = BUILD / "bertviz"
    files = {name: home / "node_modules" / place for name, place in LIBRARIES.items()}
    if not all(path.exists() for path in files.values()):
        if not (npm := shutil.which("npm")):
            return None
        command = [npm, "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(home), *PACKAGES]
        if subprocess.run(command, capture_output=True).returncode:
            return None
    return files


# ---- helpers ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def bare(model: Any, batches: tuple[Tensor, ...]) -> None:
    for batch in batches:
        model(input_ids=batch, use_cache=False)


def clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def grown(lm: sqviz.LM, work: Callable[[], object]) -> tuple[float, int | None]:
    """Seconds of the work, and by how much the peak of memory exceeded what was there before."""
    with peak_memory(lm.device) as peak:
        before = psutil.Process().memory_info().rss
        seconds = clock(work)
    return seconds, None if peak.bytes is None else peak.bytes - before


def times(seconds: dict[str, list[float]], name: str, unit: str) -> str:
    ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[unit], strict=True))
    return f"{ratio:.2f} ×"


def megabytes(count: int | None) -> str:
    return "memory unknown" if count is None else f"{count / 1e6:.0f} MB"


def spread(values: list[float], unit: str, places: int) -> str:
    """Median and 95th percentile."""
    ordered = sorted(values)
    high = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return f"{statistics.median(values):.{places}f} {unit} (p95 {high:.{places}f}, n {len(values)})"


def told(opened: list[Opened]) -> str:
    """How opening a page went, each time from a fresh browser."""
    seconds = [one.seconds for one in opened if one.seconds is not None]
    if len(seconds) < len(opened):
        last = next(one for one in opened if one.seconds is None)
        return f"{last.trouble} (up to {last.bytes / 1e9:.1f} GB of memory)"
    return f"{statistics.median(seconds):.1f} s, up to {max(one.bytes for one in opened) / 1e9:.1f} GB of memory"


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "cost": cost,
    "text": text,
    "long": long,
    "lab": lab,
    "pages": pages,
    "bertviz": bertviz,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--lot", type=int, default=32, help="sentences per round of `cost`")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a page may take to open")
    parser.add_argument("--most", type=float, default=10e9, help="bytes of memory that a page may take")
    parser.add_argument("--sizes", type=int, nargs="+", default=(64, 256, 512), help="tokens of bertviz's texts")
    given = parser.parse_args()
    bench = Bench(sqviz.load(), given.rounds, given.lot, given.limit, given.most, tuple(given.sizes))
    bare(bench.lm.model, (bench.ids[None, :LENGTH],))  # weights come from disk when they are first used
    day = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    print(f"{bench.lm}, {heads(bench.lm)} heads, {torch.get_num_threads()} threads, {day}\n")
    print("| | measured | wanted |\n|---|---|---|", flush=True)
    rows, seconds = [], {}
    for name in given.parts:
        start = time.perf_counter()
        for row in PARTS[name](bench):
            rows.append(row)
            print(f"| {row.what} | {row.figure} | {row.wanted} |", flush=True)
        seconds[name] = round(time.perf_counter() - start, 1)
    bench.close()
    file = bench.folder.with_suffix(".json")
    file.write_text(json.dumps({"date": day, "seconds": seconds, "rows": [row._asdict() for row in rows]}, indent=1))
    print(f"\n{sum(seconds.values()):.0f} s in all; saved {file}")


if __name__ == "__main__":
    main()

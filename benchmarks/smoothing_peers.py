"""SmoothQuant of others on the embedded model, beside sqviz's: same calibration tokens, same scored tokens, same code.

    python -m benchmarks.smoothing_peers [--samples 8] [--segments 16] [--alphas 0.5 0.8] [--threads 2]

torchao's prototype (divides the input of every linear at run time) and llm-compressor's SmoothQuantModifier with round
to nearest (folds into norms) run in environments of their own, made here on the first use. Weights have a step per
output channel, activations one per token, dynamic, or one per tensor, static; all are scored by sqviz's `segment_nll`.
Of every peer's row the table says how sqviz stands to it with the same α and as much smoothed: the ratio of
perplexities, paired by segment, below 1 where sqviz is better.

Rows are kept in build/smoothing_peers.jsonl, so a run that was stopped goes on where it was; the table is written to
benchmarks/results/smoothing_peers.csv.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import pandas
import torch
from torch import Tensor

import sqviz
from benchmarks.peer_process import BUILD, PeerProcess, Unavailable, model_folder
from benchmarks.schemes import LENGTH, RESULTS, split
from sqviz.corpus.segments import as_segments
from sqviz.evaluation.paired import bootstrap, sign_flips
from sqviz.evaluation.perplexity import segment_nll

KEPT = BUILD / "smoothing_peers.jsonl"
JAXTYPING = f"jaxtyping=={version('jaxtyping')}"
NEEDS = {
    "torchao": ("torchao==0.18.0", f"transformers=={version('transformers')}", JAXTYPING),
    "llmcompressor": ("llmcompressor==0.14.0.1", JAXTYPING),
}
SCHEMES = {
    "dynamic": sqviz.SMOOTHQUANT_LLAMA,
    "static": sqviz.Scheme(sqviz.PerChannel(), sqviz.PerTensor(), static=True),
}
REACH = {
    "norm": "attention and MLP",
    "all": "every input",
    "torchao": "every input",
    "llmcompressor": "attention and MLP",
}
"""Which inputs are smoothed, by sqviz's folds and by peer."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was done, by whom.

    Attributes:
        software: "sqviz" or a peer.
        activations: "dynamic" or "static"; None: nothing is quantised.
        alpha: migration strength; None: not smoothed.
        smoothed: which inputs.
        note: what is special.
    """

    software: str
    activations: str | None = None
    alpha: float | None = None
    smoothed: str = ""
    note: str = ""

    def __str__(self) -> str:
        strength = "not smoothed" if self.alpha is None else f"α = {self.alpha:g} on {self.smoothed}"
        parts = (self.software, self.activations or "float32", self.activations and strength, self.note)
        return ", ".join(filter(None, parts))


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting and its −ln p, summed over the LENGTH − 1 predicted tokens of each segment."""

    setting: Setting
    nll: tuple[float, ...]
    seconds: float
    versions: str

    @property
    def perplexity(self) -> float:
        """e to the mean."""
        return float(np.exp(sum(self.nll) / len(self.nll) / (LENGTH - 1)))


def grid(software: str, reach: Sequence[str], alphas: Sequence[float]) -> Iterator[Setting]:
    """Unquantised, then both kinds of activations: not smoothed, and with each α."""
    yield Setting(software)
    for activations in SCHEMES:
        yield Setting(software, activations)
        for alpha in alphas:
            yield from (Setting(software, activations, alpha, smoothed) for smoothed in reach)


def our_settings(alphas: Sequence[float]) -> Iterator[Setting]:
    """The grid, the α that suits the embedded model, and sqviz's best for static steps."""
    yield from grid("sqviz", (REACH["norm"], REACH["all"]), alphas)
    yield from (Setting("sqviz", activations, 0.6, REACH["all"]) for activations in SCHEMES)
    yield Setting("sqviz", "static", 0.5, REACH["norm"], "kept sinks, clipped for least error")


def their_settings(name: str, alphas: Sequence[float]) -> Iterator[Setting]:
    """The grid; of llm-compressor also its default way to take static steps."""
    yield from grid(name, (REACH[name],), alphas)
    if name == "llmcompressor":
        yield Setting(name, "static", 0.5, REACH[name], "observer minmax, its default")


def our_scorer(lm: sqviz.LM, tokens: Tensor, held: Tensor) -> Callable[[Setting], Row]:
    """Scores settings by `sqviz.Method`."""
    captured: list[sqviz.Magnitudes] = []

    def calibrate(model: sqviz.LM) -> sqviz.Magnitudes:
        if model is not lm:
            return sqviz.capture(model, tokens, samples=None, length=LENGTH, progress=False)
        if not captured:
            captured.append(sqviz.capture(lm, tokens, samples=None, length=LENGTH, progress=False))
        return captured[0]

    def score(setting: Setting) -> Row:
        start = time.perf_counter()
        scheme = SCHEMES.get(setting.activations or "")
        if setting.note and scheme is not None:
            scheme = scheme.replace(clip=sqviz.LeastError(), weight_clip=sqviz.LeastError())
        folds: Any = "all" if setting.smoothed == REACH["all"] else "norm"
        method = sqviz.Method("", scheme, setting.alpha, folds=folds, kept_sinks=bool(setting.note))
        scored = segment_nll(method.apply(lm, calibrate), held, LENGTH)
        nll = tuple(float(one.double().sum()) for one in scored)
        return Row(setting, nll, time.perf_counter() - start, f"sqviz {sqviz.__version__}")

    return score


def their_scorer(peer: PeerProcess, tokens: Tensor, held: Tensor) -> Callable[[Setting], Row]:
    """Asks the other process; `Unavailable` if it cannot."""
    fixed = {"calibration": tokens.view(-1, LENGTH).tolist(), "held": held.tolist(), "length": LENGTH}

    def score(setting: Setting) -> Row:
        observer = {"observer": "minmax"} if setting.note else {}
        answer = peer.ask(activations=setting.activations, alpha=setting.alpha, **observer, **fixed)
        versions = ", ".join(f"{package} {number}" for package, number in answer["versions"].items())
        return Row(setting, tuple(answer["nll"]), answer["seconds"], versions)

    return score


class Results:
    """Rows of one calibration and one held text, kept on disk as they come."""

    def __init__(self, samples: int, segments: int) -> None:
        self.case = f"{samples} × {LENGTH} to calibrate, {segments} × {LENGTH} scored"
        self.rows: dict[Setting, Row] = {}
        for line in KEPT.read_text(encoding="utf-8").splitlines() if KEPT.exists() else ():
            found = json.loads(line)
            if found.pop("case") == self.case:
                row = Row(**found | {"setting": Setting(**found["setting"]), "nll": tuple(found["nll"])})
                self.rows[row.setting] = row

    def fill(self, settings: Iterator[Setting], score: Callable[[Setting], Row]) -> None:
        """Score what is missing; a setting that cannot be had is printed with its reason."""
        for setting in settings:
            try:
                row = self.rows.get(setting) or score(setting)
            except Unavailable as error:
                print(f"{setting}: {error}", flush=True)
                continue
            if setting not in self.rows:
                self.rows[setting] = row
                KEPT.parent.mkdir(exist_ok=True)
                with KEPT.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"case": self.case, **dataclasses.asdict(row)}) + "\n")
            print(f"{setting!s:85s} {row.perplexity:9.3f} {row.seconds:6.0f} s", flush=True)

    def table(self) -> pandas.DataFrame:
        """All rows, each peer's with sqviz's ratio to it."""
        return pandas.DataFrame([self._line(row) for row in self.rows.values()])

    def _line(self, row: Row) -> dict[str, Any]:
        setting = row.setting
        line: dict[str, Any] = dataclasses.asdict(setting) | {
            "activations": setting.activations or "float32",
            "perplexity": round(row.perplexity, 3),
        }
        if (full := self.rows.get(Setting("sqviz"))) is not None:
            line["over_float32_percent"] = round(100 * (row.perplexity / full.perplexity - 1), 2)
        mine = self.rows.get(dataclasses.replace(setting, software="sqviz", note=""))
        if mine is not None and setting.software != "sqviz":
            d, chance = np.array(mine.nll) - np.array(row.nll), np.random.default_rng(0)
            low, high = np.exp(bootstrap(d, np.full(len(d), LENGTH - 1.0), chance))
            line |= {"sqviz_over_peer": round(mine.perplexity / row.perplexity, 4)}
            line |= {"low": round(low, 4), "high": round(high, 4), "p": round(sign_flips(d, chance), 3)}
        return line | {"versions": row.versions, "text": self.case}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=int, default=16, help="documents to score, one segment each")
    parser.add_argument("--samples", type=int, default=8, help="segments to calibrate on")
    parser.add_argument("--alphas", type=float, nargs="+", default=(0.5, 0.8))
    parser.add_argument("--software", nargs="+", default=("sqviz", *NEEDS), choices=("sqviz", *NEEDS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    lm = sqviz.load(dtype="float32", device="cpu")
    documents, held = split(lm, given.segments)
    tokens = torch.cat(list(as_segments(lm, documents, given.samples, LENGTH)))
    results = Results(given.samples, given.segments)
    for name in given.software:
        if name == "sqviz":
            results.fill(our_settings(given.alphas), our_scorer(lm, tokens, held))
            continue
        try:
            peer = PeerProcess(name, NEEDS[name], model_folder(lm))
        except Unavailable as error:
            print(error, flush=True)
            continue
        try:
            results.fill(their_settings(name, given.alphas), their_scorer(peer, tokens, held))
        finally:
            peer.close()
    results = Results(given.samples, given.segments)
    results.table().to_csv(RESULTS / "smoothing_peers.csv", index=False)
    print(results.table().drop(columns=["versions", "text"]).to_string(index=False))


if __name__ == "__main__":
    main()

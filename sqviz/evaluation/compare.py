"""`compare`: thesis Table 3.3 for a model of one's own. Rows are methods, columns metrics, size and measured latency.

    sqviz.compare(lm)                                               # the thesis's rows, perplexity
    sqviz.compare(lm, sqviz.frontier(sqviz.SMOOTHQUANT_O3))         # what each relaxation of O3 buys
    sqviz.compare(lm, [sqviz.W8A8, sqviz.LLM_INT8], ["perplexity", {"hellaswag": "val.jsonl"}], limit=200)

A finished row is written to disk at once, under a hash of everything that it depends on: the weights, the method, the
calibration tokens, what was asked; so are captures of the calibration. A comparison that was cancelled or crashed goes
on where it was when it is called again, and the same row of another table is not computed twice. Metrics are those of
the simulated model. Where a method can be executed in integers, latency is measured on that, in turns with the model
itself, and added to the row.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from sqviz import __version__
from sqviz.corpus.segments import Text, as_segments
from sqviz.corpus.source import text as source
from sqviz.errors import Cancelled, SqvizError
from sqviz.evaluation.evaluate import evaluate
from sqviz.evaluation.jobs import Settings, Wanted, jobs
from sqviz.evaluation.method_table import MethodRow, MethodTable, live_table
from sqviz.evaluation.model_cost import model_cost
from sqviz.evaluation.result import Evaluation
from sqviz.models.linears import groups, weight
from sqviz.models.lm import LM
from sqviz.observe.capture import capture
from sqviz.observe.magnitudes import Magnitudes
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.quant.execute import check_executable
from sqviz.quant.kept_sinks import keep_sinks, sinks_of
from sqviz.quant.linear import is_router, matching
from sqviz.quant.methods import LENGTH, SAMPLES, Method, table_3_2
from sqviz.quant.schemes import Scheme
from sqviz.tensorfile import write_bytes

FORMAT = "sqviz.compare/1"
PROMPT = 128
"""Tokens whose reading is timed."""

SIXTEEN_BIT = 2
"""Bytes of a weight that stays in floating point, as it would be deployed."""


def compare(
    lm: LM,
    methods: Sequence[Method | Scheme] | None = None,
    tasks: Wanted | Sequence[Wanted] = ("perplexity",),
    *,
    text: Text | None = None,
    calibration: Text | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    limit: int | None = None,
    latency: bool = True,
    folder: str | Path | None = None,
    live: bool = False,
    on_row: Callable[[MethodTable], None] | None = None,
    cancel: CancelToken | None = None,
    progress: bool = True,
) -> MethodTable:
    """Evaluate a model under several methods.

    Args:
        lm: the model, not quantised.
        methods: rows; a `Scheme` stands for itself without smoothing. None: `sqviz.table_3_2()`. The model itself is
            always the first row.
        tasks, text, limit: what is evaluated, as for `sqviz.evaluate`.
        calibration: text that the methods are calibrated on; by default the second half of the embedded addresses, of
            which evaluation by default reads the beginning.
        samples, length: segments of the calibration, and tokens in each; 512 × 512 as in the thesis. `length` is that
            of evaluated segments too.
        latency: measure how long reading 128 tokens takes, where a method can be executed.
        folder: where rows are kept; by default sqviz's cache folder.
        live: in a notebook, show the table while it fills.
        on_row: called with the table so far whenever a row is finished.
        cancel: ends the comparison; so does the progress bar's button. The rows so far are returned, `complete` False.
        progress: draw a bar.

    Raises:
        SqvizError: two methods of one name, and what `evaluate` and `capture` raise for tasks and texts. A method that
            this model cannot have does not end the comparison: its row says why.
    """
    rows = _methods(methods)
    place = _folder(folder)
    shown = live_table() if live else None
    settings = Settings(text, length, limit, 1)
    asked = [(job.name, job.content) for job in jobs(lm, tasks, settings)]
    with progress_bar(len(rows), "comparing", unit="methods", cancel=cancel, show=progress) as bar:
        runner = _Runner(lm, calibration, samples, length, place, bar.cancel)
        table = MethodTable(lm.name, (), complete=False)
        try:
            for method in rows:
                path = place / f"{runner.key(method, asked)}.json"
                row = _read(path)
                if row is None:
                    score = functools.partial(
                        evaluate, tasks=tasks, text=text, length=length, limit=limit, progress=False, cancel=bar.cancel
                    )
                    row = runner.row(method, score)
                    _write(row, path)
                if latency and row.milliseconds is None and not row.error:
                    row = runner.timed(method, row)
                    _write(row, path)
                table = dataclasses.replace(table, rows=(*table.rows, row))
                for told in (shown, on_row):
                    if told is not None:
                        told(table)
                bar.step()
        except Cancelled:
            if len(table.rows) < len(rows):
                return table
    return dataclasses.replace(table, complete=True)


class _Runner:
    """Makes rows; captures of one model are made once and kept in `folder`."""

    def __init__(
        self, lm: LM, calibration: Text | None, samples: int, length: int, folder: Path, cancel: CancelToken
    ) -> None:
        self.lm, self.folder, self.cancel = lm, folder, cancel
        self.calibration = _second_half() if calibration is None else calibration
        self.samples, self.length = samples, length
        self._captured: dict[int, tuple[LM, Magnitudes]] = {}
        self._kept: LM | None = None

    def key(self, method: Method, asked: list[tuple[str, str]]) -> str:
        """A hash of everything that the row's scores depend on."""
        return _hash([self._weights, self._tokens, method.key(), asked, __version__, torch.__version__])

    def row(self, method: Method, score: Callable[[LM], Evaluation]) -> MethodRow:
        """One row without its latency; its `error` says why the model cannot have this method."""
        size = method_bytes(self.lm, method)
        try:
            found = score(method.apply(self.lm, self.captured, keep=self.kept))
        except SqvizError as error:
            return MethodRow(method.name, method.describe(), None, size, None, None, error=str(error))
        return MethodRow(method.name, method.describe(), found, size, None, None)

    def timed(self, method: Method, row: MethodRow) -> MethodRow:
        """The row with milliseconds of the executed model and, in the same run, of the model itself, if it can run."""
        if method.scheme is None:
            return row
        try:
            check_executable(method.scheme)
        except SqvizError:
            return row
        executed = method.apply(self.lm, self.captured, backend="auto", keep=self.kept)
        ids = torch.cat(self._segments)[:PROMPT]
        models = {"itself": self.lm, "executed": executed}
        cost = model_cost(models, ids, length=len(ids), cancel=self.cancel, progress=False)
        return dataclasses.replace(row, milliseconds=cost.rows[1].context, itself=cost.rows[0].context)

    def captured(self, lm: LM) -> Magnitudes:
        """The capture of a model; those of the last two are at hand, all are on disk."""
        if id(lm) not in self._captured:
            self._captured = dict(list(self._captured.items())[-1:]) | {id(lm): (lm, self._capture(lm))}
        return self._captured[id(lm)][1]

    def _capture(self, lm: LM) -> Magnitudes:
        kept = sinks_of(lm)
        parts = [_weights(lm), None if kept is None else kept.tolist(), self._tokens, __version__]
        path = self.folder / f"{_hash(parts)}.safetensors"
        if path.exists():
            try:
                return Magnitudes.load(path)
            except SqvizError:  # what a full disk left; it is written again
                pass
        found = capture(
            lm, self.calibration, samples=self.samples, length=self.length, cancel=self.cancel, progress=False
        )
        found.save(path)
        return found

    def kept(self, lm: LM) -> LM:
        """The model with kept sinks, chosen once."""
        if self._kept is None:
            self._kept = keep_sinks(lm, text=self.calibration)
        return self._kept

    @functools.cached_property
    def _weights(self) -> str:
        return _weights(self.lm)

    @functools.cached_property
    def _tokens(self) -> str:
        found = hashlib.sha256()
        for segment in self._segments:
            found.update(segment.numpy().tobytes())
        return found.hexdigest()

    @functools.cached_property
    def _segments(self) -> list[Int64[Tensor, " token"]]:
        return list(as_segments(self.lm, self.calibration, self.samples, self.length))


def _weights(lm: LM) -> str:
    """A hash of all weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(lm.model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return found.hexdigest()


def _hash(parts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def method_bytes(lm: LM, method: Method) -> int:
    """Bytes of the weights as deployed: linears in the scheme's bits with float32 steps, everything else in 16 bit."""
    count = sum(parameter.numel() for parameter in lm.model.parameters()) * SIXTEEN_BIT
    scheme = method.scheme
    if scheme is None or scheme.weight is None:
        return count
    pairs = [(group, name) for group in groups(lm) for name in group.consumers]
    skipped = matching(method.skip, [name for _, name in pairs])
    for group, name in pairs:
        if name not in skipped and not is_router(lm, group, name):
            matrix = weight(lm, name)
            steps = scheme.weight.step_shape(tuple(matrix.shape), "weight")
            count += matrix.numel() * scheme.bits_of_weights // 8 - matrix.numel() * SIXTEEN_BIT
            count += 4 * steps[0] * steps[1] * (1 if scheme.symmetric else 2)
    return count


def _methods(methods: Sequence[Method | Scheme] | None) -> tuple[Method, ...]:
    given = table_3_2() if methods is None else methods
    rows = [one if isinstance(one, Method) else Method(one.name or one.describe(), one) for one in given]
    if not any(row.scheme is None and row.alpha is None and not row.kept_sinks for row in rows):
        rows = [Method("none"), *rows]
    names = [row.name for row in rows]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SqvizError(f"methods: {', '.join(twice)} is there more than once; give each a name of its own.")
    return tuple(rows)


def _folder(folder: str | Path | None) -> Path:
    import platformdirs

    place = Path(platformdirs.user_cache_dir("sqviz")) / "compare" if folder is None else Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    return place


def _read(path: Path) -> MethodRow | None:
    """A row that was finished before; None if there is none, or one that cannot be read."""
    try:
        held: Mapping[str, Any] = json.loads(path.read_text())
        return MethodRow.read(held) if held.get("format") == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(row: MethodRow, path: Path) -> None:
    if not row.error:
        write_bytes(json.dumps({"format": FORMAT, **row.plain()}).encode(), path)


def _second_half() -> Text:
    documents = list(source())
    return documents[len(documents) // 2 :]

"""How a row of `compare` comes about: a model under one method, scored and timed."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from sqviz import __version__
from sqviz.corpus.segments import Text, as_segments
from sqviz.corpus.source import second_half
from sqviz.errors import SqvizError
from sqviz.evaluation.method_table import MethodRow
from sqviz.evaluation.model_cost import model_cost
from sqviz.evaluation.result import Evaluation
from sqviz.models.linears import groups, weight
from sqviz.models.lm import LM
from sqviz.observe.capture import capture
from sqviz.observe.magnitudes import Magnitudes
from sqviz.progress import CancelToken
from sqviz.quant.alpha import search_alpha
from sqviz.quant.execute import check_executable
from sqviz.quant.found_alpha import FoundAlpha
from sqviz.quant.kept_sinks import keep_sinks, sinks_of
from sqviz.quant.linear import is_router, matching
from sqviz.quant.methods import Method
from sqviz.quant.plan import Folds
from sqviz.quant.schemes import Scheme

PROMPT = 128
"""Tokens whose reading is timed."""

SIXTEEN_BIT = 2
"""Bytes of a weight that stays in floating point, as it would be deployed."""


class Runner:
    """Makes rows; captures of one model are made once and kept in `folder`."""

    def __init__(
        self, lm: LM, calibration: Text | None, samples: int, length: int, folder: Path, cancel: CancelToken
    ) -> None:
        self.lm, self.folder, self.cancel = lm, folder, cancel
        self.calibration = second_half() if calibration is None else calibration
        self.samples, self.length = samples, length
        self._captured: dict[int, tuple[LM, Magnitudes]] = {}
        self._kept: LM | None = None

    def key(self, method: Method, asked: list[tuple[str, str]]) -> str:
        """A hash of everything that the row's scores depend on. The method's name is not among it."""
        return _hash([self._weights, self._tokens, method.key(), asked, __version__, torch.__version__])

    def row(self, method: Method, score: Callable[[LM], Evaluation]) -> MethodRow:
        """One row without its latency; its `error` says why the model cannot have this method."""
        row = MethodRow(method.name, method.describe(), None, method_bytes(self.lm, method), None, None)
        try:
            model = self._applied(method)
            with stops_in_a_pass(model, self.cancel):
                return dataclasses.replace(row, evaluation=score(model))
        except SqvizError as error:
            return dataclasses.replace(row, error=str(error))

    def timed(self, method: Method, row: MethodRow) -> MethodRow:
        """The row with milliseconds of the executed model and, in the same run, of the model itself; or why not."""
        if method.scheme is None:
            return row
        try:
            check_executable(method.scheme)
            executed = self._applied(method, "auto")
        except SqvizError as error:
            return dataclasses.replace(row, untimed=str(error))
        ids = torch.cat(self._segments)[:PROMPT]
        models = {"itself": self.lm, "executed": executed}
        cost = model_cost(models, ids, length=len(ids), cancel=self.cancel, progress=False)
        return dataclasses.replace(row, milliseconds=cost.rows[1].context, itself=cost.rows[0].context, untimed="")

    def _applied(self, method: Method, backend: str = "simulate") -> LM:
        return method.apply(self.lm, self.captured, backend, keep=self.kept, search=self.searched, cancel=self.cancel)

    def captured(self, lm: LM) -> Magnitudes:
        """The capture of a model; those of the last two are at hand, all are on disk."""
        if id(lm) not in self._captured:
            self._captured = dict(list(self._captured.items())[-1:]) | {id(lm): (lm, self._capture(lm))}
        return self._captured[id(lm)][1]

    def _capture(self, lm: LM) -> Magnitudes:
        path = self.folder / f"{_hash(self._identity(lm))}.safetensors"
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

    def searched(self, lm: LM, magnitudes: Magnitudes, scheme: Scheme, folds: Folds) -> FoundAlpha:
        """Strengths for a scheme, kept on disk: a search takes minutes, and the executed model wants them again."""
        path = self.folder / f"{_hash([*self._identity(lm), scheme.as_code(), folds])}.json"
        if path.exists():
            try:
                return FoundAlpha.load(path)
            except SqvizError:  # as above
                pass
        found = search_alpha(lm, magnitudes, scheme, folds=folds, cancel=self.cancel, progress=False)
        self.cancel.check("searching α")
        found.save(path)
        return found

    def _identity(self, lm: LM) -> list[Any]:
        """What the calibration of a model depends on."""
        kept = sinks_of(lm)
        return [weights_hash(lm), None if kept is None else kept.tolist(), self._tokens, __version__]

    @functools.cached_property
    def _weights(self) -> str:
        return weights_hash(self.lm)

    @functools.cached_property
    def _tokens(self) -> str:
        found = hashlib.sha256()
        for segment in self._segments:
            found.update(segment.numpy().tobytes())
        return found.hexdigest()

    @functools.cached_property
    def _segments(self) -> list[Int64[Tensor, " token"]]:
        return list(as_segments(self.lm, self.calibration, self.samples, self.length))


@contextmanager
def stops_in_a_pass(lm: LM, cancel: CancelToken) -> Iterator[None]:
    """Look at the token before every block of the model, not only between two passes; leaves no hook behind."""
    blocks = [block for listed in lm.model.modules() if isinstance(listed, nn.ModuleList) for block in listed]
    hooks = [block.register_forward_pre_hook(lambda *_: cancel.check("scoring")) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def weights_hash(lm: LM) -> str:
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

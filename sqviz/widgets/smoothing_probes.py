"""What the smoothing engine keeps: a few probes that answer for the error of a linear, and the errors found so far."""

import dataclasses
import math
from collections import OrderedDict
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from sqviz.models.linears import Group
from sqviz.models.lm import LM
from sqviz.observe.magnitudes import Magnitudes
from sqviz.quant.error import ALPHAS, LinearProbe, OutputError
from sqviz.quant.schemes import Scheme
from sqviz.widgets.smoothing_pack import Vectors, own_weight, vectors
from sqviz.widgets.smoothing_state import scheme_key

SWEEP_COLUMNS = len(ALPHAS) + 1  # the last: without smoothing
STOPS = 101  # of the slider: α = 0, 0.01 … 1
PROBES_KEPT, SCHEMES_KEPT, STOPS_KEPT = 6, 16, 256


def keep(kept: OrderedDict[str, Any], key: str, most: int) -> None:
    """`key` was used last; what was not used for longest goes."""
    kept.move_to_end(key)
    while len(kept) > most:
        kept.popitem(last=False)


class Probes:
    """Probes of the linears used last. A probe holds the exact output, which makes it worth keeping, and large."""

    def __init__(self, lm: LM, magnitudes: Magnitudes, groups: dict[str, Group]) -> None:
        self._lm, self._magnitudes = lm, magnitudes
        self._group_of = {name: group for group in groups.values() for name in group.consumers}
        self._vectors: dict[str, Vectors] = {}
        self._probes: OrderedDict[str, LinearProbe] = OrderedDict()

    def vectors(self, linear: str) -> Vectors:
        """The maxima from which s is made for the group of this linear."""
        group = self._group_of[linear]
        if group.name not in self._vectors:
            self._vectors[group.name] = vectors(self._lm, self._magnitudes, group)
        return self._vectors[group.name]

    def probe(self, linear: str, scheme: Scheme, x: Float[Tensor, "token channel"]) -> LinearProbe:
        """The probe of a linear with input `x` under a scheme. Raises `NonFinite`."""
        if linear not in self._probes:
            found, stats = self.vectors(linear), self._magnitudes.inputs[linear]
            w = own_weight(self._lm, linear, found.expert)
            bounds = (stats.minimum, stats.maximum) if found.expert is None else None
            self._probes[linear] = LinearProbe(x, w, found.s_x, found.s_w, scheme, x_range=bounds)
        keep(self._probes, linear, PROBES_KEPT)
        return self._probes[linear].with_scheme(scheme)


@dataclasses.dataclass(frozen=True, eq=False)
class Stops:
    """Errors of one linear under one scheme at the stops of the slider; NaN where unknown.

    Attributes:
        errors: float32 [stop], to be written into.
        sampled: whether they are estimates; tokens: from how many tokens.
    """

    errors: Float[np.ndarray, " stop"]
    sampled: bool
    tokens: int


class Errors:
    """The relative errors found so far, float32: NaN where unknown, −1 where there is none to speak of."""

    def __init__(self, linears: int) -> None:
        self._linears = linears
        self._sweeps: OrderedDict[str, Float[np.ndarray, "linear alpha"]] = OrderedDict()
        self._stops: OrderedDict[str, Stops] = OrderedDict()

    def sweeps(self, scheme: Scheme) -> Float[np.ndarray, "linear alpha"]:
        """Errors at ALPHAS by linear; the last column is without smoothing. To be written into."""
        key = scheme_key(scheme)
        if key not in self._sweeps:
            self._sweeps[key] = np.full((self._linears, SWEEP_COLUMNS), np.nan, dtype="<f4")
        keep(self._sweeps, key, SCHEMES_KEPT)
        return self._sweeps[key]

    def learn(self, linear: str, scheme: Scheme, alpha: float, found: OutputError) -> None:
        """Remember the error at α, if that is a stop of the slider and the error is a number."""
        stop = _stop_of(alpha)
        if stop is None or not math.isfinite(found.frobenius):
            return
        key = f"{linear}|{scheme_key(scheme)}"
        if key not in self._stops:
            self._stops[key] = Stops(np.full(STOPS, np.nan, dtype="<f4"), found.sampled, found.tokens)
        keep(self._stops, key, STOPS_KEPT)
        self._stops[key].errors[stop] = found.frobenius

    def known(self, linear: str, scheme: Scheme, alpha: float) -> OutputError | None:
        """The error at α, if it was found before."""
        stops, stop = self._stops.get(f"{linear}|{scheme_key(scheme)}"), _stop_of(alpha)
        if stops is None or stop is None or np.isnan(stops.errors[stop]):
            return None
        return OutputError(float(stops.errors[stop]), stops.sampled, stops.tokens, 0)

    def stops(self, linear: str, scheme: Scheme) -> dict[str, Any]:
        """The errors of one linear at the stops of the slider, as the page takes them."""
        key = f"{linear}|{scheme_key(scheme)}"
        stops = self._stops.get(key)
        if stops is None:
            return {}
        how = "sampled" if stops.sampled else "exact"
        return {"for": key, "how": how, "tokens": stops.tokens, "errors": stops.errors.tobytes()}


def _stop_of(alpha: float) -> int | None:
    """Which stop of the slider α is, if it is one."""
    stop = round(alpha * (STOPS - 1))
    return stop if abs(alpha * (STOPS - 1) - stop) < 1e-9 else None

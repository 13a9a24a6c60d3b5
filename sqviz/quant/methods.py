"""`Method`: everything done to a model before it is quantised, and how it is: a row of thesis Tables 3.2 and 3.3.

A `Scheme` says how numbers become integers. A method also says what happens to the model first: smoothing and its
strength, norms without gain, kept sinks. As values, so that a table of methods is a list.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from sqviz.errors import SqvizError
from sqviz.models.lm import LM
from sqviz.progress import CancelToken
from sqviz.quant.clipping import ClipTokens, ClipValues, LeastError
from sqviz.quant.found_alpha import FoundAlpha
from sqviz.quant.granularity import PerChannel, PerTensor
from sqviz.quant.kept_sinks import keep_sinks
from sqviz.quant.linear import quantize
from sqviz.quant.non_scaling_norm import non_scaling_norms
from sqviz.quant.plan import FOLDS, Folds, usual_folds
from sqviz.quant.schemes import (
    LLM_INT8,
    OUTLIER_SUPPRESSION,
    SMOOTHQUANT_LLAMA,
    SMOOTHQUANT_O1,
    SMOOTHQUANT_O2,
    SMOOTHQUANT_O3,
    W8A8,
    ZEROQUANT,
    Scheme,
)
from sqviz.quant.smooth import smooth

if TYPE_CHECKING:
    from sqviz.observe.magnitudes import Magnitudes

SAMPLES, LENGTH = 512, 512
"""Calibration of the thesis: 512 sentences (§3.4.1), of 512 tokens as its authors' scripts cut them."""

Calibrate = Callable[[LM], "Magnitudes"]
"""Captures a model on the calibration text."""

Search = Callable[[LM, "Magnitudes", Scheme, Folds], FoundAlpha]
"""Finds strengths."""


def searched(lm: LM, magnitudes: "Magnitudes", scheme: Scheme, folds: Folds) -> FoundAlpha:
    """The strengths that `search_alpha` finds by all objectives."""
    from sqviz.quant.alpha import search_alpha

    return search_alpha(lm, magnitudes, scheme, folds=folds)


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to quantise a model. A frozen value.

    Attributes:
        name: for tables and plots.
        scheme: how numbers become integers; None leaves them as they are.
        alpha: migration strength: a number, what `sqviz.search_alpha` found, "auto", or None for no smoothing.
        folds: "norm" as in the thesis, "all" or "outliers". None: what strengths were found for, for "auto" those that
            `usual_folds` gives for the scheme, else "norm".
        norms_without_gain: Outlier Suppression's half that changes the model.
        kept_sinks: read everything behind attention sinks in full precision.
        attention: QKᵀ and PV in integers too (thesis Figure 3.3).
        skip: glob patterns of linears that stay as they are.

    Raises `SqvizError` for a combination that makes no sense.
    """

    name: str
    scheme: Scheme | None = None
    alpha: float | FoundAlpha | str | None = None
    folds: Folds | None = None
    norms_without_gain: bool = False
    kept_sinks: bool = False
    attention: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.folds is None:
            object.__setattr__(self, "folds", self._own_folds)
        if self.folds not in tuple(FOLDS):
            raise SqvizError(f"Method({self.name!r}, folds={self.folds!r}): one of {', '.join(FOLDS)} is allowed.")
        if isinstance(self.alpha, str) and self.alpha != "auto":
            raise SqvizError(
                f"Method({self.name!r}, alpha={self.alpha!r}): a number in [0, 1], 'auto' or None is allowed."
            )
        if self.alpha == "auto" and self.scheme is None:
            raise SqvizError(f"Method({self.name!r}, alpha='auto') searches for a scheme: give one, or α as a number.")
        if self.alpha is not None and self.norms_without_gain:
            raise SqvizError(
                f"Method({self.name!r}): smoothing undoes norms_without_gain, both rescale the same norms. Choose one."
            )
        if self.scheme is None and (self.attention or self.skip):
            raise SqvizError(f"Method({self.name!r}): attention and skip go with a scheme.")

    def replace(self, **changes: object) -> "Method":
        """A new method with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def key(self) -> str:
        """Everything but the name, as text: equal for equal methods, in every session."""
        return repr(dataclasses.replace(self, name=""))

    def apply(
        self,
        lm: LM,
        calibrate: Calibrate,
        backend: str = "simulate",
        *,
        keep: Callable[[LM], LM] = keep_sinks,
        search: Search = searched,
        cancel: CancelToken | None = None,
    ) -> LM:
        """The quantised model. `lm` stays as it was.

        Args:
            lm: the model.
            calibrate: makes a capture of the model that it is given: `lambda lm: sqviz.capture(lm, text)`. Called only
                where statistics are needed: once, and again after smoothing where quantiles are clipped at. Maxima need
                no second pass: max|X / s| is max|X| / s.
            backend: as for `sqviz.quantize`.
            keep: gives a model its kept sinks.
            search: finds strengths, where `alpha` is "auto".
            cancel: stops quantising between two linears.

        Raises what `keep_sinks`, `smooth` and `quantize` raise.
        """
        base = keep(lm) if self.kept_sinks else lm
        magnitudes = calibrate(base) if self._needs_calibration else None
        ready = non_scaling_norms(base) if self.norms_without_gain else base
        if self.alpha is not None:
            assert magnitudes is not None
            alpha = self.alpha
            if isinstance(alpha, str):
                assert self.scheme is not None
                assert self.folds is not None
                alpha = search(base, magnitudes, self.scheme, self.folds)
            ready = smooth(ready, magnitudes, alpha, folds=self.folds)
        if self.scheme is None:
            return ready
        if isinstance(self.scheme.clip, ClipTokens | ClipValues) and ready is not base:
            magnitudes = calibrate(ready)
        return quantize(ready, self.scheme, magnitudes, backend, self.skip, attention=self.attention, cancel=cancel)

    @property
    def _own_folds(self) -> Folds:
        if isinstance(self.alpha, FoundAlpha):
            return self.alpha.folds
        return usual_folds(self.scheme) if self.alpha == "auto" and self.scheme else "norm"

    @property
    def _needs_calibration(self) -> bool:
        return self.alpha is not None or (self.scheme is not None and self.scheme.needs_calibration)

    def describe(self) -> str:
        """One line for people: what is done, in order."""
        assert self.folds is not None
        parts = ["kept sinks"] if self.kept_sinks else []
        parts += ["norms without gain"] if self.norms_without_gain else []
        if self.alpha is not None:
            shown = f"{self.alpha:g}" if isinstance(self.alpha, int | float) else "searched"
            parts.append(f"α = {shown}" + ("" if self.folds == "norm" else f", {FOLDS[self.folds]}"))
        parts += [self.scheme.replace(name="").describe()] if self.scheme else ["unquantised"]
        parts += ["attention"] if self.attention else []
        parts += [f"{', '.join(self.skip)} in 16 bit"] if self.skip else []
        return "; ".join(parts)


def table_3_2(alpha: float = 0.5) -> tuple[Method, ...]:
    """The rows of thesis Table 3.3 in its order: none, the four baselines, SmoothQuant O1–O3, and the Llama recipe.

    Args:
        alpha: strength of the SmoothQuant rows; 0.5 for OPT and BLOOM in the thesis, folded into norms.
    """
    return (
        Method("none"),
        Method(W8A8.name, W8A8),
        Method(ZEROQUANT.name, ZEROQUANT),
        Method(LLM_INT8.name, LLM_INT8),
        Method(OUTLIER_SUPPRESSION.name, OUTLIER_SUPPRESSION, norms_without_gain=True),
        *(
            Method(scheme.name, scheme, alpha)
            for scheme in (SMOOTHQUANT_O1, SMOOTHQUANT_O2, SMOOTHQUANT_O3, SMOOTHQUANT_LLAMA)
        ),
    )


def frontier(scheme: Scheme, alpha: float = 0.5, floating: tuple[str, ...] = ()) -> tuple[Method, ...]:
    """One scheme, and what each relaxation of it buys: folds, clips, kept sinks, single linears, finer weights.

    The first row is the thesis's; kept sinks leave its Figure 3.3, single linears and finer weights its Table 3.2.

    Args:
        scheme: one level.
        alpha: strength of all rows but the searched one.
        floating: glob patterns of linears that stay in 16 bit in a row of their own; none: no such row.
    """
    clipped = scheme.replace(weight_clip=LeastError(), clip=_clip(scheme))
    name = scheme.name or scheme.describe()
    kept = f"{name}, clipped, kept sinks"
    rows: tuple[Method, ...] = (
        Method(name, scheme, alpha),
        Method(f"{name}, all folds", scheme, alpha, folds="all"),
        Method(f"{name}, clipped", clipped, alpha),
        Method(kept, clipped, alpha, kept_sinks=True),
    )
    if (folds := usual_folds(scheme)) != "all":
        rows += (Method(f"{kept}, {FOLDS[folds]}", clipped, alpha, folds=folds, kept_sinks=True),)
    rows += (Method(f"{kept}, α searched", clipped, "auto", kept_sinks=True),)
    if floating:
        rows += (Method(f"{kept}, {', '.join(floating)} in 16 bit", clipped, alpha, kept_sinks=True, skip=floating),)
    finer = clipped.replace(weight=PerChannel())
    return (*rows, Method(f"{kept}, per-channel weights", finer, alpha, kept_sinks=True))


def _clip(scheme: Scheme) -> LeastError | None:
    return LeastError() if isinstance(scheme.activation, PerTensor) else None

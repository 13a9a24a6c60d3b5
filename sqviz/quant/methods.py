"""`Method`: everything done to a model before it is quantised, and how it is: a row of thesis Tables 3.2 and 3.3.

A `Scheme` says how numbers become integers. A method also says what happens to the model first: smoothing and its
strength, norms without gain, kept sinks. As values, so that a table of methods is a list.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from sqviz.errors import SqvizError
from sqviz.models.lm import LM
from sqviz.quant.clipping import ClipTokens, ClipValues, LeastError
from sqviz.quant.found_alpha import FoundAlpha
from sqviz.quant.granularity import PerChannel, PerTensor
from sqviz.quant.kept_sinks import keep_sinks
from sqviz.quant.linear import quantize
from sqviz.quant.non_scaling_norm import non_scaling_norms
from sqviz.quant.plan import Folds
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


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to quantise a model. A frozen value.

    Attributes:
        name: for tables and plots.
        scheme: how numbers become integers; None leaves them as they are.
        alpha: migration strength: a number, what `sqviz.search_alpha` found, "auto", or None for no smoothing.
        folds: "norm" as in the thesis, or "all".
        norms_without_gain: Outlier Suppression's half that changes the model.
        kept_sinks: read everything behind attention sinks in full precision.
        attention: QKᵀ and PV in integers too (thesis Figure 3.3).
        skip: glob patterns of linears that stay as they are.

    Raises `SqvizError` for a combination that makes no sense.
    """

    name: str
    scheme: Scheme | None = None
    alpha: float | FoundAlpha | str | None = None
    folds: Folds = "norm"
    norms_without_gain: bool = False
    kept_sinks: bool = False
    attention: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
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
        self, lm: LM, calibrate: Calibrate, backend: str = "simulate", *, keep: Callable[[LM], LM] = keep_sinks
    ) -> LM:
        """The quantised model. `lm` stays as it was.

        Args:
            lm: the model.
            calibrate: makes a capture of the model that it is given: `lambda lm: sqviz.capture(lm, text)`. Called only
                where statistics are needed: once, and again after smoothing where quantiles are clipped at. Maxima need
                no second pass: max|X / s| is max|X| / s.
            backend: as for `sqviz.quantize`.
            keep: gives a model its kept sinks.

        Raises what `keep_sinks`, `smooth` and `quantize` raise.
        """
        base = keep(lm) if self.kept_sinks else lm
        magnitudes = calibrate(base) if self._needs_calibration else None
        ready = non_scaling_norms(base) if self.norms_without_gain else base
        if self.alpha is not None:
            ready = smooth(ready, magnitudes, self.alpha, folds=self.folds, scheme=self.scheme)  # type: ignore[arg-type]
        if self.scheme is None:
            return ready
        if isinstance(self.scheme.clip, ClipTokens | ClipValues) and ready is not base:
            magnitudes = calibrate(ready)
        return quantize(ready, self.scheme, magnitudes, backend, self.skip, attention=self.attention)

    @property
    def _needs_calibration(self) -> bool:
        return self.alpha is not None or (self.scheme is not None and self.scheme.needs_calibration)

    def describe(self) -> str:
        """One line for people: what is done, in order."""
        parts = ["kept sinks"] if self.kept_sinks else []
        parts += ["norms without gain"] if self.norms_without_gain else []
        if self.alpha is not None:
            shown = f"{self.alpha:g}" if isinstance(self.alpha, int | float) else "searched"
            parts.append(f"α = {shown}" + (", all folds" if self.folds == "all" else ""))
        parts += [self.scheme.replace(name="").describe()] if self.scheme else ["unquantised"]
        parts += ["attention"] if self.attention else []
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


def frontier(scheme: Scheme, alpha: float = 0.5) -> tuple[Method, ...]:
    """One scheme, and what each relaxation of it buys: folds, clipped ranges, kept sinks, finer weights.

    The first row is the thesis's; each of the others adds to the one before, the last two leave Table 3.2.
    """
    clipped = scheme.replace(weight_clip=LeastError(), clip=_clip(scheme))
    name = scheme.name or scheme.describe()
    rows = (
        Method(name, scheme, alpha),
        Method(f"{name}, all folds", scheme, alpha, folds="all"),
        Method(f"{name}, clipped", clipped, alpha),
        Method(f"{name}, clipped, kept sinks", clipped, alpha, kept_sinks=True),
        Method(f"{name}, clipped, kept sinks, α searched", clipped, "auto", folds="all", kept_sinks=True),
    )
    finer = clipped.replace(weight=PerChannel())
    return (*rows, Method(f"{name}, clipped, kept sinks, per-channel weights", finer, alpha, kept_sinks=True))


def _clip(scheme: Scheme) -> LeastError | None:
    return LeastError() if isinstance(scheme.activation, PerTensor) else None

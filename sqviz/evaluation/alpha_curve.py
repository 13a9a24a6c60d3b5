"""`alpha_curve`: thesis Figure 3.8 for a model of one's own. What a model loses under each scheme, against α.

    sqviz.alpha_curve(lm, m, held)                                     # O1, O2, O3 and the Llama recipe
    sqviz.alpha_curve(lm, m, held, [sqviz.W8A8], alphas=(0.4, 0.5, 0.6), folds="all")

The thesis draws the accuracy of OPT-175B on LAMBADA. Here it is the perplexity of the simulated model, and beside it
how far its next tokens are from the model's own, KL(p ‖ p̂) in nats per token, which tells neighbouring α apart on
less text (see `quant/divergence.py`). Both come from one pass over the same segments.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sqviz.corpus.segments import Text, as_segments
from sqviz.errors import Cancelled, NonFinite, SqvizError
from sqviz.evaluation.alpha_result import AlphaCurve, AlphaPoint
from sqviz.evaluation.perplexity import token_nll
from sqviz.models.lm import LM
from sqviz.observe.capture import capture
from sqviz.observe.magnitudes import Magnitudes
from sqviz.progress import CancelToken, in_notebook
from sqviz.progress import progress as progress_bar
from sqviz.quant.clipping import ClipTokens, ClipValues
from sqviz.quant.divergence import STRIDE
from sqviz.quant.linear import quantize
from sqviz.quant.plain import check_floating
from sqviz.quant.plan import Folds, check_alpha
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA, SMOOTHQUANT_O1, SMOOTHQUANT_O2, SMOOTHQUANT_O3, Scheme
from sqviz.quant.smooth import smooth

SCHEMES = (SMOOTHQUANT_O1, SMOOTHQUANT_O2, SMOOTHQUANT_O3, SMOOTHQUANT_LLAMA)
ALPHAS: tuple[float | None, ...] = (None, *(step / 10 for step in range(11)))
"""The grid of the curve; None: not smoothed at all, which α = 0 is not: it makes columns of weights equal."""

SAMPLES, LENGTH = 8, 512
"""Held segments that are scored, and tokens in each."""

WINDOW = 16
"""Tokens in a row that have to agree for held text to count as calibrated on."""

OnPoint = Callable[[AlphaCurve], None]


def alpha_curve(
    lm: LM,
    magnitudes: Magnitudes,
    text: Text,
    schemes: Sequence[Scheme] = SCHEMES,
    alphas: Sequence[float | None] = ALPHAS,
    *,
    folds: Folds = "norm",
    samples: int = SAMPLES,
    length: int = LENGTH,
    live: bool = False,
    on_point: OnPoint | None = None,
    cancel: CancelToken | None = None,
    progress: bool = True,
) -> AlphaCurve:
    """Perplexity and divergence of the simulated model for each scheme and each α of a grid.

    Args:
        lm: the model, not quantised; it stays as it was.
        magnitudes: its calibration.
        text: held text, which the calibration should not contain; the curve says how much of it does.
        schemes: one line each.
        alphas: strengths in [0, 1], one for all folds; None: not smoothed.
        folds: as for `sqviz.smooth`; "norm" as in the thesis.
        samples, length: how many segments of the text are scored, and tokens in each.
        live: in a notebook, draw the lines while they grow, with a button that stops the work.
        on_point: called with the curve so far after each point.
        cancel: ends the work; so does the button. What is there is returned, with `complete` False.
        progress: draw a bar, where `live` does not draw.

    Raises:
        SqvizError: no scheme, two of one name, no α or one outside [0, 1], and what `as_segments`, `smooth` and
            `quantize` raise.
        NonFinite: the model gave NaN; the message says under which scheme and α.
    """
    check_floating(lm, "draw the α curve of")
    names = _names(schemes)
    grid = _grid(alphas)
    if length < STRIDE:
        raise SqvizError(f"length={length}: at least {STRIDE} tokens are needed, of which every {STRIDE}th is asked.")
    segments = list(as_segments(lm, text, samples, length))
    cancel = CancelToken() if cancel is None else cancel
    empty = AlphaCurve(
        points=(),
        schemes=names,
        alphas=grid,
        reference=math.nan,
        model=lm.name,
        folds=folds,
        tokens=len(segments) * length,
        length=length,
        seen=share_seen(torch.cat(segments), magnitudes.tokens),
        complete=False,
    )
    if live and in_notebook():
        from sqviz.widgets.live_alpha import LiveAlpha

        with LiveAlpha(empty, cancel) as drawn:
            return _draw(lm, magnitudes, segments, schemes, empty, cancel, [drawn, on_point], show=False)
    return _draw(lm, magnitudes, segments, schemes, empty, cancel, [on_point], show=progress)


def _draw(
    lm: LM,
    magnitudes: Magnitudes,
    segments: list[Int64[Tensor, " token"]],
    schemes: Sequence[Scheme],
    curve: AlphaCurve,
    cancel: CancelToken,
    told: Sequence[OnPoint | None],
    *,
    show: bool,
) -> AlphaCurve:
    """Fill the curve, α by α; what is there once the work is cancelled."""
    total = len(schemes) * len(curve.alphas)
    with progress_bar(total, "α against what is lost", unit="points", cancel=cancel, show=show) as bar:
        try:
            held = _Held(lm, segments, cancel)
            curve = dataclasses.replace(curve, reference=held.reference)
            for alpha in curve.alphas:
                ready = lm if alpha is None else smooth(lm, magnitudes, alpha, folds=curve.folds)
                again = functools.cache(lambda ready=ready: _captured(ready, magnitudes, cancel))
                for name, scheme in zip(curve.schemes, schemes, strict=True):
                    quantiles = isinstance(scheme.clip, ClipTokens | ClipValues) and ready is not lm
                    q = quantize(ready, scheme, again() if quantiles else magnitudes)
                    perplexity, divergence = held.score(q, f"{name} at α = {alpha}")
                    point = AlphaPoint(name, alpha, perplexity, divergence)
                    curve = dataclasses.replace(curve, points=(*curve.points, point))
                    for tell in told:
                        if tell is not None:
                            tell(curve)
                    bar.step()
        except Cancelled:
            return dataclasses.replace(curve, complete=len(curve.points) == total)
    return dataclasses.replace(curve, complete=True)


class _Held:
    """What the model itself makes of the held text, and how far another model is from that."""

    def __init__(self, lm: LM, segments: list[Int64[Tensor, " token"]], cancel: CancelToken) -> None:
        self.segments, self.cancel = segments, cancel
        self._own: list[Float[Tensor, "asked vocabulary"]] = []  # ln p of what follows every STRIDE-th token
        total = 0.0
        for logits, segment in self._read(lm):
            total += _summed(logits, segment, f"{lm.name} itself")
            self._own.append(_asked(logits))
        self.reference = math.exp(total / self._count)

    @property
    def _count(self) -> int:
        return sum(len(segment) - 1 for segment in self.segments)

    def score(self, other: LM, what: str) -> tuple[float, float]:
        """(perplexity, KL(p ‖ p̂) in nats per token) of a model."""
        total = divergence = 0.0
        for own, (logits, segment) in zip(self._own, self._read(other), strict=True):
            total += _summed(logits, segment, what)
            divergence += float((own.exp() * (own - _asked(logits))).sum(-1).mean())
        mean = total / self._count
        return math.exp(mean) if mean < 700 else math.inf, divergence / len(self.segments)

    def _read(self, lm: LM):  # type: ignore[no-untyped-def]
        for segment in self.segments:
            self.cancel.check("the α curve")
            with torch.no_grad():
                yield lm.model(segment[None].to(lm.device), use_cache=False).logits[0], segment.to(lm.device)


def _summed(logits: Float[Tensor, "token vocabulary"], segment: Int64[Tensor, " token"], what: str) -> float:
    nll = float(token_nll(logits, segment).double().sum())
    if not math.isfinite(nll):
        raise NonFinite(f"{what}: NaN or infinite logits, so there is no perplexity. Load the model in float32.")
    return nll


def _asked(logits: Float[Tensor, "token vocabulary"]) -> Float[Tensor, "asked vocabulary"]:
    return logits[STRIDE - 1 :: STRIDE].float().log_softmax(-1)


def _captured(lm: LM, magnitudes: Magnitudes, cancel: CancelToken) -> Magnitudes:
    """Quantiles of a smoothed model are not those of X divided by s: a second pass over the calibration."""
    return capture(lm, magnitudes.tokens, length=magnitudes.length, samples=None, cancel=cancel, progress=False)


def share_seen(held: Int64[Tensor, " token"], calibrated: Int64[Tensor, " token"]) -> float:
    """Which share of the held windows of WINDOW tokens stands in the calibration as well."""
    if min(len(held), len(calibrated)) < WINDOW:
        return 0.0
    windows = [tokens.unfold(0, WINDOW, 1).numpy() for tokens in (held.cpu(), calibrated.cpu())]
    mine, theirs = (window.copy().view(f"V{window.itemsize * WINDOW}").ravel() for window in windows)
    known = {window.tobytes() for window in theirs}
    return sum(window.tobytes() in known for window in mine) / len(mine)


def _names(schemes: Sequence[Scheme]) -> tuple[str, ...]:
    if isinstance(schemes, Scheme) or not schemes:
        raise SqvizError(
            f"schemes={schemes!r}: a list of at least one scheme is needed, such as [sqviz.SMOOTHQUANT_O1]."
        )
    names = tuple(scheme.name or scheme.describe() for scheme in schemes)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SqvizError(f"schemes: {', '.join(twice)} is there more than once; give each a name of its own.")
    return names


def _grid(alphas: Sequence[float | None]) -> tuple[float | None, ...]:
    """None first, then ascending, each once."""
    if isinstance(alphas, int | float) or not alphas:
        raise SqvizError(f"alphas={alphas!r}: a list of strengths in [0, 1] is needed, such as (0.4, 0.5, 0.6).")
    found = sorted({check_alpha(alpha, "alphas: one") for alpha in alphas if alpha is not None})
    return (*((None,) if None in alphas else ()), *found)

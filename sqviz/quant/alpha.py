"""`alpha="auto"`: a migration strength for every fold of a model, found instead of tried (thesis §3.3, §3.4.1).

The thesis takes one α per model from a grid search; here each group of linears may have its own, or be left alone. What
is searched for depends on what one looks at:

    "layer"    each linear by itself: mean_t ‖ŷ_t − y_t‖² / ‖y_t‖² of its own output. Fast, and misleading where
               weights have one step per tensor: a fold into an earlier linear spreads that one's rows, which no layer
               sees of another.
    "block"    the same of a block's output, its groups searched in turns (coordinate descent)
    "logits"   the Kullback-Leibler divergence KL(p ‖ p̂) of the next token: first one α for each kind of linear, the
               kinds in turns, then for each group of the REFINED blocks that lose most an α of its own

    "auto"     all three, and flat strengths beside them, compared on segments that no search has seen: the search with
               the least divergence is kept if it beats the best flat strength by more than NOISE, else that one

What is searched for one group or kind walks along GRID, from the best of what it has, None and MIDDLE, as far as that
helps. The segments come from the calibration that `sqviz.capture` saw: of its tokens the first are searched on, later
ones decide. Everything is simulated. A search that is cancelled returns the best it has found so far.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sqviz.errors import Cancelled, SqvizError
from sqviz.models.linears import Group, experts, groups, weight
from sqviz.models.lm import LM
from sqviz.progress import Bar, CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.quant.block import Blocks
from sqviz.quant.calibration import Calibration
from sqviz.quant.divergence import Divergence
from sqviz.quant.found_alpha import SEARCHES, FoundAlpha, Tried
from sqviz.quant.linear import quantize_calibrated
from sqviz.quant.plain import check_floating
from sqviz.quant.plan import Folds, usual_folds
from sqviz.quant.rows import SEGMENTS, Rows, sample_rows
from sqviz.quant.schemes import Scheme
from sqviz.quant.smooth import smooth

if TYPE_CHECKING:
    from sqviz.observe.magnitudes import Magnitudes

Objective = Literal["layer", "block", "logits", "auto"]
OBJECTIVES = (*SEARCHES, "auto")
GRID: tuple[float | None, ...] = (None, 0.2, 0.4, 0.5, 0.6, 0.7, 0.85)
"""What a group may get; None leaves it unsmoothed."""

MIDDLE = 0.5
"""Of GRID, where optima usually are."""

FLAT: dict[str, tuple[float | None, float | None]] = {
    "none": (None, None),
    "0.5 into norms": (0.5, None),
    "flat 0.5": (0.5, 0.5),
    "flat 0.85": (0.85, 0.85),
}
"""What "auto" tries beside the searches: strengths of all folds into norms, and of all into linears."""

STARTS: tuple[tuple[float | None, float | None], ...] = ((None, None), (0.5, None), (0.5, 0.5))
"""Where that search begins, at the best of these: strengths of all folds into norms, and of all into linears."""

REFINED = 8
"""Blocks whose groups get strengths of their own where the divergence of the logits is searched by."""

SEARCHED, HELD = 8, 16
"""Segments of the calibration that are searched on, and that decide; of a short one a third is searched on."""

FEWEST = 6
"""Segments that a search needs."""

NOISE = 2.0
"""Standard errors by which strengths that were searched have to beat flat ones: fewer may be the choice of text."""

Alphas = dict[str, float | None]
"""α by the name of a group's first linear."""


def search_alpha(
    lm: LM,
    magnitudes: "Magnitudes",
    scheme: Scheme,
    objective: Objective = "auto",
    *,
    folds: Folds | None = None,
    cancel: CancelToken | None = None,
    progress: bool = True,
) -> FoundAlpha:
    """A strength for every fold, for one scheme.

    Args:
        lm: the model, not quantised; it stays as it was.
        magnitudes: from `sqviz.capture` of this model, six segments at least; they also give the text to search on.
        scheme: what the model will be quantised by.
        objective: see above.
        folds: as for `sqviz.smooth`; None: "outliers" where a weight has one step per tensor, else "all".
        cancel: ends the search; so does the progress bar's button. The best so far is returned.
        progress: draw a bar.

    Raises:
        SqvizError: an unknown objective or fold, too short a calibration, or one of another model.
    """
    if objective not in OBJECTIVES:
        raise SqvizError(f"objective={objective!r}: one of {', '.join(OBJECTIVES)} is allowed.")
    check_floating(lm, "search α for")
    cancel = CancelToken() if cancel is None else cancel
    folds = folds or usual_folds(scheme)
    search = _Search(lm, magnitudes, scheme, folds, cancel)
    stages = {"layer": search.by_layer, "block": search.by_block, "logits": search.by_logits}
    chosen = list(stages) if objective == "auto" else [objective]
    found: dict[str, Alphas] = {}
    total = sum(search.steps(one) for one in chosen) + (len(FLAT) + len(chosen)) * (objective == "auto")
    complete = True
    with progress_bar(total, "searching α", unit="steps", cancel=cancel, show=progress) as bar:
        try:
            for one in chosen:
                found[one] = {}
                stages[one](found[one], bar)
            tried = search.decide(found, bar) if objective == "auto" else []
        except Cancelled:
            complete, tried = False, list(search.decided)
    name, alphas = search.best(found, tried)
    return FoundAlpha(
        alphas=search.filled(alphas),
        objective=name,
        scheme=scheme.as_code(),
        folds=folds,
        model=lm.name,
        tokens=hashlib.sha256(magnitudes.tokens.numpy().tobytes()).hexdigest(),
        tried=tuple(sorted(tried, key=lambda one: one.divergence)),
        complete=complete,
    )


class _Search:
    """The searches over one model. Each fills a dictionary as it goes, so that what was found outlives a cancel."""

    def __init__(self, lm: LM, magnitudes: "Magnitudes", scheme: Scheme, folds: Folds, cancel: CancelToken) -> None:
        self.lm, self.magnitudes, self.scheme, self.folds, self.cancel = lm, magnitudes, scheme, folds, cancel
        segments = magnitudes.tokens.view(-1, magnitudes.length)
        if len(segments) < FEWEST:
            raise SqvizError(
                f"a search needs {FEWEST} segments of calibration, better {SEARCHED + HELD}, and the magnitudes hold "
                f"{len(segments)}: sqviz.capture(lm, text, samples={SEARCHED + HELD})"
            )
        self.segments, held = divided(segments)
        self.searched, self.held = Divergence(lm, self.segments, cancel), Divergence(lm, held, cancel)
        kinds = ("norm",) if folds == "norm" else ("norm", "linear")
        self.groups = [group for group in groups(lm) if group.fold_kind in kinds]
        if not self.groups:
            raise SqvizError(f"nothing in {lm.name} can be folded with folds={folds!r}, so there is no α to search.")
        self.rows: Rows = sample_rows(lm, segments[:SEGMENTS])
        self.decided: list[Tried] = []
        self._flat: dict[str, Alphas] = {}

    def steps(self, objective: str) -> int:
        """How many steps a search has; those that walk along GRID try several strengths each."""
        kinds = len({group.kind for group in self.groups})
        blocks = [group.block for group in self.groups]
        refined = len(set(blocks)) + min(REFINED, len(set(blocks))) * max(map(blocks.count, blocks))
        return {"layer": len(blocks), "block": len(blocks), "logits": len(STARTS) + kinds + refined}[objective]

    # --- the three searches ---

    def by_layer(self, found: Alphas, bar: Bar) -> None:
        """Each group by the error of its own outputs."""
        for group in self.groups:
            found[group.name], _ = _climb(functools.partial(self._layer_error, group))
            bar.step()

    def _layer_error(self, group: Group, alpha: float | None) -> float:
        model = self._smoothed({group.name: alpha}, only=[group])
        q = self._quantised(model, [group])
        rows, total = self.rows.of(group), 0.0
        if experts(self.lm, group.consumers[-1]):
            return self._blocks.error(q, group.block)  # fused experts show no output of their own
        with torch.no_grad():
            for name in group.consumers:
                y = rows @ weight(self.lm, name).T
                s = model.scales.get(name)
                x = rows if s is None else rows * self._since(group).to(rows) / s.to(rows)
                module = q.model.get_submodule(name)
                bias = getattr(module, "bias", None)
                made = module(x.to(self.lm.dtype)).to(y) - (0 if bias is None else bias)
                size = y.square().sum(1).clamp(min=torch.finfo(y.dtype).tiny)
                total += float(((made - y).square().sum(1) / size).mean())
        return total

    def by_block(self, found: Alphas, bar: Bar) -> None:
        """The groups of each block in turns, by the error of the block's output."""
        for index in sorted({group.block for group in self.groups}):
            mine = [group for group in self.groups if group.block == index]
            now: Alphas = dict.fromkeys((group.name for group in mine), None)
            for group in mine:
                now[group.name], _ = _climb(functools.partial(self._block_error, now, group, mine))
                bar.step()
            found.update(now)

    def _block_error(self, alphas: Alphas, group: Group, mine: list[Group], alpha: float | None) -> float:
        self.cancel.check("searching α")
        model = self._smoothed({**alphas, group.name: alpha}, only=mine)
        return self._blocks.error(self._quantised(model, mine), group.block)

    def by_logits(self, found: Alphas, bar: Bar) -> None:
        """One α for each kind of linear, then some of their own, by the divergence of the logits."""
        kinds = list(dict.fromkeys(group.kind for group in self.groups))
        now: dict[str, float | None] = {}
        least = math.inf
        for norm, linear in STARTS:
            start = {group.kind: norm if group.fold_kind == "norm" else linear for group in self.groups}
            value = self.divergence(self._spread(start), self.searched)
            if not now or value < least:
                least, now = value, start
            bar.step()
        found.update(self._spread(now))
        for kind in kinds:
            now[kind], least = _climb(functools.partial(self._with_kind, now, kind), now[kind], least)
            found.update(self._spread(now))
            bar.step()
        self._refine(found, bar)

    def _refine(self, found: Alphas, bar: Bar) -> None:
        """The groups of the blocks that lose most in turns, by the divergence with this block alone quantised."""
        alone = {}
        for index in sorted({group.block for group in self.groups}):
            alone[index] = self._alone(found, index)
            bar.step()
        for index in sorted(alone, key=lambda index: -alone[index])[:REFINED]:
            for group in (group for group in self.groups if group.block == index):
                value = functools.partial(self._with_group, found, group)
                found[group.name], alone[index] = _climb(value, found[group.name], alone[index])
                bar.step()

    def _with_kind(self, by_kind: Mapping[str, float | None], kind: str, alpha: float | None) -> float:
        """KL(p ‖ p̂) if all groups of this kind get α."""
        return self.divergence(self._spread({**by_kind, kind: alpha}), self.searched)

    def _with_group(self, alphas: Alphas, group: Group, alpha: float | None) -> float:
        """KL(p ‖ p̂) with the group's block alone quantised, if the group gets α."""
        return self._alone({**alphas, group.name: alpha}, group.block)

    def _alone(self, alphas: Alphas, index: int) -> float:
        """KL(p ‖ p̂) with block `index` smoothed and quantised, the others as they are."""
        self.cancel.check("searching α")
        mine = [group for group in self.groups if group.block == index]
        return self.searched(self._quantised(self._smoothed(alphas, only=mine), mine), since=index)

    def decide(self, found: Mapping[str, Alphas], bar: Bar) -> list[Tried]:
        """All candidates on the segments that no search has seen."""
        for label, (norm, linear) in FLAT.items():
            self._flat[label] = {group.name: norm if group.fold_kind == "norm" else linear for group in self.groups}
        flat: list[Tensor] = []
        for name, alphas in {**self._flat, **found}.items():
            model = self._quantised(self._smoothed(alphas), None)
            here = self.held.each(model).nan_to_num(math.inf, posinf=math.inf)
            if name in self._flat:
                flat, noise = sorted([*flat, here], key=torch.mean), None
            else:
                noise = _noise(here, flat[0])
            self.decided.append(Tried(name, float(here.mean()), self.searched(model), noise))
            bar.step()
        return list(self.decided)

    def best(self, found: Mapping[str, Alphas], tried: list[Tried]) -> tuple[str, Alphas]:
        """The name and the strengths to keep: of the best candidate; of a cancelled search, the last that has any."""
        if tried:
            flat = min((one for one in tried if one.noise is None), key=lambda one: one.divergence)
            better = [one for one in tried if one.divergence + NOISE * (one.noise or 0) < flat.divergence]
            name = min(better, key=lambda one: one.divergence, default=flat).name
            return name, {**found, **self._flat}[name]
        begun = [name for name, alphas in found.items() if alphas]
        return (begun[-1], found[begun[-1]]) if begun else ("none", {})

    def filled(self, alphas: Alphas) -> Alphas:
        """α of every group of the model; None for those that were not reached or cannot be folded."""
        return {group.name: alphas.get(group.name) for group in groups(self.lm)}

    # --- trying one ---

    @functools.cached_property
    def _blocks(self) -> Blocks:
        return Blocks(self.lm, self.segments)

    def divergence(self, alphas: Alphas, against: Divergence) -> float:
        """KL(p ‖ p̂) of the model smoothed and quantised so. Raises `Cancelled`."""
        self.cancel.check("searching α")
        return against(self._quantised(self._smoothed(alphas), None))

    def _smoothed(self, alphas: Alphas, only: list[Group] | None = None) -> LM:
        chosen = {group.name for group in (self.groups if only is None else only)}

        def alpha(group: Group) -> float | None:
            return alphas.get(group.name) if group.name in chosen else None

        if all(alphas.get(name) is None for name in chosen):
            return self.lm
        return smooth(self.lm, self.magnitudes, alpha, folds=self.folds, check=False)

    def _quantised(self, model: LM, only: list[Group] | None) -> LM:
        since = {
            group.name: model.scales[group.name] / self._since(group)
            for group in self.groups
            if group.name in model.scales
        }
        rows = self.rows.divided(since)
        calibration = Calibration(model, self.scheme, self.magnitudes, self.cancel, rows)
        if only is None:
            return quantize_calibrated(calibration)
        blocks = {group.block for group in only}
        skip = [name for group in groups(self.lm) if group.block not in blocks for name in group.consumers]
        return quantize_calibrated(calibration, skip=skip)

    def _since(self, group: Group) -> Tensor:
        """The s that the model at hand carried before the search."""
        return self.lm.scales.get(group.name, torch.ones(()))

    def _spread(self, by_kind: Mapping[str, float | None]) -> Alphas:
        return {group.name: by_kind[group.kind] for group in self.groups}


def divided(segments: Int64[Tensor, "segment token"]) -> tuple[Tensor, Tensor]:
    """The segments of a calibration that are searched on, and those that decide."""
    searched = min(SEARCHED, len(segments) // 3)
    return segments[:searched], segments[-min(HELD, len(segments) - searched) :]


def _noise(one: Float[Tensor, " segment"], other: Float[Tensor, " segment"]) -> float:
    """Standard error of the mean difference."""
    return float((one - other).std().nan_to_num() / len(one) ** 0.5)


def _climb(
    value: Callable[[float | None], float], start: float | None = None, least: float | None = None
) -> tuple[float | None, float]:
    """Where on GRID a value is least, and the value: from the best of `start`, None and MIDDLE on, as far as it falls.

    Args:
        value: of one of GRID.
        start: one of GRID.
        least: its value, where that is known.
    """
    known = {} if least is None else {start: least}

    def look(place: int) -> float:
        alpha = GRID[place]
        if alpha not in known:
            found = value(alpha)
            known[alpha] = math.inf if math.isnan(found) else found
        return known[alpha]

    at = min((GRID.index(start), GRID.index(None), GRID.index(MIDDLE)), key=look)
    while True:
        beside = min((place for place in (at - 1, at + 1) if 0 <= place < len(GRID)), key=look)
        if look(beside) >= look(at):
            return GRID[at], look(at)
        at = beside

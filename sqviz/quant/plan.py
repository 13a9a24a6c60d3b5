"""Which groups of linears one call of `smooth` rescales, with which α, and whether by a fold or at run time."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Literal

from sqviz.errors import CannotFold, SqvizError
from sqviz.models.linears import Group, groups, linear_names, no_such_layer
from sqviz.models.lm import LM
from sqviz.quant.granularity import PerTensor
from sqviz.quant.schemes import Scheme

Alpha = float | Mapping[str, float | None] | Callable[[Group], float | None] | Literal["auto"]
Folds = Literal["norm", "all", "outliers"]
FOLDS: dict[Folds, str] = {"norm": "folds into norms", "all": "all folds", "outliers": "folds of outliers"}
"""For people."""


def usual_folds(scheme: Scheme) -> Folds:
    """The folds that a search for this scheme makes if it is not told: "outliers" where a weight has but one step."""
    return "outliers" if isinstance(scheme.weight, PerTensor) else "all"


@dataclasses.dataclass(frozen=True)
class Step:
    """One group to rescale with `alpha`; by folding, or at run time if `online`."""

    group: Group
    alpha: float
    online: bool


def check_alpha(alpha: float, what: str = "alpha") -> float:
    """α as a float. Raises `SqvizError`, naming the value, if it is not a number in [0, 1]."""
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise SqvizError(f"{what}={alpha!r} is not a number; give a migration strength in [0, 1], usually 0.5 to 0.9")
    value = float(alpha)
    if math.isnan(value) or not 0 <= value <= 1:
        raise SqvizError(f"{what}={value} is outside [0, 1]; 0 leaves the difficulty to activations, 1 to weights")
    return value


def plan(lm: LM, alpha: Alpha, folds: Folds = "norm", online: bool = False) -> tuple[Step, ...]:
    """The groups to rescale, in execution order; see `sqviz.smooth` for the meaning of the arguments.

    Raises:
        SqvizError: α outside [0, 1], an α or `folds` of another kind.
        NoSuchLayer: a pattern matches no linear.
        CannotFold: something was asked for that has no exact fold (and `online` is off).
    """
    if folds not in tuple(FOLDS):
        raise SqvizError(
            f"folds={folds!r}; allowed: 'norm' (into norms, as the thesis does), 'all' (also into linears) or "
            "'outliers' (into linears only for channels that stand out)"
        )
    every = groups(lm)
    chosen = _choose(lm, every, alpha, folds, online)
    steps = []
    for group, value in ((group, chosen[group]) for group in every if group in chosen):
        if _foldable(group, folds):
            steps.append(Step(group, value, online=False))
        elif online:
            steps.append(Step(group, value, online=True))
        elif group.entry:
            raise CannotFold(_refusal(group))
    if not steps and chosen:
        raise CannotFold(_refusal(next(iter(chosen))))
    return tuple(steps)


def _choose(lm: LM, every: tuple[Group, ...], alpha: Alpha, folds: Folds, online: bool) -> dict[Group, float]:
    """α of every group that the call addresses."""
    covered = [group for group in every if folds != "norm" or group.entry]
    if isinstance(alpha, str):
        raise SqvizError(
            f"alpha={alpha!r}: a number in [0, 1] is needed, a mapping {{pattern: α}}, a callable, or 'auto'"
        )
    if isinstance(alpha, Mapping):
        return _match(lm, every, covered, alpha, online)
    if callable(alpha):
        asked = ((group, alpha(group)) for group in covered)
        return {group: check_alpha(value, f"alpha({group.name})") for group, value in asked if value is not None}
    return dict.fromkeys(covered, check_alpha(alpha))


def _match(
    lm: LM, every: tuple[Group, ...], covered: list[Group], alpha: Mapping[str, float | None], online: bool
) -> dict[Group, float]:
    """α by pattern; of two patterns that match one group the later one counts, and None leaves the group out."""
    chosen: dict[Group, float | None] = {}
    for pattern, value in alpha.items():
        matched = [group for group in every if any(fnmatchcase(name, pattern) for name in group.consumers)]
        if not matched:
            raise no_such_layer(pattern, linear_names(lm))
        addressed = [group for group in matched if group in covered] or matched
        if value is not None and not online and not any(group.fold and group in covered for group in addressed):
            raise CannotFold(_refusal(addressed[0]))
        checked = None if value is None else check_alpha(value, f"alpha[{pattern!r}]")
        chosen.update(dict.fromkeys(addressed if value is not None else matched, checked))
    return {group: value for group, value in chosen.items() if value is not None}


def _foldable(group: Group, folds: Folds) -> bool:
    return group.fold_kind == "norm" or (group.fold_kind == "linear" and folds != "norm")


def _refusal(group: Group) -> str:
    if group.fold is not None:
        why = f"it can be folded exactly, into {group.fold.path}, but only with folds='all'"
    else:
        why = f"it cannot be folded: {group.reason}"
    return f"{group.name}: {why}. Or pass online=True to divide its input at run time, or leave it out of alpha"

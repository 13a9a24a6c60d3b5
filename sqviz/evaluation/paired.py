"""Is a quantised model worse, or is that noise? Differences between two models on the very same items.

Both models answer the same questions and read the same segments, so most of the spread between items cancels in
d = x − x′, and what is left tells far smaller changes apart than two standard errors would (Dror et al. 2018, ACL,
section 3; Miller 2024, arXiv 2411.00640, section 4.2). The change of a score is

    mean:        Σ d / Σ w              perplexity: the ratio exp( Σ d / Σ w ), each segment one cluster

Interval: percentiles of a bootstrap that draws items with replacement (Efron 1979), seeded. Check: the normal interval
from the standard error of Σ d / Σ w.
p: McNemar's exact test on the items that one model has right and the other wrong (a fair coin, two sides); for other
values a test that flips signs of d at random (Fisher 1935), over all 2ⁿ patterns for few items.
A change counts as told apart from noise if p is below 5 % and the interval leaves out "no change": both, because the
interval is too narrow for a handful of items.
"""

import dataclasses

import numpy as np
import torch
from jaxtyping import Float64

from sqviz.errors import SqvizError
from sqviz.evaluation.scores import Score, exp, ratio

RESAMPLES = 5000
"""Draws of the bootstrap, and sign patterns of the test."""

SAME = "Use the same file or text, the same limit and length, and for perplexity a model with the same tokenizer"
"""What to do about items that differ."""

LEVEL = 0.95
_NORMAL = 1.959963984540054  # the 97.5 % point of the normal distribution
_ALL_PATTERNS = 12  # nonzero differences up to which all sign patterns are tried
_AT_A_TIME = 4_000_000  # numbers drawn at a time


class NotComparable(SqvizError):
    """Two evaluations were to be compared that did not see the same items."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One score against the same score of another model.

    Attributes:
        task, metric: which.
        value, reference: the two scores.
        higher_is_better: which way is better.
        relative: whether `change` is a ratio (perplexity), 1 for no change; else it is a difference, 0 for no change.
        change: value against reference.
        low, high: 95 % interval of the change by the bootstrap; None for a single item.
        normal: the same by the normal approximation.
        p: how often a change as large comes about if the models are equally good.
        test: how p was found.
        count: items.
        gained, lost: items with 0 or 1 that only this model has right, and that only the reference has; else None.
    """

    task: str
    metric: str
    value: float
    reference: float
    higher_is_better: bool
    relative: bool
    change: float
    low: float | None
    high: float | None
    normal: tuple[float, float] | None
    p: float
    test: str
    count: int
    gained: int | None = None
    lost: int | None = None

    @property
    def significant(self) -> bool:
        """Whether the change can be told apart from noise."""
        none = 1.0 if self.relative else 0.0
        return (
            self.p < 1 - LEVEL and self.low is not None and self.high is not None and not self.low <= none <= self.high
        )

    @property
    def better(self) -> bool | None:
        """Whether the change is for the better; None if there is none."""
        none = 1.0 if self.relative else 0.0
        return None if self.change == none else (self.change > none) == self.higher_is_better

    @property
    def verdict(self) -> str:
        """In words."""
        if self.better is None and self.low == self.high:
            return "no difference on any item"
        chance = "p < 0.0001" if self.p < 1e-4 else f"p = {self.p:.2g}"
        if not self.significant:
            return f"cannot be told apart from noise ({chance})"
        return f"{'better' if self.better else 'worse'}, not noise ({chance})"


def difference(score: Score, reference: Score, seed: int = 0) -> Difference:
    """One score against the same score of another model.

    Raises:
        NotComparable: they belong to different tasks, metrics or items, or hold nothing per item.
    """
    label = f"{score.task} {score.metric}"
    if (score.task, score.metric) != (reference.task, reference.metric):
        raise NotComparable(f"{label} cannot be compared with {reference.task} {reference.metric}")
    if score.items is None or reference.items is None or score.weights is None or reference.weights is None:
        raise NotComparable(f"{label} holds no values per item, so the two cannot be paired")
    if score.content != reference.content or len(score.items) != len(reference.items):
        raise NotComparable(
            f"{label}: the two models did not see the same items ({score.count} and {reference.count} of them). {SAME}"
        )
    if not torch.equal(score.weights, reference.weights):
        raise NotComparable(f"{label}: the items count for different numbers of tokens or bytes in the two models")
    return _paired(score, reference, np.random.default_rng(seed))


def _paired(score: Score, reference: Score, chance: np.random.Generator) -> Difference:
    assert score.items is not None
    assert score.weights is not None
    assert reference.items is not None
    assert score.value is not None
    assert reference.value is not None
    change = score.items - reference.items
    d, w = change.numpy(), score.weights.numpy()
    shift, error = ratio(change, score.weights)
    shown = exp if score.exponential else float
    binary = all(bool(((items == 0) | (items == 1)).all()) for items in (score.items, reference.items))
    gained, lost = (int((d > 0).sum()), int((d < 0).sum())) if binary and not score.exponential else (None, None)
    if gained is None or lost is None:
        p, test = sign_flips(d, chance), "sign flips"
    else:
        p, test = mcnemar(gained, lost), "McNemar, exact"
    low, high = (None, None) if error is None else map(shown, bootstrap(d, w, chance))
    normal = None if error is None else (shown(shift - _NORMAL * error), shown(shift + _NORMAL * error))
    return Difference(
        score.task,
        score.metric,
        score.value,
        reference.value,
        score.higher_is_better,
        score.exponential,
        shown(shift),
        low,
        high,
        normal,
        p,
        test,
        len(d),
        gained,
        lost,
    )


def bootstrap(
    d: Float64[np.ndarray, " item"], w: Float64[np.ndarray, " item"], chance: np.random.Generator
) -> tuple[float, float]:
    """The middle 95 % of Σ d / Σ w over items drawn with replacement."""
    step = max(1, _AT_A_TIME // len(d))
    drawn = []
    for start in range(0, RESAMPLES, step):
        rows = chance.integers(len(d), size=(min(step, RESAMPLES - start), len(d)))
        drawn.append(d[rows].sum(1) / w[rows].sum(1))
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p for so many items going one way and the other, if each is the toss of a fair coin."""
    total, ways, tail = gained + lost, 1, 0
    for count in range(min(gained, lost) + 1):
        tail += ways
        ways = ways * (total - count) // (count + 1)
    return min(1.0, 2 * tail / 2**total)  # whole numbers to the end: exact for thousands of items


def sign_flips(d: Float64[np.ndarray, " item"], chance: np.random.Generator) -> float:
    """Two-sided p of |Σ d| among sums with signs flipped at random; exact for few items, never 0 otherwise."""
    d = d[d != 0]
    if not len(d):
        return 1.0
    seen = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    if len(d) <= _ALL_PATTERNS:
        patterns = (np.arange(2 ** len(d))[:, None] >> np.arange(len(d))) & 1
        return float((abs((2 * patterns - 1) @ d) >= seen).mean())
    step, beyond = max(1, _AT_A_TIME // len(d)), 0
    for start in range(0, RESAMPLES, step):
        signs = 2 * chance.integers(0, 2, size=(min(step, RESAMPLES - start), len(d)), dtype=np.int8) - 1
        beyond += int((abs(signs @ d) >= seen).sum())
    return (1 + beyond) / (1 + RESAMPLES)

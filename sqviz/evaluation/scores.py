"""`Score`: one metric of one task, with what each item contributed, so that two models can be compared item by item.

Every metric here is a ratio of sums over items, or e to its power:

    mean       = Σ x / Σ w              accuracies (x = 0 or 1, w = 1), bits per byte (x bits, w bytes)
    perplexity = exp( Σ x / Σ w )       x = −ln p of an item's tokens, w = their number

Its standard error is that of a ratio estimator, items drawn independently (Cochran, Sampling Techniques, eq. 6.13):
with r = x − (Σx / Σw) · w, it is sd(r) / (mean(w) · √n); sd has n − 1 below. For w = 1 this is sd(x) / √n. That of an
exponential is this times the value (the delta method).
"""

import dataclasses
import math

import torch
from jaxtyping import Float64
from torch import Tensor

from sqviz.errors import NonFinite


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric is read: what it is called, its unit, how it is printed, and which way is better."""

    label: str
    unit: str = ""
    scale: float = 1.0
    digits: int = 4
    higher_is_better: bool = True

    def number(self, value: float) -> str:
        """A value without its unit; four digits where it is a huge perplexity."""
        value *= self.scale
        return f"{value:.{self.digits}f}" if abs(value) < 1e5 else f"{value:.4g}"


METRICS = {
    "acc": Metric("accuracy", "%", 100.0, 2),
    "acc_norm": Metric("accuracy per character", "%", 100.0, 2),
    "perplexity": Metric("perplexity", "", higher_is_better=False),
    "bits_per_byte": Metric("bits per byte", "bit/B", higher_is_better=False),
}
"""Metrics that sqviz computes itself. Others come from lm-eval under lm-eval's names, see `metric`."""


def metric(name: str, higher_is_better: bool | None = None) -> Metric:
    """The row of a metric; one that has none is shown under its own name."""
    known = METRICS.get(name)
    if known is not None:
        return known
    lower = name.endswith("perplexity") if higher_is_better is None else not higher_is_better
    return Metric(name, higher_is_better=not lower)


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """One metric of one task.

    Attributes:
        task, metric: their names.
        value: the metric; None where it cannot be had, and `note` says why.
        count: items.
        standard_error: of `value`, in the same unit; None for fewer than two items.
        higher_is_better: which way is better.
        items: what each item contributed, the x above; None where the metric is no sum over items.
        weights: what each item counted for, the w above.
        content: a hash of what was asked. Scores are compared item by item only if it is the same.
        seconds: how long the task took, all its metrics together.
        note: what to know about this number.
    """

    task: str
    metric: str
    value: float | None
    count: int
    standard_error: float | None
    higher_is_better: bool
    items: Float64[Tensor, " item"] | None
    weights: Float64[Tensor, " item"] | None
    content: str
    seconds: float
    note: str = ""

    @property
    def exponential(self) -> bool:
        """Whether the value is e to the ratio of sums: a perplexity."""
        return is_perplexity(self.metric)

    def __repr__(self) -> str:
        return f"Score({self.task} {self.metric}: {self.shown()}, {self.count} items)"

    def shown(self) -> str:
        """The value with its standard error and unit, for people."""
        if self.value is None:
            return "not available"
        row = metric(self.metric, self.higher_is_better)
        error = "" if self.standard_error is None else f" ± {row.number(self.standard_error)}"
        return f"{row.number(self.value)}{error} {row.unit}".rstrip()


def is_perplexity(name: str) -> bool:
    """Whether a metric of this name is an exponential: "perplexity", and lm-eval's "word_perplexity" and the like."""
    return name.endswith("perplexity")


def score(
    task: str,
    name: str,
    items: Float64[Tensor, " item"],
    weights: Float64[Tensor, " item"] | None = None,
    *,
    content: str,
    seconds: float,
    note: str = "",
    higher_is_better: bool | None = None,
) -> Score:
    """A `Score` from what each item contributed and, unless that is 1, counted for.

    Raises:
        NonFinite: an item is NaN or infinite.
    """
    items = items.double()
    weights = torch.ones_like(items) if weights is None else weights.double()
    if not bool(torch.isfinite(items).all()):
        at = int((~torch.isfinite(items)).nonzero()[0])
        raise NonFinite(f"item {at + 1} of {task} has a {name} of {float(items[at])}: the model gave no usable logits")
    value, error = ratio(items, weights)
    if is_perplexity(name):
        value = exp(value)
        error = None if error is None or math.isinf(value) else error * value
    better = metric(name, higher_is_better).higher_is_better
    return Score(task, name, value, len(items), error, better, items, weights, content, seconds, note)


def missing(task: str, name: str, count: int, *, content: str, seconds: float, note: str) -> Score:
    """A `Score` without a value, and why there is none."""
    better = metric(name).higher_is_better
    return Score(task, name, None, count, None, better, None, None, content, seconds, note)


def ratio(x: Float64[Tensor, " item"], weights: Float64[Tensor, " item"]) -> tuple[float, float | None]:
    """Σ x / Σ w and its standard error; None for fewer than two items."""
    value = float(x.sum() / weights.sum())
    if len(x) < 2:
        return value, None
    rest = x - value * weights
    return value, float(rest.std() / weights.mean()) / math.sqrt(len(x))


def exp(value: float) -> float:
    """e to the value, infinite where float64 has no number for it."""
    return math.exp(value) if value < 700 else math.inf

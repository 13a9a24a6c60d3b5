"""What a live view remembers of one lane: bounded, however long the stream is."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from sqviz.streaming.lane import LaneStep

LATEST = 400
"""Tokens whose text is kept."""
POINTS = 1500
"""Most points of a curve; every other one is dropped when there are more."""
RUNNING = 64
"""Tokens of the running mean."""


@dataclasses.dataclass
class Track:
    """One lane so far.

    Attributes:
        spent: seconds that its steps took.
        count: tokens predicted.
        total: sum of their −ln p, in nats.
        ended: whether the text is at its end.
        points: (position, perplexity of the last `RUNNING` tokens, milliseconds per token), thinned.
    """

    spent: float = 0.0
    count: int = 0
    total: float = 0.0
    ended: bool = False
    points: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)
    _latest: list[list[Any]] = dataclasses.field(default_factory=list)
    _window: list[float] = dataclasses.field(default_factory=list)
    _times: list[float] = dataclasses.field(default_factory=list)
    _every: int = 1
    _sent: int = 0
    _cache: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, step: LaneStep | None, seconds: float) -> None:
        """One more token; None: there is none."""
        self.spent += seconds
        if step is None:
            self.ended = True
            return
        self.count += 1
        self.total += step.nll
        top = [[text, round(chance, 4)] for text, chance in step.top]
        self._latest.append([step.position, step.text, round(step.nll, 4), top, round(1000 * seconds, 3)])
        self._window.append(step.nll)
        self._times.append(1000 * seconds)
        for kept, most in ((self._latest, LATEST), (self._window, RUNNING), (self._times, RUNNING)):
            del kept[: max(0, len(kept) - most)]
        if self.count % self._every == 0:
            self.points.append((step.position, self.running, self.milliseconds))
            if len(self.points) > POINTS:
                self.points, self._every = self.points[1::2], 2 * self._every
        view = step.cache
        self._cache = {
            "sinks": list(view.sinks[:64]),
            "first": view.first,
            "last": view.last,
            "keys": view.keys,
            "capacity": view.capacity,
            "megabytes": view.bytes / 1e6,
        }

    @property
    def running(self) -> float:
        """Perplexity of the last `RUNNING` tokens."""
        return _exp(sum(self._window) / len(self._window)) if self._window else math.nan

    @property
    def perplexity(self) -> float:
        """Of all tokens."""
        return _exp(self.total / self.count) if self.count else math.nan

    @property
    def milliseconds(self) -> float:
        """Per token, median of the last `RUNNING`."""
        return float(np.median(self._times)) if self._times else math.nan

    def curve(self) -> tuple[Float[np.ndarray, " point"], Float[np.ndarray, " point"]]:
        """(positions, running perplexity)."""
        points = np.array(self.points, dtype=float).reshape(-1, 3)
        return points[:, 0], points[:, 1]

    def news(self) -> dict[str, Any]:
        """What came since the last call."""
        fresh = min(self.count - self._sent, len(self._latest))
        self._sent = self.count
        return self._about() | {"steps": self._latest[len(self._latest) - fresh :] if fresh else []}

    def all(self) -> dict[str, Any]:
        """Everything that is remembered."""
        self._sent = self.count
        return self._about() | {"steps": list(self._latest), "points": [list(point) for point in self.points]}

    def _about(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "perplexity": self.perplexity if self.count else None,
            "running": self.running if self.count else None,
            "milliseconds": self.milliseconds if self.count else None,
            "ended": self.ended,
            "cache": self._cache,
        }


def _exp(mean: float) -> float:
    return math.exp(min(mean, 700.0))

"""Which keys a stream keeps (thesis Figure 4.1), as values.

    Dense()               all of them: exact, and out of memory in the end
    Window(n)             the n latest: breaks once the first tokens leave
    Sinks(s, r)           s attention sinks and the r latest: StreamingLLM, thesis §4.3.2
    Recompute(n)          the n latest tokens, run through the model anew for every token: no cache, the slow yardstick

The current token counts among the recent ones, so a cache of `Sinks(s, r)` holds at most s + r keys. Positions are
those inside the cache: the keys kept are numbered 0, 1, 2 … for each query, whatever their place in the text.
"""

import dataclasses
from collections.abc import Iterable

from sqviz.errors import SqvizError


@dataclasses.dataclass(frozen=True)
class Dense:
    """Keep every key."""

    @property
    def sinks(self) -> int:
        """None: nothing leaves."""
        return 0

    @property
    def recent(self) -> None:
        """No limit."""


@dataclasses.dataclass(frozen=True)
class Window:
    """Keep the `recent` latest keys, the current one among them. The same as `Sinks(0, recent)`."""

    recent: int

    def __repr__(self) -> str:
        return f"Window({self.recent})"

    def __post_init__(self) -> None:
        _check_recent(self, self.recent)

    @property
    def sinks(self) -> int:
        """None."""
        return 0


@dataclasses.dataclass(frozen=True)
class Sinks:
    """Keep `sinks` attention sinks and the `recent` latest keys.

    Attributes:
        sinks: how many tokens are kept for good; 4 in the thesis (Table 4.2).
        recent: how many of the latest tokens are kept, the current one among them.
        tokens: ids that may become sinks, such as a trained sink token or a line break; None: any. The first `sinks`
            tokens that qualify are taken, whenever they come.
        positions: places in the stream that may become sinks; None: any.
    """

    sinks: int = 4
    recent: int = 252
    tokens: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_recent(self, self.recent)
        if isinstance(self.sinks, bool) or not isinstance(self.sinks, int) or self.sinks < 0:
            raise SqvizError(f"sinks={self.sinks!r}: a number of tokens, 0 at least, is allowed.")
        for name in ("tokens", "positions"):
            chosen = getattr(self, name)
            if chosen is None:
                continue
            whole = isinstance(chosen, Iterable) and all(
                isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in chosen
            )
            if not whole or not chosen:
                raise SqvizError(f"{name}={chosen!r}: give one or more whole numbers, 0 at least, or None for any.")
            object.__setattr__(self, name, tuple(sorted(set(chosen))))

    def __repr__(self) -> str:
        chosen = "".join(
            f", {name}={getattr(self, name)}" for name in ("tokens", "positions") if getattr(self, name) is not None
        )
        return f"Sinks({self.sinks}, {self.recent}{chosen})"


@dataclasses.dataclass(frozen=True)
class Recompute:
    """For each new token, run the `recent` latest tokens through the model without a cache."""

    recent: int

    def __repr__(self) -> str:
        return f"Recompute({self.recent})"

    def __post_init__(self) -> None:
        _check_recent(self, self.recent)


Policy = Dense | Window | Sinks | Recompute
Cached = Dense | Window | Sinks
"""Policies that keep a cache."""


def capacity(policy: Policy) -> int | None:
    """Most keys that are kept; None without a limit."""
    if isinstance(policy, Dense):
        return None
    return policy.recent + (policy.sinks if isinstance(policy, Sinks) else 0)


def chosen_by(policy: Cached) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Which token ids, and which positions, may become sinks; None: any."""
    return (policy.tokens, policy.positions) if isinstance(policy, Sinks) else (None, None)


def of_size(size: int, sinks: int = 4) -> Sinks:
    """`Sinks` with a cache of `size` keys in all.

    Raises `SqvizError` if the sinks leave no room for a recent key.
    """
    if sinks >= size:
        raise SqvizError(f"{sinks} sinks do not fit into a cache of {size} keys: one recent key at least is needed.")
    return Sinks(sinks, size - sinks)


def _check_recent(policy: object, recent: object) -> None:
    if isinstance(recent, bool) or not isinstance(recent, int) or recent < 1:
        raise SqvizError(
            f"{type(policy).__name__}: recent={recent!r}; the current token is one of the recent ones, so 1 at least."
        )

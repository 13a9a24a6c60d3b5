"""`FoundAlpha`: the strengths that a search has found: a map of them, kept as JSON, reapplied."""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqviz.errors import SqvizError
from sqviz.models.linears import Group
from sqviz.quant.plan import FOLDS, Folds
from sqviz.tensorfile import write_bytes

if TYPE_CHECKING:
    import pandas

    from sqviz.widgets.alpha_map import AlphaMapView

_PLACE = re.compile(r"(?:^|\.)(\d+)\.(.+)$")
"""Index of the block and kind of linear in "model.layers.3.mlp.down_proj": the first number is the block's."""


SEARCHES = ("layer", "block", "logits")
"""What strengths are searched by."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """One candidate: how it was found, and KL(p ‖ p̂) in nats per token.

    Attributes:
        name: the objective it was searched by, or "flat 0.5", or "none".
        divergence: on the segments that no search has seen; this decides.
        searched: on those that were searched on, where it is known.
        noise: standard error of how far `divergence` is from that of the best flat strength, segment by segment.
    """

    name: str
    divergence: float
    searched: float | None = None
    noise: float | None = None


@dataclasses.dataclass(frozen=True)
class FoundAlpha:
    """What a search has found: a strength for every group. A callable, as `sqviz.smooth` takes it.

    Attributes:
        alphas: α by the name of each group's first linear; None: not smoothed.
        objective: what was searched by; for "auto" the winner.
        scheme: the scheme it was found for, as code.
        folds: the folds it needs.
        model: name of the model.
        tokens: SHA-256 of the calibration tokens.
        tried: the candidates on text that no search has seen, least divergence first; empty for a single objective.
        complete: False if the search was cancelled.
    """

    alphas: Mapping[str, float | None]
    objective: str
    scheme: str
    folds: Folds
    model: str
    tokens: str
    tried: tuple[Tried, ...] = ()
    complete: bool = True

    def __call__(self, group: Group) -> float | None:
        """α of a group. Raises `SqvizError` for one of another model."""
        if group.name not in self.alphas:
            raise SqvizError(f"these strengths were found for {self.model}, which has no {group.name!r}. Search anew.")
        return self.alphas[group.name]

    def place(self, name: str) -> tuple[int, str]:
        """Block and kind of a group, from its name: (3, "mlp.down_proj")."""
        found = _PLACE.search(name)
        return (int(found[1]), found[2]) if found else (0, name)

    def to_frame(self) -> "pandas.DataFrame":
        """One row per group: its first linear, block, kind, α (NaN: not smoothed)."""
        import pandas

        rows = [(name, *self.place(name), alpha) for name, alpha in self.alphas.items()]
        return pandas.DataFrame(rows, columns=["linear", "block", "kind", "alpha"])

    def tried_to_frame(self) -> "pandas.DataFrame":
        """One row per candidate, the least divergence first: KL on held segments, and on those searched on.

        Between them the standard error of the difference to the best flat strength. All in nats per token.
        """
        import pandas

        rows = [(one.name, one.divergence, one.noise, one.searched, one.name == self.objective) for one in self.tried]
        columns = ["candidate", "KL held, nats per token", "± to flat α", "KL searched, nats per token", "kept"]
        frame = pandas.DataFrame(rows, columns=columns).set_index("candidate")
        return frame.dropna(axis="columns", how="all")

    def map(self, **state: Any) -> "AlphaMapView":
        """α of every linear by kind and block, with the candidates; `state`: traits of `AlphaMapView`."""
        from sqviz.widgets.alpha_map import AlphaMapView

        return AlphaMapView(self, **state)

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """A page with the map: self-contained, no network. Written to `path`; None returns its text."""
        return self.map().to_html(path)

    def to_png(self, path: str | Path | None = None) -> bytes | Path:
        """The map as a PNG, drawn without a browser. Written to `path`; None returns the bytes."""
        return self.map().to_png(path)

    def to_svg(self, path: str | Path | None = None) -> str | Path:
        """The map as an SVG, drawn without a browser. Written to `path`; None returns its text."""
        return self.map().to_svg(path)

    def describe(self) -> str:
        """One line for people: how it was found, for what, and how strong."""
        given = sorted(alpha for alpha in self.alphas.values() if alpha is not None)
        left = len(self.alphas) - len(given)
        parts = [
            f"{self._how} for {self.scheme.removeprefix('sqviz.')}",
            FOLDS[self.folds],
        ]
        if given:
            span = f"{given[0]:g}" if given[0] == given[-1] else f"{given[0]:g} … {given[-1]:g}"
            parts.append(f"α = {span} for {len(given)} of {len(self.alphas)} inputs")
        parts += [f"{left} not smoothed"] if left else []
        parts += [] if self.complete else ["cancelled: the best so far"]
        return "; ".join(parts)

    @property
    def _how(self) -> str:
        if self.objective == "none":
            return "no smoothing"
        return f"searched by {self.objective}" if self.objective in SEARCHES else self.objective

    def __repr__(self) -> str:
        """Short; with a hash of the strengths, so that those of two are equal only if they are."""
        kept = json.dumps([dict(self.alphas), self.tokens]).encode()
        return f"FoundAlpha({self.model}: {self.describe()}; {hashlib.sha256(kept).hexdigest()[:16]})"

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        data, metadata = self.map()._repr_mimebundle_(**kwargs)
        return data | {"text/plain": repr(self)}, metadata

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, in place of what may be there once it is complete."""
        write_bytes(json.dumps({"sqviz": "alpha", **dataclasses.asdict(self)}, indent=1).encode(), Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FoundAlpha":
        """Read what `save` wrote. Raises `SqvizError` if it is something else."""
        try:
            held = json.loads(Path(path).read_text())
            {"alpha": None}[held.pop("sqviz")]
            FOLDS[held["folds"]]
            return cls(**{**held, "tried": tuple(Tried(**one) for one in held["tried"])})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise SqvizError(f"{str(path)!r} holds no strengths written by sqviz ({error!r}).") from error

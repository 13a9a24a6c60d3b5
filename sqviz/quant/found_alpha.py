"""`FoundAlpha`: the strengths that a search has found, kept as JSON and reapplied; and those of the literature."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path

from sqviz.errors import SqvizError
from sqviz.models.linears import Group
from sqviz.quant.plan import Folds
from sqviz.tensorfile import write_bytes

LITERATURE = {
    "opt": 0.5,
    "bloom": 0.5,
    "glm": 0.75,
    "llama": 0.85,
    "mistral": 0.8,
    "mixtral": 0.8,
    "falcon": 0.6,
}
"""Published strengths by `config.model_type`: OPT, BLOOM and GLM-130B from thesis §3.4.1, others from smoothquant."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """One candidate on the segments that no search has seen: how it was found, and KL(p ‖ p̂) in nats per token."""

    name: str
    divergence: float


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
        tried: the candidates on text that no search has seen, the best first; empty unless objective was "auto".
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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, in place of what may be there once it is complete."""
        write_bytes(json.dumps({"sqviz": "alpha", **dataclasses.asdict(self)}, indent=1).encode(), Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FoundAlpha":
        """Read what `save` wrote. Raises `SqvizError` if it is something else."""
        try:
            held = json.loads(Path(path).read_text())
            {"alpha": None}[held.pop("sqviz")]
            return cls(**{**held, "tried": tuple(Tried(**one) for one in held["tried"])})
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise SqvizError(f"{str(path)!r} holds no strengths written by sqviz ({error!r}).") from error

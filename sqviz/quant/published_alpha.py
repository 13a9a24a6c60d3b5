"""`alpha_preset`: the migration strength that was published for a model's family, as a point to start from.

Each row of `PUBLISHED_ALPHAS` says for which model it was found, for which scheme, and where that stands. Where a
family has several, `alpha_preset` takes the row that the model's config fits, or else that of the nearest width. A
published strength belongs to its model and scheme: `sqviz.alpha_curve` shows how another model does with it, and
`sqviz.search_alpha` finds one for each fold.

Sources: the thesis's §3.4.1 (a grid search on a subset of the Pile's validation set) and Tables 3.6 and 3.7; the table
of the README of smoothquant, the authors' repository.
"""

import dataclasses
import math
from typing import Any

from sqviz.errors import SqvizError
from sqviz.models.lm import LM

TABLE_3_2 = "O1, O2 and O3: per-tensor weights"
PER_CHANNEL = "per-token activations, per-channel weights"


@dataclasses.dataclass(frozen=True)
class PublishedAlpha:
    """One published strength.

    Attributes:
        alpha: the migration strength.
        model: for which model it was published.
        scheme: how that model was quantised, in words.
        source: where it stands.
        model_type: `config.model_type` of its family.
        width: its `config.hidden_size`; None: all sizes of the family.
        fields: (name, value) of what else in the config tells it from the rest of its family.
        exact: of what `alpha_preset` returns, whether it was published for this very model; False: for the one of its
            family that comes nearest.
    """

    alpha: float
    model: str
    scheme: str
    source: str
    model_type: str
    width: int | None = None
    fields: tuple[tuple[str, int], ...] = ()
    exact: bool = True

    def __str__(self) -> str:
        near = "" if self.exact else "; nothing is published for this very model, this one is the nearest of its family"
        return f"α = {self.alpha:g} for {self.model}, {self.scheme} ({self.source}){near}"


def _llama(alpha: float, model: str, width: int, source: str, **fields: int) -> PublishedAlpha:
    return PublishedAlpha(alpha, model, PER_CHANNEL, source, "llama", width, tuple(fields.items()))


_ONE = {"vocab_size": 32000, "max_position_embeddings": 2048}
_TWO = {"vocab_size": 32000, "max_position_embeddings": 4096}
_THREE = {"vocab_size": 128256}

PUBLISHED_ALPHAS: tuple[PublishedAlpha, ...] = (
    PublishedAlpha(0.5, "OPT, all sizes", TABLE_3_2, "thesis §3.4.1", "opt"),
    PublishedAlpha(0.5, "BLOOM, all sizes", TABLE_3_2, "thesis §3.4.1", "bloom"),
    PublishedAlpha(0.75, "GLM-130B", TABLE_3_2, "thesis §3.4.1", "glm", 12288),
    _llama(0.85, "Llama-2-7B", 4096, "thesis Table 3.7", **_TWO),
    _llama(0.85, "Llama-2-13B", 5120, "thesis Table 3.7", **_TWO),
    _llama(0.9, "Llama-2-70B", 8192, "thesis Table 3.7", **_TWO),
    _llama(0.85, "Llama-3-8B", 4096, "README of smoothquant", **_THREE),
    _llama(0.85, "Llama-3-70B", 8192, "README of smoothquant", **_THREE),
    *(
        PublishedAlpha(
            0.8,
            f"LLaMA-{size}",
            "per-token activations",
            "thesis Table 3.6",
            "llama",
            width,
            tuple(_ONE.items()),
        )
        for size, width in (("7B", 4096), ("13B", 5120), ("30B", 6656), ("65B", 8192))
    ),
    PublishedAlpha(0.8, "Mistral-7B", PER_CHANNEL, "thesis Table 3.7", "mistral", 4096),
    PublishedAlpha(0.8, "Mixtral-8x7B", PER_CHANNEL, "thesis Table 3.7", "mixtral", 4096),
    PublishedAlpha(0.6, "Falcon-7B", PER_CHANNEL, "thesis Table 3.7", "falcon", 4544),
    PublishedAlpha(0.7, "Falcon-40B", PER_CHANNEL, "thesis Table 3.7", "falcon", 8192),
)
"""Every strength that the thesis or its authors' repository gives, with what it was found for."""


def alpha_preset(lm: LM | Any) -> PublishedAlpha:
    """The strength published for a model, or for the one of its family that comes nearest (then `exact` is False).

    Args:
        lm: the model, or its transformers config: no weights are needed.

    Raises:
        SqvizError: it has no `model_type`, or nothing is published for that family; the message names the families.

    Example:
        `sqviz.smooth(lm, m, sqviz.alpha_preset(lm).alpha)`
    """
    config = lm.config if isinstance(lm, LM) else lm
    kind = getattr(config, "model_type", None)
    if not isinstance(kind, str):
        raise SqvizError(f"alpha_preset({lm!r}): a model from sqviz.load, or a transformers config, is allowed.")
    rows = [row for row in PUBLISHED_ALPHAS if row.model_type == kind]
    if not rows:
        families = ", ".join(dict.fromkeys(row.model_type for row in PUBLISHED_ALPHAS))
        raise SqvizError(
            f"no α is published for model_type={kind!r}; there are: {families}. See what one costs with "
            "sqviz.alpha_curve(lm, m, text), or search: sqviz.search_alpha(lm, m, scheme)."
        )
    fitting = [row for row in rows if _fits(row, config)]
    if fitting:
        return fitting[0]
    width = getattr(config, "hidden_size", None) or 1
    nearest = min(rows, key=lambda row: abs(math.log((row.width or width) / width)))
    return dataclasses.replace(nearest, exact=False)


def _fits(row: PublishedAlpha, config: Any) -> bool:
    wanted = dict(row.fields) | ({} if row.width is None else {"hidden_size": row.width})
    return all(getattr(config, name, None) == value for name, value in wanted.items())

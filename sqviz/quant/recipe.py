"""How a model came about, as plain data: what was smoothed how strongly, and on which text that was measured.

    {"did": "smooth", "alpha": 0.5, "folds": "norm", "online": False, "calibration": {…}, "search": None}

`alpha` is what `sqviz.smooth` takes to do the same again: a number, or the strength of each group that was smoothed, by
the name of its first linear. `search` is there for strengths that were searched: by what, for which scheme, on
which tokens. A text is known by the SHA-256 of its token ids as int64.
"""

import hashlib
import numbers
from typing import TYPE_CHECKING, Any

import torch

from sqviz.models.lm import LM
from sqviz.quant.found_alpha import FoundAlpha
from sqviz.quant.plan import Alpha, Folds, Step

if TYPE_CHECKING:
    from sqviz.observe.magnitudes import Magnitudes


def calibration_record(magnitudes: "Magnitudes") -> dict[str, Any]:
    """Which model was captured, on how many segments of which length, and the hash of their tokens."""
    tokens = magnitudes.tokens.to(torch.int64).contiguous().numpy()
    return {
        "model": magnitudes.model,
        "samples": magnitudes.samples,
        "length": magnitudes.length,
        "tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
    }


def smoothing_record(
    alpha: Alpha, steps: tuple[Step, ...], folds: Folds, online: bool, magnitudes: object
) -> dict[str, Any]:
    """What `sqviz.smooth` did.

    Args:
        alpha: what it was given, after a search for "auto".
        steps: what followed from that.
        folds, online: as it was given them.
        magnitudes: what max|X| came from; on record if it is a capture of sqviz's own.
    """
    from sqviz.observe.magnitudes import Magnitudes

    return {
        "did": "smooth",
        "alpha": float(alpha) if isinstance(alpha, numbers.Real) else {step.group.name: step.alpha for step in steps},
        "folds": folds,
        "online": online,
        "calibration": calibration_record(magnitudes) if isinstance(magnitudes, Magnitudes) else None,
        "search": _search(alpha) if isinstance(alpha, FoundAlpha) else None,
    }


def _search(found: FoundAlpha) -> dict[str, Any]:
    """What is known of a search, beside the strengths."""
    return {
        "objective": found.objective,
        "scheme": found.scheme,
        "model": found.model,
        "tokens_sha256": found.tokens,
        "complete": found.complete,
        "tried": {one.name: one.divergence for one in found.tried},
    }


def scales_hash(lm: LM) -> str:
    """SHA-256 of the smoothing factors: of each linear, by name, its name, a zero byte and its factors in float32."""
    digest = hashlib.sha256()
    for name in sorted(lm.scales):
        digest.update(name.encode() + b"\0")
        digest.update(lm.scales[name].detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()

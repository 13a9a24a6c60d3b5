"""Logits of some tokens only: with a large vocabulary the head costs as much as several blocks."""

import inspect
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from sqviz.models.lm import LM


def logits_of(lm: LM, which: int | Int64[Tensor, " place"]) -> dict[str, Any]:
    """The argument of the model's forward for the logits of these places, or of so many last tokens, alone.

    Empty for a model that has no such argument: it gives the logits of all tokens.
    """
    return {"logits_to_keep": which} if "logits_to_keep" in inspect.signature(lm.model.forward).parameters else {}

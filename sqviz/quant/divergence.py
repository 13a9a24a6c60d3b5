"""`Divergence`: how far a changed model's next tokens are from the model's own, on some segments.

    KL(p ‖ p̂) = Σ_v p(v) (ln p(v) − ln p̂(v))   nats per token, mean over every STRIDE-th token of each segment

Both models are asked about the same text, so a few segments tell apart what perplexity on as many would not.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from sqviz.models.lm import LM

STRIDE = 4
"""Of the tokens of a segment every so manyth is asked for the next one: less to compute and to hold."""


class Divergence:
    """Called with another model of the same vocabulary; what `lm` itself predicts is computed once."""

    def __init__(self, lm: LM, segments: Int64[Tensor, "segment token"]) -> None:
        self.lm, self.segments = lm, segments
        self._known: list[Float[Tensor, "token vocabulary"]] = []

    def __call__(self, other: LM) -> float:
        """KL(p ‖ p̂), p of `lm` and p̂ of `other`, in nats per token."""
        if not self._known:
            self._known = [_next_token(self.lm, segment) for segment in self.segments]
        total = 0.0
        for expected, segment in zip(self._known, self.segments, strict=True):
            got = _next_token(other, segment)
            total += float((expected.exp() * (expected - got)).sum(-1).mean())
        return total / len(self.segments)


def _next_token(lm: LM, segment: Int64[Tensor, " token"]) -> Float[Tensor, "token vocabulary"]:
    """ln p of what follows every STRIDE-th token."""
    with torch.no_grad():
        logits = lm.model(segment[None].to(lm.device), use_cache=False).logits[0, STRIDE - 1 :: STRIDE]
        return logits.float().log_softmax(-1)

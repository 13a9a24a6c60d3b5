"""`Divergence`: how far a changed model's next tokens are from the model's own, on some segments.

    KL(p ‖ p̂) = Σ_v p(v) (ln p(v) − ln p̂(v))   nats per token, mean over every STRIDE-th token of each segment

Both models are asked about the same text, so a few segments tell apart what perplexity on as many would not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from sqviz.models.lm import LM
from sqviz.models.logits import logits_of
from sqviz.progress import CancelToken

STRIDE = 4
"""Of the tokens of a segment every so manyth is asked for the next one: less to compute and to hold."""


class Divergence:
    """Called with another model of the same vocabulary; what `lm` itself predicts is computed once."""

    def __init__(self, lm: LM, segments: Int64[Tensor, "segment token"], cancel: CancelToken | None = None) -> None:
        self.lm, self.segments, self.cancel = lm, segments, cancel or CancelToken()
        self._known: list[Float[Tensor, "token vocabulary"]] = []
        self._made: list[list[Any]] = []

    def __call__(self, other: LM, since: int = 0) -> float:
        """KL(p ‖ p̂), p of `lm` and p̂ of `other`, in nats per token; see `each`."""
        return float(self.each(other, since).mean())

    def each(self, other: LM, since: int = 0) -> Float[Tensor, " segment"]:
        """The same of every segment: two models compared segment by segment differ by less noise than their means.

        Args:
            other: the changed model. Its blocks give what `lm`'s gave while this runs, and are as they were after it.
            since: index of its first block that was changed; those before it are not computed again.

        Raises `Cancelled` between two segments.
        """
        if not self._known:
            self._known = [_next_token(self.lm, segment) for segment in self.segments]
        if since and not self._made:
            self._made = [_outputs(self.lm, segment) for segment in self.segments]
        found = []
        for place, (expected, segment) in enumerate(zip(self._known, self.segments, strict=True)):
            self.cancel.check("comparing the logits")
            with _given(other.blocks[:since], self._made[place] if since else []):
                got = _next_token(other, segment)
            found.append(float((expected.exp() * (expected - got)).sum(-1).mean()))
        return torch.tensor(found)


def _next_token(lm: LM, segment: Int64[Tensor, " token"]) -> Float[Tensor, "token vocabulary"]:
    """ln p of what follows every STRIDE-th token."""
    places = torch.arange(STRIDE - 1, len(segment), STRIDE, device=lm.device)
    with torch.no_grad():
        logits = lm.model(segment[None].to(lm.device), use_cache=False, **logits_of(lm, places)).logits[0]
        return (logits if len(logits) == len(places) else logits[places]).float().log_softmax(-1)


def _outputs(lm: LM, segment: Int64[Tensor, " token"]) -> list[Any]:
    """What every block returns."""
    made: list[Any] = []
    hooks = [block.register_forward_hook(lambda module, given, out: made.append(out)) for block in lm.blocks]
    try:
        _next_token(lm, segment)
    finally:
        for hook in hooks:
            hook.remove()
    return made


@contextmanager
def _given(blocks: list[nn.Module], outputs: list[Any]) -> Iterator[None]:
    """Let blocks return these outputs without computing them."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, out in zip(blocks, outputs, strict=False):
            block.__dict__["forward"] = lambda *given, out=out, **named: out
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            del block.__dict__["forward"]
            if own is not None:
                block.__dict__["forward"] = own

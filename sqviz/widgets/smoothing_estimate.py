"""Perplexity of a whole model under a state of the smoothing explorer, in steps small enough to be stopped at once.

The copy that is smoothed and quantised is this module's own; hooks on its blocks look at the turn, so that neither a
cancel button nor a slider waits for more than one block of one segment.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from sqviz.corpus.segments import Text
from sqviz.models.linears import groups
from sqviz.models.lm import LM, share
from sqviz.observe.magnitudes import Magnitudes
from sqviz.quant.linear import quantize
from sqviz.quant.smooth import smooth
from sqviz.widgets.smoothing_sample import held_tokens, longest
from sqviz.widgets.smoothing_state import State, scheme_key
from sqviz.widgets.worker import Turn

SEGMENTS, LENGTH = 8, 128
BLOCKS_AT_ONCE = 2
Report = Callable[[str, int, int, str], None]


def smooth_online(lm: LM) -> bool:
    """Whether smoothing the inputs of attention and MLP needs scaling at run time: some have no exact fold."""
    return any(group.entry and group.fold is None for group in groups(lm))


class Estimator:
    """Scores a held slice under one state after another; the model's own score is taken once."""

    def __init__(self, lm: LM, magnitudes: Magnitudes, text: Text | None, report: Report) -> None:
        self._lm, self._magnitudes, self._text, self._report = lm, magnitudes, text, report
        self._reference: float | None = None

    def run(self, turn: Turn, state: State) -> dict[str, Any]:
        """{reference, value: perplexities, tokens, alpha, scheme, folds}. Raises `Cancelled` within a block's time."""
        self._report("estimate", 0, 1, "reading held text")
        tokens = held_tokens(self._lm, self._magnitudes, self._text, SEGMENTS * LENGTH)
        length = min(longest(self._lm, LENGTH), len(tokens))
        tokens = tokens[: len(tokens) // length * length]
        if self._reference is None:
            self._reference = self._score(
                turn, self._lm.replace(model=share(self._lm.model)), tokens, length, "unquantised"
            )
        turn.check("the estimate")
        value = self._score(turn, self._build(turn, state), tokens, length, "this state")
        return {
            "reference": self._reference,
            "value": value,
            "tokens": len(tokens),
            "alpha": state.alpha,
            "scheme": scheme_key(state.scheme),
            "folds": state.folds,
        }

    def _build(self, turn: Turn, state: State) -> LM:
        """The smoothed and quantised model, quantised a few blocks at a time."""
        self._report("estimate", 0, 1, "smoothing")
        online = smooth_online(self._lm)
        lm = smooth(self._lm, self._magnitudes, state.alpha, folds=state.folds, online=online, check=False)
        every = groups(lm)
        blocks = sorted({group.block for group in every})
        for first in range(0, len(blocks), BLOCKS_AT_ONCE):
            turn.check("the estimate")
            self._report("estimate", first, len(blocks), f"quantising, {first} of {len(blocks)} layers")
            now = set(blocks[first : first + BLOCKS_AT_ONCE])
            others = [name for group in every if group.block not in now for name in group.consumers]
            lm = quantize(lm, state.scheme, self._magnitudes, skip=others)
        return lm

    def _score(self, turn: Turn, lm: LM, tokens: Any, length: int, what: str) -> float:
        from sqviz.evaluation.perplexity import segment_nll

        total, count, done, segments = 0.0, 0, 0, len(tokens) // length
        with interruptible(lm, turn):
            for nll in segment_nll(lm, tokens, length):
                total, count, done = total + float(nll.double().sum()), count + nll.numel(), done + 1
                self._report("estimate", done, segments, f"{what}, {done} of {segments}")
        return math.exp(min(total / max(count, 1), 700.0))


@contextmanager
def interruptible(lm: LM, turn: Turn) -> Iterator[None]:
    """Within it, every block of this (privately owned) model looks at the turn before it computes."""
    with ExitStack() as undo:
        for block in lm.blocks:
            undo.callback(block.register_forward_pre_hook(lambda *_: turn.check("the estimate")).remove)
        yield

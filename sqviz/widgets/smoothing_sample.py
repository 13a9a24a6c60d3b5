"""The activations of one short text, from which the smoothing explorer knows what rounding does to a linear's output.

They are measured once, in a pass through a private copy of the model's module tree (the tensors are shared, the hooks
are not), so that neither the user's own passes in another thread are seen here, nor these there. Within a budget of
bytes the inputs of all groups are kept; above it those of one block, measured again when another block is opened.
"""

from collections.abc import Callable
from contextlib import suppress

import torch
from jaxtyping import Float, Float16, Int64
from torch import Tensor

from sqviz.corpus.segments import Text, as_tokens
from sqviz.corpus.source import text as default_text
from sqviz.models.linears import Group, groups, weight
from sqviz.models.lm import LM, share
from sqviz.observe.hooks import Routing, body, watch
from sqviz.observe.magnitudes import Magnitudes
from sqviz.observe.recorder import MapRecorder
from sqviz.widgets.worker import Turn

SAMPLE_TOKENS = 512
HELD_SEED = 1_000_003
"""Of the order of documents held out: another one than `sqviz.capture` uses by default."""
MAP_ROWS = 256
BUDGET_BYTES = 1 << 29
Report = Callable[[int, int], None]


class _Done(Exception):
    """Ends a forward pass early."""


def held_tokens(lm: LM, magnitudes: Magnitudes, text: Text | None, count: int) -> Int64[Tensor, " token"]:
    """About `count` tokens that the calibration did not read, as far as that can be known.

    From `text` in its order; without it, from documents of the embedded addresses drawn with a seed of their own; for a
    model without a tokenizer, the end of the calibration stream itself.
    """
    if text is not None:
        return as_tokens(lm, text, count)
    if lm.tokenizer is None:
        return magnitudes.tokens[-count:]
    return next(default_text().segments(lm.tokenizer, count, 1, HELD_SEED))


def longest(lm: LM, length: int) -> int:
    """`length`, or as many tokens as the model has positions for."""
    positions = getattr(lm.config, "max_position_embeddings", None)
    return min(length, positions) if isinstance(positions, int) else length


class Sample:
    """Inputs of the linears on one text, float32 [token channel] by group, measured when asked for."""

    def __init__(self, lm: LM, tokens: Int64[Tensor, " token"], budget_bytes: int = BUDGET_BYTES) -> None:
        self.lm = lm.replace(model=share(lm.model))
        self.tokens = tokens
        self.groups = {group.name: group for group in groups(self.lm)}
        channels = {name: weight(self.lm, name).shape[1] for name in self.groups}
        self.all_fit = 4 * len(tokens) * sum(channels.values()) <= budget_bytes
        self._held: dict[str, Float[Tensor, "token channel"]] = {}

    def get(self, group: str) -> Float[Tensor, "token channel"] | None:
        """The input of a group, if it has been measured and is still held."""
        return self._held.get(group)

    def measure(self, turn: Turn, group: str, report: Report, arrived: Callable[[str], None]) -> None:
        """Measure the inputs of all groups, or of those in the block of `group` where all are too many.

        Args:
            turn: looked at before every group.
            group: the one that is wanted.
            report: called with (groups done, groups in all).
            arrived: called with the name of each group as soon as its input is held.
        """
        wanted = list(self.groups.values())
        if not self.all_fit:
            wanted = [other for other in wanted if other.block == self.groups[group].block]
            self._held = {name: x for name, x in self._held.items() if self.groups[name] in wanted}

        def keep(seen: Group, x: Float[Tensor, "token channel"]) -> None:
            turn.check("measuring activations")
            self._held[seen.name] = x.detach().to(torch.float32, copy=True)
            report(len(self._held), len(wanted))
            arrived(seen.name)
            if all(other.name in self._held for other in wanted):
                raise _Done

        def keep_routed(seen: Group, x: Float[Tensor, "row channel"], routing: Routing) -> None:
            keep(seen, x[routing.expert == busiest(routing.expert)])

        with suppress(_Done):
            self._pass(self.tokens, keep, keep_routed, wanted)

    def maps(self, turn: Turn, magnitudes: Magnitudes) -> dict[str, Float16[Tensor, "bin channel"]]:
        """|x| of every group over the first calibration segment, max-pooled along tokens, for captures saved without.

        Where the capture holds the maps of some groups, the others get as many rows.
        """
        tokens = magnitudes.tokens[: magnitudes.length]
        rows = max(len(magnitudes.inputs[name].map) for name in self.groups) or MAP_ROWS
        recorder = MapRecorder(rows, len(tokens))

        def see(group: Group, x: Float[Tensor, "token channel"]) -> None:
            turn.check("measuring maps")
            recorder.see(group, x)

        self._pass(tokens, see, recorder.see_routed, list(self.groups.values()))
        return recorder.maps

    def _pass(self, tokens: Tensor, see: Callable, routed: Callable, wanted: list[Group]) -> None:
        with torch.no_grad(), watch(self.lm, see, wanted, routed=routed):
            body(self.lm)(tokens[None].to(self.lm.device), use_cache=False)


def busiest(expert: Int64[Tensor, " row"]) -> int:
    """The expert with the most rows."""
    return int(expert.bincount().argmax())

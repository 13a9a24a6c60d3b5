"""`SinkCache`: a transformers `Cache` that keeps attention sinks and a window of recent keys (thesis §4.3).

It is given to the model like any other cache, `model(ids, past_key_values=cache)` or `model.generate(ids,
past_key_values=cache)`, and works with whatever attention the model runs: it writes keys to where plan.py says, turns
the few sinks (layer.py), and tells the model where the new tokens stand and what they may see (steering.py).

The cost of a step does not depend on how much was read: one key and value written, the sinks written one slot further.
"""

import dataclasses
import weakref
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from sqviz.errors import SqvizError
from sqviz.models.lm import LM
from sqviz.streaming.checks import check_policy, check_rows, padding
from sqviz.streaming.layer import SinkLayer
from sqviz.streaming.plan import Plan, State, choose, plan
from sqviz.streaming.policies import Cached, Dense, Sinks, capacity, chosen_by
from sqviz.streaming.positions import Alibi, Angles, Rotary, angles, frequencies, limit_of, scheme_of
from sqviz.streaming.steering import steer

SLACK = 256
"""Steps at least between two moves of the window to the beginning of the buffer."""


class SinkCache(Cache):
    """Keys and values of a stream under a policy; see the module's docstring.

    Attributes:
        lm: the model it was made for.
        policy: may be changed while the stream runs. More sinks: the oldest keys still held become sinks. A wider
            window: it grows from now on. `Dense`: nothing leaves from now on, and the sinks that are there stay.
        int8: whether keys and values are kept as INT8.
        state: what was read and what is kept; see plan.py.
        share: whether several queries may share their sinks; set by shared_sinks.py.
    """

    def __init__(self, lm: LM, policy: Cached | None = None, *, int8: bool = False) -> None:
        """Make an empty cache.

        Args:
            lm: the model; its forward gets a hook until the cache is closed or collected.
            policy: `Sinks(4, 252)` by default.
            int8: keep keys and values as INT8, one step per token and head; sinks stay as they are.

        Raises:
            SqvizError: learned absolute positions, a sliding window smaller than the cache, `Recompute`, or more keys
                than the model has angles for.
            UnknownArchitecture: a position scheme that is not known.
        """
        self.lm, self.scheme = lm, scheme_of(lm)
        self.limit = limit_of(lm, self.scheme)
        self._policy = Sinks() if policy is None else policy
        check_policy(lm, self._policy, self.limit)
        self.state, self.length = State(), 0
        self.int8, self.share = int8, False
        self._plan: Plan | None = None
        self._pending: State | None = None
        self._turns: dict[int, Angles] = {}
        self.bias: dict[str, Any] | None = None
        self.arriving: dict[int, Int[Tensor, " row"]] = {}
        self.rows, self.passes = 0, 0
        shared: dict[bytes, Tensor] = {}
        layers = []
        for index in range(lm.config.num_hidden_layers):
            omega = frequencies(lm, self.scheme, index) if isinstance(self.scheme, Rotary) else None
            if omega is not None:
                omega = shared.setdefault(omega.cpu().numpy().tobytes(), omega)
            layers.append(SinkLayer(self, omega))
        super().__init__(layers=layers)
        handles = steer(self)
        self.close = weakref.finalize(self, _remove, handles)
        """Take the hooks off the model; the cache cannot be used afterwards."""

    # --- what is kept ---

    @property
    def policy(self) -> Cached:
        """What is kept."""
        return self._policy

    @policy.setter
    def policy(self, policy: Cached) -> None:
        self.abort()
        check_policy(self.lm, policy, self.limit)
        self._policy, known = policy, self.state.sinks
        kept = int((known < self.state.held).sum(-1).max()) if isinstance(policy, Dense) else policy.sinks
        self.state.sinks = known[:, :kept]
        if policy.sinks > known.shape[1]:
            self._adopt(policy)

    @property
    def slots(self) -> int:
        """Sinks that may be there."""
        return self.state.sinks.shape[1] if isinstance(self._policy, Dense) else self._policy.sinks

    @property
    def kept(self) -> int:
        """Keys that are held."""
        chosen = int((self.state.sinks < self.state.held).sum(-1).max()) if self.state.sinks.numel() else 0
        return chosen + self.state.seen - self.state.held

    @property
    def attended(self) -> int:
        """Keys that the pass under way attends to beside its own; outside of a pass, those held."""
        return self.kept if self._plan is None else self._plan.keys - self._plan.new

    @property
    def bytes(self) -> int:
        """Memory of the buffers and sinks, in bytes."""
        tensors = [
            x for layer in self.layers for x in (*layer.sinks, *(x for store in layer.stores for x in store.tensors))
        ]
        return sum(x.numel() * x.element_size() for x in tensors)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Where the first new query stands among the keys attended to."""
        return self.attended

    def reset(self) -> None:
        """Forget everything that was read."""
        self.abort()
        super().reset()
        self.state, self.length, self.rows = State(), 0, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows in another order (beam search)."""
        super().reorder_cache(beam_idx)
        beam_idx = beam_idx.cpu()
        if self.state.pads is not None:
            self.state.pads = self.state.pads[beam_idx]
        if len(self.state.sinks) > 1:
            self.state.sinks = self.state.sinks[beam_idx]

    def crop(self, *_: Any) -> None:
        """Refused: what was evicted cannot come back."""
        raise SqvizError("a SinkCache cannot be cropped: evicted keys are gone. Use reset(), or DynamicCache for that")

    # --- one forward pass ---

    @property
    def now(self) -> Plan:
        """The plan of the pass under way."""
        if self._plan is None:
            raise self.stranger
        return self._plan

    @property
    def shared(self) -> bool:
        """Whether the queries of the pass under way have to be turned; see shared_sinks.py."""
        return self._plan is not None and self._plan.shared

    @property
    def stranger(self) -> SqvizError:
        """What is said to a pass that did not begin here."""
        return SqvizError(
            f"this SinkCache was made for {self.lm.name} and used with another model, or after close(). Make one "
            "with SinkCache(lm, policy) for the model that runs"
        )

    def angles_of(self, omega: Float[Tensor, " pair"] | None) -> Angles:
        """By how much the sinks are turned in this pass: [row 1 sink pair], or [row 1 query sink pair] if `now.each`.

        Computed once for all layers that share the frequencies.
        """
        assert omega is not None
        if id(omega) not in self._turns:
            now = self.now
            assert now.targets is not None
            targets = now.targets if now.each else now.targets[:, -1]
            if now.shared:
                targets = torch.arange(now.taken)[None]
            cos, sin = angles(targets.to(omega.device), omega, self.lm.dtype)
            self._turns[id(omega)] = (cos.unsqueeze(1), sin.unsqueeze(1))
        return self._turns[id(omega)]

    def begin(self, ids: Int[Tensor, "batch token"] | None, rows: int, new: int, mask: Tensor | None) -> Plan:
        """Make room for `new` tokens and plan the pass. Changes nothing that a failed pass would have to undo."""
        if not self.state.seen:
            self.reset()  # a first pass that failed may have left buffers of another shape
        self.abort()
        if new == 0 or rows == 0:
            raise SqvizError(f"there is nothing to read: {rows} rows of {new} tokens")
        if self.state.seen and rows != self.rows:
            raise SqvizError(
                f"this cache holds {self.rows} rows and was given {rows}. Use one cache per batch, or reset()"
            )
        pads = padding(self.state, mask, new)
        check_rows(self.scheme, self._policy, rows, pads)
        sinks = self._choose(pads, ids, new)
        self._make_room(new)
        self._pending = dataclasses.replace(self.state, pads=pads, sinks=sinks)
        alibi = isinstance(self.scheme, Alibi)
        self._plan = plan(self._pending, new, self._policy.recent, turned=not alibi, places=alibi, share=self.share)
        self.rows, self.passes = rows, self.passes + 1
        return self._plan

    def commit(self) -> None:
        """The pass went through all layers."""
        assert self._plan is not None
        assert self._pending is not None
        self.state = dataclasses.replace(self._pending, seen=self.state.seen + self._plan.new, held=self._plan.held)
        self.abort()

    def abort(self) -> None:
        """The pass failed, or is over."""
        self._plan, self._pending, self.bias = None, None, None
        self.arriving, self._turns = {}, {}

    def undo(self, before: State) -> None:
        """Go back to a copy of `state`: of the keys written since, nothing is remembered."""
        self.abort()
        self.state.seen, self.state.sinks = before.seen, before.sinks
        self.state.held = before.held
        self.state.held = self._first()

    @property
    def hidden(self) -> Bool[Tensor, "row key"] | None:
        """Which keys of a pass without sinks are padding; None without padding."""
        if self._pending is None or self._pending.pads is None:
            return None
        columns = self.state.base + self.now.window + torch.arange(self.now.keys)
        return columns[None] < self._pending.pads[:, None]

    def _choose(self, pads: Tensor | None, ids: Tensor | None, new: int) -> Int[Tensor, "row sink"]:
        """The sinks once the new tokens are read; those among them are noted as `arriving`."""
        tokens, positions = chosen_by(self._policy)
        if tokens is not None and ids is None:
            raise SqvizError(f"{self._policy} chooses sinks by token id, so the model has to be given input_ids")
        if tokens is None or ids is None:
            ids = torch.empty(1, new, dtype=torch.long)
        state = dataclasses.replace(self.state, pads=pads)
        chosen = choose(state, self.slots, ids, tokens, positions)
        self.arriving = _among(chosen, self.state.seen, self.state.seen + new)
        return chosen

    def _adopt(self, policy: Cached) -> None:
        """After more sinks were asked for: take the oldest keys still held."""
        tokens, positions = chosen_by(policy)
        state = self.state
        if tokens is not None or not state.seen:
            return  # the ids of what was read are not kept; those that come will do
        past = dataclasses.replace(state, seen=state.held)
        width = torch.empty(1, state.seen - state.held, dtype=torch.long)
        chosen = choose(past, policy.sinks, width, None, positions)
        arriving = _among(chosen, state.held, state.seen)
        if arriving:
            for layer in self.layers:
                layer.remember(arriving)
        state.sinks = chosen

    # --- room ---

    def _first(self) -> int:
        """First column that the next query sees in its window."""
        recent = self._policy.recent
        return max(self.state.held, 0 if recent is None else self.state.seen - recent + 1)

    def _standard(self) -> int | None:
        """Length of the buffer that a stream settles at."""
        size = capacity(self._policy)
        return None if size is None else size + max(SLACK, size // 2)

    def _fit(self, new: int) -> tuple[bool, int]:
        """Whether the window has to move before `new` tokens are written, and the length of the buffer then."""
        sinks, first, seen = self.slots, self._first(), self.state.seen
        needed, standard = sinks + seen - first + new, self._standard()
        length = needed + max(SLACK, needed // 2)
        if standard is not None:
            length = max(needed, min(length, standard))
        if self.limit is not None:
            length = max(needed, min(length, self.limit))
        start, window = seen - self.state.base, first - self.state.base
        stays = start + new <= self.length and window >= sinks and (standard is None or self.length <= standard)
        return not stays, length

    def _make_room(self, new: int) -> None:
        """Drop what no query sees any more, and move the window if the new tokens would not fit.

        If this is cut short, layers differ in their base; the next call brings them together again.
        """
        first, base = self._first(), self.state.base
        moves, length = self._fit(new)
        if moves:
            base = first - self.slots
        else:
            length = self.length
        if moves and self.limit is not None and length > self.limit:
            raise SqvizError(
                f"{self.lm.name} has angles for {self.limit} positions; the window and {new} new tokens need {length}. "
                f"Use a smaller window than {self._policy}, or feed fewer tokens at a time"
            )
        self.state.held = first
        for layer in self.layers:
            if layer.is_initialized:
                layer.move(first, self.state.seen, base, length)
        self.state.base, self.length = base, length


def _among(chosen: Int[Tensor, "row sink"], first: int, stop: int) -> dict[int, Int[Tensor, " row"]]:
    """{sink: [row] column} of the sinks among columns first … stop − 1; −1 for rows whose sink is elsewhere."""
    among = (chosen >= first) & (chosen < stop)
    return {j: torch.where(among[:, j], chosen[:, j], -1) for j in range(chosen.shape[1]) if bool(among[:, j].any())}


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()

"""Where the keys of one forward pass go, and which of them each query sees. No tensor of the model is touched here.

Keys lie in a buffer in the order of the stream; the index of a key in the buffer is the position it is turned to. The
window of the `recent` latest keys moves through the buffer; the sinks stand in the slots right before it, so that

    index        … [ sink 0 | … | sink m−1 ][ oldest recent key | … | current token ]
    in the cache     0 … m−1                   m …                  m + recent − 1

all differences of indices are differences of positions inside the cache (thesis §4.3.2). A step writes one key and, as
the window moved on by one, the few sinks anew, one place further. Where the buffer ends, the window moves back to its
beginning: the recent keys are turned back by as much, which keeps every angle small whatever the length of the text.

Several queries in one pass see windows that differ. Their recent keys stand right for all of them; but sinks would have
to stand right before each window. So each query gets sinks of its own, turned to where it wants them, and a mask keeps
the others out. That is the exact block-parallel form: with n queries, s sinks and r recent keys, n·s + r + n keys.
Where the attention allows, the queries are turned instead and share sinks turned to 0, 1, 2 … (shared_sinks.py).
"""

import dataclasses

import torch
from jaxtyping import Bool, Int
from torch import Tensor

NEVER = 1 << 60
"""The column of a sink that has not come yet: later than any token."""


@dataclasses.dataclass
class State:
    """What a stream remembers beside its keys. Columns count the tokens of the stream, padding included.

    Attributes:
        seen: columns that went through the model.
        base: the buffer index of column c is c − base.
        held: the first column still in the window.
        pads: [row] padding columns on the left; None without padding.
        sinks: [row sink] columns of the sinks that were chosen, ascending; NEVER where none was. One row if all rows of
            the batch agree.
    """

    seen: int = 0
    base: int = 0
    held: int = 0
    pads: Int[Tensor, " row"] | None = None
    sinks: Int[Tensor, "row sink"] = dataclasses.field(default_factory=lambda: torch.empty(1, 0, dtype=torch.long))


@dataclasses.dataclass
class Plan:
    """One forward pass of n new tokens.

    Attributes:
        new: number of new tokens n.
        start: buffer index of the first.
        window: buffer index of the oldest recent key that any query sees.
        taken: sinks that some query sees: the first so many.
        each: whether every query gets sinks of its own; otherwise all share the slots before the window.
        shared: whether the sinks in these slots are turned to 0, 1, 2 … and the queries are to be turned to meet them.
        targets: [row query sink] the index each sink is turned to; row and query are 1 where all agree.
        visible: [row query key] what each query sees of the keys that the pass attends to; None for all that came
            before it, as far as the model's own mask lets it.
        places: [row query key] positions inside the cache; only when asked for.
        lows: [query] how far each query's window begins behind that of the first.
        held: first column still needed after the pass.
    """

    new: int
    start: int
    window: int
    taken: int
    each: bool
    shared: bool
    targets: Int[Tensor, "row query sink"] | None
    visible: Bool[Tensor, "row query key"] | None
    places: Int[Tensor, "row query key"] | None
    lows: list[int]
    held: int

    @property
    def keys(self) -> int:
        """How many keys the pass attends to."""
        return self.taken * (self.new if self.each else 1) + self.start + self.new - self.window

    @property
    def end(self) -> int:
        """Buffer index behind the last new key."""
        return self.start + self.new


def plan(state: State, new: int, recent: int | None, *, turned: bool, places: bool, share: bool = False) -> Plan:
    """How `new` tokens are fed.

    Args:
        state: before the pass; `state.base` such that all new tokens fit into the buffer, and the sinks before them.
        new: number of new tokens.
        recent: size of the window; None without limit.
        turned: sinks have to be turned to where a query wants them (rotary positions).
        places: positions inside the cache are wanted (ALiBi).
        share: several queries can share turned sinks, because they will be turned themselves.
    """
    seen, last = state.seen, state.seen + new - 1
    oldest = lambda t: max(state.held, 0 if recent is None else t - recent + 1)  # noqa: E731 - of the window of query t
    first, start = oldest(seen), seen - state.base
    window, held = first - state.base, oldest(last)
    taken = int((state.sinks < held).sum(-1).max()) if state.sinks.numel() else 0
    several = turned and new > 1 and taken > 0
    each, shared = several and not share, several and share
    if new == 1 and state.pads is None and len(state.sinks) == 1 and not places:
        slots = torch.arange(window - taken, window)[None, None] if taken else None
        return Plan(new, start, window, taken, False, False, slots, None, None, [0], held)
    if first == held and taken == 0 and state.pads is None and not places:
        return Plan(
            new, start, window, 0, False, False, None, None, None, [0] * new, held
        )  # nothing leaves: plain causal

    t = torch.arange(seen, seen + new)[None, :, None]  # [1 query 1]
    pads = torch.zeros(1, 1, 1, dtype=torch.long) if state.pads is None else state.pads[:, None, None]
    low = t.clone().fill_(state.held) if recent is None else (t - recent + 1).clamp(min=state.held)
    lows = (low.flatten() - first).tolist()
    low = torch.maximum(low, pads)  # [row query 1] first column of each query's window
    gone = state.sinks[:, None, :taken] < low  # [row query sink]
    columns = torch.arange(first, last + 1)[None, None]  # [1 1 key]
    near = (columns >= low) & (columns <= t)
    count = gone.sum(-1, keepdim=True)
    targets = None
    if taken:
        rank = torch.arange(taken)
        targets = t - state.base - (count + t - low - rank)  # the query's index less the distance inside the cache
    if each:
        own = torch.eye(new, dtype=torch.bool)[None, :, :, None] & gone[:, :, None, :]  # [row query owner sink]
        far = own.flatten(2)
    else:
        far = gone
    rows = max(len(near), len(far))
    visible = torch.cat([far.expand(rows, new, -1), near.expand(rows, new, -1)], -1)
    where = None
    if places:
        rank = torch.arange(taken).expand(rows, new, taken)
        where = torch.cat([rank, (count + columns - low).expand(rows, -1, -1)], -1).clamp(min=0)
    return Plan(new, start, window, taken, each, shared, targets, visible, where, lows, held)


def choose(
    state: State,
    wanted: int,
    ids: Int[Tensor, "row token"],
    tokens: tuple[int, ...] | None,
    positions: tuple[int, ...] | None,
) -> Int[Tensor, "row sink"]:
    """The sinks once `ids` are read too: the first `wanted` columns that qualify, of each row."""
    known = state.sinks[:, :wanted]
    if known.shape[1] == wanted and not bool((known == NEVER).any()):
        return known
    columns = torch.arange(state.seen, state.seen + ids.shape[1])
    ids = ids.cpu()
    pads = torch.zeros(1, dtype=torch.long) if state.pads is None else state.pads
    fit = (columns[None] >= pads[:, None]).expand(max(len(pads), len(ids) if tokens else 1), -1)
    if tokens is not None:
        fit = fit & torch.isin(ids, torch.tensor(tokens))
    if positions is not None:
        fit = fit & torch.isin(columns[None] - pads[:, None], torch.tensor(positions))
    fit = fit & ~(columns[None, :, None] == known[:, None]).any(-1)
    offered = torch.where(fit, columns[None], NEVER)
    rows = max(len(known), len(offered))
    both = torch.cat([known.expand(rows, -1), offered.expand(rows, -1)], -1).sort(-1).values
    if both.shape[1] < wanted:
        both = torch.nn.functional.pad(both, (0, wanted - both.shape[1]), value=NEVER)
    return both[:, :wanted].contiguous()

"""What `capture` collects while a model runs: a reducer and a map per group of linears, and absmax per expert."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float, Float16
from torch import Tensor

from sqviz.errors import NonFinite
from sqviz.models.linears import Group
from sqviz.observe.hooks import Routing
from sqviz.observe.reduce import Reducer, make_reducer, max_pool, to_half


class MapRecorder:
    """Keeps |x| of the first segment of a pass, max-pooled along tokens, as `maps` by group name."""

    def __init__(self, bins: int, length: int) -> None:
        self.maps: dict[str, Float16[Tensor, "bin channel"]] = {}
        self._bins, self._length = bins, length

    def see(self, group: Group, x: Float[Tensor, "token channel"]) -> None:
        """Take the input of a group."""
        self.maps[group.name] = to_half(max_pool(x[: self._length], self._bins))

    def see_routed(self, group: Group, x: Float[Tensor, "row channel"], routing: Routing) -> None:
        """Take the input of experts: a token's row becomes the largest over its experts."""
        whole = x.new_zeros(len(x), x.shape[1])  # more rows than tokens, never fewer
        for _, rows in by_expert(routing):
            token = routing.token[rows]
            whole[token] = torch.maximum(whole[token], x[rows].abs())
        self.see(group, whole)


class Recorder:
    """Reduces the inputs of all groups over a calibration stream; `watch` calls `see` and `see_routed`."""

    def __init__(
        self,
        tokens: int,
        length: int,
        map_tokens: int,
        device: torch.device,
        pool: ThreadPoolExecutor | None = None,
        threads: int = 1,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """For a stream of `tokens` in segments of `length`, on `device`.

        Args:
            tokens, length, map_tokens, device: see above; `map_tokens` rows at most in the maps of the first segment.
            pool, threads: share the larger reductions on the CPU; `threads` counts the calling one too.
            check: called before each reduction; raises to stop.
        """
        self.reducers: dict[str, Reducer] = {}
        self.expert_absmax: dict[str, dict[int, Float[Tensor, " channel"]]] = {}
        self.expert_tokens: dict[str, dict[int, int]] = {}
        self.first = MapRecorder(map_tokens, length)
        self._length, self._pool, self._threads, self._check = length, pool, threads, check
        self._stream = torch.arange(tokens, device=device)
        self._now = slice(0, 0)

    def advance(self, tokens: int) -> None:
        """The next pass is over so many tokens of the stream."""
        self._now = slice(self._now.stop, self._now.stop + tokens)

    def see(self, group: Group, x: Float[Tensor, "token channel"]) -> None:
        """Take the input of a group."""
        self._check()
        self._reducer(group, x).add(x, self._stream[self._now].to(x.device))
        if self._now.start == 0:
            self.first.see(group, x)

    def see_routed(self, group: Group, x: Float[Tensor, "row channel"], routing: Routing) -> None:
        """Take the input of experts, one expert after the other: there a token comes once."""
        self._check()
        reducer = self._reducer(group, x)
        absmax = self.expert_absmax.setdefault(group.name, {})
        count = self.expert_tokens.setdefault(group.name, {})
        stream = self._stream[self._now].to(x.device)
        for expert, rows in by_expert(routing):
            reducer.add(x[rows], stream[routing.token[rows]])
            new = x[rows].abs().amax(0).float()
            absmax[expert] = torch.maximum(absmax[expert], new) if expert in absmax else new
            count[expert] = count.get(expert, 0) + rows.stop - rows.start
        if self._now.start == 0:
            self.first.see_routed(group, x, routing)

    def check_finite(self) -> None:
        """Raise `NonFinite` if the last pass had a NaN or an infinity, naming the first linear it flowed into."""
        fine = [
            reducer.token_absmax[self._now].isfinite().all().to(self._stream.device)
            for reducer in self.reducers.values()
        ]
        if not fine or bool(torch.stack(fine).all()):  # one wait for the device, not one per linear
            return
        name = next(name for name, good in zip(self.reducers, fine, strict=True) if not good)
        token = self._now.start + int((~self.reducers[name].token_absmax[self._now].isfinite()).nonzero()[0])
        raise NonFinite(
            f"the input of {name} has a NaN or an infinity in segment {token // self._length} at position "
            f"{token % self._length}. The model computes it, not the capture: if its dtype is float16 (largest number "
            "65504), load it with dtype='bfloat16' or 'float32'; if not, look at its weights"
        )

    def _reducer(self, group: Group, x: Float[Tensor, "row channel"]) -> Reducer:
        if group.name not in self.reducers:
            self.reducers[group.name] = make_reducer(x.shape[1], len(self._stream), x.device, self._pool, self._threads)
        return self.reducers[group.name]


def by_expert(routing: Routing) -> Iterator[tuple[int, slice]]:
    """Each expert that got a token, and its rows."""
    chosen, counts = routing.expert.unique_consecutive(return_counts=True)
    start = 0
    for expert, count in zip(chosen.tolist(), counts.tolist(), strict=True):
        yield expert, slice(start, start + count)
        start += count

"""Streaming statistics of one linear input: rows go in as the model computes them, a `Reduced` comes out at the end.

Two implementations of one interface, tested equal: `CpuReducer` (one fused numba pass, see reduce_cpu.py) and
`TorchReducer` (plain torch: the definition, and what runs on other devices). Neither keeps a row it was given.
Memory per input: histogram 1.3 kB per channel, 32 bytes per channel beside it, 8 bytes per calibration token.
"""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sqviz.observe.buckets import BUCKETS, bucket, quantiles

THREAD_ELEMENTS = 1 << 17  # below this, waking a second thread costs more than it saves
CHUNK_ELEMENTS = 1 << 22  # bounds the temporaries of TorchReducer


@dataclasses.dataclass(frozen=True, eq=False)
class Reduced:
    """What is left of the rows of one linear input. CPU tensors, float32 and int32.

    Attributes:
        minimum, maximum, mean: [channel], over all rows; mean of |x|. 0 where there was no row.
        quantiles: [quantile channel] of |x|; tensor_quantiles [quantile] of |x| over all rows and channels.
        channel_token: [channel] the token that holds the channel's absmax, the first of equals; −1 if all are zero.
        token_absmax, token_channel: [token] absmax of each token and the channel that holds it.
        rows: how many rows came in.
    """

    minimum: Float[Tensor, " channel"]
    maximum: Float[Tensor, " channel"]
    mean: Float[Tensor, " channel"]
    quantiles: Float[Tensor, "quantile channel"]
    tensor_quantiles: Float[Tensor, " quantile"]
    channel_token: Int[Tensor, " channel"]
    token_absmax: Float[Tensor, " token"]
    token_channel: Int[Tensor, " token"]
    rows: int

    @property
    def absmax(self) -> Float[Tensor, " channel"]:
        """Max |x| per channel."""
        return torch.maximum(self.maximum, -self.minimum)


class Reducer(Protocol):
    """Takes rows, gives statistics."""

    token_absmax: Float[Tensor, " token"]

    def add(self, x: Float[Tensor, "row channel"], tokens: Int[Tensor, " row"]) -> None:
        """Take rows; `tokens` says which calibration token each row is (no token twice within one call)."""

    def finish(self, levels: tuple[float, ...]) -> Reduced:
        """The statistics, with quantiles at these levels. Frees the accumulators: call it once."""


class _Accumulators:
    """The tensors that both implementations add into, and how they become a `Reduced`."""

    def __init__(self, channels: int, tokens: int, device: torch.device | str) -> None:
        new = functools.partial(torch.zeros, device=device)
        self.low, self.high = new(channels).fill_(torch.inf), new(channels).fill_(-torch.inf)
        self.total = new(channels, dtype=torch.float32 if str(device).startswith("mps") else torch.float64)
        self.histogram = new(channels, BUCKETS, dtype=torch.int32)
        self.peak_token = new(channels, dtype=torch.int64).fill_(-1)
        self.token_absmax, self.token_channel = new(tokens), new(tokens, dtype=torch.int32)
        self.rows = 0

    def finish(self, levels: tuple[float, ...]) -> Reduced:
        """See Reducer."""
        empty = self.rows == 0
        low, high = (torch.zeros(len(self.low)),) * 2 if empty else (self.low.cpu(), self.high.cpu())
        absmax, histogram = torch.maximum(high, -low), self.histogram.cpu()
        del self.histogram
        over_all = quantiles(histogram.sum(0, keepdim=True), absmax.max().reshape(1), levels)[:, 0]
        return Reduced(
            minimum=low,
            maximum=high,
            mean=(self.total / max(self.rows, 1)).float().cpu(),
            quantiles=quantiles(histogram, absmax, levels),
            tensor_quantiles=over_all,
            channel_token=torch.where(absmax > 0, self.peak_token.cpu(), -1).to(torch.int32),
            token_absmax=self.token_absmax.cpu(),
            token_channel=self.token_channel.cpu(),
            rows=self.rows,
        )


class TorchReducer(_Accumulators):
    """The reduction in plain torch, on any device."""

    def add(self, x: Float[Tensor, "row channel"], tokens: Int[Tensor, " row"]) -> None:
        """See Reducer."""
        rows = max(1, CHUNK_ELEMENTS // max(x.shape[1], 1))
        for start in range(0, len(x), rows):
            self._add(x[start : start + rows].float(), tokens[start : start + rows])

    def _add(self, x: Float[Tensor, "row channel"], tokens: Int[Tensor, " row"]) -> None:
        magnitude = x.abs()
        absmax, row = magnitude.max(0)
        before = torch.maximum(self.high, -self.low)
        self.peak_token = torch.where(absmax > before, tokens[row], self.peak_token)
        self.low, self.high = torch.minimum(self.low, x.amin(0)), torch.maximum(self.high, x.amax(0))
        self.total += magnitude.sum(0, dtype=self.total.dtype)
        at = torch.arange(x.shape[1], device=x.device) * BUCKETS + bucket(magnitude)
        ones = torch.ones((), dtype=torch.int32, device=x.device).expand(at.numel())
        self.histogram.view(-1).scatter_add_(0, at.reshape(-1), ones)
        self._keep_larger(tokens, *magnitude.max(1))
        self.rows += len(x)

    def _keep_larger(
        self, tokens: Int[Tensor, " row"], absmax: Float[Tensor, " row"], channel: Int[Tensor, " row"]
    ) -> None:
        larger = ~(absmax <= self.token_absmax[tokens])  # NaN is larger than anything
        self.token_absmax[tokens] = torch.where(larger, absmax, self.token_absmax[tokens])
        self.token_channel[tokens] = torch.where(larger, channel.to(torch.int32), self.token_channel[tokens])


class CpuReducer(TorchReducer):
    """The same in one pass over x, on the CPU, with the channels of large inputs dealt out to the threads of a pool."""

    def __init__(self, channels: int, tokens: int, pool: ThreadPoolExecutor | None = None, threads: int = 1) -> None:
        super().__init__(channels, tokens, "cpu")
        self._pool, self._threads = pool, threads
        self._peak_row = torch.empty(channels, dtype=torch.int64)

    def add(self, x: Float[Tensor, "row channel"], tokens: Int[Tensor, " row"]) -> None:
        """See Reducer."""
        from sqviz.observe.reduce_cpu import reduce_block

        if not len(x):
            return
        x = x.detach().to(torch.float32).contiguous()
        parts = self._parts(x)
        row_bits, row_channel = torch.zeros(2, len(parts), len(x), dtype=torch.int32)
        self._peak_row.fill_(-1)
        arrays = x.numpy(), x.view(torch.int32).numpy()
        accumulators = [t.numpy() for t in (self.low, self.high, self.total, self.histogram.view(-1), self._peak_row)]

        def reduce(part: int, first: int, stop: int) -> None:
            reduce_block(*arrays, first, stop, *accumulators, row_bits[part].numpy(), row_channel[part].numpy())

        others = [self._pool.submit(reduce, part, *parts[part]) for part in range(1, len(parts)) if self._pool]
        reduce(0, *parts[0])
        for other in others:
            other.result()
        largest, channel = row_bits[0], row_channel[0]
        for bits, where in zip(row_bits[1:], row_channel[1:], strict=True):  # the first of equal channels stays
            channel = torch.where(bits > largest, where, channel)
            largest = torch.maximum(bits, largest)
        self._keep_larger(tokens, largest.view(torch.float32), channel)
        self.peak_token = torch.where(self._peak_row >= 0, tokens[self._peak_row], self.peak_token)
        self.rows += len(x)

    def _parts(self, x: Float[Tensor, "row channel"]) -> list[tuple[int, int]]:
        """(first, stop) channel per thread, in whole blocks."""
        from sqviz.observe.reduce_cpu import BLOCK

        channels = x.shape[1]
        blocks = -(-channels // BLOCK)
        count = max(1, min(self._threads if self._pool else 1, blocks, x.numel() // THREAD_ELEMENTS))
        edges = [min(channels, blocks * part // count * BLOCK) for part in range(count + 1)]
        return list(pairwise(edges))


def make_reducer(
    channels: int, tokens: int, device: torch.device, pool: ThreadPoolExecutor | None = None, threads: int = 1
) -> Reducer:
    """The reducer for inputs of so many channels on this device, and a calibration stream of so many tokens."""
    if device.type == "cpu":
        return CpuReducer(channels, tokens, pool, threads)
    return TorchReducer(channels, tokens, device)


def max_pool(x: Float[Tensor, "row channel"], bins: int) -> Float[Tensor, "bin channel"]:
    """Max |x| over runs of ⌈row / bins⌉ rows, the last run possibly shorter: every channel keeps its absmax exactly."""
    run = max(1, -(-len(x) // bins))
    magnitude = x.abs()
    if run == 1:
        return magnitude
    whole = len(x) // run * run
    parts = [magnitude[:whole].view(-1, run, x.shape[1]).amax(1)]
    if whole < len(x):
        parts.append(magnitude[whole:].amax(0, keepdim=True))
    return torch.cat(parts)


def to_half(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """float16 on the CPU; what is larger than 65504 becomes 65504, not infinity."""
    return x.clamp(max=torch.finfo(torch.float16).max).to("cpu", torch.float16)

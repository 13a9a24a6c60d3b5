"""What the CPU backends share: quantising (with a norm before it) in one pass over X, and how many threads to use."""

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numba
import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from sqviz.errors import NonFinite, SqvizError
from sqviz_kernels import cpu_loops as loops
from sqviz_kernels.backend import Backend, Codes
from sqviz_kernels.spec import TINY, TOP, Norm, Share, check_step

WORTH_THREADS = 1 << 15
"""Elements from which a second thread helps a pass over X (its start takes about 3 µs)."""
_NORMS = {"rms": loops.RMS, "layer": loops.LAYER}
_KINDS = {torch.float32: loops.F32, torch.bfloat16: loops.BF16}
_DYNAMIC = np.float32(-1)

_forked = False
_one_at_a_time = threading.Lock()


def _after_fork() -> None:
    """The parent's threads are not there: starting numba's aborts the process, and torch would wait for its own."""
    global _forked
    _forked = True
    torch.set_num_threads(1)


os.register_at_fork(after_in_child=_after_fork)


def threads_for(work: int, worth: int = WORTH_THREADS) -> int:
    """Threads for so much work: torch's number, or 1 where there is little to do or the process was forked."""
    return 1 if work < worth or _forked else min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)


def launching() -> AbstractContextManager[Any]:
    """Held around a kernel with threads: one at a time where numba's threads cannot be shared (they would abort)."""
    try:
        safe = numba.threading_layer() in ("omp", "tbb")
    except ValueError:  # nothing was launched so far
        safe = False
    return nullcontext() if safe else _one_at_a_time


def run(threads: int, alone: Callable[..., int], dealt: Callable[..., int], rows: int, *arguments: Any) -> int:
    """`alone(0, rows, …)` on this thread, or `dealt(threads, rows, …)`."""
    if threads == 1:
        return alone(0, rows, *arguments)
    with launching():
        return dealt(threads, rows, *arguments)


def readable(x: Float[Tensor, "row channel"]) -> Float[Tensor, "row channel"]:
    """X as the kernels read it: float32 or bfloat16, rows contiguous in themselves; a copy only where it must be."""
    if x.dtype not in _KINDS:
        if not x.is_floating_point():
            raise SqvizError(f"X has dtype {x.dtype}: a floating-point tensor is needed.")
        x = x.float()
    if x.device.type != "cpu":
        raise SqvizError(f"X is on {x.device}: this backend reads tensors on the CPU.")
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def vector(values: Float[Tensor, " channel"] | None, channels: int) -> Float[Tensor, " channel"] | None:
    """A float32 vector of that many channels that a kernel may read."""
    if values is None:
        return None
    if values.shape != (channels,):
        raise SqvizError(f"a vector has shape {tuple(values.shape)} where {channels} channels are read.")
    return values if values.dtype == torch.float32 and values.is_contiguous() else values.float().contiguous()


class CpuBackend(Backend):
    """Base of the CPU backends: everything but the product."""

    shift: ClassVar[int]
    """128: codes are kept as uint8 = code + 128; 0: as int8."""

    def row_bytes(self, channels: int) -> int:
        """Bytes from one row of codes to the next."""
        return channels

    def quantise(
        self,
        x: Float[Tensor, "row channel"],
        step: Float[Tensor, "1"] | None = None,
        share: Share = "token",
        divisor: Float[Tensor, " channel"] | None = None,
    ) -> Codes:
        """See `spec.quantise`. Raises `NonFinite`."""
        return self._quantise(x, step, share, divisor=vector(divisor, x.shape[1]))

    def norm_quantise(
        self,
        x: Float[Tensor, "row channel"],
        gain: Float[Tensor, " channel"],
        bias: Float[Tensor, " channel"] | None,
        eps: float,
        kind: Norm,
        step: Float[Tensor, "1"] | None = None,
        share: Share = "token",
        out: Float[Tensor, "row channel"] | None = None,
    ) -> Codes:
        """See `spec.norm_quantise`; the mean square is summed in 16 parts. Raises `NonFinite`."""
        channels = x.shape[1]
        gain, bias = vector(gain, channels), vector(bias, channels)  # type: ignore[assignment]
        direct = out is not None and x.dtype == out.dtype and x.dtype in _KINDS and out.stride(1) == 1
        y = out if direct or out is None else torch.empty(x.shape, dtype=readable(x).dtype)
        codes = self._quantise(x, step, share, _NORMS[kind], gain, bias, eps, y=y)
        if out is not None and y is not None and not direct:
            out.copy_(y)
        return codes

    def plain_codes(self, x: Float[Tensor, "row channel"]) -> tuple[Int8[Tensor, "row channel"], Float[Tensor, " row"]]:
        """See `Backend.plain_codes`. Raises `NonFinite`."""
        found = self._quantise(x, None, "token", layout=(x.shape[1], 0))
        return found.values, found.step

    def _quantise(
        self,
        x: Tensor,
        step: Tensor | None,
        share: Share,
        norm: int = loops.NO_NORM,
        gain: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 0.0,
        divisor: Tensor | None = None,
        y: Tensor | None = None,
        layout: tuple[int, int] | None = None,
    ) -> Codes:
        x = readable(x)
        rows, channels = x.shape
        stride, shift = (self.row_bytes(channels), self.shift) if layout is None else layout
        codes = torch.empty(rows, stride, dtype=torch.uint8 if shift else torch.int8)
        steps = torch.empty(rows)
        threads = threads_for(x.numel())
        before = (
            *(x.data_ptr(), x.stride(0) * x.element_size(), _KINDS[x.dtype], channels, norm),
            *(0 if gain is None else gain.data_ptr(), 0 if bias is None else bias.data_ptr(), np.float32(eps)),
            0 if divisor is None else divisor.data_ptr(),
        )
        to = (0, 0) if y is None else (y.data_ptr(), y.stride(0) * y.element_size())
        given = _DYNAMIC
        if step is None and share == "tensor" and rows != 1:  # one row is the whole tensor
            _quantised(threads, rows, *before, _DYNAMIC, *to, 0, stride, shift, steps.data_ptr())
            most = steps.amax(0, keepdim=True) if rows else torch.zeros(1)
            step = most / TOP
            step = torch.where(step < TINY, 0.0, step)
        elif step is not None:
            check_step(step)
        if step is not None:
            given = np.float32(step.item())
        _quantised(threads, rows, *before, given, *to, codes.data_ptr(), stride, shift, steps.data_ptr())
        return Codes(codes, steps if step is None else step.float(), rows, channels)


def _quantised(threads: int, rows: int, *arguments: Any) -> None:
    """`loops.quantise_rows` over all rows. Raises `NonFinite`."""
    bad = run(threads, loops.quantise_rows, loops.quantise_rows_threads, rows, *arguments)
    if bad:
        raise NonFinite(
            f"{bad} of {rows} rows of the input of an INT8 product hold a NaN or an infinity, which no step can "
            "represent. Find where they come from: a model in float16 that overflows runs in bfloat16."
        )

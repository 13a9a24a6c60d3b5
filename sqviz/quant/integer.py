"""The integer product X̄ W̄ᵀ on the CPU, for answering quickly how far a quantised linear is off (thesis equation 3.2).

    Ŷ = diag(Δ_X) · (X̄ W̄ᵀ) · diag(Δ_W)      X̄, W̄ int8 in ±127, summed in int32: exact

holds where steps vary along tokens and out channels only: symmetric, per-tensor or per-token activations, per-tensor or
per-channel weights. oneDNN's int8 product takes a fifth of the float32 one's time here; whether it is exact on this
machine is tried once. This is no execution backend: it serves the error curves only.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from sqviz.quant.granularity import PerChannel, PerTensor, PerToken
from sqviz.quant.quantize import levels, step_and_zero
from sqviz.quant.schemes import Scheme

BLOCK = 1 << 17
"""Elements worked on at a time, so that the passes over them stay in the second-level cache."""


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch operations of the calling thread on `count` threads, and afterwards on as many as before.

    Small work is faster on one thread where another process wants the second core: the threads of an operation wait
    for each other, and a descheduled one costs a time slice (8 ms measured, for a product of 1 ms; even for a power of
    576 numbers).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def product_is_exact() -> bool:
    """Whether `torch._int_mm` works here and does not saturate on the way (as int8 instructions without VNNI can)."""
    a = torch.full((17, 96), 127, dtype=torch.int8)
    b = torch.full((33, 96), 127, dtype=torch.int8)
    a[::2] = -127
    b[:, ::3] = -127
    try:
        got = torch._int_mm(a, b.t())
    except (RuntimeError, NotImplementedError):
        return False
    return torch.equal(got.long(), a.long() @ b.long().t())


def applies(scheme: Scheme, device: torch.device) -> bool:
    """Whether this scheme's product is one of integers with steps outside the sum, and this machine has it."""
    return (
        scheme.symmetric
        and isinstance(scheme.weight, PerTensor | PerChannel)
        and isinstance(scheme.activation, PerTensor | PerToken)
        and device.type == "cpu"
        and product_is_exact()
    )


def activation_codes(
    x: Float[Tensor, "token channel"], s: Float[Tensor, " channel"], step: Float[Tensor, "1 1"] | None, bits: int
) -> tuple[Int8[Tensor, "token channel"], Float[Tensor, "token_or_1 1"]]:
    """X̄ of X / s, and its steps: the given one, values beyond it saturating, or one per token."""
    return _codes(x, s, step, bits, divide=True)


def weight_codes(
    w: Float[Tensor, "out channel"], s: Float[Tensor, " channel"], step: Float[Tensor, "1 1"] | None, bits: int
) -> tuple[Int8[Tensor, "out channel"], Float[Tensor, "out_or_1 1"]]:
    """W̄ of s·W, and its steps: the given one, or one per out channel."""
    return _codes(w, s, step, bits, divide=False)


def _codes(
    rows: Float[Tensor, "row channel"], s: Float[Tensor, " channel"], step: Tensor | None, bits: int, divide: bool
) -> tuple[Int8[Tensor, "row channel"], Float[Tensor, "row_or_1 1"]]:
    """Codes and steps of rows / s or rows · s; in blocks, with the operations and roundings of `quantize_tensor`."""
    low, high = levels(bits)
    codes = torch.empty(rows.shape, dtype=torch.int8)
    count = max(1, BLOCK // max(1, rows.shape[1]))
    buffer = torch.empty(min(count, len(rows)), rows.shape[1])
    steps = []
    for start in range(0, len(rows), count):
        block = rows[start : start + count]
        value = buffer[: len(block)]
        (torch.div if divide else torch.mul)(block, s, out=value)
        own = step
        if own is None:
            own, _ = step_and_zero(value.amin(1, keepdim=True), value.amax(1, keepdim=True), bits)
            steps.append(own)
        value.div_(torch.where(own == 0, 1.0, own)).round_()
        if step is not None:
            value.clamp_(low, high)
        codes[start : start + count].copy_(value)
    if step is None:
        step = torch.cat(steps) if steps else torch.zeros(0, 1)
    return codes, step


def product(
    x: Int8[Tensor, "token channel"], w: Int8[Tensor, "out channel"], x_step: Tensor, w_step: Tensor
) -> Float[Tensor, "token out"]:
    """Ŷ, from codes and steps [token 1] or [1 1], and [out 1] or [1 1]."""
    sums: Int32[Tensor, "token out"] = torch._int_mm(x, w.t())
    return sums.float().mul_(x_step).mul_(w_step.T)

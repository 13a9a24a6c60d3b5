"""Errors of a linear's output from integer products, where a scheme allows; and how many threads small work gets.

    Ŷ = diag(Δ_X) · (X̄ W̄ᵀ) · diag(Δ_W)      X̄, W̄ int8 in ±127, summed in int32: exact        (thesis equation 3.2)

holds where steps vary along tokens and out channels only: symmetric, per-tensor or per-token activations, per-tensor or
per-channel weights. The kernel is `sqviz_kernels.alpha_sweep`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from sqviz.progress import CancelToken
from sqviz.quant.granularity import PerChannel, PerTensor, PerToken
from sqviz.quant.quantize import levels
from sqviz.quant.sample import Part
from sqviz.quant.schemes import Scheme


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


def applies(scheme: Scheme, device: torch.device) -> bool:
    """Whether this scheme's product is one of integers with steps outside the sum, on this device."""
    return (
        scheme.symmetric
        and isinstance(scheme.weight, PerTensor | PerChannel)
        and isinstance(scheme.activation, PerTensor | PerToken)
        and device.type == "cpu"
    )


def errors(
    part: Part,
    s: Sequence[Float[Tensor, " channel"]],
    x_steps: Sequence[Float[Tensor, "1 1"]],
    w_steps: Sequence[Float[Tensor, "1 1"]],
    scheme: Scheme,
    cancel: CancelToken | None = None,
) -> list[float]:
    """‖Y − X̂ Ŵᵀ‖² for each s, elements counted as often as they stand for others.

    Steps are those of the whole tensor for each s; none where every token or row has its own. Raises `Cancelled`.
    """
    from sqviz_kernels import alpha_sweep  # compiles, so not before it is needed

    if not s:
        return []
    x_step, w_step = (torch.cat(list(steps)).view(-1) if steps else None for steps in (x_steps, w_steps))
    squares = alpha_sweep.sweep(
        *(part.x, part.w, part.y, torch.stack(list(s)), x_step, w_step),
        x_top=levels(scheme.bits)[1],
        w_top=levels(scheme.bits_of_weights)[1],
        out_weight=part.row_weight,
        cancel=cancel,
    )
    weight = torch.ones(()) if part.token_weight is None else part.token_weight
    return [float((row * weight).sum()) for row in squares]

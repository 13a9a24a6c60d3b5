"""Which schemes the integer kernel of error curves can answer for, and how many threads small work gets.

    Ŷ = diag(Δ_X) · (X̄ W̄ᵀ) · diag(Δ_W)      X̄, W̄ int8 in ±127, summed in int32: exact        (thesis equation 3.2)

holds where steps vary along tokens and out channels only: symmetric, per-tensor or per-token activations, per-tensor or
per-channel weights. The kernel is `sqviz_kernels.alpha_sweep`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sqviz.quant.granularity import PerChannel, PerTensor, PerToken
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

"""Integer uniform quantisation of one tensor (thesis equation 3.1), simulated or to integers.

    symmetric    Δ = max|x| / (2^(bits−1) − 1)       x̄ = ⌈x / Δ⌋                       x̂ = Δ · x̄
    asymmetric   Δ = (max(x,0) − min(x,0)) / (2^bits − 1),  z = ⌈−min(x,0) / Δ⌋
                                                     x̄ = ⌈x / Δ⌋ + z                   x̂ = Δ · (x̄ − z)

Ranges: x̄ in ±(2^(bits−1) − 1) as int8 (so −128 is never used), or in 0 … 2^bits − 1 as uint8 with z a whole number
in it, so that 0 is represented exactly. 2 to 8 bits. ⌈·⌋ rounds halves to even; x / Δ is a true division.
Arithmetic is float32 (float64 for a float64 tensor); float16 and bfloat16 are widened first and only the result is
rounded to their dtype. A slice without a nonzero value has Δ = 0 and comes back as exact zeros; steps below the
smallest normal float32 count as 0 too. Values beyond a given step or clip saturate.

Nothing is changed in place: smoothquant's own quantisers overwrite the tensor they are given.
"""

import dataclasses

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from sqviz.errors import NonFinite, SqvizError
from sqviz.quant.granularity import Granularity, Kind

MIN_BITS, MAX_BITS = 2, 8


def check_bits(bits: int, name: str = "bits") -> None:
    """Raise `SqvizError` unless `bits` is a whole number from 2 to 8."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise SqvizError(f"{name}={bits!r}: a whole number from {MIN_BITS} to {MAX_BITS} is allowed.")


def levels(bits: int, symmetric: bool = True) -> tuple[int, int]:
    """The smallest and the largest integer used: (−127, 127) for 8 bits, (0, 255) if asymmetric."""
    top = 2 ** (bits - 1) - 1
    return (-top, top) if symmetric else (0, 2**bits - 1)


def step_and_zero(
    minimum: Float[Tensor, "*step"], maximum: Float[Tensor, "*step"], bits: int = 8, symmetric: bool = True
) -> tuple[Float[Tensor, "*step"], Float[Tensor, "*step"] | None]:
    """The step Δ (in units of x) and the zero point z (None if symmetric) for values between minimum and maximum.

    Not finite where a bound is not; 0 where both bounds are 0. Thesis equation 3.1.
    """
    low, high = levels(bits, symmetric)
    if symmetric:
        step = torch.maximum(maximum, -minimum).div_(high)
    else:
        step = maximum.clamp(min=0) / high - minimum.clamp(max=0) / high  # divided first: the range may exceed float32
    step = torch.where(step < torch.finfo(torch.float32).tiny, 0.0, step)
    if symmetric:
        return step, None
    return step, (-minimum.clamp(max=0) / _safe(step)).round_().clamp_(low, high)


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor in integers, with what it takes to come back.

    Attributes:
        values: x̄ [*rows channel], int8 if symmetric, uint8 if not.
        step: Δ, shaped as `granularity.step_shape(values.shape)`, in units of the tensor.
        zero: z, shaped as `step`; None if symmetric.
        granularity: which elements share a step.
        dtype: dtype of the tensor that was quantised, and of `dequantize()`.
    """

    values: Int[Tensor, "*rows channel"]
    step: Float[Tensor, "*step"]
    zero: Integer[Tensor, "*step"] | None
    granularity: Granularity
    dtype: torch.dtype

    def dequantize(self) -> Float[Tensor, "*rows channel"]:
        """x̂ = Δ · (x̄ − z), in the dtype of the original."""
        channels = self.values.shape[-1]
        value = self.values.to(self.step.dtype)
        if self.zero is not None:
            value.sub_(self.granularity.spread(self.zero, channels))
        return value.mul_(self.granularity.spread(self.step, channels)).to(self.dtype)


def quantize_tensor(
    x: Float[Tensor, "*rows channel"],
    granularity: Granularity,
    bits: int = 8,
    symmetric: bool = True,
    step: Float[Tensor, "*step"] | float | None = None,
    *,
    zero: Float[Tensor, "*step"] | float | None = None,
    clip: Float[Tensor, "*step"] | float | None = None,
    of: Kind | None = None,
    name: str = "x",
) -> Quantized:
    """Quantise `x` to integers (thesis equation 3.1).

    Args:
        x: float tensor; the last dimension is the input channel.
        granularity: which elements share a step; `PerChannel()` also needs `of`.
        bits: 2 to 8.
        symmetric: around 0, or with a zero point.
        step: a step known beforehand (static quantisation), shaped as `granularity.step_shape(x.shape)` or with as
            many elements; values beyond saturate. None: from `x` itself (dynamic).
        zero: the zero point that belongs to `step`; needed where `symmetric=False` and `step` is given.
        clip: a largest magnitude (such as a percentile of |x|) to which a dynamic range is limited, shaped as `step`.
        of: "activation" or "weight": what `PerChannel()` refers to.
        name: what to call `x` in an error message.

    Raises `NonFinite` if `x` holds a NaN or an infinity, and `SqvizError` for an argument out of range.
    """
    rounded, step, zero = _round(x, granularity, bits, symmetric, step, zero, clip, of, name)
    low, high = levels(bits, symmetric)
    if zero is not None:
        rounded.add_(granularity.spread(zero, x.shape[-1]))
    integer = torch.int8 if symmetric else torch.uint8
    return Quantized(
        values=rounded.clamp_(low, high).to(integer),
        step=step,
        zero=None if zero is None else zero.to(torch.uint8),
        granularity=granularity,
        dtype=x.dtype,
    )


def fake_quantize(
    x: Float[Tensor, "*rows channel"],
    granularity: Granularity,
    bits: int = 8,
    symmetric: bool = True,
    step: Float[Tensor, "*step"] | float | None = None,
    *,
    zero: Float[Tensor, "*step"] | float | None = None,
    clip: Float[Tensor, "*step"] | float | None = None,
    of: Kind | None = None,
    name: str = "x",
) -> Float[Tensor, "*rows channel"]:
    """x̂: what is left of `x` after quantising and coming back, in the dtype of `x`. Arguments as `quantize_tensor`.

    Equal to `quantize_tensor(…).dequantize()`, without the detour through integers.
    """
    static = step is not None or clip is not None
    value, step, zero = _round(x, granularity, bits, symmetric, step, zero, clip, of, name)
    low, high = levels(bits, symmetric)
    if zero is not None:
        spread = granularity.spread(zero, x.shape[-1])
        value.add_(spread).clamp_(low, high).sub_(spread)
    elif static:  # a dynamic symmetric range holds every value: nothing to saturate
        value.clamp_(low, high)
    return value.mul_(granularity.spread(step, x.shape[-1])).to(x.dtype)


def _round(
    x: Tensor,
    granularity: Granularity,
    bits: int,
    symmetric: bool,
    step: Tensor | float | None,
    zero: Tensor | float | None,
    clip: Tensor | float | None,
    of: Kind | None,
    name: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """⌈x / Δ⌋ as a fresh tensor in the working dtype, Δ and z, both shaped as `granularity.step_shape`."""
    check_bits(bits)
    if not x.is_floating_point():
        raise SqvizError(f"{name} has dtype {x.dtype}: a floating-point tensor is needed.")
    if step is not None and clip is not None:
        raise SqvizError("step and clip were both given: clip limits a dynamic range, a step leaves nothing to limit.")
    if (zero is not None) != (step is not None and not symmetric):
        raise SqvizError(
            "zero goes with step and symmetric=False, and is needed there; "
            f"got step={step!r}, symmetric={symmetric}, zero={zero!r}."
        )
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = granularity.step_shape(tuple(x.shape), of)
    value = x.to(work)
    if step is not None:
        _require_finite(x, name)
        step = _fit(step, shape, value, "step")
        zero = None if zero is None else _fit(zero, shape, value, "zero")
    else:
        minimum, maximum = granularity.extrema(value, of)
        if clip is not None:
            _require_finite(x, name)  # clipping would hide an infinity
            bound = _fit(clip, shape, value, "clip")
            minimum, maximum = torch.maximum(minimum, -bound), torch.minimum(maximum, bound)
        step, zero = step_and_zero(minimum, maximum, bits, symmetric)
        if not bool(torch.isfinite(step).all()):
            _require_finite(x, name)
    return torch.div(value, granularity.spread(_safe(step), x.shape[-1])).round_(), step, zero


def _safe(step: Tensor) -> Tensor:
    """The steps, with 1 in place of 0: 0 / 0 never happens, and the multiplication by the true step gives exact 0."""
    return torch.where(step == 0, 1.0, step)


def _fit(value: Tensor | float, shape: tuple[int, ...], like: Tensor, name: str) -> Tensor:
    """A given step, zero point or clip in the shape of the steps; it must be finite and not negative."""
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if tensor.numel() == 1:
        tensor = tensor.reshape([1] * len(shape)).expand(shape)
    elif tensor.numel() != int(torch.Size(shape).numel()):
        raise SqvizError(f"{name} has shape {tuple(tensor.shape)}: one value or the shape {shape} is needed here.")
    if not bool((torch.isfinite(tensor) & (tensor >= 0)).all()):
        raise SqvizError(f"{name} holds a negative or non-finite value: finite values ≥ 0 are allowed.")
    return tensor.reshape(shape)


def _require_finite(x: Tensor, name: str) -> None:
    """Raise `NonFinite` if `x` holds a NaN or an infinity; two reductions, no temporary."""
    if x.numel() and not bool(torch.isfinite(x.amax()) & torch.isfinite(x.amin())):
        bad = int((~torch.isfinite(x)).sum())
        raise NonFinite(
            f"{name} holds {bad} NaN or infinite of {x.numel()} values, which no step size can represent. "
            "Find where they come from: a model in float16 that overflows runs in bfloat16 or float32."
        )

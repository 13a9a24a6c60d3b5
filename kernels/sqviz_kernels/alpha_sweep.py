"""The output error of one linear at many α in one go: `spec.sweep` with nothing of the size of Y ever written.

    for each α:  X̄ = codes of X / s                                      once, in the layout of the tile
        for each group of panels (32 out channels each) whose codes stay in the second-level cache:
            W̄ = codes of s·W                                             quantised straight into packed panels
            for each 12 tokens:
                Ŷ = ((float(X̄ W̄ᵀ) · Δ_x) · Δ_w)                         12 × 512 floats, in the first-level cache
                error[token] += Σ (Y − Ŷ)²                               difference in float32, squared in float64

Steps are one per token or given, one per out channel or given (thesis equation 3.2); codes have 8 bits or fewer. The
product is the tile of vnni_tile.py. Where the processor lacks VNNI it is torch's INT8 product, if that is exact on this
machine, or a float32 product of 1024 channels at a time, which holds every sum of so many products exactly. Everything
else is the same code, so that the errors are the same to the last bit.

Sums of one token are added group by group, whoever computed them: the number of threads does not show either. Work is
handed out some 20 ms at a time, and in between a cancel token is looked at.

Simplification: X, W and Y are float32, rows contiguous (anything else is copied first).
"""

import dataclasses
import functools

import numpy as np
import torch
from jaxtyping import Float, Float64, Int8, Int32
from torch import Tensor

from sqviz.errors import NonFinite, SqvizError
from sqviz.progress import CancelToken
from sqviz_kernels import alpha_loops as loops
from sqviz_kernels.cpu import run, threads_for
from sqviz_kernels.cpu_onednn import why_not_exact
from sqviz_kernels.spec import TOP, check_channels
from sqviz_kernels.vnni_tile import HAVE_VNNI, WIDE

GROUP_BYTES, GROUP_PANELS = 1 << 18, 16
"""Most codes of W, and most panels, that all tokens are multiplied with before the next ones are quantised."""
CALL = 1 << 32
"""Multiplications per thread between two looks at the cancel token: 20 to 30 ms. Shorter calls cost more where another
process wants the second core: each ends with waiting for a thread that may have lost its turn."""
PER_X, PER_W = 60, 100
"""Multiplications in the time that one element of X, or of W, takes to become a code."""
KEPT = 1 << 26
"""Most codes of X that are kept at a time, of several α."""
TOKENS = 4096
"""Tokens whose codes are kept at a time."""
WORTH_THREADS = 1 << 22
"""Multiplications from which a second thread helps."""
FLOAT_CHANNELS = 1024
"""1024 · 127² < 2²⁴: float32 holds every sum of so many products of codes."""


def sweep(
    x: Float[Tensor, "token channel"],
    w: Float[Tensor, "out channel"],
    y: Float[Tensor, "token out"],
    s: Float[Tensor, "alpha channel"],
    x_step: Float[Tensor, " alpha"] | None = None,
    w_step: Float[Tensor, " alpha"] | None = None,
    *,
    x_top: int = TOP,
    w_top: int = TOP,
    out_weight: Float[Tensor, " out"] | None = None,
    cancel: CancelToken | None = None,
) -> Float64[Tensor, "alpha token"]:
    """Σ over out channels of |Y − Q(X / s) Q(s·W)ᵀ|², per token, for the s of each α. See `spec.sweep`.

    Args:
        x, w: input and weight of one linear, before smoothing.
        y: X Wᵀ in float32.
        s: smoothing factors, one row per α.
        x_step, w_step: one step per α for the whole matrix; None: one per token, one per out channel.
        x_top, w_top: the largest codes: 127 for 8 bits.
        out_weight: how often each out channel counts; None: once.
        cancel: looked at every 20 to 30 ms.

    Threads: as many as torch would use. Raises `NonFinite` for a NaN or an infinity in X / s or s·W, `Cancelled`, and
    `SqvizError` where shapes do not fit.
    """
    _check(x, w, y, s, x_step, w_step, out_weight)
    tokens, alphas = len(x), len(s)
    found = torch.zeros(alphas, tokens, dtype=torch.float64)
    if not found.numel() or not w.numel():
        return found
    linear = _Linear(_plain(w), _plain(s), _steps(w_step, alphas), np.float32(w_top), _plain(out_weight))
    given = _steps(x_step, alphas)
    threads = threads_for(alphas * _work(tokens, *w.shape), WORTH_THREADS)
    most = min(tokens, TOKENS)
    at_once = max(1, min(threads * CALL // _work(most, *w.shape), KEPT // (most * w.shape[1])))
    for first in range(0, tokens, TOKENS):
        rows = slice(first, first + TOKENS)
        some, target = _plain(x[rows]), _plain(y[rows])
        for alpha in range(0, alphas, at_once):
            part = slice(alpha, min(alpha + at_once, alphas))
            _look(cancel)
            codes = _codes(some, linear.s[part], given[part], np.float32(x_top), threads)
            found[part, rows] = torch.from_numpy(_errors(linear, codes, target, part, threads, cancel))
    return found


# --- the steps of it ---


@dataclasses.dataclass(frozen=True, eq=False)
class _Linear:
    """What all α have in common, as numpy arrays; `step` −1: one per out channel; `out_weight` empty: all 1."""

    w: Float[np.ndarray, "out channel"]
    s: Float[np.ndarray, "alpha channel"]
    step: Float[np.ndarray, " alpha"]
    top: np.float32
    out_weight: Float[np.ndarray, " out"]

    @functools.cached_property
    def bounds(self) -> np.ndarray:
        """The first panel of each group, and the end: groups as even as can be."""
        out, channels = self.w.shape
        panels = -(-out // WIDE)
        most = min(GROUP_PANELS, max(1, GROUP_BYTES // (-(-channels // 4) * 4 * WIDE)))
        groups = -(-panels // most)
        return np.arange(groups + 1) * panels // groups


@dataclasses.dataclass(frozen=True, eq=False)
class _Codes:
    """X̄ of some α: uint8 [alpha token byte] = code + 128 where the tile reads it, else int8; and Δ [alpha token]."""

    values: np.ndarray
    steps: np.ndarray


def _codes(x: np.ndarray, s: np.ndarray, given: np.ndarray, top: np.float32, threads: int) -> _Codes:
    (tokens, channels), alphas = x.shape, len(s)
    bytes_ = max(2, channels)
    if HAVE_VNNI:
        bytes_ = -(-channels // 64) * 64
        bytes_ += 64 * (bytes_ % 1024 == 0)  # rows a power of two apart would share few lines of the cache
    values = np.empty((alphas, tokens, bytes_), np.uint8 if HAVE_VNNI else np.int8)
    steps = np.empty((alphas, tokens), np.float32)
    shift = 128 if HAVE_VNNI else 0
    bad = run(threads, loops.x_codes, loops.x_codes_threads, alphas * tokens, x, s, given, top, values, shift, steps)
    _refuse(bad, "X / s")
    return _Codes(values, steps)


def _errors(
    linear: _Linear, codes: _Codes, y: np.ndarray, part: slice, threads: int, cancel: CancelToken | None
) -> Float64[np.ndarray, "alpha token"]:
    """The errors of the α in `part`, a few groups of panels of one α after the other."""
    alphas, tokens = codes.steps.shape
    groups = len(linear.bounds) - 1
    found = np.empty((alphas, groups, tokens))
    of_x = (codes.values, codes.steps)
    arguments = (linear.w, linear.s[part], linear.step[part], linear.top, linear.out_weight, linear.bounds)
    some = max(threads, threads * CALL * groups // _work(tokens, *linear.w.shape))
    for first in range(0, alphas * groups, some):
        _look(cancel)
        count = min(some, alphas * groups - first)
        if HAVE_VNNI:
            bad = run(threads, loops.errors_of, loops.errors_of_threads, count, first, *arguments, *of_x, y, found)
        else:
            bad = _portable(first, count, *arguments, *of_x, y, found)
        _refuse(bad, "s·W")
    return functools.reduce(np.add, np.moveaxis(found, 1, 0))


def _work(tokens: int, out: int, channels: int) -> int:
    """What one α takes, in multiplications."""
    return (tokens + PER_W) * (out + PER_X) * channels


def _refuse(bad: int, what: str) -> None:
    if bad:
        raise NonFinite(
            f"{bad} rows of {what} hold a NaN or an infinity, which no step can represent: the linear holds one, or "
            "its largest values times this s exceed float32."
        )


def _plain(tensor: Tensor | None) -> np.ndarray:
    return np.empty(0, np.float32) if tensor is None else tensor.detach().float().contiguous().numpy()


def _steps(steps: Tensor | None, alphas: int) -> np.ndarray:
    return np.full(alphas, -1, np.float32) if steps is None else _plain(steps)


def _look(cancel: CancelToken | None) -> None:
    if cancel is not None:
        cancel.check("the error of a linear")


def _check(
    x: Tensor, w: Tensor, y: Tensor, s: Tensor, x_step: Tensor | None, w_step: Tensor | None, out_weight: Tensor | None
) -> None:
    (tokens, channels), out, alphas = x.shape, len(w), len(s)
    wanted: dict[str, tuple[int, ...]] = {"w": (out, channels), "y": (tokens, out), "s": (alphas, channels)}
    wanted |= {"x_step": (alphas,), "w_step": (alphas,), "out_weight": (out,)}
    given = {"w": w, "y": y, "s": s, "x_step": x_step, "w_step": w_step, "out_weight": out_weight}
    for name, tensor in given.items():
        if tensor is not None and tuple(tensor.shape) != wanted[name]:
            raise SqvizError(
                f"{name} has shape {tuple(tensor.shape)}; with x {tuple(x.shape)} and {out} out channels at {alphas} α "
                f"it needs {wanted[name]}."
            )
    check_channels(channels)


# --- without VNNI ---


def _product(x: Int8[Tensor, "token channel"], w: Int8[Tensor, "out channel"]) -> Int32[Tensor, "token out"]:
    """X̄ W̄ᵀ, exact; rows are at least two bytes apart (see cpu_onednn.py)."""
    if why_not_exact() is None:
        return torch._int_mm(x, w.t())
    sums = torch.zeros(len(x), len(w), dtype=torch.int32)
    for first in range(0, x.shape[1], FLOAT_CHANNELS):
        some = slice(first, first + FLOAT_CHANNELS)
        sums += (x[:, some].float() @ w[:, some].float().T).to(torch.int32)
    return sums


def _portable(
    first: int,
    count: int,
    w: np.ndarray,
    s: np.ndarray,
    given: np.ndarray,
    top: np.float32,
    out_weight: np.ndarray,
    bounds: np.ndarray,
    codes: np.ndarray,
    x_steps: np.ndarray,
    y: np.ndarray,
    found: np.ndarray,
) -> int:
    """What `loops.errors_of` does, with a product of torch."""
    (out, channels), groups, bad = w.shape, len(bounds) - 1, 0
    for item in range(first, first + count):
        alpha, group = divmod(item, groups)
        left, right = bounds[group] * WIDE, min(out, bounds[group + 1] * WIDE)
        values, steps = np.empty((right - left, max(2, channels)), np.int8), np.empty(right - left, np.float32)
        bad += loops.codes_of(0, right - left, w[left:right], s[alpha], False, given[alpha], top, values, 0, steps)
        sums = _product(*(torch.from_numpy(each)[:, :channels] for each in (codes[alpha], values)))
        y_hat = sums.float().mul_(torch.from_numpy(x_steps[alpha, :, None])).mul_(torch.from_numpy(steps))
        loops.add_errors(0, len(y), y_hat.numpy(), right - left, y, left, out_weight, found[alpha, group])
    return bad

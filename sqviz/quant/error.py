"""How far the output of one quantised linear is from its own: the curve that the smoothing explorer draws.

    Y = X Wᵀ    X̂ = Q(X / s)    Ŵ = Q(s·W)    error = ‖Y − X̂ Ŵᵀ‖ / ‖Y‖ (Frobenius)    SQNR = −20 log₁₀ error, in dB

with s from α by thesis equation 3.4. Small α leaves the outliers in X, α near 1 moves them all into W (thesis
Figure 3.8); in between lies the sweet spot. `output_error` is the definition; `LinearProbe` answers the same question
fast enough for a slider.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor

from sqviz.errors import NonFinite, SqvizError
from sqviz.progress import CancelToken
from sqviz.quant import integer
from sqviz.quant.granularity import PerChannel, PerTensor
from sqviz.quant.quantize import fake_quantize, step_and_zero
from sqviz.quant.sample import Part, everything, sample
from sqviz.quant.schemes import Scheme
from sqviz.quant.smooth import smoothing_scale

ALPHAS: tuple[float, ...] = tuple(k / 20 for k in range(21))
"""0, 0.05 … 1: where error curves are sampled."""

SMALL = 30_000_000_000  # multiplications (about 0.2 s) up to which one thread does better unless the machine is idle
CHUNK = 256  # rows of W between two looks at the cancel token


@dataclasses.dataclass(frozen=True)
class OutputError:
    """The error of a linear's output.

    Attributes:
        frobenius: ‖Y − Ŷ‖ / ‖Y‖; 0 where both are 0.
        sampled: estimated from some of the tokens and out channels; exact otherwise.
        tokens: how many tokens were multiplied.
        rows: how many out channels.
    """

    frobenius: float
    sampled: bool
    tokens: int
    rows: int

    @property
    def sqnr_db(self) -> float:
        """Signal to quantisation noise, −20 log₁₀ of `frobenius`, in dB; infinite without error."""
        return math.inf if self.frobenius == 0 else -20 * math.log10(self.frobenius)


@torch.inference_mode()
def output_error(
    x: Float[Tensor, "token channel"],
    w: Float[Tensor, "out channel"],
    s: Float[Tensor, " channel"],
    scheme: Scheme,
    x_range: tuple[Float[Tensor, " channel"], Float[Tensor, " channel"]] | None = None,
) -> OutputError:
    """The error of Q(X/s) Q(sW)ᵀ against X Wᵀ: the definition, in float32 and without sampling.

    Args:
        x: input of the linear, before smoothing.
        w: its weight, before smoothing.
        s: smoothing factors; ones for none.
        scheme: how both are quantised.
        x_range: minimum and maximum per channel seen in calibration, before smoothing; for a static scheme.

    Raises `SqvizError` if the scheme is static and `x_range` is missing, `NonFinite` for NaN and infinities.
    """
    x_smooth, w_smooth = x.float() / s, w.float() * s
    check_curve(scheme)
    if scheme.activation is not None:
        step, zero = None, None
        if scheme.static:
            if x_range is None:
                raise SqvizError(f"{scheme!r} is static: give x_range, the calibrated minimum and maximum per channel.")
            bounds = scheme.activation.extrema(torch.stack(x_range).float() / s, "activation")
            step, zero = step_and_zero(*bounds, scheme.bits, scheme.symmetric)
        x_smooth = fake_quantize(
            x_smooth, scheme.activation, scheme.bits, scheme.symmetric, step, zero=zero, of="activation"
        )
    if scheme.weight is not None:
        w_smooth = fake_quantize(
            w_smooth, scheme.weight, scheme.bits_of_weights, scheme.symmetric, of="weight", name="w"
        )
    y = (x.float() @ w.float().T).double()
    error = (y - (x_smooth @ w_smooth.T).double()).norm()
    return OutputError(_ratio(float(error), float(y.norm())), False, len(x), len(w))


class LinearProbe:
    """The output error of one linear at any α, fast: `coarse` while a slider moves, `exact` when it rests.

    The coarse answer multiplies up to 64 tokens with some rows of W. The steps of the scheme stay those of the whole:
    a per-tensor step follows from the maximum of every channel, max_j s_j·max|W_j|, a row's or a token's from itself.
    What stands out is always in the sample (tokens with the largest values, rows with the largest outputs), the rest is
    drawn at random and weighted by how many it stands for. Where W is small, all its rows are taken. `exact` multiplies
    everything.

    Made once per linear; made over for another scheme by `with_scheme`, which shares all tensors. Calls take no lock
    and change nothing but the lazily made exact product, so one worker thread may own it.
    """

    def __init__(
        self,
        x: Float[Tensor, "token channel"],
        w: Float[Tensor, "out channel"],
        x_absmax: Float[Tensor, " channel"],
        w_absmax: Float[Tensor, " channel"],
        scheme: Scheme,
        *,
        x_range: tuple[Float[Tensor, " channel"], Float[Tensor, " channel"]] | None = None,
        tokens: int = 64,
        weights: int = 1 << 21,
        seed: int = 0,
    ) -> None:
        """Look at the tensors once.

        Args:
            x: input of the linear, before smoothing.
            w: its weight, before smoothing.
            x_absmax: max|X| per channel from calibration: for s, and for the steps of a static scheme.
            w_absmax: max|W| per channel over all linears that share this input: for s.
            scheme: how X and W are quantised.
            x_range: minimum and maximum of X per channel from calibration, for a static asymmetric scheme;
                ±x_absmax if None.
            tokens: most tokens in the coarse sample.
            weights: most weights in the coarse sample; whole rows are taken, 64 at least.
            seed: of the random part of the sample.

        Raises `SqvizError` if shapes do not fit or there is nothing to multiply, `NonFinite` for NaN and infinities.
        """
        _check(x, w, x_absmax, w_absmax)
        check_curve(scheme)
        with torch.inference_mode(), _threads_for(tokens * w.numel()):
            self._x, self._w = x.float().contiguous(), w.float().contiguous()
            self._x_absmax, self._w_absmax = x_absmax.to(self._x), w_absmax.to(self._x)
            self._x_seen = torch.stack([self._x.amin(0), self._x.amax(0)])  # [2 channel]
            self._w_seen = torch.stack([self._w.amin(0), self._w.amax(0)])
            known = (-self._x_absmax, self._x_absmax) if x_range is None else x_range
            self._x_known = torch.stack([bound.to(self._x) for bound in known])
            for name, seen in (("x", self._x_seen), ("w", self._w_seen), ("x_range", self._x_known)):
                if not bool(torch.isfinite(seen).all()):
                    raise NonFinite(f"{name} of the linear holds a NaN or an infinity; its error has no meaning.")
            self.scheme = scheme
            self._coarse, whole = sample(self._x, self._w, tokens, weights, seed)
        # made at the first exact question where it is large; a list, because `with_scheme` shares it
        self._whole: list[Part] = [] if whole is None else [whole]

    def with_scheme(self, scheme: Scheme) -> "LinearProbe":
        """The same linear under another scheme; shares every tensor."""
        check_curve(scheme)
        other = object.__new__(LinearProbe)
        other.__dict__.update(self.__dict__)
        other.scheme = scheme
        return other

    def scale(self, alpha: float) -> Float[Tensor, " channel"]:
        """s at this α, thesis equation 3.4."""
        return smoothing_scale(self._x_absmax, self._w_absmax, alpha)

    def coarse(self, alpha: float | Float[Tensor, " channel"], cancel: CancelToken | None = None) -> OutputError:
        """The error at α (or under a given s) from the sample. Raises `Cancelled`."""
        return self.ask([alpha], cancel=cancel)[0]

    def exact(self, alpha: float | Float[Tensor, " channel"], cancel: CancelToken | None = None) -> OutputError:
        """The error at α (or under a given s) over all tokens and rows. Raises `Cancelled` between chunks of rows."""
        return self.ask([alpha], exact=True, cancel=cancel)[0]

    @torch.inference_mode()
    def ask(
        self,
        alphas: Sequence[float | Float[Tensor, " channel"]],
        *,
        exact: bool = False,
        cancel: CancelToken | None = None,
    ) -> list[OutputError]:
        """The error at each α, or under each given s: many cost less than the same one by one.

        NaN where X / s or s·W exceeds float32. Raises `Cancelled` within some 20 ms.
        """
        if not alphas:
            return []
        if exact and not self._whole:
            with _threads_for(len(self._x) * self._w.numel()):
                self._whole.append(self._everything(cancel))
        part = self._whole[0] if exact else self._coarse
        found = [math.nan] * len(alphas)
        with _threads_for(len(alphas) * len(part.x) * part.w.numel()):
            s = [alpha.to(self._x) if isinstance(alpha, Tensor) else self.scale(alpha) for alpha in alphas]
            finite = [place for place, one in enumerate(s) if self._represents(one)]
            product = self._integers if integer.applies(self.scheme, self._x.device) else self._floats
            for place, error in zip(finite, product(part, [s[place] for place in finite], cancel), strict=True):
                found[place] = _ratio(math.sqrt(error), part.norm)
        return [OutputError(error, part.sampled, len(part.x), len(part.w)) for error in found]

    def decompose(self, alpha: float | Float[Tensor, " channel"]) -> tuple[OutputError, OutputError]:
        """The coarse errors from the activations alone, Q(X/s)·sW, and from the weights alone, X/s·Q(sW)."""
        zero = OutputError(0.0, self._coarse.sampled, len(self._coarse.x), len(self._coarse.w))
        if self.scheme.weight is None:
            return self.coarse(alpha), zero
        if self.scheme.activation is None:
            return zero, self.coarse(alpha)
        of_x = self.with_scheme(self.scheme.replace(weight=None))
        of_w = self.with_scheme(self.scheme.replace(activation=None, static=False))
        return of_x.coarse(alpha), of_w.coarse(alpha)

    def sweep(
        self,
        alphas: Sequence[float | Float[Tensor, " channel"]] = ALPHAS,
        *,
        exact: bool = False,
        cancel: CancelToken | None = None,
    ) -> Float[Tensor, " alpha"]:
        """The relative Frobenius error at each α."""
        return torch.tensor([found.frobenius for found in self.ask(alphas, exact=exact, cancel=cancel)])

    # --- what is multiplied ---

    def _everything(self, cancel: CancelToken | None) -> Part:
        y = self._x.new_empty(len(self._x), len(self._w))
        for rows in _chunks(len(self._w)):
            _look(cancel)
            torch.mm(self._x, self._w[rows].T, out=y[:, rows])
        return everything(self._x, self._w, y)

    # --- what it is off by ---

    def _represents(self, s: Float[Tensor, " channel"]) -> bool:
        """Whether X / s and s·W stay within float32."""
        return bool(torch.isfinite(self._x_seen / s).all() & torch.isfinite(self._w_seen * s).all())

    def _integers(self, part: Part, s: list[Float[Tensor, " channel"]], cancel: CancelToken | None) -> list[float]:
        """‖Y − Ŷ‖² for each s, from integer products."""
        x_steps = [step for one in s if (step := self._activation_grid(one)[0]) is not None]
        w_steps = [step for one in s if (step := self._weight_grid(one)[0]) is not None]
        return integer.errors(part, s, x_steps, w_steps, self.scheme, cancel)

    def _floats(self, part: Part, s: list[Float[Tensor, " channel"]], cancel: CancelToken | None) -> list[float]:
        """‖Y − Ŷ‖² for each s, for schemes that integers alone cannot do."""
        found = []
        for one in s:
            error = 0.0
            for rows, y_hat in self._chunks_of(part, one):
                _look(cancel)
                error += part.norm_squared(y_hat.sub_(part.y[:, rows]), rows)
            found.append(error)
        return found

    def _chunks_of(self, part: Part, s: Float[Tensor, " channel"]) -> Iterator[tuple[slice, Tensor]]:
        """Ŷ in chunks of rows."""
        scheme = self.scheme
        x = part.x / s
        if scheme.activation is not None:
            step, zero = self._activation_grid(s)
            x = fake_quantize(x, scheme.activation, scheme.bits, scheme.symmetric, step, zero=zero, of="activation")
        step, zero = self._weight_grid(s)
        for rows in _chunks(len(part.w)):
            w = part.w[rows] * s
            if scheme.weight is not None:
                bits = scheme.bits_of_weights
                w = fake_quantize(w, scheme.weight, bits, scheme.symmetric, step, zero=zero, of="weight")
            yield rows, x @ w.T

    def _activation_grid(self, s: Float[Tensor, " channel"]) -> tuple[Tensor | None, Tensor | None]:
        """Step and zero point of X / s over all tokens, or of calibration if static; (None, None) if per token."""
        if not isinstance(self.scheme.activation, PerTensor | PerChannel):
            return None, None
        seen = self._x_known if self.scheme.static else self._x_seen
        bounds = self.scheme.activation.extrema(seen / s, "activation")
        return step_and_zero(*bounds, self.scheme.bits, self.scheme.symmetric)

    def _weight_grid(self, s: Float[Tensor, " channel"]) -> tuple[Tensor | None, Tensor | None]:
        """Step and zero point of s·W over all rows if per tensor; (None, None) where every row has its own."""
        if not isinstance(self.scheme.weight, PerTensor):
            return None, None
        bounds = self.scheme.weight.extrema(self._w_seen * s, "weight")
        return step_and_zero(*bounds, self.scheme.bits_of_weights, self.scheme.symmetric)


def error_sweep(
    x: Float[Tensor, "token channel"],
    w: Float[Tensor, "out channel"],
    x_absmax: Float[Tensor, " channel"],
    w_absmax: Float[Tensor, " channel"],
    scheme: Scheme,
    alphas: Sequence[float] = ALPHAS,
    *,
    exact: bool = True,
    cancel: CancelToken | None = None,
) -> Float[Tensor, " alpha"]:
    """The relative Frobenius error of the output at each α (thesis Figure 3.8 for one linear). See `LinearProbe`."""
    return LinearProbe(x, w, x_absmax, w_absmax, scheme).sweep(alphas, exact=exact, cancel=cancel)


def check_curve(scheme: Scheme) -> None:
    """Raise `SqvizError` for a scheme whose error is not one of X and s alone."""
    if scheme.clip is not None or scheme.weight_clip is not None or scheme.outliers is not None:
        raise SqvizError(
            f"{scheme!r}: error curves know no clipping and no channels kept in floating point. Use "
            "scheme.replace(clip=None, weight_clip=None, outliers=None), or measure the whole model: sqviz.quantize."
        )


def _check(x: Tensor, w: Tensor, x_absmax: Tensor, w_absmax: Tensor) -> None:
    shapes = {"x": x, "w": w, "x_absmax": x_absmax, "w_absmax": w_absmax}
    given = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in shapes.items())
    channels = x.shape[-1:]
    if x.ndim != 2 or w.ndim != 2 or any(t.shape[-1:] != channels or t.ndim < 1 for t in shapes.values()):
        raise SqvizError(f"x [token channel], w [out channel] and two maxima [channel] are needed; got {given}.")
    if x.numel() == 0 or w.numel() == 0:
        raise SqvizError(f"there is nothing to multiply: {given}.")


def _threads_for(multiplications: int) -> AbstractContextManager[None]:
    return integer.threads(1 if multiplications <= SMALL else torch.get_num_threads())


def _chunks(rows: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, rows, CHUNK))


def _look(cancel: CancelToken | None) -> None:
    if cancel is not None:
        cancel.check("the error of a linear")


def _ratio(error: float, signal: float) -> float:
    if signal == 0:
        return 0.0 if error == 0 else math.inf
    return error / signal

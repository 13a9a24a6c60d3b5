"""`Scheme`: what is quantised, how finely, from which statistics; and the rows of thesis Table 3.2 as values."""

import dataclasses
import math

from sqviz.errors import SqvizError
from sqviz.quant.clipping import Clip, ClipTokens, ClipValues, LeastError
from sqviz.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from sqviz.quant.quantize import check_bits

WEIGHT_GRANULARITIES = (PerTensor, PerChannel, PerGroup)
ACTIVATION_GRANULARITIES = (PerTensor, PerToken, PerChannel, PerGroup)
STATIC_GRANULARITIES = (PerTensor, PerChannel)
"""Granularities of an activation whose steps can be known before its tokens are."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the linears of a model are quantised (thesis §3.1, Table 3.2). A frozen value; equality ignores the name.

    Attributes:
        weight: granularity of the weights: PerTensor(), PerChannel() (per out channel) or PerGroup(n); None leaves
            the weights in floating point.
        activation: granularity of each linear's input: PerTensor(), PerToken(), PerChannel() (per input channel,
            simulation only, Table 3.1) or PerGroup(n); None leaves the activations in floating point.
        static: steps of the activations from calibration (`Magnitudes`) instead of from each tensor as it comes;
            for PerTensor() and PerChannel().
        bits: bits of the activations, and of the weights unless `weight_bits` says otherwise; 2 to 8.
        weight_bits: bits of the weights, 2 to 8; None: the same as `bits`.
        symmetric: around 0 (thesis equation 3.1), or with a zero point, for weights and activations alike.
        clip: where per-tensor steps of activations are cut off: ClipTokens(share), ClipValues(quantile) or
            LeastError(). None: static steps reach as far as calibration did, dynamic ones as far as each tensor does.
            A dynamic step that is clipped still follows a tensor that stays below.
        weight_clip: LeastError() cuts the range of the weights off where the linear's output errs least; None: they
            are represented up to their maximum.
        outliers: input channels with a value of at least this magnitude, in any token, are multiplied in floating
            point, both operands (LLM.int8()); None: no channel is.
        name: a label for tables and plots.

    Raises `SqvizError` naming the field, its value and what is allowed.
    """

    weight: Granularity | None = PerChannel()  # noqa: RUF009 - a frozen value
    activation: Granularity | None = PerToken()  # noqa: RUF009
    static: bool = False
    bits: int = 8
    weight_bits: int | None = None
    symmetric: bool = True
    clip: Clip | None = None
    weight_clip: LeastError | None = None
    outliers: float | None = None
    name: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        _check_granularity("weight", self.weight, WEIGHT_GRANULARITIES)
        _check_granularity("activation", self.activation, ACTIVATION_GRANULARITIES)
        if self.weight is None and self.activation is None:
            raise SqvizError("Scheme(weight=None, activation=None) quantises nothing: give at least one granularity.")
        for field in ("static", "symmetric"):
            if not isinstance(getattr(self, field), bool):
                raise SqvizError(f"Scheme({field}={getattr(self, field)!r}): True or False is allowed.")
        if not isinstance(self.name, str):
            raise SqvizError(f"Scheme(name={self.name!r}): a string is allowed.")
        if self.static and not isinstance(self.activation, STATIC_GRANULARITIES):
            raise SqvizError(
                f"Scheme(activation={self.activation!r}, static=True): static steps are fixed before the tokens are "
                f"known, so the activation has to be {_names(STATIC_GRANULARITIES)}; or use static=False."
            )
        check_bits(self.bits, "Scheme(bits=…): bits")
        if self.weight_bits is not None:
            check_bits(self.weight_bits, "Scheme(weight_bits=…): weight_bits")
        self._check_clips()
        self._check_outliers()

    def _check_clips(self) -> None:
        if self.clip is not None:
            if not isinstance(self.clip, Clip):
                raise SqvizError(
                    f"Scheme(clip={self.clip!r}): ClipTokens(share), ClipValues(quantile), LeastError() or None is "
                    "allowed."
                )
            if not isinstance(self.activation, PerTensor) or not self.symmetric:
                raise SqvizError(
                    f"Scheme(clip={self.clip!r}): one step for the whole tensor is cut off, from calibration: it needs "
                    f"activation=PerTensor() and symmetric=True, not {self.activation!r}, symmetric={self.symmetric}. "
                    "Or leave clip out."
                )
        if self.weight_clip is not None:
            fits = isinstance(self.weight, PerTensor | PerChannel) and self.symmetric
            if not isinstance(self.weight_clip, LeastError) or not fits:
                raise SqvizError(
                    f"Scheme(weight_clip={self.weight_clip!r}): LeastError() is allowed, with symmetric weights "
                    f"PerTensor() or PerChannel(), not {self.weight!r}, symmetric={self.symmetric}."
                )

    def _check_outliers(self) -> None:
        if self.outliers is None:
            return
        number = isinstance(self.outliers, int | float) and not isinstance(self.outliers, bool)
        if not number or not 0 < self.outliers < math.inf:
            raise SqvizError(f"Scheme(outliers={self.outliers!r}): a magnitude above 0 is allowed, 6.0 in LLM.int8().")
        if self.weight is None or not isinstance(self.activation, PerToken | PerTensor) or self.static:
            raise SqvizError(
                f"Scheme(outliers={self.outliers!r}): the channels kept in floating point are found in each tensor as "
                "it comes. It needs weights, activation=PerToken() or PerTensor(), and static=False; not "
                f"{self.weight!r}, {self.activation!r}, static={self.static}."
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether `quantize` has to be given magnitudes."""
        return self.static or self.clip is not None or self.weight_clip is not None

    @property
    def bits_of_weights(self) -> int:
        """`weight_bits`, or `bits` where that is None."""
        return self.bits if self.weight_bits is None else self.weight_bits

    def replace(self, **changes: object) -> "Scheme":
        """A new scheme with some fields changed; the name is dropped unless given."""
        return dataclasses.replace(self, **{"name": "", **changes})  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return self._call("")

    def describe(self) -> str:
        """One line for people: "W8 per-tensor, A8 per-token, dynamic"."""
        parts = []
        if self.weight is not None:
            parts.append(f"W{self.bits_of_weights} {_words(self.weight)}")
        if self.activation is not None:
            parts.append(f"A{self.bits} {_words(self.activation)}, {'static' if self.static else 'dynamic'}")
        if self.clip is not None:
            parts.append(_clipped(self.clip))
        if self.weight_clip is not None:
            parts.append("weights clipped for least error")
        if self.outliers is not None:
            parts.append(f"channels ≥ {self.outliers:g} in 16 bit")
        line = ", ".join(parts) + ("" if self.symmetric else ", asymmetric")
        return f"{self.name}: {line}" if self.name else line

    def as_code(self, prefix: str = "sqviz.") -> str:
        """The Python expression that makes this scheme again: a preset's name, or the call."""
        for constant, preset in PRESETS.items():
            if preset == self and preset.name == self.name:
                return prefix + constant
        return self._call(prefix)

    def _call(self, prefix: str) -> str:
        """The call that makes this scheme, without the fields left at their defaults."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Granularity | Clip):
                parts.append(f"{field.name}={prefix}{value!r}")
            elif value != field.default:
                parts.append(f"{field.name}={value!r}")
        return f"{prefix}Scheme({', '.join(parts)})"


def _check_granularity(field: str, value: object, allowed: tuple[type, ...]) -> None:
    if value is not None and not isinstance(value, allowed):
        hint = f"; write {value.__name__}(…), with brackets" if isinstance(value, type) else ""
        raise SqvizError(f"Scheme({field}={value!r}): {_names(allowed)} or None is allowed{hint}.")


def _names(kinds: tuple[type, ...]) -> str:
    return ", ".join("PerGroup(size)" if kind is PerGroup else f"{kind.__name__}()" for kind in kinds)


def _words(granularity: Granularity) -> str:
    if isinstance(granularity, PerGroup):
        return f"per-group({granularity.size})"
    return {PerTensor: "per-tensor", PerToken: "per-token", PerChannel: "per-channel"}[type(granularity)]


def _clipped(clip: Clip) -> str:
    match clip:
        case ClipTokens(share):
            return f"clipped above all but {share:.2%} of tokens"
        case ClipValues(quantile):
            return f"clipped at the {quantile:.2%} quantile"
        case LeastError():
            return "clipped for least error"


W8A8 = Scheme(PerTensor(), PerTensor(), name="W8A8")
ZEROQUANT = Scheme(PerGroup(64), PerToken(), name="ZeroQuant")
"""Groups of 64 channels, which divide those of every common model; the thesis names no size."""
LLM_INT8 = Scheme(PerChannel(), PerToken(), outliers=6.0, name="LLM.int8()")
OUTLIER_SUPPRESSION = Scheme(PerTensor(), PerTensor(), static=True, clip=LeastError(), name="Outlier Suppression")
"""Its other half, the norm without a gain, changes the model and not the scheme: `sqviz.non_scaling_norms`."""
SMOOTHQUANT_O1 = Scheme(PerTensor(), PerToken(), name="SmoothQuant-O1")
SMOOTHQUANT_O2 = Scheme(PerTensor(), PerTensor(), name="SmoothQuant-O2")
SMOOTHQUANT_O3 = Scheme(PerTensor(), PerTensor(), static=True, name="SmoothQuant-O3")
SMOOTHQUANT_LLAMA = Scheme(PerChannel(), PerToken(), name="SmoothQuant-Llama")
"""Thesis Tables 3.6 and 3.7: per-token activations and per-channel weights."""

PRESETS = {
    "W8A8": W8A8,
    "ZEROQUANT": ZEROQUANT,
    "LLM_INT8": LLM_INT8,
    "OUTLIER_SUPPRESSION": OUTLIER_SUPPRESSION,
    "SMOOTHQUANT_O1": SMOOTHQUANT_O1,
    "SMOOTHQUANT_O2": SMOOTHQUANT_O2,
    "SMOOTHQUANT_O3": SMOOTHQUANT_O3,
    "SMOOTHQUANT_LLAMA": SMOOTHQUANT_LLAMA,
}
"""The presets by the name under which sqviz exports them. A preset says how to quantise, not how much to smooth."""

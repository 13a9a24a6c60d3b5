"""What the smoothing explorer's state means: schemes as plain values for the page, what can be picked, and the code
that reproduces a state. Knows no widget and no model.

A scheme crosses to the page as a dict of strings, numbers and booleans:
`{"activation": "per-token", "weight": "per-channel", "static": False, "bits": 8, "weight_bits": 8, "symmetric": True}`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from sqviz.errors import NoSuchLayer, SqvizError
from sqviz.models.linears import linear_names
from sqviz.models.lm import LM
from sqviz.observe.magnitudes import QUANTILES, GroupInfo, Magnitudes
from sqviz.quant.error import OutputError
from sqviz.quant.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from sqviz.quant.plan import Folds
from sqviz.quant.schemes import PRESETS, Scheme

SLACK = 1.1
"""The sweet spot is where the error stays within this factor of the smallest one swept."""
PRESET_LABELS = {
    "W8A8": "W8A8 naive (per-tensor)",
    "SMOOTHQUANT_O1": "SmoothQuant-O1",
    "SMOOTHQUANT_O2": "SmoothQuant-O2",
    "SMOOTHQUANT_O3": "SmoothQuant-O3 (static)",
    "SMOOTHQUANT_LLAMA": "Llama recipe",
    "ZEROQUANT": "ZeroQuant",
}
_WORDS: dict[str, Granularity | None] = {
    "none": None,
    "per-tensor": PerTensor(),
    "per-token": PerToken(),
    "per-channel": PerChannel(),
}


def check_folds(folds: Any) -> Folds:
    """`folds`, if it is one of the two that the explorer can show."""
    if folds not in ("norm", "all"):
        raise SqvizError(
            f"folds={folds!r}: 'norm' (into norms only) or 'all' (also into the linear before) is allowed."
        )
    return folds


def check_same_model(lm: LM, magnitudes: Magnitudes) -> None:
    """Raise unless the capture is of this model as it is now: the same linears, the same smoothing folded in."""
    known = linear_names(lm)
    missing = [name for name in magnitudes.names if name not in known]
    if missing or not magnitudes.names:
        raise NoSuchLayer(
            f"the magnitudes are of {magnitudes.model or 'another model'}: {lm.name} has no linear "
            f"{missing[0] if missing else '(they are empty)'}. Capture this model: sqviz.capture(lm, text)"
        )
    same = magnitudes.scales.keys() == lm.scales.keys() and all(
        torch.equal(scale.cpu().float(), lm.scales[name].cpu().float()) for name, scale in magnitudes.scales.items()
    )
    if not same:
        raise SqvizError(
            "lm and magnitudes are smoothed differently: explore the model that was captured, or capture this one with "
            "sqviz.capture(lm, text)"
        )


def open_linear(magnitudes: Magnitudes, linear: str | int) -> str:
    """The linear that a name, the end of one, or a block's index means. Raises `NoSuchLayer`."""
    group = magnitudes.group(linear)
    return next((name for name in group.consumers if isinstance(linear, str) and name.endswith(linear)), group.name)


def check_linear(magnitudes: Magnitudes, name: str) -> str:
    """`name`, if the capture holds it; else `NoSuchLayer` naming a few that it does hold."""
    if name not in magnitudes.inputs:
        few = ", ".join(list(magnitudes.names)[:3])
        raise NoSuchLayer(f"linear={name!r} is not in the capture, which holds {few}, …: see magnitudes.names")
    return name


def granularity_word(granularity: Granularity | None) -> str:
    """PerGroup(64) → "per-group(64)", None → "none"."""
    if isinstance(granularity, PerGroup):
        return f"per-group({granularity.size})"
    return next(word for word, value in _WORDS.items() if value == granularity)


def granularity_of(word: str) -> Granularity | None:
    """The inverse of `granularity_word`."""
    grouped = re.fullmatch(r"per-group\((\d+)\)", word)
    if grouped:
        return PerGroup(int(grouped[1]))
    if word not in _WORDS:
        raise SqvizError(f"granularity {word!r}: one of {', '.join(_WORDS)}, per-group(n) is allowed.")
    return _WORDS[word]


def scheme_to_page(scheme: Scheme) -> dict[str, Any]:
    """The scheme as the page holds it."""
    return {
        "activation": granularity_word(scheme.activation),
        "weight": granularity_word(scheme.weight),
        "static": scheme.static,
        "bits": scheme.bits,
        "weight_bits": scheme.bits_of_weights,
        "symmetric": scheme.symmetric,
    }


def scheme_from_page(value: Mapping[str, Any]) -> Scheme:
    """The scheme that the page asks for, under its preset's name where it equals one. Raises `SqvizError`."""
    fields = dict(value)
    try:
        scheme = Scheme(
            activation=granularity_of(fields.pop("activation")),
            weight=granularity_of(fields.pop("weight")),
            static=fields.pop("static"),
            bits=fields.pop("bits"),
            weight_bits=fields.pop("weight_bits"),
            symmetric=fields.pop("symmetric"),
        )
    except KeyError as missing:
        raise SqvizError(
            f"scheme={dict(value)!r} lacks {missing}; assign a sqviz.Scheme to `explorer.scheme`."
        ) from None
    return named(scheme)


def named(scheme: Scheme) -> Scheme:
    """The scheme, with `weight_bits` dropped where it repeats `bits`, and a preset's name where it equals one."""
    plain = dataclasses.replace(scheme, weight_bits=None) if scheme.weight_bits == scheme.bits else scheme
    return next((preset for preset in PRESETS.values() if preset == plain), plain)


def scheme_key(scheme: Scheme) -> str:
    """One string per scheme, the same in the page (smoothing.js, `schemeKey`), by which answers are told apart."""
    page = scheme_to_page(scheme)
    return "|".join(
        str(page[field]).lower() for field in ("activation", "weight", "static", "bits", "weight_bits", "symmetric")
    )


def code_template(scheme: Scheme, folds: Folds, *, online: bool = False) -> str:
    """The calls that reproduce a state, with `{alpha}` where α goes: the page fills it in, kernel or not."""
    return (
        f"smoothed = sqviz.smooth(lm, magnitudes, {{alpha}}, folds={folds!r}{', online=True' if online else ''})\n"
        f"quantized = sqviz.quantize(smoothed, {scheme.as_code()}, magnitudes)"
    )


def relative_kind(group: GroupInfo, linear: str) -> str:
    """A consumer's path inside its block: "model.layers.3.mlp.up_proj" → "mlp.up_proj"."""
    prefix = group.name.removesuffix(group.kind)
    return linear.removeprefix(prefix)


def catalogue(magnitudes: Magnitudes) -> list[dict[str, Any]]:
    """One row per linear, in execution order, for the pickers and the strip."""
    rows = []
    for group in magnitudes.groups:
        for linear in group.consumers:
            rows.append(  # noqa: PERF401 - a comprehension over two loops and six fields reads worse
                {
                    "name": linear,
                    "group": group.name,
                    "block": group.block,
                    "kind": relative_kind(group, linear),
                    "channels": int(magnitudes.absmax(linear).shape[-1]),
                    "out": int(magnitudes.weights[linear].out_absmax.shape[0]),
                    "fold": group.fold_kind,
                    "reason": group.reason,
                }
            )
    return rows


def first_linear(magnitudes: Magnitudes) -> str:
    """Where the explorer opens: the input, of those the thesis smooths, whose large channels are large all the time.

    A high quantile instead of the maximum: what one token alone makes large (the "massive activations" of some
    down_proj inputs) is no channel's, and no s per channel mends it.
    """
    groups = [group for group in magnitudes.groups if group.fold_kind == "norm"] or list(magnitudes.groups)
    groups = [group for group in groups if magnitudes.has_map(group.name)] or groups

    def spread(name: str) -> float:
        usual = magnitudes.inputs[name].quantiles[QUANTILES.index(0.99)]
        return float(usual.max()) / max(float(usual.median()), 1e-30)

    return max((group.name for group in groups), key=spread)


@dataclasses.dataclass(frozen=True)
class State:
    """What the user has set. `moving`: α is still under the hand."""

    linear: str
    alpha: float
    scheme: Scheme
    folds: Folds
    moving: bool = False


def answer_for(state: State, found: OutputError) -> dict[str, Any]:
    """An error, and the state it belongs to, as the page takes it."""
    return {
        "linear": state.linear,
        "scheme": scheme_key(state.scheme),
        "alpha": state.alpha,
        "error": found.frobenius if math.isfinite(found.frobenius) else None,
        "how": "sampled" if found.sampled else "exact",
        "tokens": found.tokens,
        "rest": not state.moving,
    }

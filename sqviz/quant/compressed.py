"""The compressed-tensors layout of a W8A8 model, which vLLM and transformers read ("int-quantized").

    NAME.weight         int8 [out channel], the codes W̄ of equation 3.1
    NAME.weight_scale   float32 [out 1] (strategy "channel") or [1] ("tensor"): the steps Δ, so that Ŵ = Δ · W̄
    NAME.input_scale    float32 [1], of a static scheme only
    config.json         quantization_config: how weights and inputs are quantised, and which linears are not ("ignore")

Everything else stands there as it is. A mixture's experts are written one by one, as vLLM reads them. Codes and steps
are those of `sqviz.quantize`, to the bit; a step of 0 (a slice of zeros, codes 0) becomes the smallest normal number,
since readers divide by it. Codes that stand for inputs are the reader's affair:

    vLLM           Δ = max|x| / 127, per token if dynamic, per tensor if static; experts per channel and per token only
    transformers   comes back to floating point. Δ = max|x| / 127.5 and x̄ from −128; steps are rounded to the model's
                   dtype; one step for all tokens where a module hands its linears [token channel] without a batch
                   (OPT's MLP); no mixtures

As read from vLLM's source (not run here) and found by trying: compressed-tensors 0.20.0 under transformers 5.23.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sqviz.errors import SqvizError
from sqviz.models.linears import experts, groups, holder, weight
from sqviz.models.lm import LM
from sqviz.quant.calibration import Calibration
from sqviz.quant.granularity import PerChannel, PerTensor, PerToken
from sqviz.quant.linear import is_router, matching
from sqviz.quant.plain import check_experts, is_plain
from sqviz.quant.quantize import quantize_tensor
from sqviz.quant.schemes import Scheme
from sqviz.quant.shards import Piece, floating, kept, on_disk

FUSED_BY_VLLM = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """A model in the compressed-tensors layout, nothing of it made yet.

    Attributes:
        pieces: the tensors.
        config: the value of `quantization_config`.
        quantised: names of the linears that become INT8.
        notes: what not every reader can do, for people.
    """

    pieces: tuple[Piece, ...]
    config: dict[str, Any]
    quantised: tuple[str, ...]
    notes: tuple[str, ...]


def lay_out(calibration: Calibration, skip: str | Iterable[str], dtype: torch.dtype | None) -> Layout:
    """Plan the tensors of a model, with the codes that `quantize` would give its linears.

    Args:
        calibration: of the model, by the scheme.
        skip: glob patterns over names of linears that stay in floating point.
        dtype: of what stays in floating point; None: as it is.

    Raises:
        SqvizError: the scheme or a linear has no place in the format, or nothing is left to quantise.
        NoSuchLayer: a pattern matches nothing.
    """
    lm, scheme = calibration.lm, calibration.scheme
    chosen = chosen_linears(lm, scheme, skip)
    keys = {_key(lm, name): name for name in chosen}
    tiny = torch.finfo(lm.dtype if dtype is None else dtype).tiny
    pieces = [
        _quantised(calibration, keys[key], key, tiny) if key in keys else floating(lm.model, key, tensor, dtype)
        for key, tensor in kept(lm.model).items()
    ]
    return Layout(tuple(pieces), _config(scheme, _ignored(lm, chosen)), chosen, _notes(scheme, lm, chosen))


def check_scheme(scheme: Scheme) -> None:
    """Raise `SqvizError` naming the fields for which the format has no word that its readers know."""
    troubles = []
    if not isinstance(scheme.weight, PerTensor | PerChannel):
        troubles.append(f"weight={scheme.weight!r}: PerTensor() or PerChannel() is needed")
    if not isinstance(scheme.activation, PerTensor | PerToken):
        troubles.append(f"activation={scheme.activation!r}: PerToken() or PerTensor() is needed")
    if scheme.bits != 8:
        troubles.append(f"bits={scheme.bits}: 8 is needed")
    if scheme.bits_of_weights != 8 and scheme.weight_bits is not None:
        troubles.append(f"weight_bits={scheme.weight_bits}: 8 is needed")
    if not scheme.symmetric:
        troubles.append("symmetric=False: weights have no zero point here; symmetric=True is needed")
    if scheme.outliers is not None:
        troubles.append(f"outliers={scheme.outliers}: no channels stay in floating point here; outliers=None is needed")
    if scheme.clip is not None and not scheme.static:
        troubles.append(
            f"clip={scheme.clip!r}: readers know no ceiling of dynamic steps; static=True or clip=None is needed"
        )
    if troubles:
        raise SqvizError(
            f"{scheme!r} cannot be written as compressed-tensors W8A8: {'; '.join(troubles)}. "
            "sqviz.SMOOTHQUANT_LLAMA, SMOOTHQUANT_O1 and SMOOTHQUANT_O3 can."
        )


# --- which linears ---


def chosen_linears(lm: LM, scheme: Scheme, skip: str | Iterable[str]) -> tuple[str, ...]:
    """The linears to quantise, as `quantize` chooses them. Raises as `lay_out` does for what the format cannot hold."""
    check_scheme(scheme)
    names = [(name, is_router(lm, group, name)) for group in groups(lm) for name in group.consumers]
    skipped = matching(skip, [name for name, _ in names])
    found = tuple(name for name, router in names if not router and name not in skipped)
    if not found:
        raise SqvizError(f"skip={skip!r} leaves nothing to quantise. Skip less, or export without scheme.")
    for name in found:
        _check_linear(lm, name, scheme)
    return found


def _check_linear(lm: LM, name: str, scheme: Scheme) -> None:
    """Raise `SqvizError` unless readers of the format can take this linear as INT8."""
    if experts(lm, name):
        path = name.rpartition(".")[0]
        check_experts(lm.model.get_submodule(path), path)
        if not isinstance(scheme.weight, PerChannel) or not isinstance(scheme.activation, PerToken):
            raise SqvizError(
                f"{name}: the INT8 experts that vLLM reads have weight=PerChannel() and activation=PerToken(), not "
                f"{scheme.weight!r} and {scheme.activation!r}. Take scheme=sqviz.SMOOTHQUANT_LLAMA, or leave the "
                f"experts as they are: skip={path + '.*'!r}."
            )
        return
    module: Any = lm.model.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise SqvizError(
            f"{name} is a {type(module).__name__}, whose weight is stored [channel out]. compressed-tensors quantises "
            "nn.Linear only and would not find it. Export without scheme, or write an INT8 model by sqviz.save_int8."
        )
    if not is_plain(module, weight(lm, name), module.bias):
        raise SqvizError(
            f"{name} is a {type(module).__name__}, which computes more than X Wᵀ + b. Leave it in floating point: "
            f"skip={[name]!r}."
        )


def _key(lm: LM, name: str) -> str:
    """The name of the linear's weight in the model's state: fused experts are parameters themselves."""
    return name if experts(lm, name) else f"{name}.{holder(lm.model, name)[1]}"


def _ignored(lm: LM, chosen: Sequence[str]) -> list[str]:
    """Every other linear, under its name in the model and under the one that it has in the files."""
    linears = [name for name, module in lm.model.named_modules() if isinstance(module, nn.Linear)]
    linears += [name for group in groups(lm) for name in group.consumers if name not in linears]
    found: dict[str, None] = {}
    for name in linears:
        if name in chosen:
            continue
        if not _key(lm, name).endswith(".weight"):  # fused experts: no module has their name
            shape = getattr(*holder(lm.model, name)).shape
            found.update(dict.fromkeys(_bare(on_disk(lm.model, name, torch.empty(shape, device="meta")))))
            continue
        found[name] = None
        found.update(dict.fromkeys(_bare(on_disk(lm.model, f"{name}.weight", torch.empty(1, 1, device="meta")))))
    return list(found)


def _bare(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(".weight") for name in names]


def _notes(scheme: Scheme, lm: LM, chosen: Sequence[str]) -> tuple[str, ...]:
    """What not every reader can do."""
    notes = []
    if any(experts(lm, name) for group in groups(lm) for name in group.consumers):
        notes.append("vLLM reads it, transformers does not: it has no reader for mixtures in this format.")
    if isinstance(scheme.activation, PerTensor) and not scheme.static:
        notes.append(
            "vLLM does not read it: it has no dynamic per-tensor inputs. For vLLM take activation=PerToken(), or "
            "static=True."
        )
    for group in groups(lm):
        for parts in FUSED_BY_VLLM:
            there = [name for name in group.consumers if name.rpartition(".")[2] in parts]
            left = [name for name in there if name not in chosen]
            if left and len(left) < len(there):
                notes.append(
                    f"vLLM computes {' + '.join(parts)} as one product and does not read it with {left[0]} left in "
                    "floating point and others not. For vLLM skip all of them or none."
                )
                return tuple(notes)
    return tuple(notes)


# --- tensors ---


def _quantised(calibration: Calibration, name: str, key: str, tiny: float) -> Piece:
    """Codes and steps of a linear, or of the same linear of all experts."""
    lm = calibration.lm
    stored = getattr(*holder(lm.model, name))
    grids = calibration.grids(name)  # now: magnitudes of another model are told before anything is written
    per_tensor = isinstance(calibration.scheme.weight, PerTensor)

    def tensors(codes: Tensor, steps: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        scales = on_disk(lm.model, key, steps)
        for weight_name, part in on_disk(lm.model, key, codes).items():
            found[weight_name] = part
            found[f"{weight_name}_scale"] = scales[weight_name].reshape(-1) if per_tensor else scales[weight_name]
            if grids[0] is not None:
                step = grids[0][0].reshape(1).float()
                found[f"{weight_name.removesuffix('weight')}input_scale"] = torch.where(step == 0, tiny, step)
        return found

    def make() -> dict[str, Tensor]:
        codes, steps = _codes(calibration, name)
        return tensors(codes.reshape(stored.shape), torch.where(steps == 0, tiny, steps))

    shape = (1, 1) if per_tensor else (*stored.shape[:-1], 1)
    empty = tensors(torch.empty(stored.shape, dtype=torch.int8, device="meta"), torch.empty(shape, device="meta"))
    return Piece({found: part.nbytes for found, part in empty.items()}, make)


def _codes(calibration: Calibration, name: str) -> tuple[Tensor, Tensor]:
    """W̄ int8 [*expert out channel] and its steps, float32 [*expert out_or_1 1], as `quantize` makes them."""
    scheme, count = calibration.scheme, experts(calibration.lm, name)
    assert scheme.weight is not None
    original = weight(calibration.lm, name).detach()
    found = [
        quantize_tensor(
            matrix,
            scheme.weight,
            clip=calibration.weight_clip(name, matrix, expert if count else None),
            of="weight",
            name=f"the weight of {name}",
        )
        for expert, matrix in enumerate(original.unflatten(0, (count or 1, -1)))
    ]
    if not count:
        return found[0].values, found[0].step.float()
    return torch.stack([one.values for one in found]), torch.stack([one.step for one in found]).float()


def _config(scheme: Scheme, ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    plain = {"num_bits": 8, "type": "int", "symmetric": True}
    inputs = "token" if isinstance(scheme.activation, PerToken) else "tensor"
    weights = "channel" if isinstance(scheme.weight, PerChannel) else "tensor"
    group = {
        "targets": ["Linear"],
        "weights": {**plain, "strategy": weights, "dynamic": False},
        "input_activations": {**plain, "strategy": inputs, "dynamic": not scheme.static},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }

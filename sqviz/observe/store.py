"""`Magnitudes` as one safetensors file: nothing in it is executed, and it is there whole or not at all.

Layout: one tensor per field, the groups' (or weights') values one after the other, in the order of the table in the
header's metadata; so a capture of any model is some twenty tensors. A compact file holds what smoothing is computed
from (absmax of inputs and weights) as float16, and what is only looked at as uint8 log codes: 0 for 0, k ∈ 1..255
for peak · 10^(6 (k − 255)/254), six decades below the largest value of the array, within 2.8 %; its maps of weights
have 32 rows.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz.observe.magnitudes import GroupInfo, InputStats, Magnitudes, TopToken, WeightStats
from sqviz.observe.reduce import max_pool
from sqviz.tensorfile import write_tensors

FORMAT, VERSION = "sqviz-magnitudes", 1
DECADES, CODES = 6, 254

_INPUT_FIELDS = ("minimum", "maximum", "mean", "quantiles", "tensor_quantiles", "token_absmax", "channel_token", "map")
_INPUT_EXTRAS = ("expert_absmax", "expert_tokens")
_WEIGHT_FIELDS = ("channel_absmax", "out_absmax", "map")
_WEIGHT_EXTRAS = ("expert_absmax",)
_LOOKED_AT = ("mean", "quantiles", "tensor_quantiles", "token_absmax", "out_absmax", "map")  # one byte when compact
COMPACT_WEIGHT_BINS = 32


def save(
    magnitudes: Magnitudes, path: str | os.PathLike[str], *, compact: bool = False, maps: Sequence[str] | None = None
) -> None:
    """See `Magnitudes.save`."""
    kept = {consumer for name in maps for consumer in magnitudes.group(name).consumers} if maps is not None else None
    inputs = {group.name: _without_map(magnitudes.inputs[group.name], group.name, kept) for group in magnitudes.groups}
    weights = {name: _without_map(stats, name, kept) for name, stats in magnitudes.weights.items()}
    if compact:
        weights = {
            name: replace(stats, map=max_pool(stats.map, COMPACT_WEIGHT_BINS)) for name, stats in weights.items()
        }
    tensors: dict[str, Tensor] = {"tokens": magnitudes.tokens}
    table = {
        "model": magnitudes.model,
        "length": magnitudes.length,
        "token_texts": magnitudes.token_texts,
        "groups": [dataclasses.asdict(group) for group in magnitudes.groups],
        "top": [[list(dataclasses.astuple(top)) for top in stats.top] for stats in inputs.values()],
        "inputs": _put(tensors, "inputs", inputs, (*_INPUT_FIELDS, *_INPUT_EXTRAS), compact),
        "weights": _put(tensors, "weights", weights, (*_WEIGHT_FIELDS, *_WEIGHT_EXTRAS), compact),
        "scales": list(magnitudes.scales),
    }
    tensors |= {f"scales/{index}": scale.contiguous() for index, scale in enumerate(magnitudes.scales.values())}
    write_tensors(tensors, {"format": FORMAT, "version": str(VERSION), "table": json.dumps(table)}, Path(path))


def load(path: str | os.PathLike[str]) -> Magnitudes:
    """See `Magnitudes.load`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check(metadata, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return _build(json.loads(metadata["table"]), tensors)
    except (SafetensorError, KeyError, IndexError, RuntimeError, TypeError, json.JSONDecodeError) as broken:
        raise SqvizError(f"{str(path)!r} is damaged, or no safetensors file ({broken}); capture again") from broken


def _check(metadata: dict[str, str], path: Path) -> None:
    if metadata.get("format") != FORMAT:
        raise SqvizError(f"{str(path)!r} is a safetensors file, but not a capture written by Magnitudes.save")
    if int(metadata["version"]) > VERSION:
        raise SqvizError(
            f"{str(path)!r} is of version {metadata['version']} of the format, and this sqviz reads up to "
            f"{VERSION}: update sqviz"
        )


def _build(table: dict[str, Any], tensors: dict[str, Tensor]) -> Magnitudes:
    fields = _take(tensors, "inputs", table["inputs"])
    groups = tuple(GroupInfo(**{**group, "consumers": tuple(group["consumers"])}) for group in table["groups"])
    inputs: dict[str, InputStats] = {}
    for group, values, top in zip(groups, fields, table["top"], strict=True):
        stats = InputStats(**values, top=tuple(TopToken(*entry) for entry in top))
        inputs |= dict.fromkeys(group.consumers, stats)
    names = [name for group in groups for name in group.consumers]
    weights = zip(names, _take(tensors, "weights", table["weights"]), strict=True)
    return Magnitudes(
        inputs=inputs,
        weights={name: WeightStats(**values) for name, values in weights},
        groups=groups,
        tokens=tensors["tokens"],
        length=table["length"],
        token_texts=tuple(table["token_texts"]),
        model=table["model"],
        scales={name: tensors[f"scales/{index}"] for index, name in enumerate(table["scales"])},
    )


def _without_map(stats: Any, name: str, kept: set[str] | None) -> Any:
    return stats if kept is None or name in kept else replace(stats, map=stats.map[:0])


# --- many small tensors as one ---


def _put(
    tensors: dict[str, Tensor], prefix: str, stats: dict[str, Any], fields: Sequence[str], compact: bool
) -> list[Any]:
    """Add one tensor per field; return, per entry, {field: [shape, peak or None]} without fields that are None."""
    rows: list[dict[str, Any]] = [{} for _ in stats]
    for field in fields:
        encode = _encoder(field) if compact else _as_is
        parts = []
        for row, entry in zip(rows, stats.values(), strict=True):
            value = getattr(entry, field)
            if value is not None:
                part, peak = encode(value)
                parts.append(part.reshape(-1))
                row[field] = [list(value.shape), peak]
        if parts:
            tensors[f"{prefix}/{field}"] = torch.cat(parts)
    return rows


def _take(tensors: dict[str, Tensor], prefix: str, rows: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """The inverse of `_put`: views of the long tensors, or float32 of what was encoded."""
    starts: dict[str, int] = {}
    taken = []
    for row in rows:
        values = {}
        for field, (shape, peak) in row.items():
            count = int(torch.tensor(shape).prod())
            start = starts.get(field, 0)
            part = tensors[f"{prefix}/{field}"][start : start + count].reshape(shape)
            starts[field] = start + count
            values[field] = _decode(part, peak, field)
        taken.append(values)
    return taken


def _encoder(field: str) -> Callable[[Tensor], tuple[Tensor, float | None]]:
    if field in _LOOKED_AT:
        return _to_codes
    return _to_short


def _as_is(value: Tensor) -> tuple[Tensor, float | None]:
    return value, None


def _to_short(value: Tensor) -> tuple[Tensor, float | None]:
    """float16 for what is float; int16 for token indices where they fit."""
    if value.is_floating_point():
        limit = torch.finfo(torch.float16).max
        return value.clamp(-limit, limit).half(), None
    fits = value.dtype == torch.int32 and (value.numel() == 0 or int(value.max()) < 1 << 15)
    return (value.to(torch.int16) if fits else value), None


def _to_codes(value: Tensor) -> tuple[Tensor, float | None]:
    peak = float(value.max()) if value.numel() else 0.0
    if peak == 0.0:
        return torch.zeros_like(value, dtype=torch.uint8), 0.0
    code = 255 + (value.double() / peak).log10() * (CODES / DECADES)
    return torch.where(value > 0, code.round().clamp(0, 255), 0).to(torch.uint8), peak


def _decode(part: Tensor, peak: float | None, field: str) -> Tensor:
    if peak is not None:
        value = peak * 10.0 ** ((part.double() - 255) * (DECADES / CODES))
        value = torch.where(part > 0, value, 0.0)
        return value.clamp(max=torch.finfo(torch.float16).max).half() if field == "map" else value.float()
    if part.dtype == torch.int16:
        return part.to(torch.int32)
    return part.float() if part.dtype == torch.float16 and field != "map" else part

"""Packs: the arrays from which the page draws one group of linears, in one run of bytes.

    u32 total bytes · u32 bytes of header · header (JSON, utf-8) · arrays, each at a multiple of 8 bytes; little-endian

The header holds plain values and, under "arrays", name → {kind, offset, count}, with kind one of u1, f4, i4. Packs can
be put one after the other: an exported page carries several. `unpackAll` in smoothing_formula.js reads them.
"""

import dataclasses
import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sqviz.models.folds import producer_rows, tie
from sqviz.models.linears import Group, experts, weight
from sqviz.models.lm import LM
from sqviz.observe.capture import WEIGHT_BINS
from sqviz.observe.magnitudes import Magnitudes
from sqviz.observe.reduce import max_pool, to_half
from sqviz.widgets.view import code_range, encode_log

_KINDS: dict[np.dtype, str] = {np.dtype("uint8"): "u1", np.dtype("<f4"): "f4", np.dtype("<i4"): "i4"}
MAX_CELLS = 1_000_000
"""Cells of one map that the page scales and paints within a frame; above it, the map is pooled further along tokens."""


def pack(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """One pack of plain values and flat arrays (uint8, float32 or int32)."""
    table: dict[str, dict[str, Any]] = {}
    parts: list[bytes] = []

    def header_bytes(base: int) -> bytes:
        placed = {name: {**entry, "offset": entry["offset"] + base} for name, entry in table.items()}
        return json.dumps({**header, "arrays": placed}, allow_nan=False).encode()

    size = 0
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(-1)
        data = flat.tobytes()
        table[name] = {"kind": _KINDS[flat.dtype.newbyteorder("<")], "offset": size, "count": flat.size}
        parts.append(data + bytes(-len(data) % 8))
        size += len(parts[-1])
    base = 8 + len(header_bytes(10**9)) + 16  # the header's own length depends on the offsets it holds: leave room
    base += -base % 8
    text = header_bytes(base).ljust(base - 8)
    return struct.pack("<II", base + size, len(text)) + text + b"".join(parts)


def unpack(data: bytes) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """The packs in a run of bytes, as (header, arrays): what the page does, for tests and stills."""
    packs, start = [], 0
    while start < len(data):
        total, length = struct.unpack_from("<II", data, start)
        header = json.loads(data[start + 8 : start + 8 + length])
        dtypes: dict[str, np.dtype] = {kind: dtype for dtype, kind in _KINDS.items()}
        arrays = {
            name: np.frombuffer(data, dtypes[entry["kind"]], entry["count"], start + entry["offset"])
            for name, entry in header.pop("arrays").items()
        }
        packs.append((header, arrays))
        start += total
    return packs


def pool_rows(values: Float[Tensor, "row channel"], rows: int) -> Float[Tensor, "bin channel"]:
    """Max over runs of ⌈row / rows⌉ rows. Exact for any smoothing, which scales a whole column."""
    run = max(1, -(-values.shape[0] // max(rows, 1)))
    if run == 1:
        return values
    return torch.stack([part.amax(0) for part in values.split(run)])


@dataclasses.dataclass(frozen=True, eq=False)
class Vectors:
    """The channel maxima of one group; of its busiest expert, where experts read inputs of their own.

    Attributes:
        x_absmax: [channel] max|X|.
        s_x, s_w: [channel] what s is made from (thesis equation 3.4): max|X|, and max|W| over all consumers; both tied
            among channels that one row of the producer feeds, as the fold ties them.
        expert: which expert, or None.
    """

    x_absmax: Float[Tensor, " channel"]
    s_x: Float[Tensor, " channel"]
    s_w: Float[Tensor, " channel"]
    expert: int | None = None


def vectors(lm: LM, magnitudes: Magnitudes, group: Group) -> Vectors:
    """The maxima from which a group's s is made, as `sqviz.smooth` would make it."""
    x, w = magnitudes.absmax(group.name).float(), magnitudes.fold_weight_absmax(group.name).float()
    s_x, s_w = x, w
    if group.fold_kind == "linear":
        rows = producer_rows(lm, group).cpu()
        s_x, s_w = tie(x, rows), tie(w, rows)
    if x.ndim == 1:
        return Vectors(x, s_x, s_w)
    tokens = magnitudes.inputs[group.name].expert_tokens
    expert = int(tokens.argmax()) if tokens is not None else 0
    return Vectors(x[expert], s_x[expert], s_w[expert], expert)


def own_weight(lm: LM, name: str, expert: int | None) -> Float[Tensor, "out channel"]:
    """The weight whose output the explorer shows: all of it, or one expert's."""
    whole = weight(lm, name).detach()
    return whole if expert is None else whole.unflatten(0, (experts(lm, name), -1))[expert]


def weight_map(
    lm: LM, magnitudes: Magnitudes, name: str, expert: int | None, rows: int
) -> Float[Tensor, "bin channel"]:
    """|W| max-pooled along out to at most `rows` rows; from the capture, or from the model where it was left out."""
    held = magnitudes.weights[name].map
    if len(held) == 0 or expert is not None:
        held = to_half(max_pool(own_weight(lm, name, expert), WEIGHT_BINS))
    return pool_rows(held.float(), rows)


def group_pack(
    lm: LM,
    magnitudes: Magnitudes,
    group: Group,
    x_map: Float[Tensor, "bin channel"] | None = None,
    *,
    max_rows: int = 512,
    weight_rows: int = 128,
) -> bytes:
    """What the page needs of a group: |X| and, per consumer, |W| as log codes, and the exact channel maxima.

    Args:
        lm: the model.
        magnitudes: its capture.
        group: one of its groups.
        x_map: in place of the capture's map, where that was saved without.
        max_rows: rows of the |X| map at most; fewer where that makes more than MAX_CELLS cells.
        weight_rows: rows of each |W| map at most.
    """
    found = vectors(lm, magnitudes, group)
    channels = len(found.x_absmax)
    most = max(1, MAX_CELLS // channels)
    whole = magnitudes.inputs[group.name].map if x_map is None else x_map
    x = pool_rows(whole.float(), min(max_rows, most)).numpy()
    arrays = {
        "x_map": encode_log(x, *code_range(x)),
        "x_absmax": found.x_absmax.numpy(),
        "s_x": found.s_x.numpy(),
        "s_w": found.s_w.numpy(),
    }
    consumers = []
    for index, name in enumerate(group.consumers):
        stats = magnitudes.weights[name]
        w = weight_map(lm, magnitudes, name, found.expert, min(weight_rows, most)).numpy()
        absmax = stats.channel_absmax
        if found.expert is not None:
            absmax = own_weight(lm, name, found.expert).abs().amax(0).float().cpu()
        arrays |= {f"w_map_{index}": encode_log(w, *code_range(w)), f"w_absmax_{index}": absmax.numpy()}
        consumers.append(
            {"name": name, "rows": len(w), "range": code_range(w), "out": len(own_weight(lm, name, found.expert))}
        )
    run = -(-magnitudes.length // max(len(x), 1))
    header = {
        "group": group.name,
        "channels": channels,
        "rows": len(x),
        "range": code_range(x),
        "tokens_per_row": run,
        "texts": list(magnitudes.token_texts[: magnitudes.length]),
        "expert": found.expert,
        "consumers": consumers,
    }
    return pack(
        header, {name: array.astype("<f4") if array.dtype != np.uint8 else array for name, array in arrays.items()}
    )

"""Packs: the arrays from which the page draws one group of linears, in one run of bytes.

    u32 total bytes · u32 bytes of header · header (JSON, utf-8) · arrays, each at a multiple of 8 bytes; little-endian

The header holds plain values and, under "arrays", name → {kind, offset, count}, with kind one of u1, f4, i4. Packs can
be put one after the other: an exported page carries several. `unpackAll` in smoothing_formula.js reads them.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sqviz.observe.magnitudes import GroupInfo, Magnitudes
from sqviz.widgets.view import code_range, encode_log

_KINDS = {np.dtype("uint8"): "u1", np.dtype("<f4"): "f4", np.dtype("<i4"): "i4"}
MAX_CELLS = 1_500_000
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
        dtypes = {kind: dtype for dtype, kind in _KINDS.items()}
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


def group_pack(magnitudes: Magnitudes, group: GroupInfo, *, max_rows: int = 512, weight_rows: int = 128) -> bytes:
    """What the page needs of a group: |X| and, per consumer, |W| as log codes, and the exact channel maxima.

    Args:
        magnitudes: the capture.
        group: one of its groups.
        max_rows: rows of the |X| map at most; fewer where that makes more than MAX_CELLS cells.
        weight_rows: rows of each |W| map at most.
    """
    stats = magnitudes.inputs[group.consumers[0]]
    channels = stats.absmax.shape[0]
    rows = max(1, min(max_rows, MAX_CELLS // channels))
    x = pool_rows(stats.map.float(), rows).numpy()
    run = -(-min(magnitudes.length, len(magnitudes.token_texts) or magnitudes.length) // max(x.shape[0], 1))
    x_range = code_range(x)
    arrays = {
        "x_map": encode_log(x, *x_range),
        "x_absmax": stats.absmax.numpy().astype("<f4"),
        "fold_w_absmax": magnitudes.fold_weight_absmax(group.name).numpy().astype("<f4"),
    }
    consumers = []
    for index, name in enumerate(group.consumers):
        weights = magnitudes.weights[name]
        w = pool_rows(weights.map.float(), min(weight_rows, max(1, MAX_CELLS // channels))).numpy()
        w_range = code_range(w)
        arrays[f"w_map_{index}"] = encode_log(w, *w_range)
        arrays[f"w_absmax_{index}"] = weights.channel_absmax.numpy().astype("<f4")
        consumers.append({"name": name, "rows": w.shape[0], "range": w_range, "out": weights.out_absmax.shape[0]})
    header = {
        "group": group.name,
        "channels": channels,
        "rows": x.shape[0],
        "range": x_range,
        "tokens_per_row": run,
        "consumers": consumers,
    }
    return pack(header, arrays)

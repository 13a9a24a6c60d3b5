"""Which linears an exported smoothing page carries, and at what resolution, so that it stays small enough to mail."""

import fnmatch
from collections.abc import Callable, Sequence

from sqviz.errors import NoSuchLayer
from sqviz.observe.magnitudes import GroupInfo, Magnitudes

PAGE_BLOCKS = 8
PAGE_BYTES = 4_500_000
"""Of the maps in a page, which makes pages of 5 MB at most."""
BASE64 = 4 / 3
RESOLUTIONS = ((128, 64), (64, 32), (32, 16))
"""Rows of |X| and of |W|, tried in this order; the linear in view always has the first."""


def choose_linears(magnitudes: Magnitudes, linear: str, wanted: str | Sequence[str] | None = None) -> list[str]:
    """The linears to carry, in execution order.

    Args:
        magnitudes: the capture.
        linear: the one in view, which always comes along.
        wanted: names or glob patterns; None: every linear of the block in view, of the block with the largest
            outliers, and of evenly spaced ones, PAGE_BLOCKS in all.

    Raises:
        NoSuchLayer: a name or pattern matches nothing.
    """
    if wanted is None:
        blocks = _blocks(magnitudes, linear)
        return [name for group in magnitudes.groups if group.block in blocks for name in group.consumers]
    found = {linear}
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        matched = fnmatch.filter(magnitudes.names, pattern)
        if not matched:
            raise NoSuchLayer(f"linears={pattern!r} matches no linear of this capture: see magnitudes.names")
        found.update(matched)
    return [name for name in magnitudes.names if name in found]


def _blocks(magnitudes: Magnitudes, linear: str) -> set[int]:
    every = sorted({group.block for group in magnitudes.groups})
    outlying = max(magnitudes.groups, key=lambda group: magnitudes.inputs[group.name].outlier_ratio)
    chosen = {magnitudes.group(linear).block, outlying.block}
    spaced = [every[round(k * (len(every) - 1) / max(PAGE_BLOCKS - 1, 1))] for k in range(PAGE_BLOCKS)]
    for block in sorted(spaced, key=spaced.index):
        if len(chosen) < PAGE_BLOCKS:
            chosen.add(block)
    return chosen


def embed(
    magnitudes: Magnitudes,
    linears: Sequence[str],
    first: str,
    make: Callable[..., bytes],
    budget_bytes: int = PAGE_BYTES,
) -> tuple[bytes, list[str]]:
    """The packs of the groups of these linears within a budget, and the linears that found room.

    Maps are made coarser until all fit, but for those in view; where even the coarsest do not, the last groups are left
    out.

    Args:
        magnitudes: the capture.
        linears: what to carry.
        first: the linear in view, whose group comes first and is never left out.
        make: `make(group name, max_rows=…, weight_rows=…)` -> pack.
        budget_bytes: of the packs as base64.
    """
    wanted = set(linears)
    groups = [group for group in magnitudes.groups if wanted & set(group.consumers)]
    groups.sort(key=lambda group: first not in group.consumers)  # a stable sort: the rest stays in order
    for rows, weight_rows in RESOLUTIONS:
        kept = _within(groups, make, rows, weight_rows, budget_bytes)
        if len(kept) == len(groups) or rows == RESOLUTIONS[-1][0]:
            break
    held = {name for group, _ in kept for name in group.consumers if name in wanted}
    return b"".join(pack for _, pack in kept), [name for name in magnitudes.names if name in held]


def _within(
    groups: Sequence[GroupInfo], make: Callable[..., bytes], rows: int, weight_rows: int, budget_bytes: int
) -> list[tuple[GroupInfo, bytes]]:
    kept: list[tuple[GroupInfo, bytes]] = []
    size = 0
    for group in groups:
        shape = (rows, weight_rows) if kept else RESOLUTIONS[0]
        pack = make(group.name, max_rows=shape[0], weight_rows=shape[1])
        size += int(len(pack) * BASE64)
        if kept and size > budget_bytes:
            break
        kept.append((group, pack))
    return kept

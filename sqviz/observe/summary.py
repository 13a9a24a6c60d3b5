"""`Magnitudes` in words: one line, a small table, a data frame."""

from html import escape
from typing import TYPE_CHECKING, Any

from sqviz.observe.magnitudes import GroupInfo, Magnitudes

if TYPE_CHECKING:
    import pandas

ROWS = 8
_COLUMNS = ("input of", "max |x|", "median channel", "max / median", "top token")


def line(magnitudes: Magnitudes) -> str:
    """What was captured, and the largest input."""
    blocks = len({group.block for group in magnitudes.groups})
    head = (
        f"Magnitudes({magnitudes.model}: {blocks} blocks, {len(magnitudes.inputs)} linears with "
        f"{len(magnitudes.groups)} inputs; {magnitudes.samples} × {magnitudes.length} tokens"
    )
    if not magnitudes.groups:
        return f"{head})"
    largest = max(magnitudes.groups, key=lambda group: float(_stats(magnitudes, group).absmax.max()))
    idle = sum(len(experts) for experts in idle_experts(magnitudes).values())
    tail = f"; {idle} experts saw no token" if idle else ""
    return f"{head}{tail}; largest input {float(_stats(magnitudes, largest).absmax.max()):.4g} at {largest.name})"


def table(magnitudes: Magnitudes) -> str:
    """HTML: the inputs whose outlier channels stand out most. Takes its colours from the page."""
    chosen = sorted(magnitudes.groups, key=lambda group: -_stats(magnitudes, group).outlier_ratio)[:ROWS]
    head = "".join(f"<th>{escape(column)}</th>" for column in _COLUMNS)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in _cells(magnitudes, group))}</tr>" for group in chosen
    )
    rest = f"the {len(chosen)} of {len(magnitudes.groups)} inputs whose largest channel stands out most"
    first = sum(stats.top[0].position == 0 for group in chosen if (stats := _stats(magnitudes, group)).top)
    rest += f"; at a segment's first token in {first} of these and {magnitudes.first_token_share:.0%} of all"
    return f"<p>{escape(line(magnitudes))}</p><table><caption>{rest}</caption><tr>{head}</tr>{body}</table>"


def frame(magnitudes: Magnitudes) -> "pandas.DataFrame":
    """One row per linear, in execution order."""
    import pandas

    return pandas.DataFrame([_row(magnitudes, group, name) for group in magnitudes.groups for name in group.consumers])


def outlier_tokens(magnitudes: Magnitudes) -> "pandas.DataFrame":
    """The calibration tokens that carry the largest inputs; those that lead the most inputs first."""
    import pandas

    found: dict[int, dict[str, Any]] = {}
    for group in magnitudes.groups:
        for place, top in enumerate(_stats(magnitudes, group).top):
            row = found.setdefault(
                top.token,
                {
                    "token": top.text,
                    "position": top.position,
                    "segment": top.token // magnitudes.length,
                    "leads": 0,
                    "among_the_largest": 0,
                    "largest": 0.0,
                    "input_of": "",
                    "channel": -1,
                },
            )
            row["leads"] += place == 0
            row["among_the_largest"] += 1
            if top.value > row["largest"]:
                row |= {"largest": top.value, "input_of": group.name, "channel": top.channel}
    frame = pandas.DataFrame(list(found.values()))
    return frame.sort_values(["leads", "largest"], ascending=False, ignore_index=True) if len(frame) else frame


def idle_experts(magnitudes: Magnitudes) -> dict[str, list[int]]:
    """The fused experts that calibration sent no token, by the name of their second linear."""
    idle = {
        group.name: (tokens == 0).nonzero().flatten().tolist()
        for group in magnitudes.groups
        if (tokens := _stats(magnitudes, group).expert_tokens) is not None
    }
    return {name: experts for name, experts in idle.items() if experts}


def _stats(magnitudes: Magnitudes, group: GroupInfo) -> Any:
    return magnitudes.inputs[group.name]


def _cells(magnitudes: Magnitudes, group: GroupInfo) -> tuple[str, ...]:
    stats = _stats(magnitudes, group)
    top = f"{stats.top[0].text} at position {stats.top[0].position}" if stats.top else ""
    return (
        group.title or group.name,
        f"{float(stats.absmax.max()):.4g}",
        f"{float(stats.absmax.median()):.3g}",
        f"{stats.outlier_ratio:.0f} ×",
        top,
    )


def _row(magnitudes: Magnitudes, group: GroupInfo, name: str) -> dict[str, Any]:
    stats, weight = magnitudes.inputs[name], magnitudes.weights[name]
    top = stats.top[0] if stats.top else None
    return {
        "linear": name,
        "block": group.block,
        "kind": name.removeprefix(group.name.removesuffix(group.kind)),
        "channels": len(stats.absmax),
        "out": len(weight.out_absmax),
        "absmax": float(stats.absmax.max()),
        "median_channel": float(stats.absmax.median()),
        "outlier_ratio": stats.outlier_ratio,
        "outlier_channel": int(stats.absmax.argmax()),
        "weight_absmax": float(weight.channel_absmax.max()),
        "fold": group.fold_kind,
        "top_token": top.text if top else "",
        "top_position": top.position if top else -1,
    }

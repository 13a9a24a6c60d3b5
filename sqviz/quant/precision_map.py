"""`precision_map`: which operators of a block compute in INT8, which stay in 16 bit, and what each costs (Figure 3.3).

    INT8      all linears, and both batched products of attention: QKᵀ and PV
    16 bit    norms, softmax, activation functions, rotary positions, residual sums, a mixture's router

The operators are read off the running model (observe/flow.py), so every architecture is drawn as it is. Each is
quantised alone, everything else left as it was, and three errors are measured (precision_meter.py): of its own output,
of what its block adds to the residual stream, and of the model's next token. For what stays in 16 bit the same numbers
say what it would cost to hand its result on in INT8 as well.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sqviz.corpus.segments import Text, as_segments
from sqviz.errors import Cancelled, SqvizError
from sqviz.models.lm import LM
from sqviz.observe.flow import Operator, operators_of
from sqviz.progress import Bar, CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.quant import int8_attention
from sqviz.quant.calibration import Calibration
from sqviz.quant.granularity import Granularity, PerGroup
from sqviz.quant.plain import check_floating
from sqviz.quant.precision_meter import Meter, Seen
from sqviz.quant.schemes import Scheme

if TYPE_CHECKING:
    import pandas

    from sqviz.observe.magnitudes import Magnitudes
    from sqviz.widgets.precision import PrecisionView

NAN = math.nan
WHY = {
    "norm": "a sum over all channels and a division for every token; next to nothing of the time",
    "softmax": "an exponential, and a sum over all keys; the product behind it quantises what it makes",
    "activation": "elementwise; the linear behind it quantises what comes out",
    "multiply": "elementwise; the linear behind it quantises what comes out",
    "rotary": "elementwise; QKᵀ quantises queries and keys behind it",
    "add": "a sum that later operators build on: what is lost here stays lost",
    "router": "it chooses which experts run, and costs next to nothing",
}
"""Why an operator stays in 16 bit, by kind."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """What an operator reads.

    Attributes:
        label: "X", "W", "Q", "K", "P", "V".
        granularity: which values share a step, in words; "" in 16 bit.
        steps: how many steps one segment of text has; 0 in 16 bit.
        largest: magnitude in the measured text.
    """

    label: str
    granularity: str
    steps: int
    largest: float


@dataclasses.dataclass(frozen=True)
class MappedOperator:
    """One operator of one block.

    Attributes:
        block: index of the block.
        name: in the block; see `sqviz.observe.flow.Operator`.
        kind: "linear", "product", "norm", "softmax", "activation", "rotary", "multiply", "add" or "router".
        title: for people.
        sources: names of the operators it reads from; "input" is the residual stream before the block.
        precision: "INT8" (or other bits), or "16 bit".
        reason: why it stays in 16 bit; "" if it does not.
        operands: what it reads.
        largest: magnitude in its result.
        local: mean_t ‖ŷ_t − y_t‖² / ‖y_t‖² of its own output; NaN where it was not measured.
        in_block: mean_t ‖ŷ_t − y_t‖² / ‖y_t − x_t‖² of what the block adds to the residual stream x.
        in_model: KL(p ‖ p̂) of the next token, nats.
    """

    block: int
    name: str
    kind: str
    title: str
    sources: tuple[str, ...]
    precision: str
    reason: str
    operands: tuple[Operand, ...] = ()
    largest: float = NAN
    local: float = NAN
    in_block: float = NAN
    in_model: float = NAN

    @property
    def quantised(self) -> bool:
        """Whether it computes in integers."""
        return self.precision != "16 bit"


@dataclasses.dataclass(frozen=True, eq=False)
class PrecisionMap:
    """The operators of every block, with the precision of each and what it costs.

    Attributes:
        model: name of the model.
        scheme: what linears are quantised by.
        blocks: operators of each block in execution order.
        everywhere: KL(p ‖ p̂) in nats with an operator quantised in all blocks that have it, by name.
        together: KL(p ‖ p̂) in nats with everything quantised that is to be.
        samples, length: segments of the measured text, and tokens in each.
        complete: False where the work was cancelled: what was not reached is NaN.
    """

    model: str
    scheme: Scheme
    blocks: tuple[tuple[MappedOperator, ...], ...]
    everywhere: Mapping[str, float]
    together: float
    samples: int
    length: int
    complete: bool = True

    def operator(self, block: int, name: str) -> MappedOperator:
        """One operator. Raises `SqvizError` naming those there are."""
        if not 0 <= block < len(self.blocks):
            raise SqvizError(f"block={block}: there are blocks 0 … {len(self.blocks) - 1}.")
        for one in self.blocks[block]:
            if one.name == name:
                return one
        known = ", ".join(one.name for one in self.blocks[block])
        raise SqvizError(f"block {block} has no operator {name!r}; it has {known}.")

    def view(self, **state: Any) -> "PrecisionView":
        """The block as thesis Figure 3.3 draws it, each operator to be clicked; `state` sets traits."""
        from sqviz.widgets.precision import PrecisionView

        return PrecisionView(self, **state)

    def to_frame(self) -> "pandas.DataFrame":
        """A row per operator and block. Needs pandas."""
        import pandas

        rows = [dataclasses.asdict(one) for block in self.blocks for one in block]
        return pandas.DataFrame(rows).drop(columns=["operands", "sources"])

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """The view as a page: no kernel, no network. Written to `path`; None returns its text."""
        return self.view().to_html(path)

    def to_png(self, path: str | Path | None = None) -> bytes | Path:
        """A picture of the first block and of every layer's errors. Written to `path`; None returns the bytes."""
        return self.view().to_png(path)

    def to_svg(self, path: str | Path | None = None) -> str | Path:
        """The same picture as an SVG. Written to `path`; None returns its text."""
        return self.view().to_svg(path)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.view()._repr_mimebundle_(**kwargs)

    def __repr__(self) -> str:
        inside = sum(one.quantised for one in self.blocks[0])
        state = "" if self.complete else ", cancelled before the end"
        return (
            f"PrecisionMap({self.model}, {self.scheme.describe()}: in block 0, {inside} of {len(self.blocks[0])} "
            f"operators in integers; KL of all together {self.together:.4g} nats{state})"
        )


def precision_map(
    lm: LM,
    scheme: Scheme,
    magnitudes: "Magnitudes | None" = None,
    text: Text | None = None,
    *,
    attention: bool = True,
    blocks: Iterable[int] | Literal["all"] = (),
    samples: int = 2,
    length: int = 128,
    cancel: CancelToken | None = None,
    progress: bool = True,
) -> PrecisionMap:
    """The precision of every operator of a model's blocks, and the errors of each alone (thesis Figure 3.3).

    Args:
        lm: the model, smoothed or not, not quantised; it stays as it was.
        scheme: what its linears are quantised by.
        magnitudes: from `sqviz.capture`, for static schemes and clipped ranges.
        text: what errors are measured on: a text, source, list, path or ids; the embedded text by default.
        attention: QKᵀ and PV in integers too, as in the figure; where the model does not allow it they stay in 16 bit.
        blocks: indices of blocks of which each operator's effect on the model is measured too, for which the model
            runs once per operator, or "all"; without, that of each operator in all blocks at once.
        samples: segments of the text.
        length: tokens of each.
        cancel: ends the work, as the progress bar's button does; what is there by then is returned.
        progress: show a progress bar.

    Raises:
        SqvizError: a model quantised already, a block that is not there, a scheme that needs magnitudes or cannot
            quantise these linears.
        TextTooShort: not even one segment.
    """
    check_floating(lm, "map the precision of")
    if text is None:
        from sqviz.corpus.source import text as embedded

        text = embedded()
    calibration = Calibration(lm, scheme, magnitudes, cancel)
    flows = operators_of(lm)
    wanted = list(range(len(flows)) if blocks == "all" else dict.fromkeys(blocks))
    for block in wanted:
        if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < len(flows):
            raise SqvizError(f"blocks={blocks!r}: {block!r} is no block; 0 … {len(flows) - 1} or 'all' is allowed.")
    segments = torch.stack(list(as_segments(lm, text, samples, length)))
    work = _Work(Meter(calibration, segments), flows, attention)
    complete = True
    with progress_bar(work.steps(wanted), "precision map", unit="passes", cancel=cancel, show=progress) as bar:
        try:
            work.do(wanted, bar)
        except Cancelled:
            complete = False
    return PrecisionMap(
        model=lm.name,
        scheme=scheme,
        blocks=tuple(tuple(mapped.values()) for mapped in work.found),
        everywhere=work.everywhere,
        together=work.together,
        samples=len(segments),
        length=segments.shape[1],
        complete=complete,
    )


class _Work:
    """What has been measured so far."""

    def __init__(self, meter: Meter, flows: tuple[tuple[Operator, ...], ...], attention: bool) -> None:
        self.meter, self.flows = meter, flows
        self.obstacle = int8_attention.obstacle(meter.lm) if attention else "attention=False"
        self.found = [{one.name: self._mapped(block, one) for one in ops} for block, ops in enumerate(flows)]
        self.names = list(dict.fromkeys(one.name for ops in flows for one in ops))
        self.everywhere: dict[str, float] = dict.fromkeys(self.names, NAN)
        self.together = NAN

    def steps(self, wanted: list[int]) -> int:
        """Passes of the model, or through one block for every operator."""
        return len(self.flows) + 1 + len(self.names) + sum(len(self.flows[block]) for block in wanted)

    def do(self, wanted: list[int], bar: Bar) -> None:
        """Errors of outputs and blocks first, then of the model: all together, one in all blocks, one in one block."""
        for block, ops in enumerate(self.flows):
            seen = self.meter.look(block)
            for one in ops:
                bar.cancel.check("the precision map")
                change = {"in_block": self._unless_router(block, one, lambda: self.meter.in_block(block, one.name))}  # noqa: B023
                self._change(block, one.name, **self._noted(block, one, seen[one.name]), **change)
            bar.step()
        self.together = self.meter.together(attention=not self.obstacle)
        bar.step()
        for name in self.names:
            block, one = next((b, one) for b, ops in enumerate(self.flows) for one in ops if one.name == name)
            self.everywhere[name] = self._unless_router(block, one, lambda: self.meter.in_model(name))  # noqa: B023
            bar.step()
        for block in wanted:
            for one in self.flows[block]:
                error = self._unless_router(block, one, lambda: self.meter.in_model(one.name, block))  # noqa: B023
                self._change(block, one.name, in_model=error)
                bar.step()

    def _unless_router(self, block: int, operator: Operator, measure: Any) -> float:
        return NAN if self.found[block][operator.name].kind == "router" else float(measure())

    def _change(self, block: int, name: str, **changes: Any) -> None:
        self.found[block][name] = dataclasses.replace(self.found[block][name], **changes)

    def _mapped(self, block: int, operator: Operator) -> MappedOperator:
        router = self.meter.path(block, operator.name) in self.meter.routers
        kind = "router" if router else operator.kind
        reason = self.obstacle if kind == "product" else WHY.get(kind, "")
        precision = "16 bit" if reason else "INT8" if kind == "product" else _bits(self.meter.scheme)
        return MappedOperator(block, operator.name, kind, _title(operator), operator.sources, precision, reason)

    def _noted(self, block: int, operator: Operator, seen: Seen) -> dict[str, Any]:
        one = self.found[block][operator.name]
        operands = tuple(
            Operand(label, *_granularity(one, self.meter.scheme, label, rows, shape), largest)
            for label, (largest, rows, shape) in seen.operands.items()
        )
        return {"operands": operands, "largest": seen.largest, "local": seen.local}


def _title(operator: Operator) -> str:
    name, _, _ = operator.name.partition("#")
    titles = {"rotary": "RoPE", "qk": "QKᵀ", "pv": "PV", "multiply": "×", "add": "+", "softmax": "softmax"}
    title = titles.get(name, name.rpartition(".")[2])
    if operator.kind == "norm":
        title = re.sub("_?layer_?norm", " norm", title).strip()
    if ".experts." in f".{name}":
        title = f"experts {title}"
    return f"ALiBi, {title}" if operator.biased else title


def _bits(scheme: Scheme) -> str:
    weight = 16 if scheme.weight is None else scheme.bits_of_weights
    activation = 16 if scheme.activation is None else scheme.bits
    return f"INT{weight}" if weight == activation else f"W{weight}A{activation}"


def _granularity(one: MappedOperator, scheme: Scheme, label: str, rows: int, shape: tuple[int, ...]) -> tuple[str, int]:
    """Which values of an operand share a step, and how many steps a segment has."""
    if not one.quantised:
        return "", 0
    if one.kind == "product":
        words = {"Q": "per token and head", "K": "per token and head", "V": "per token and head, moved into P"}
        return words.get(label, "per query and head"), rows
    granularity = scheme.weight if label == "W" else scheme.activation
    if granularity is None:
        return "", 0
    if label == "W":
        each = shape[0] if len(shape) == 3 else 1  # fused experts have steps of their own
        steps = each * math.prod(granularity.step_shape(shape[-2:], "weight"))
        return words_of(granularity) + (", each expert" if each > 1 else ""), steps
    steps = math.prod(granularity.step_shape((math.prod(shape[:-1]), shape[-1]), "activation"))
    return words_of(granularity) + (", static" if scheme.static else ""), steps


def words_of(granularity: Granularity) -> str:
    """A granularity for people: "per tensor", "per group of 128"."""
    if isinstance(granularity, PerGroup):
        return f"per group of {granularity.size}"
    return re.sub("(?<!^)(?=[A-Z])", " ", type(granularity).__name__).lower()

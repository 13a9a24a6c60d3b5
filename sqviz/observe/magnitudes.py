"""`Magnitudes`: how large the inputs and the weights of every linear are. Plain data: knows no model, reads no
tokenizer.

What smoothing (thesis §3.3) needs is max|X| and max|W| per channel; the rest shows where the outliers come from.
A linear's input is [token channel] over the whole calibration stream: `samples` segments of `length` tokens, one
after the other. All tensors are on the CPU and float32, unless said otherwise.
"""

import dataclasses
import difflib
import os
from collections.abc import Mapping
from functools import cached_property
from importlib import resources
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Float16, Int, Int32
from torch import Tensor

from sqviz.errors import NoSuchLayer

if TYPE_CHECKING:
    import pandas

QUANTILES = (0.5, 0.9, 0.99, 0.999, 0.9999)
TOP_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class TopToken:
    """A calibration token with one of the largest inputs of a linear.

    Attributes:
        value: its absmax over channels; channel: where it has it.
        token: its index in the calibration stream (`magnitudes.tokens[token]` is the id); position: in its segment.
        text: what it reads, with blanks shown as · and line ends as ↵.
    """

    value: float
    channel: int
    token: int
    text: str
    position: int


@dataclasses.dataclass(frozen=True, eq=False)
class InputStats:
    """The input X of a group of linears, reduced.

    For the second linear of fused experts a row of X is a token at one of the experts it was sent to. A token's
    absmax is then over its experts.

    Attributes:
        minimum, maximum, mean: [channel] over tokens; the mean is of |x|.
        quantiles: [quantile channel] of |x| at QUANTILES, within 5 %; tensor_quantiles [quantile] over all channels
        too.
        token_absmax: [token] over channels.
        channel_token: int32 [channel], the token (index in the stream) that holds the channel's absmax; −1 if all are
        0.
        top: the TOP_TOKENS largest tokens, the largest first.
        map: float16 [bin channel], |x| of the first segment, max-pooled along tokens only, in runs of equal length (the
            last may be shorter). [0 channel] where it was left out to save space, see `Magnitudes.has_map`.
        expert_absmax: [expert channel] of fused experts, else None; 0 for an expert that got no token.
        expert_tokens: int64 [expert], how many tokens each expert got, else None.
    """

    minimum: Float[Tensor, " channel"]
    maximum: Float[Tensor, " channel"]
    mean: Float[Tensor, " channel"]
    quantiles: Float[Tensor, "quantile channel"]
    tensor_quantiles: Float[Tensor, " quantile"]
    token_absmax: Float[Tensor, " token"]
    channel_token: Int32[Tensor, " channel"]
    top: tuple[TopToken, ...]
    map: Float16[Tensor, "bin channel"]
    expert_absmax: Float[Tensor, "expert channel"] | None = None
    expert_tokens: Int[Tensor, " expert"] | None = None

    @cached_property
    def absmax(self) -> Float[Tensor, " channel"]:
        """Max |x| per channel."""
        return torch.maximum(self.maximum, -self.minimum)

    @property
    def outlier_ratio(self) -> float:
        """The largest channel's absmax over the median channel's; 0 if the median channel is dead."""
        median = float(self.absmax.median())
        return float(self.absmax.max()) / median if median > 0 else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class WeightStats:
    """The weight W [out channel] of a linear, reduced. Fused experts are stacked along `out`.

    Attributes:
        channel_absmax: [channel] max |W| over out; out_absmax [out] over channels.
        map: float16 [bin channel], |W| max-pooled along out only, in runs of equal length (the last may be shorter).
        expert_absmax: [expert channel] of the second linear of fused experts, else None.
    """

    channel_absmax: Float[Tensor, " channel"]
    out_absmax: Float[Tensor, " out"]
    map: Float16[Tensor, "bin channel"]
    expert_absmax: Float[Tensor, "expert channel"] | None = None


@dataclasses.dataclass(frozen=True)
class GroupInfo:
    """Linears that read one tensor; see `sqviz.models.linears.Group`, of which this is a plain copy.

    Attributes:
        name: the first linear, which stands for the group.
        block: index of the block.
        kind: the first linear's path inside its block.
        consumers: all linears that read the tensor.
        fold_kind: "norm", "linear" or "": where 1/s can be folded exactly.
        reason: why it cannot, in words.
        title: for people: "3 · self_attn.q_proj + k_proj + v_proj".
    """

    name: str
    block: int
    kind: str
    consumers: tuple[str, ...]
    fold_kind: str = ""
    reason: str = ""
    title: str = ""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Magnitudes:
    """Statistics of every linear's input and weight, from `sqviz.capture`.

    Attributes:
        inputs: by linear name; linears of one group share one object.
        weights: by linear name.
        groups: the groups of linears, in execution order.
        tokens: int64 [token], the calibration stream.
        length: tokens per segment.
        token_texts: the tokens of the first segment, to be read by people.
        model: name of the model.
        scales: the smoothing factors that were folded into the model at capture (`lm.scales`): the inputs are after
        them.
    """

    inputs: Mapping[str, InputStats]
    weights: Mapping[str, WeightStats]
    groups: tuple[GroupInfo, ...]
    tokens: Int[Tensor, " token"]
    length: int
    token_texts: tuple[str, ...] = ()
    model: str = ""
    scales: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    # --- looking things up ---

    @property
    def names(self) -> tuple[str, ...]:
        """All linears, in execution order."""
        return tuple(self.inputs)

    @property
    def samples(self) -> int:
        """How many segments went through the model."""
        return len(self.tokens) // self.length

    def group(self, layer: int | str) -> GroupInfo:
        """The group of a linear, or the one with the largest outliers of a block.

        Args:
            layer: a linear's name, or an end of it that fits one linear only ("28.mlp.down_proj"), or a block's index.

        Raises:
            NoSuchLayer: it fits nothing, or more than one linear.
        """
        if isinstance(layer, int):
            block = [group for group in self.groups if group.block == layer]
            if not block:
                blocks = sorted({group.block for group in self.groups})
                raise NoSuchLayer(f"layer={layer}: there are blocks {blocks[0]} to {blocks[-1]}")
            return max(block, key=lambda group: self.inputs[group.name].outlier_ratio)
        if layer in self._owners:
            return self._owners[layer]
        fits = [name for name in self.names if name.endswith(f".{layer}")]
        if len(fits) == 1:
            return self._owners[fits[0]]
        near = fits or difflib.get_close_matches(layer, self.names, n=5, cutoff=0.3) or self.names[:5]
        what = "fits several linears" if fits else "fits no linear of this capture; near"
        raise NoSuchLayer(f"layer={layer!r} {what}: {', '.join(near[:5])}{', …' if len(near) > 5 else ''}")

    @cached_property
    def _owners(self) -> dict[str, GroupInfo]:
        return {name: group for group in self.groups for name in group.consumers}

    def absmax(self, name: str) -> Float[Tensor, "*expert channel"]:
        """Max |X| per channel of a linear's input; per expert too for the second linear of fused experts.

        An expert that calibration sent no token (`idle_experts`) has the maxima over all experts, so that it is
        smoothed as they are. What it saw, zeros, stands in `inputs`.
        """
        stats = self.inputs[self.group(name).name]
        if stats.expert_absmax is None:
            return stats.absmax
        if stats.expert_tokens is None:
            return stats.expert_absmax
        return torch.where((stats.expert_tokens == 0)[:, None], stats.absmax, stats.expert_absmax)

    def fold_weight_absmax(self, name: str) -> Float[Tensor, "*expert channel"]:
        """Max |W| per channel over *all* linears that read this linear's input, shaped like `absmax`.

        They share one s, so the one with the largest weight decides (thesis eq. 3.4, smoothquant's `smooth_ln_fcs`).
        """
        stats = [self.weights[consumer] for consumer in self.group(name).consumers]
        if self.inputs[self.group(name).name].expert_absmax is not None:
            return torch.stack([s.expert_absmax for s in stats if s.expert_absmax is not None]).amax(0)
        return torch.stack([s.channel_absmax for s in stats]).amax(0)

    def has_map(self, layer: int | str) -> bool:
        """Whether the capture holds |X| token by token for this layer's input (the one that ships holds a few only)."""
        return len(self.inputs[self.group(layer).name].map) > 0

    # --- keeping ---

    def save(self, path: str | os.PathLike[str], *, compact: bool = False, maps: tuple[str, ...] | None = None) -> None:
        """Write one safetensors file, in place of what may be there once it is complete.

        Args:
            path: where.
            compact: absmax per channel in two bytes per value, what is only looked at in one (within 3 %).
            maps: names of the groups whose maps are kept; all by default.

        Raises:
            OSError: it cannot be written; what was there stays.
        """
        from sqviz.observe.store import save

        save(self, path, compact=compact, maps=maps)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Magnitudes":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            SqvizError: it is not a capture, is damaged, or is of a later version.
        """
        from sqviz.observe.store import load

        return load(path)

    @classmethod
    def embedded(cls) -> "Magnitudes":
        """The small capture of the embedded model that ships with sqviz, made by observe/first.py. Loads no model."""
        with resources.as_file(resources.files("sqviz.observe") / "first.safetensors") as path:
            return cls.load(path)

    # --- showing ---

    def to_frame(self) -> "pandas.DataFrame":
        """One row per linear: place, size, absmax and median channel of its input, absmax of its weight, top token."""
        from sqviz.observe.summary import frame

        return frame(self)

    def outlier_tokens(self) -> "pandas.DataFrame":
        """Which tokens carry the outliers: text, position, how many inputs each leads, its largest value and where.

        One row per token that is among the TOP_TOKENS of any input; those that lead the most inputs come first. In most
        models the first token of a text is one of them: the attention sink (thesis §4.2), see `first_token_share`.
        """
        from sqviz.observe.summary import outlier_tokens

        return outlier_tokens(self)

    @property
    def first_token_share(self) -> float:
        """Share of the inputs whose largest value lies at the first token of a segment; 0 for a capture of nothing."""
        leads = [tops[0].position == 0 for group in self.groups if (tops := self.inputs[group.name].top)]
        return sum(leads) / len(leads) if leads else 0.0

    def idle_experts(self) -> dict[str, list[int]]:
        """Experts of a mixture that calibration sent no token, by linear; s and steps of theirs are from all."""
        from sqviz.observe.summary import idle_experts

        return idle_experts(self)

    def surface(self, layer: int | str, alpha: float = 0.5) -> Any:
        """|X| over token × channel as a surface, |W| beside it, before and after smoothing (thesis Figure 3.2).

        Args:
            layer: a linear's name, its end, or a block's index (then the input with the largest outliers of that
            block).
            alpha: how much of the difficulty smoothing moves to the weights.

        Raises:
            NoSuchLayer: it fits nothing, or the capture holds no map of it.
        """
        from sqviz.widgets.surface import SurfaceView

        return SurfaceView.of(self, self._mapped(layer), alpha=alpha)

    def heatmap(self, layer: int | str) -> Any:
        """|X| over token × channel as a heatmap that keeps every outlier; `layer` and errors as in `surface`."""
        from sqviz.widgets.heatmap import HeatmapView

        return HeatmapView.of(self, self._mapped(layer))

    def outliers(self) -> Any:
        """Channel maxima of every layer, small and side by side; click one to open it."""
        from sqviz.widgets.outliers import OutliersView

        return OutliersView.of(self)

    def _mapped(self, layer: int | str) -> str:
        group = self.group(layer)
        if not self.has_map(group.name):
            held = [other.name for other in self.groups if self.has_map(other.name)]
            raise NoSuchLayer(
                f"layer={layer!r}: this capture holds no token map of {group.name}, only of "
                f"{', '.join(held) or 'none'}; sqviz.capture(...) makes one with all"
            )
        named = [name for name in group.consumers if not isinstance(layer, int) and name.endswith(layer)]
        return named[0] if named else group.name

    def __repr__(self) -> str:
        from sqviz.observe.summary import line

        return line(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from sqviz.observe.summary import table

        return {"text/plain": repr(self), "text/html": table(self)}

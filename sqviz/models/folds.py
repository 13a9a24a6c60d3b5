"""Dividing the input of a group of linears exactly, by rescaling what produces it (thesis ch. 3.3, eq. 3.3).

    norm      gain and bias / s
    linear    the producer's output rows and biases / s: one row feeds one channel, or with grouped queries (GQA) the
              same channel of every query head that shares the value head; those channels must have the same s

Everything here works on a shared copy (`models.lm.share`): tensors are replaced, never written to. Products are taken
in float32 (float64 in a float64 model) and stored in the model's own dtype.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sqviz.models.arch import Norm, Value
from sqviz.models.linears import Group, experts, holder, replace_parameter, set_weight, weight
from sqviz.models.lm import LM


def wide(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of the arithmetic: float64 if it has that, else float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def scale_shape(lm: LM, group: Group) -> tuple[int, ...]:
    """Shape of the group's s: (channel,), or (expert, channel) where every expert reads an input of its own."""
    channels = weight(lm, group.name).shape[1]
    count = experts(lm, group.name)  # experts that share one input, a norm's output, are never first in their group
    return (count, channels) if count else (channels,)


def weight_absmax(lm: LM, group: Group) -> Float[Tensor, "*expert channel"]:
    """max |W| per input channel over the outputs of all consumers: what eq. 3.4 calls max|W_j|."""
    if len(shape := scale_shape(lm, group)) == 2:
        return wide(weight(lm, group.name).detach()).abs().unflatten(0, (shape[0], -1)).amax(1)
    return torch.stack([wide(weight(lm, name).detach().abs().amax(0)) for name in group.consumers]).amax(0)


def producer_rows(lm: LM, group: Group) -> Int[Tensor, " channel"]:
    """For each channel of the group's input (experts one after the other), the producer's row that makes it.

    Only for a group with `fold_kind == "linear"`.
    """
    assert group.fold is not None
    channels = weight(lm, group.name).shape[1]
    out = weight(lm, group.fold.path).shape[0]
    device = weight(lm, group.name).device
    if isinstance(group.fold, Value):
        heads = lm.config.num_attention_heads
        return _value_rows(out, channels, heads, group.fold.layout).to(device)
    count = max(1, experts(lm, group.name))
    first = (torch.arange(count) + 1) * (out // count) - channels  # the last rows of each expert
    return (first[:, None] + torch.arange(channels)).flatten().to(device)


def _value_rows(out: int, channels: int, heads: int, layout: str) -> Int[Tensor, " channel"]:
    """Rows of the values in a projection of `out` rows, for the channels (head, place in the head) of the attention."""
    size = channels // heads
    value_heads = {"own": out // size, "latent": heads}.get(layout, (out // size - heads) // 2)
    head = torch.arange(heads) // (heads // value_heads)  # the value head of each query head
    if layout == "stacked":  # the values are the last rows
        return (out - (value_heads - head[:, None]) * size + torch.arange(size)).flatten()
    first = (head + 1) * (out // value_heads) - size  # one chunk of rows per value head, the value at its end
    return (first[:, None] + torch.arange(size)).flatten()


def tie(values: Float[Tensor, "*expert channel"], rows: Int[Tensor, " channel"]) -> Float[Tensor, "*expert channel"]:
    """The maximum over all channels that come from the same row of the producer."""
    flat = values.flatten()
    maxima = flat.new_full((int(rows.max()) + 1,), -torch.inf).scatter_reduce(0, rows, flat, "amax")
    return maxima[rows].view_as(values)


def divide_input(
    model: nn.Module, lm: LM, group: Group, s: Float[Tensor, "*expert channel"]
) -> Float[Tensor, "*expert channel"]:
    """Divide the group's input by s, by rescaling its producer in `model`, a shared copy of `lm.model`.

    Returns:
        The s that was really applied: a norm's new gain is rounded to the model's dtype, and s follows the rounding, so
        that only the consumers' rounding remains (Gemma's w = (1 + w)/s − 1 has few digits left in bfloat16).
    """
    assert group.fold is not None
    if isinstance(group.fold, Norm):
        return _divide_norm(model.get_submodule(group.fold.path), s, plus=float(group.fold.plus_one))
    rows = producer_rows(lm, group)
    factor = wide(s.new_ones(weight(model, group.fold.path).shape[0]))
    factor[rows] = wide(s).flatten()
    old = weight(model, group.fold.path).detach()
    set_weight(model, group.fold.path, wide(old) / factor[:, None])
    module, _ = holder(model, group.fold.path)
    if getattr(module, "bias", None) is not None:
        replace_parameter(module, "bias", wide(module.bias.detach()) / factor)  # type: ignore[operator]
    return s


def _divide_norm(norm: nn.Module, s: Float[Tensor, " channel"], plus: float) -> Float[Tensor, " channel"]:
    old = norm.weight.detach()  # type: ignore[operator]
    gain = old.double() + plus
    new = (gain / s - plus).to(old.dtype)
    lost = (new.double() + plus == 0) & (gain != 0)  # s beyond what the dtype can hold: leave that channel as it is
    new = torch.where(lost, old, new)
    applied = torch.where(gain == 0, s.double(), gain / (new.double() + plus))
    replace_parameter(norm, "weight", new)
    if getattr(norm, "bias", None) is not None:
        replace_parameter(norm, "bias", norm.bias.detach().double() / applied)  # type: ignore[operator]
    return applied.to(s.dtype)


def multiply_weights(model: nn.Module, group: Group, s: Float[Tensor, "*expert channel"]) -> None:
    """Multiply the columns of all consumers of the group by s, in a shared copy."""
    for name in group.consumers:
        old = wide(weight(model, name).detach())
        stacked = old.unflatten(0, (s.shape[0], -1)) if s.ndim == 2 else old
        set_weight(model, name, (stacked * s.unsqueeze(-2)).view_as(old))

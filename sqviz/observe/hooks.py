"""Watching what flows into the linears of a model, for the length of a `with` block, without a trace afterwards.

Linears that read one tensor form a group (models/linears.py); the tensor is seen once, by a forward-pre-hook on the
first of them. The linears of fused experts (one parameter [expert out channel]) are no modules: what flows between
their two products is seen by putting an equivalent loop over experts in the place of the module's `forward`, on that
one instance, until the block ends. Its result equals transformers' own up to the order of a sum.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from sqviz.errors import SqvizError
from sqviz.models.linears import Group, experts, holder, no_such_layer
from sqviz.models.linears import groups as groups_of
from sqviz.models.lm import LM

Callback = Callable[[Group, Float[Tensor, "token channel"]], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Routing:
    """Which token of the pass and which expert each row of the experts' input belongs to; sorted by expert."""

    expert: Int[Tensor, " row"]
    token: Int[Tensor, " row"]


RoutedCallback = Callable[[Group, Float[Tensor, "row channel"], Routing], None]


class _Enough(Exception):
    """Ends a forward pass early."""


@contextmanager
def watch(
    lm: LM, callback: Callback, groups: Iterable[Group] | None = None, routed: RoutedCallback | None = None
) -> Iterator[None]:
    """Call `callback(group, x)` with the input of every group, at every forward pass inside the `with` block.

    Args:
        lm: the model; every hook is removed when the block ends, also by an exception (one raised by a callback too).
        callback: gets x as [token channel], tokens of all rows of a batch one after the other: the tensor itself, not a
            copy, so it must not write to it, nor keep it. Where a linear divides its input by s at run time (online
            smoothing), x is what comes out of the division.
        groups: the groups to watch; all by default.
        routed: called in place of `callback` for the input of the experts' second linear, with one row per token and
        expert
            and where each comes from. Without it `callback` gets these rows.

    Raises:
        NoSuchLayer: the model lacks a group's first linear.
        SqvizError: the experts of a group are laid out in a way that is not known here.
    """
    with ExitStack() as undo:
        for group in groups_of(lm) if groups is None else groups:
            module, _ = holder(lm.model, group.name)
            if experts(lm, group.name):  # those that read a norm's output are never first in their group
                undo.enter_context(_looped(module, group, routed or _without_routing(callback)))
            else:
                undo.callback(module.register_forward_pre_hook(_hook(group, callback), with_kwargs=True).remove)
        yield


def _hook(group: Group, callback: Callback) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        s = getattr(module, "input_scale", getattr(module, "smoothing", None))  # quant's linears that divide by s
        callback(group, (x if s is None else x / s).flatten(0, -2))

    return hook


def _without_routing(callback: Callback) -> RoutedCallback:
    return lambda group, x, _: callback(group, x)


@contextmanager
def _looped(module: Any, group: Group, routed: RoutedCallback) -> Iterator[None]:
    """Replace `forward` of this experts module by a loop that shows the input of down_proj, until the block ends."""
    gated = getattr(module, "has_gate", False) and hasattr(module, "_apply_gate")
    if not gated or module.is_transposed or module.has_bias or getattr(module, "has_post_expert_norm", False):
        raise SqvizError(
            f"{group.name}: the inside of {type(module).__name__} cannot be watched; known are gated experts with "
            "weights [expert out channel] and no bias. Watch the model it was made from, or leave this group out "
            "(groups=...)"
        )

    def forward(
        hidden: Float[Tensor, "token channel"], choice: Int[Tensor, "token slot"], share: Float[Tensor, "token slot"]
    ) -> Float[Tensor, "token channel"]:
        chosen = [int(e) for e in choice.unique() if e < module.num_experts]  # larger: dropped by expert parallelism
        places = [(choice == expert).nonzero(as_tuple=True) for expert in chosen]
        inner = [
            module._apply_gate(linear(hidden[token], module.gate_up_proj[expert]))
            for expert, (token, _) in zip(chosen, places, strict=True)
        ]
        counts = torch.tensor([len(token) for token, _ in places], device=hidden.device)
        routing = Routing(
            torch.tensor(chosen, device=hidden.device).repeat_interleave(counts),
            torch.cat([token for token, _ in places]),
        )
        routed(group, torch.cat(inner), routing)
        out = torch.zeros_like(hidden)
        for expert, (token, slot), x in zip(chosen, places, inner, strict=True):
            y = linear(x, module.down_proj[expert]) * share[token, slot, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out

    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def body(lm: LM) -> nn.Module:
    """The model without its head, where transformers knows it: no logits are computed that nobody reads."""
    return getattr(lm.model, "base_model", lm.model)


def activations(
    lm: LM, tokens: Int[Tensor, " token"], names: Sequence[str], cast: torch.dtype = torch.float32
) -> dict[str, Float[Tensor, "token channel"]]:
    """The inputs of some linears, from one forward pass over `tokens`. The pass ends after the last of them.

    Args:
        lm: the model; left as it was.
        tokens: ids, one dimension.
        names: names of linears. Those of one group read the same tensor and share it in the result.
        cast: dtype of the result, which stays on the model's device.

    Returns:
        x [token channel] by name. For the second linear of fused experts a row is a token and an expert, sorted by
        expert.

    Raises:
        NoSuchLayer: a name is none of the model's linears.
    """
    every = {name: group for group in groups_of(lm) for name in group.consumers}
    for name in names:
        if name not in every:
            raise no_such_layer(name, every)
    wanted = {every[name].name: every[name] for name in names}
    seen: dict[str, Tensor] = {}

    def keep(group: Group, x: Float[Tensor, "token channel"]) -> None:
        seen[group.name] = x.detach().to(cast, copy=True)
        if len(seen) == len(wanted):
            raise _Enough

    # no_grad, not inference_mode: what is returned must be a tensor like any other
    with torch.no_grad(), watch(lm, keep, wanted.values()):
        try:
            if wanted:
                body(lm)(tokens.to(lm.device)[None], use_cache=False)
        except _Enough:
            pass
    return {name: seen[every[name].name] for name in names}

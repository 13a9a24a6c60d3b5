"""How a model is told the positions and masks of a `SinkCache`: by hooks that replace arguments of its forward.

The hooks live as long as the cache and act only on calls that are given this very cache; for all other calls the model
is what it was. Another thread may be in the middle of such a call while hooks come or go; torch then calls them without
the keyword arguments that they were registered for, so they take any arguments (`_keywords`). The base model is told
`position_ids` (indices of the buffer) and a mask; attention modules with ALiBi, whose models compute the bias
themselves from the length of the text, are told bias and mask.
"""

import dataclasses
import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from sqviz_kernels.backend import opaque
from torch import Tensor, nn

from sqviz.errors import SqvizError
from sqviz.models.lm import LM
from sqviz.quant.step_attention import SDPA
from sqviz.streaming.plan import State
from sqviz.streaming.positions import Alibi, bias, slopes

if TYPE_CHECKING:
    from sqviz.streaming.cache import SinkCache

Arguments = dict[str, Any]


def steer(cache: "SinkCache") -> list[Any]:
    """Put the hooks on; returns their handles."""
    base: nn.Module = cache.lm.model.base_model  # type: ignore[assignment]
    mine: weakref.ref[SinkCache] = weakref.ref(cache)

    def given(kwargs: Arguments) -> "SinkCache | None":
        cache = mine()
        return cache if any(kwargs.get(name) is cache for name in ("past_key_values", "layer_past")) else None

    def before(_: nn.Module, args: tuple[Any, ...], *rest: Any) -> tuple[Any, Arguments] | None:
        kwargs = _keywords(rest, 1)
        cache = given(kwargs)
        return None if cache is None else (args, kwargs | _told(cache, args, kwargs))

    def after(_: nn.Module, __: tuple[Any, ...], *rest: Any) -> None:
        cache, output = given(_keywords(rest, 2)), rest[-1]
        if cache is not None:
            cache.abort() if output is None else cache.commit()  # None: it raised

    states: list[State] = []

    def begun(_: nn.Module, __: tuple[Any, ...], *rest: Any) -> None:
        cache = given(_keywords(rest, 1))
        if cache is not None:
            states[:] = [dataclasses.replace(cache.state)]

    def headed(_: nn.Module, __: tuple[Any, ...], *rest: Any) -> None:
        cache = given(_keywords(rest, 2))
        if cache is not None and rest[-1] is None and states:  # all blocks are through; the head failed
            cache.undo(states.pop())

    handles: list[Any] = [
        base.register_forward_pre_hook(before, with_kwargs=True),
        base.register_forward_hook(after, with_kwargs=True, always_call=True),
    ]
    if base is not cache.lm.model:
        handles += [
            cache.lm.model.register_forward_pre_hook(begun, with_kwargs=True),
            cache.lm.model.register_forward_hook(headed, with_kwargs=True, always_call=True),
        ]
    if not isinstance(cache.scheme, Alibi):
        return handles
    form, slope = cache.scheme.form, slopes(cache.lm, cache.scheme.form, cache.lm.device)

    def biased(_: nn.Module, args: tuple[Any, ...], *rest: Any) -> tuple[Any, Arguments] | None:
        kwargs = _keywords(rest, 1)
        cache = given(kwargs)
        if cache is None:
            return None
        if cache.bias is None:
            twice = cache.lm.config._attn_implementation not in SDPA or bool(kwargs.get("output_attentions"))
            cache.bias = _biased(cache, form, slope, twice)
        return args, kwargs | cache.bias

    for block in cache.lm.blocks:
        attention = block.get_submodule(cache.scheme.attention)
        handles.append(attention.register_forward_pre_hook(biased, with_kwargs=True))
    return handles


def _keywords(rest: tuple[Any, ...], count: int) -> Arguments:
    """The keyword arguments, first of the `count` values behind the positional ones; {} where there are fewer."""
    return rest[0] if len(rest) == count else {}


@opaque
def _told(cache: "SinkCache", args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """What the base model's forward is told instead of what it was given."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    given = kwargs.get("inputs_embeds") if ids is None else ids
    if given is None:
        raise SqvizError("the model was given neither input_ids nor inputs_embeds")
    if kwargs.get("use_cache") is False:  # generate() would then feed the whole text again for each token
        raise SqvizError(
            "a SinkCache was given together with use_cache=False, which some configurations set (MPT's does). Pass "
            "use_cache=True"
        )
    rows, new = given.shape[:2]
    now = cache.begin(ids, rows, new, kwargs.get("attention_mask"))
    if isinstance(cache.scheme, Alibi):
        # Falcon makes a bias of the length of this mask before ours replaces it.
        ones = torch.ones(rows, now.keys, dtype=torch.long, device=given.device)
        return {"attention_mask": ones if cache.scheme.form == "falcon" else None}
    positions = torch.arange(now.start, now.end, device=given.device)[None].expand(rows, -1)
    if now.visible is None:
        return {"attention_mask": None, "position_ids": positions}
    if (
        cache.policy.recent is None and not now.taken and cache.hidden is not None
    ):  # the model's own mask, with its sliding window
        return {"attention_mask": (~cache.hidden).long().to(given.device), "position_ids": positions}
    if str(cache.lm.config._attn_implementation).startswith("flash"):
        raise SqvizError("flash attention takes no mask: feed one token at a time, or load with sdpa attention")
    mask = _additive(now.visible.to(given.device), cache.lm.dtype)
    return {"attention_mask": mask[:, None].expand(rows, -1, -1, -1), "position_ids": positions}


def _additive(visible: Bool[Tensor, "row query key"], dtype: torch.dtype) -> Float[Tensor, "row query key"]:
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


@opaque
def _biased(cache: "SinkCache", form: str, slope: Float[Tensor, " head"], twice: bool) -> Arguments:
    """What attention modules with ALiBi are told instead; the same for all layers of a pass.

    Falcon without sdpa adds the bias twice, as the mask holds it already. A model trained or measured that way is taken
    as it is: here the mask holds both.
    """
    now, rows, dtype = cache.now, cache.rows, cache.lm.dtype
    assert now.places is not None
    assert now.visible is not None
    added = bias(now.places.to(slope.device), slope, form, dtype)  # [row head query key]
    visible = now.visible.to(slope.device)
    if form == "mpt":
        return {"position_bias": added[0], "attention_mask": ~visible[:, None]}
    if form == "bloom":
        mask = _additive(visible, dtype)[:, None]
        return {"alibi": added.expand(rows, -1, -1, -1).flatten(0, 1), "attention_mask": mask}
    mask = added * ((2 if twice else 1) / math.sqrt(head_dim(cache.lm)))
    mask = mask.masked_fill(~visible[:, None], torch.finfo(dtype).min).expand(rows, -1, -1, -1)
    return {"attention_mask": mask, "alibi": mask.new_zeros(rows * len(slope), 1, now.keys)}


def head_dim(lm: LM) -> int:
    """Channels per head."""
    return int(lm.config.hidden_size // lm.config.num_attention_heads)

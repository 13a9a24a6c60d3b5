"""A plain recorder of max|X|, so that the tests of smoothing need no capture."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from sqviz.models.linears import folded_scales, groups, holder
from sqviz.models.lm import LM


class Absmax:
    """max|X| per channel of every group's input, as the obvious loop finds it; per expert for experts' down_proj."""

    def __init__(self, found: dict[str, Tensor], scales: Mapping[str, Tensor]) -> None:
        self.found, self.scales = found, scales

    def absmax(self, name: str) -> Tensor:
        return self.found[name]


def _inner_absmax(experts: torch.nn.Module, hidden: Tensor, index: Tensor) -> Tensor:
    found = torch.zeros(experts.num_experts, experts.down_proj.shape[-1], dtype=hidden.dtype)
    for token, chosen in zip(hidden, index, strict=True):
        for expert in chosen.tolist():
            gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
            found[expert] = torch.maximum(found[expert], (experts.act_fn(gate) * up).abs())
    return found


@torch.no_grad()
def absmax_of(lm: LM, tokens: int = 72) -> Absmax:
    found: dict[str, Tensor] = {}
    hooks = []
    for group in groups(lm):
        module, attribute = holder(lm.model, group.name)
        if attribute == "weight":

            def hook(_, args, name=group.name):
                found[name] = args[0].flatten(0, -2).abs().amax(0).float()
        else:

            def hook(experts, args, name=group.name):
                found[name] = _inner_absmax(experts, args[0], args[1]).float()

        hooks.append(module.register_forward_pre_hook(hook))
    lm.model((torch.arange(tokens) * 37 % 131)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return Absmax(found, folded_scales(lm))


@pytest.fixture
def record() -> Callable[[LM], Absmax]:
    return absmax_of

"""`share`: a twin of the module tree over the same tensors."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from sqviz.models.lm import LM, share, unshare
from sqviz.models.tiny import tiny


class Tied(nn.Module):
    """An embedding tied to its head, a buffer, and a linear between."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.ones(5))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed(ids)) + self.offset)


def test_share_copies_modules_and_no_tensor() -> None:
    model = Tied()
    twin = share(model)
    assert twin.mix is not model.mix
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert twin.offset.data_ptr() == model.offset.data_ptr()
    assert twin.head.weight is twin.embed.weight, "tied weights stay tied"


def test_a_changed_twin_leaves_the_original_as_it_was() -> None:
    model = Tied()
    before = copy.deepcopy(model.state_dict())
    twin = share(model)
    twin.mix.weight = nn.Parameter(twin.mix.weight * 2)
    twin.head = nn.Linear(5, 7)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("convert", [nn.Module.half, lambda m: m.to("meta"), lambda m: m.to(torch.float64)])
def test_converting_or_moving_an_unshared_twin_leaves_the_original_as_it_was(
    convert: Callable[[nn.Module], nn.Module],
) -> None:
    model = Tied()
    before, ids = copy.deepcopy(model.state_dict()), torch.arange(5)
    expected, twin = model(ids), share(model)
    unshare(twin)
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert twin.head.weight is twin.embed.weight
    convert(twin)
    assert twin.mix.weight.dtype != torch.float32 or twin.mix.weight.is_meta
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(ids), expected)


def test_an_unshared_twin_keeps_what_parameters_are_marked_with() -> None:
    model = Tied()
    model.mix.weight.requires_grad_(False)
    model.mix.weight.initialised = True
    twin = share(model)
    unshare(twin)
    assert twin.mix.weight is not model.mix.weight
    assert not twin.mix.weight.requires_grad
    assert twin.mix.bias.requires_grad
    assert twin.mix.weight.initialised


def test_share_leaves_hooks_behind_and_keeps_the_originals() -> None:
    model = Tied()
    calls: list[str] = []
    model.mix.register_forward_hook(lambda *_: calls.append("original"))
    share(model)(torch.tensor([1]))
    assert calls == []
    model(torch.tensor([1]))
    assert calls == ["original"]


def test_a_twin_records_hidden_states_after_its_original_did() -> None:
    lm, ids = tiny("LlamaForCausalLM"), torch.arange(5)[None]
    with torch.no_grad():
        states = lm.model(ids, output_hidden_states=True).hidden_states
        again = share(lm.model)(ids, output_hidden_states=True).hidden_states
    assert len(states) == 3
    assert all(torch.equal(a, b) for a, b in zip(states, again, strict=True))


def test_replace_makes_a_new_value() -> None:
    lm = LM(Tied(), None, arch=None)  # type: ignore[arg-type]
    other = lm.replace(note="smoothed")
    assert other is not lm
    assert lm.note == ""
    assert other.model is lm.model

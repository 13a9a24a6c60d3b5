"""Groups and weights of resolved models."""

import pytest
import torch

from sqviz.errors import NoSuchLayer
from sqviz.models.linears import experts, groups, holder, linear_names, set_weight, weight
from sqviz.models.lm import share
from sqviz.models.tiny import TINY, tiny


def test_groups_of_a_llama_in_execution_order():
    lm = tiny("LlamaForCausalLM")
    found = groups(lm)
    assert [(group.block, group.kind, group.fold_kind, group.entry) for group in found[:4]] == [
        (0, "self_attn.q_proj", "norm", True),
        (0, "self_attn.o_proj", "linear", False),
        (0, "mlp.gate_proj", "norm", True),
        (0, "mlp.down_proj", "linear", False),
    ]
    assert found[4].name == "model.layers.1.self_attn.q_proj"
    assert found[4].consumers == tuple(f"model.layers.1.self_attn.{kind}_proj" for kind in "qkv")
    assert found[4].fold.path == "model.layers.1.input_layernorm"
    assert found[4].title == "1 · self_attn.q_proj + k_proj + v_proj"
    assert [name for group in found for name in group.consumers] == list(linear_names(lm))


@pytest.mark.parametrize("name", TINY)
def test_names_lie_in_their_block(name: str):
    lm = tiny(name)
    for group in groups(lm):
        prefix = f"{lm.arch.blocks}.{group.block}."
        assert group.name == prefix + group.kind == group.consumers[0]
        assert all(consumer.startswith(prefix) for consumer in group.consumers)
        assert bool(group.reason) == (group.fold is None)
        assert not {"lm_head", "embed_out"} & set(group.name.split("."))


@pytest.mark.parametrize("name", TINY)
def test_weight_is_a_view_of_the_stored_tensor(name: str):
    lm = tiny(name)
    for linear in linear_names(lm):
        module, attribute = holder(lm.model, linear)
        assert weight(lm, linear).data_ptr() == getattr(module, attribute).data_ptr()
        assert weight(lm, linear).numel() == getattr(module, attribute).numel()
        assert weight(lm, linear).ndim == 2


@pytest.mark.parametrize("name", ["LlamaForCausalLM/tied-bias", "GPT2LMHeadModel", "FalconForCausalLM/rw"])
def test_weight_maps_channels_to_outputs(name: str):
    lm = tiny(name)
    for linear in linear_names(lm):
        module, _ = holder(lm.model, linear)
        x = torch.randn(3, 5, weight(lm, linear).shape[1])
        with torch.no_grad():
            torch.testing.assert_close(module(x), x @ weight(lm, linear).T + module.bias)


def test_experts_are_stacked():
    lm = tiny("MixtralForCausalLM")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = lm.model.get_submodule("model.layers.0.mlp.experts").gate_up_proj
    assert (experts(lm, name), experts(lm, "model.layers.0.mlp.gate")) == (5, 0)
    assert weight(lm, name).shape == (5 * 2 * 24, 48)
    assert torch.equal(weight(lm, name)[2 * 48 : 3 * 48], stored[2])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"])
def test_set_weight_replaces_in_the_copy_only(name: str):
    lm = tiny(name)
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    twin = share(lm.model)
    for linear in linear_names(lm):
        old = weight(lm, linear)
        set_weight(twin, linear, old.detach() * 2)
        module, attribute = holder(twin, linear)
        assert getattr(module, attribute).shape == getattr(*holder(lm.model, linear)).shape
        assert getattr(module, attribute).is_contiguous()
        assert torch.equal(weight(twin, linear), old * 2)
    assert all(torch.equal(value, before[key]) for key, value in lm.model.state_dict().items())


def test_set_weight_keeps_the_dtype():
    twin = share(tiny("LlamaForCausalLM", dtype=torch.bfloat16).model)
    name = "model.layers.0.mlp.up_proj"
    set_weight(twin, name, torch.ones(53, 48))
    assert weight(twin, name).dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", ["model.layers.0.mlp.dwn_proj", "model.layers.9.mlp.down_proj", "", "lm_heads"])
def test_unknown_linears_are_told_near_ones(wrong: str):
    with pytest.raises(NoSuchLayer, match=f"'{wrong}' matches nothing.*near: "):
        weight(tiny("LlamaForCausalLM"), wrong)


def test_near_names_are_near():
    with pytest.raises(NoSuchLayer, match=r"model\.layers\.0\.mlp\.down_proj"):
        weight(tiny("LlamaForCausalLM"), "model.layers.0.mlp.dwn_proj")

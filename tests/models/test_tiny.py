"""The tiny models themselves: reproducible, harmless, and with the outliers that they promise."""

import pytest
import torch

from sqviz.errors import UnknownArchitecture
from sqviz.models.linears import groups
from sqviz.models.tiny import TINY, tiny


def absmax(name: str, outliers: bool) -> dict[str, torch.Tensor]:
    lm, seen = tiny(name, outliers=outliers), {}
    for group in groups(lm):
        if group.fold is not None and not group.kind.endswith("experts.down_proj"):
            module = lm.model.get_submodule(group.name)
            module.register_forward_pre_hook(
                lambda _, args, name=group.name: seen.__setitem__(name, args[0].flatten(0, -2).abs().amax(0))
            )
    with torch.no_grad():
        lm.model(torch.arange(3, 67)[None])
    return seen


@pytest.mark.parametrize("name", TINY)
def test_outliers_are_planted_in_every_foldable_input(name: str):
    planted, plain = absmax(name, outliers=True), absmax(name, outliers=False)
    for group, maxima in planted.items():
        assert maxima.max() / maxima.median() > 30, group
        assert plain[group].max() / plain[group].median() < 20, group


@pytest.mark.parametrize("name", TINY)
def test_the_same_arguments_give_the_same_model(name: str):
    first, second, other = tiny(name), tiny(name), tiny(name, seed=1)
    for key, value in first.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[key])
    assert any(not torch.equal(v, other.model.state_dict()[k]) for k, v in first.model.state_dict().items())


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    tiny("LlamaForCausalLM")
    assert torch.equal(torch.get_rng_state(), before)


def test_settings_reach_the_model():
    lm = tiny("LlamaForCausalLM", dtype=torch.float64, num_hidden_layers=3, vocab_size=77)
    assert lm.dtype == torch.float64
    assert len(lm.model.model.layers) == 3
    assert lm.model.get_input_embeddings().num_embeddings == 77
    assert lm.tokenizer is None
    assert lm.name == "tiny/LlamaForCausalLM"
    assert not lm.model.training


def test_a_bare_architecture_means_its_first_layout():
    assert tiny("FalconForCausalLM").name == "tiny/FalconForCausalLM/7b"


def test_there_are_tied_and_untied_models_and_grouped_queries():
    tied = {
        name: lm.model.get_input_embeddings().weight is lm.model.get_output_embeddings().weight
        for name in TINY
        for lm in [tiny(name)]
    }
    assert 5 < sum(tied.values()) < len(tied) - 5
    assert tiny("LlamaForCausalLM").config.num_key_value_heads < tiny("LlamaForCausalLM").config.num_attention_heads


def test_unknown_ids_are_told_the_known_ones():
    with pytest.raises(UnknownArchitecture, match=r"'llama'.*LlamaForCausalLM"):
        tiny("llama")

"""The operators of a block, read off the running model: compared with what the modelling files say, written by hand."""

import pytest
import torch

from sqviz.models.linears import groups
from sqviz.models.tiny import TINY, tiny
from sqviz.observe.flow import Flow, operators_of

IDS = (torch.arange(20) * 37 % 128 + 3)[None]
ATTENTION = ["qk", "softmax", "pv"]
# what stands in block 1, in execution order, and what some operators read from
BY_HAND = {
    "LlamaForCausalLM": (
        (
            "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj rotary qk softmax pv "
            "self_attn.o_proj add post_attention_layernorm mlp.gate_proj mlp.act_fn mlp.up_proj multiply "
            "mlp.down_proj add#2"
        ),
        {
            "rotary": ("self_attn.q_proj", "self_attn.k_proj"),
            "pv": ("self_attn.v_proj", "softmax"),
            "add": ("input", "self_attn.o_proj"),
            "multiply": ("mlp.act_fn", "mlp.up_proj"),
            "add#2": ("add", "mlp.down_proj"),
        },
    ),
    "GPT2LMHeadModel": (
        "ln_1 attn.c_attn qk softmax pv attn.c_proj add ln_2 mlp.c_fc mlp.act mlp.c_proj add#2",
        {"qk": ("attn.c_attn",), "pv": ("attn.c_attn", "softmax"), "ln_2": ("add",)},
    ),
    "GPTNeoXForCausalLM": (  # attention and MLP side by side, a norm each
        (
            "input_layernorm attention.query_key_value rotary qk softmax pv attention.dense "
            "post_attention_layernorm mlp.dense_h_to_4h mlp.act mlp.dense_4h_to_h add add#2"
        ),
        {"post_attention_layernorm": ("input",), "add": ("attention.dense", "mlp.dense_4h_to_h")},
    ),
    "CohereForCausalLM": (  # side by side, one norm
        (
            "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.q_norm self_attn.k_norm "
            "rotary qk softmax pv self_attn.o_proj mlp.gate_proj mlp.act_fn mlp.up_proj multiply mlp.down_proj "
            "add add#2"
        ),
        {"mlp.gate_proj": ("input_layernorm",), "self_attn.q_proj": ("input_layernorm",)},
    ),
    "GPTJForCausalLM": (  # its attention is multiplied out in the model
        (
            "ln_1 attn.q_proj attn.k_proj attn.v_proj rotary qk softmax pv attn.out_proj mlp.fc_in mlp.act "
            "mlp.fc_out add add#2"
        ),
        {"rotary": ("attn.q_proj", "attn.k_proj"), "pv": ("attn.v_proj", "softmax")},
    ),
    "MixtralForCausalLM": (
        (
            "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj rotary qk softmax pv "
            "self_attn.o_proj add post_attention_layernorm mlp.gate mlp.experts.gate_up_proj mlp.experts.act_fn "
            "mlp.experts.down_proj add#2"
        ),
        {
            "mlp.experts.gate_up_proj": ("post_attention_layernorm",),
            "mlp.experts.down_proj": ("mlp.gate", "mlp.experts.act_fn"),
        },
    ),
    "Gemma2ForCausalLM": (  # norms before and behind
        (
            "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj rotary qk softmax pv "
            "self_attn.o_proj post_attention_layernorm add pre_feedforward_layernorm mlp.gate_proj mlp.act_fn "
            "mlp.up_proj multiply mlp.down_proj post_feedforward_layernorm add#2"
        ),
        {"add": ("input", "post_attention_layernorm")},
    ),
    "OPTForCausalLM/post-ln": (
        (
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj qk softmax pv self_attn.out_proj add "
            "self_attn_layer_norm fc1 activation_fn fc2 add#2 final_layer_norm"
        ),
        {"self_attn.q_proj": ("input",), "add#2": ("self_attn_layer_norm", "fc2")},
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_operators_are_those_of_the_modelling_file(name):
    names, sources = BY_HAND[name]
    found = operators_of(tiny(name))[1]
    assert [one.name for one in found] == names.split()
    for one in found:
        if one.name in sources:
            assert one.sources == sources[one.name]


@pytest.mark.parametrize("name", TINY)
def test_every_architecture_has_its_linears_and_one_attention_and_is_left_alone(name):
    lm = tiny(name)
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    logits = lm.model(IDS).logits
    found = operators_of(lm)
    assert len(found) == len(lm.blocks) == 2
    for block, ops in enumerate(found):
        names = [one.name for one in ops]
        prefix = f"{lm.arch.blocks}.{block}."
        linears = {n.removeprefix(prefix) for group in groups(lm) if group.block == block for n in group.consumers}
        assert {one.name for one in ops if one.kind == "linear"} == linears
        assert [one for one in names if one in ATTENTION] == ATTENTION
        assert len(set(names)) == len(names)
        for at, one in enumerate(ops):  # everything reads from what was there before, and is read or goes on
            assert one.sources
            assert set(one.sources) <= {"input", *names[:at]}
        read = {source for one in ops for source in one.sources}
        assert set(names) - read == {names[-1]}
    assert torch.equal(lm.model(IDS).logits, logits)
    assert all(torch.equal(value, before[key]) for key, value in lm.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.blocks[0].modules())


@pytest.mark.parametrize("name", ["BloomForCausalLM", "MptForCausalLM", "FalconForCausalLM/rw"])
def test_positions_added_to_logits_are_seen(name):
    softmax = next(one for one in operators_of(tiny(name))[0] if one.name == "softmax")
    assert softmax.biased


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPTJForCausalLM", "BloomForCausalLM", "FalconForCausalLM/rw"])
def test_the_operators_results_are_those_of_the_model(name):
    """Given back its own results, operator by operator, a model computes what it computes."""
    lm = tiny(name, dtype=torch.float64)

    def same(_, operator, operands, result):
        return tuple(one.clone() for one in result) if isinstance(result, tuple) else result.clone()

    with torch.no_grad():
        expected = lm.model(IDS).logits
        with Flow(lm, same):
            got = lm.model(IDS).logits
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPTJForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("operator", ["rotary", "qk", "softmax", "pv", "add#2"])
def test_another_result_is_what_the_model_goes_on_with(name, operator):
    lm = tiny(name)

    def halve(_, one, operands, result):
        if one.name != operator:
            return None
        return tuple(part / 2 for part in result) if isinstance(result, tuple) else result / 2

    with torch.no_grad():
        expected = lm.model(IDS).logits
        with Flow(lm, halve, 0):
            got = lm.model(IDS).logits
    assert not torch.allclose(got, expected, rtol=1e-3)


def test_an_error_inside_leaves_no_hook_behind():
    lm = tiny("LlamaForCausalLM")

    def fail(*_):
        raise KeyError("on purpose")

    with pytest.raises(KeyError), torch.no_grad(), Flow(lm, fail):
        lm.model(IDS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules() if m is not lm.model)
    assert torch.isfinite(lm.model(IDS).logits).all()

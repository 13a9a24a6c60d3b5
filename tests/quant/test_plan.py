"""Which linears a call of smooth addresses, and what it refuses."""

import numpy as np
import pytest
import torch

from sqviz.errors import CannotFold, NoSuchLayer, SqvizError
from sqviz.models.tiny import tiny
from sqviz.quant.plan import plan
from sqviz.quant.smooth import smooth, smoothing_scale


def planned(name: str, alpha, **options) -> dict[str, float]:
    return {
        f"{step.group.block}.{step.group.kind}{'/online' if step.online else ''}": step.alpha
        for step in plan(tiny(name), alpha, **options)
    }


def test_one_number_means_the_inputs_of_attention_and_mlp():
    assert planned("LlamaForCausalLM", 0.5) == {
        f"{block}.{kind}": 0.5 for block in (0, 1) for kind in ("self_attn.q_proj", "mlp.gate_proj")
    }


def test_all_folds_adds_the_linear_ones_and_leaves_what_has_none():
    assert len(planned("LlamaForCausalLM", 0.5, folds="all")) == 8
    assert {key[2:] for key in planned("OPTForCausalLM/gelu", 0.5, folds="all")} == {
        "self_attn.q_proj",
        "self_attn.out_proj",
        "fc1",
    }
    assert planned("LlamaForCausalLM", 0.5, folds="outliers") == planned("LlamaForCausalLM", 0.5, folds="all")


def test_patterns_over_any_consumer_and_the_last_one_counts():
    alphas = {"*": 0.5, "model.layers.1.*": 0.8, "*.v_proj": 0.6, "model.layers.0.mlp.*": None}
    assert planned("LlamaForCausalLM", alphas) == {
        "0.self_attn.q_proj": 0.6,
        "1.self_attn.q_proj": 0.6,
        "1.mlp.gate_proj": 0.8,
    }


def test_a_pattern_for_linear_folds():
    alphas = {"*.o_proj": 0.4, "*.down_proj": 0.9}
    assert planned("Olmo2ForCausalLM", alphas, folds="all") == {
        f"{block}.{kind}": alpha
        for block in (0, 1)
        for kind, alpha in (("self_attn.o_proj", 0.4), ("mlp.down_proj", 0.9))
    }


def test_a_callable_gets_the_group():
    found = planned("LlamaForCausalLM", lambda group: 0.3 if group.block else None)
    assert found == {"1.self_attn.q_proj": 0.3, "1.mlp.gate_proj": 0.3}


def test_online_takes_what_cannot_be_folded():
    two = ("0.self_attn.q_proj/online", "0.mlp.gate_proj/online")
    assert tuple(planned("Olmo2ForCausalLM", 0.5, online=True))[:2] == two
    assert "0.fc2/online" in planned("OPTForCausalLM/gelu", 0.5, folds="all", online=True)
    assert "0.fc2/online" not in planned("OPTForCausalLM/gelu", 0.5, online=True)
    assert planned("OPTForCausalLM/gelu", {"*.0.fc2": 0.5}, online=True) == {"0.fc2/online": 0.5}
    assert planned("LlamaForCausalLM", {"*.0.*.o_proj": 0.5}, online=True) == {"0.self_attn.o_proj/online": 0.5}


@pytest.mark.parametrize(
    ("name", "alpha", "options", "message"),
    [
        ("Olmo2ForCausalLM", 0.5, {}, r"layers\.0\.self_attn\.q_proj: it cannot be folded: no norm.*online=True"),
        ("Olmo2ForCausalLM", 0.5, {"folds": "all"}, "q_proj: it cannot be folded: no norm"),
        ("OPTForCausalLM/post-ln", 0.5, {}, r"q_proj: it cannot be folded: post-LN.*residual"),
        ("OPTForCausalLM/gelu", {"*.fc2": 0.5}, {"folds": "all"}, r"layers\.0\.fc2: it cannot be folded: gelu"),
        ("OPTForCausalLM/gelu", {"*.fc2": 0.5}, {}, r"layers\.0\.fc2: it cannot be folded: gelu"),
        ("LlamaForCausalLM", {"*.o_proj": 0.5}, {}, r"o_proj: it can be folded exactly, into .*v_proj.*folds='all'"),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name_and_reason(name, alpha, options, message):
    with pytest.raises(CannotFold, match=message):
        plan(tiny(name), alpha, **options)


@pytest.mark.parametrize("alpha", [-0.1, 1.0001, float("nan"), float("inf"), 7])
def test_alpha_outside_its_range_is_refused(alpha: float):
    lm = tiny("LlamaForCausalLM")
    with pytest.raises(SqvizError, match=rf"alpha={float(alpha)} is outside \[0, 1\]"):
        plan(lm, alpha)
    with pytest.raises(SqvizError, match=r"alpha\['\*'\]=.*outside"):
        plan(lm, {"*": alpha})
    with pytest.raises(SqvizError, match=r"alpha\(model\.layers\.0\.self_attn\.q_proj\)=.*outside"):
        plan(lm, lambda group: alpha)
    with pytest.raises(SqvizError, match="outside"):
        smoothing_scale(torch.ones(2), torch.ones(2), alpha)


@pytest.mark.parametrize("alpha", [True, None, [0.5], "high"])
def test_alpha_of_another_kind_is_refused(alpha):
    with pytest.raises(SqvizError, match=r"alpha=.*number"):
        plan(tiny("LlamaForCausalLM"), alpha)


def test_numpy_numbers_are_numbers():
    assert set(planned("LlamaForCausalLM", np.float32(0.5)).values()) == {0.5}


def test_a_pattern_that_matches_nothing_lists_near_names():
    with pytest.raises(NoSuchLayer, match=r"'\*\.dwn_proj' matches nothing.*near: .*proj"):
        plan(tiny("LlamaForCausalLM"), {"*": 0.5, "*.dwn_proj": 0.5})


def test_unknown_folds_are_refused():
    with pytest.raises(SqvizError, match=r"folds='linear'.*'norm'.*'all'"):
        plan(tiny("LlamaForCausalLM"), 0.5, folds="linear")


def test_a_tensor_with_two_owners_is_refused(record):
    lm = tiny("LlamaForCausalLM")
    magnitudes = record(lm)
    first, second = (block.mlp for block in lm.model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    with pytest.raises(
        CannotFold, match=r"layers\.0\.mlp\.up_proj\.weight and .*layers\.1\.mlp\.up_proj\.weight are one"
    ):
        smooth(lm, magnitudes, 0.5)
    smooth(lm, magnitudes, {"*.q_proj": 0.5})

"""Rows of ARCHS, each held against the data flow of a tiny model rather than against itself."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sqviz.errors import UnknownArchitecture
from sqviz.models.arch import ARCHS, Input, Set, Unset, arch_of
from sqviz.models.linears import groups, holder, linear_names
from sqviz.models.lm import LM
from sqviz.models.tiny import TINY, tiny


def readers(lm: LM) -> dict[str, torch.Tensor]:
    """The input of every module with a weight of two or more axes, and of every norm's reader, by module name."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2)))
        for name, module in lm.model.get_submodule(lm.arch.blocks).named_modules(prefix=lm.arch.blocks)
        if any(p.ndim >= 2 and "norm" not in name for p in module.parameters(recurse=False))
    ]
    with torch.no_grad():
        lm.model(torch.arange(3, 14)[None])
    for hook in hooks:
        hook.remove()
    return seen


def test_every_row_has_a_tiny_model_and_back():
    assert {name.partition("/")[0] for name in TINY} == set(ARCHS)


@pytest.mark.parametrize("name", TINY)
def test_every_linear_of_a_block_is_in_exactly_one_group(name: str):
    lm = tiny(name)
    names = linear_names(lm)
    assert len(set(names)) == len(names)
    owners = {id(holder(lm.model, linear)[0]) for linear in names}
    blocks = lm.model.get_submodule(lm.arch.blocks)
    weighted = [m for n, m in blocks.named_modules() if type(m).__name__ in ("Conv1D", "FalconLinear", "Linear")]
    assert weighted
    assert {id(module) for module in weighted} <= owners


@pytest.mark.parametrize("name", TINY)
def test_consumers_are_all_that_read_the_tensor(name: str):
    """Two linears are in one group if and only if the model feeds them the same values."""
    lm = tiny(name)
    seen = readers(lm)
    module_of = {linear: linear if linear in seen else linear.rpartition(".")[0] for linear in linear_names(lm)}
    for group in groups(lm):
        if group.name not in seen:  # the experts' inner input, which is no module's
            continue
        tensor = seen[group.name]
        same = {n for n, other in seen.items() if other.shape == tensor.shape and torch.equal(other, tensor)}
        assert same == {module_of[consumer] for consumer in group.consumers}


@pytest.mark.parametrize("name", TINY)
def test_norm_folds_name_the_norm_whose_output_is_read(name: str):
    lm = tiny(name)
    outputs: dict[str, torch.Tensor] = {}
    folds = [group for group in groups(lm) if group.fold_kind == "norm"]
    for group in folds:
        norm = lm.model.get_submodule(group.fold.path)
        norm.register_forward_hook(lambda _, args, out, path=group.fold.path: outputs.__setitem__(path, out))
    seen = readers(lm)
    for group in folds:
        assert torch.equal(outputs[group.fold.path].flatten(0, -2), seen[group.name])


@pytest.mark.parametrize("name", TINY)
def test_plus_one_says_how_the_norm_uses_its_weight(name: str):
    """A norm with weight 0 gives 0, one with a gain of 1 + w does not."""
    lm = tiny(name)
    for group in groups(lm):
        if group.fold_kind == "norm":
            norm = lm.model.get_submodule(group.fold.path)
            nn.init.zeros_(norm.weight)
            if getattr(norm, "bias", None) is not None:
                nn.init.zeros_(norm.bias)
            out = norm(torch.randn(3, norm.weight.shape[0]))
            assert bool((out != 0).any()) == group.fold.plus_one


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("OPTForCausalLM/gelu", "fc2", "gelu between fc1 and fc2 is not homogeneous"),
        ("OPTForCausalLM/post-ln", "fc1", "residual"),
        ("OPTForCausalLM/post-ln", "self_attn.q_proj", "residual"),
        ("BloomForCausalLM", "mlp.dense_4h_to_h", "gelu"),
        ("BloomForCausalLM/post-residual", "self_attention.query_key_value", "apply_residual_connection"),
        ("GPT2LMHeadModel", "mlp.c_proj", "gelu_new"),
        ("MptForCausalLM/clip-qkv", "attn.out_proj", "clip"),
        ("Olmo2ForCausalLM", "self_attn.q_proj", "no norm"),
        ("Olmo2ForCausalLM", "mlp.gate_proj", "no norm"),
    ],
)
def test_what_cannot_be_folded_says_why(name: str, kind: str, reason: str):
    found = [group for group in groups(tiny(name)) if group.kind == kind]
    assert found
    assert all(group.fold is None and group.fold_kind == "" and reason in group.reason for group in found)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("OPTForCausalLM", "fc2"),
        ("GPT2LMHeadModel/relu", "mlp.c_proj"),
        ("PhiForCausalLM/relu", "mlp.fc2"),
        ("FalconForCausalLM/rw-multi-query", "mlp.dense_4h_to_h"),
        ("GPTNeoXForCausalLM/sequential-relu", "mlp.dense_4h_to_h"),
        ("Olmo2ForCausalLM", "self_attn.o_proj"),
        ("Olmo2ForCausalLM", "mlp.down_proj"),
    ],
)
def test_exact_linear_folds_are_offered(name: str, kind: str):
    found = [group for group in groups(tiny(name)) if group.kind == kind]
    assert found
    assert all(group.fold_kind == "linear" and not group.reason for group in found)


def test_a_norm_without_weight_cannot_be_folded_into():
    lm = tiny("OPTForCausalLM", layer_norm_elementwise_affine=False)
    assert {group.reason for group in groups(lm) if group.entry} == {
        "the norm self_attn_layer_norm has no weight to divide",
        "the norm final_layer_norm has no weight to divide",
    }


def test_deepseek_has_dense_and_mixture_blocks():
    kinds = {(group.block, group.kind) for group in groups(tiny("DeepseekV2ForCausalLM"))}
    assert {(0, "mlp.gate_proj"), (0, "mlp.down_proj"), (1, "mlp.gate"), (1, "mlp.experts.down_proj")} <= kinds
    assert not {(1, "mlp.gate_proj"), (0, "mlp.gate"), (0, "mlp.experts.down_proj")} & kinds


def test_conditions_compare_config_values():
    config = SimpleNamespace(kind="a", off=None, inner=SimpleNamespace(clip=0.5), table={"rows": 3})
    holds = {"kind": "a", "off": Unset, "absent": Unset, "inner.clip": Set, "table.rows": 3}
    fails = {"kind": "b", "off": Set, "absent": Set, "inner.clip": Unset, "table.rows": 4}
    for key, wanted in holds.items():
        assert Input(("x",), when={key: wanted}).holds(config)
    for key, wanted in fails.items():
        assert not Input(("x",), when={key: wanted}).holds(config)
    assert not Input(("x",), when={**holds, "kind": "b"}).holds(config)


def test_unknown_architectures_are_told_what_is_known_and_how_to_add_a_row():
    with pytest.raises(UnknownArchitecture, match=r"'MambaForCausalLM'.*LlamaForCausalLM.*ARCHS") as raised:
        arch_of(SimpleNamespace(architectures=["MambaForCausalLM"]))
    assert all(name in str(raised.value) for name in ARCHS)
    with pytest.raises(UnknownArchitecture, match="empty"):
        arch_of(SimpleNamespace(architectures=None))


def test_rows_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ARCHS["LlamaForCausalLM"].blocks = "elsewhere"  # type: ignore[misc]


def test_rows_are_read_without_transformers():
    code = "import sys, sqviz.models.linears, sqviz.models.tiny; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)

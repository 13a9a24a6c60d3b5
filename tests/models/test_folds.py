"""Where a channel comes from: checked by silencing the producer's row and looking which channels fall silent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqviz.models.folds import divide_input, producer_rows, tie, weight_absmax
from sqviz.models.linears import groups, holder, set_weight, weight
from sqviz.models.lm import LM, share
from sqviz.models.tiny import TINY, tiny

LINEAR = [name for name in TINY if any(group.fold_kind == "linear" for group in groups(tiny(name)))]


def input_of(lm: LM, model: torch.nn.Module, name: str) -> torch.Tensor:
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(torch.arange(3, 40)[None])
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", LINEAR)
def test_silencing_a_row_silences_its_channels_and_no_others(name: str):
    lm = tiny(name)
    for group in groups(lm):
        if group.fold_kind != "linear" or group.block or holder(lm.model, group.name)[1] != "weight":
            continue  # (the inner input of fused experts is no module's: nothing to listen at)
        rows = producer_rows(lm, group)
        before = input_of(lm, lm.model, group.name)
        assert (before != 0).any(0).float().mean() > 0.9  # not silent by itself
        for channel in (0, 7, len(rows) // 2, len(rows) - 1):
            twin = share(lm.model)
            new = weight(lm, group.fold.path).detach().clone()
            new[rows[channel]] = 0
            set_weight(twin, group.fold.path, new)
            module, _ = holder(twin, group.fold.path)
            if module.bias is not None:
                bias = module.bias.detach().clone()
                bias[rows[channel]] = 0
                module.bias = torch.nn.Parameter(bias)
            after = input_of(lm, twin, group.name)
            silent = rows == rows[channel]
            assert (after[:, silent] == 0).all()
            torch.testing.assert_close(after[:, ~silent], before[:, ~silent])


def test_grouped_queries_share_rows():
    lm = tiny("LlamaForCausalLM")  # 6 query heads of size 8, 2 value heads
    rows = producer_rows(lm, groups(lm)[1])
    assert rows.tolist() == [head // 3 * 8 + place for head in range(6) for place in range(8)]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 9, width=32), st.integers(0, 4)), min_size=1, max_size=20))
def test_tied_channels_get_the_maximum(pairs: list[tuple[float, int]]):
    values, rows = torch.tensor([v for v, _ in pairs]), torch.tensor([r for _, r in pairs])
    expected = [max(v for v, r in pairs if r == row) for _, row in pairs]
    assert tie(values, rows).tolist() == torch.tensor(expected).tolist()


def test_weight_absmax_is_over_all_consumers():
    lm = tiny("LlamaForCausalLM")
    group = groups(lm)[0]
    parts = [getattr(lm.model.model.layers[0].self_attn, f"{kind}_proj").weight.detach() for kind in "qkv"]
    expected = [max(float(part[:, channel].abs().max()) for part in parts) for channel in range(48)]
    assert weight_absmax(lm, group).tolist() == expected


def test_weight_absmax_of_experts_is_per_expert():
    lm = tiny("MixtralForCausalLM")
    group = next(group for group in groups(lm) if group.kind == "mlp.experts.down_proj")
    stored = lm.model.model.layers[0].mlp.experts.down_proj
    assert torch.equal(weight_absmax(lm, group), torch.stack([expert.abs().amax(0) for expert in stored]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["Gemma2ForCausalLM", "OPTForCausalLM"])
def test_the_applied_s_follows_the_rounding_of_the_norm(name: str, dtype: torch.dtype):
    lm = tiny(name, dtype=dtype)
    group = next(group for group in groups(lm) if group.fold_kind == "norm")
    twin, s = share(lm.model), torch.rand(48) * 20 + 0.1
    applied = divide_input(twin, lm, group, s)
    plus = float(group.fold.plus_one)
    old, new = (m.get_submodule(group.fold.path).weight.double() + plus for m in (lm.model, twin))
    torch.testing.assert_close((new * applied.double()), old, rtol=1e-6, atol=0)
    torch.testing.assert_close(applied, s, rtol=0.2 if plus and dtype == torch.bfloat16 else 0.03, atol=0)


def test_a_channel_that_the_dtype_cannot_hold_is_left_as_it_is():
    lm = tiny("Gemma2ForCausalLM", dtype=torch.bfloat16)
    group, twin = groups(lm)[0], share(lm.model)
    applied = divide_input(twin, lm, group, torch.full((48,), 1e5))
    assert (applied == 1).any()
    assert torch.isfinite(applied).all()
    gain = twin.get_submodule(group.fold.path).weight.double() + 1
    assert (gain != 0).all()

"""Smoothing: the logits stay, the outliers go, the original stays as it was."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqviz.errors import NonFinite, NoSuchLayer, SqvizError
from sqviz.models.linears import groups, weight
from sqviz.models.tiny import TINY, tiny
from sqviz.observe.capture import capture
from sqviz.quant.alpha import search_alpha
from sqviz.quant.equivalence import logits, probe
from sqviz.quant.plan import FOLDS
from sqviz.quant.schemes import W8A8
from sqviz.quant.smooth import smooth, smoothing_scale

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
NO_ENTRY_FOLD = ("OPTForCausalLM/post-ln", "BloomForCausalLM/post-residual", "Olmo2ForCausalLM")


def needs_online(name: str) -> bool:
    return name in NO_ENTRY_FOLD


def change(before, after) -> float:
    """max|Δ logits| / max|logits|, as the requirement has it."""
    expected, got = logits(before.model, probe(before)), logits(after.model, probe(before))
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", TINY)
def test_logits_stay_the_same(name: str, dtype: torch.dtype, record):
    lm = tiny(name, dtype=dtype)
    magnitudes, limit = record(tiny(name)), {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    for folds in FOLDS:
        for alpha in ALPHAS:
            after = smooth(lm, magnitudes, alpha, folds=folds, online=needs_online(name), check=False)
            assert change(lm, after) < limit, (folds, alpha)
            assert all(((s - 1).abs() > 0.01).any() for s in after.scales.values())
            assert len(after.scales) >= 4
            assert after.dtype == dtype


@pytest.mark.parametrize("name", TINY)
def test_inputs_are_divided_by_s_and_outliers_fall(name: str, record):
    """Seen from outside: what reaches each linear is X/s, for the s that `scales` tells."""
    lm = tiny(name)
    before = record(lm)
    after = smooth(lm, before, 0.5, folds="all", online=needs_online(name))
    smoothed = record(after)
    for group in groups(lm):
        x, seen = before.absmax(group.name), smoothed.absmax(group.name)
        s = smoothed.scales.get(group.name, torch.ones_like(x))
        torch.testing.assert_close(seen * s, x, rtol=1e-3, atol=1e-5)
        if group.fold is None:
            assert torch.equal(s, torch.ones_like(s))
        else:
            # a tied channel's x may be smaller than the maximum of its tie that s was made for
            assert seen.max() / seen.median() < 0.5 * x.max() / x.median(), group.name


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "GPTJForCausalLM", "DeepseekV2ForCausalLM"])
def test_s_is_the_formula_of_the_thesis(name: str, record):
    """Norm folds alone: every column of every consumer was multiplied by max|X|^α / max|W|^(1−α)."""
    lm, alpha = tiny(name, dtype=torch.float64), 0.7
    magnitudes = record(tiny(name))
    after = smooth(lm, magnitudes, alpha)
    for group in groups(lm):
        if group.fold_kind != "norm":
            assert group.name not in after.scales
            continue
        x = magnitudes.absmax(group.name)
        for channel in range(0, len(x), 5):
            w = max(float(weight(lm, consumer)[:, channel].detach().abs().max()) for consumer in group.consumers)
            s = float(x[channel]) ** alpha / w ** (1 - alpha)
            assert float(after.scales[group.name][channel]) == pytest.approx(s, rel=1e-9)
            for consumer in group.consumers:
                old, new = (weight(m, consumer).detach()[:, channel] for m in (lm, after))
                torch.testing.assert_close(new, old * s, rtol=1e-9, atol=0)


def test_alpha_1_levels_the_activations_and_alpha_0_the_weights(record):
    lm = tiny("LlamaForCausalLM")
    magnitudes = record(lm)
    level = record(smooth(lm, magnitudes, 1.0)).absmax("model.layers.1.self_attn.q_proj")
    torch.testing.assert_close(level, torch.ones(48), rtol=1e-4, atol=0)
    after = smooth(lm, magnitudes, 0.0)
    columns = torch.stack([weight(after, n).detach().abs().amax(0) for n in groups(lm)[0].consumers]).amax(0)
    torch.testing.assert_close(columns, torch.ones(48), rtol=1e-4, atol=0)


def test_query_heads_that_share_a_value_head_share_s(record):
    lm = tiny("LlamaForCausalLM")  # 6 query heads of 8 channels, 2 value heads
    magnitudes = record(lm)
    s = smooth(lm, magnitudes, 0.5, folds="all").scales["model.layers.0.self_attn.o_proj"].view(2, 3, 8)
    assert torch.equal(s, s[:, :1].expand_as(s))
    x = magnitudes.absmax("model.layers.0.self_attn.o_proj").view(2, 3, 8).amax(1)
    w = weight(lm, "model.layers.0.self_attn.o_proj").detach().abs().amax(0).view(2, 3, 8).amax(1)
    torch.testing.assert_close(s[:, 0], x.sqrt() / w.sqrt())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "DeepseekV2ForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"])
def test_folds_of_outliers_divide_what_stands_out_and_nothing_else(name: str, record):
    """Channel by channel: max(1, s / the middle s) of the fold's own experts; what feeds it never grows."""
    lm, magnitudes = tiny(name, dtype=torch.float64), record(tiny(name))
    whole, after = (smooth(lm, magnitudes, 0.5, folds=folds) for folds in ("all", "outliers"))
    seen = 0
    for group in groups(lm):
        if group.fold_kind != "linear":
            continue
        got, s = (m.scales[group.name].view(-1, m.scales[group.name].shape[-1]).tolist() for m in (after, whole))
        for mine, full in zip(got, s, strict=True):
            middle = sorted(full)[(len(full) - 1) // 2]
            assert mine == pytest.approx([max(1.0, one / middle) for one in full], rel=1e-6)
            seen += sum(one > 1 for one in mine)
    assert seen
    for group in groups(lm):
        if group.fold_kind == "linear":
            alone = smooth(lm, magnitudes, dict.fromkeys(group.consumers, 0.5), folds="outliers")
            old, new = (weight(m, group.fold.path).detach().abs().sum(1) for m in (lm, alone))
            assert (new <= old * (1 + 1e-12)).all()
            assert (new < old * 0.999).any()


def test_a_channel_that_never_fires_is_no_outlier(record):
    """The folds of outliers leave it alone, and it does not shift the middle; a linear that never fires is left."""
    lm = tiny("LlamaForCausalLM")
    magnitudes = record(lm)
    some, all_of_it = (f"model.layers.{block}.mlp.down_proj" for block in (0, 1))
    dead = len(magnitudes.found[some]) * 3 // 4
    magnitudes.found[some][:dead] = 0
    magnitudes.found[all_of_it][:] = 0
    scales = smooth(lm, magnitudes, 0.5, folds="outliers").scales
    assert (scales[some][:dead] == 1).all()
    assert 0.4 < (scales[some][dead:] > 1).float().mean() < 0.6
    assert (scales[all_of_it] == 1).all()


def test_norm_folds_balance_the_weights_that_linear_folds_left(record):
    """v_proj's rows are divided first, so max|X/s| = max|sW| per channel holds in the result (α = 0.5)."""
    lm = tiny("LlamaForCausalLM", dtype=torch.float64)
    after = smooth(lm, record(tiny("LlamaForCausalLM")), 0.5, folds="all")
    x = record(tiny("LlamaForCausalLM")).absmax(groups(lm)[0].name) / after.scales[groups(lm)[0].name]
    w = torch.stack([weight(after, name).detach().abs().amax(0) for name in groups(lm)[0].consumers]).amax(0)
    torch.testing.assert_close(x, w, rtol=1e-6, atol=0)


def test_the_original_is_untouched(record):
    lm = tiny("LlamaForCausalLM/tied-bias")
    magnitudes = record(lm)
    tensors = {key: (value.data_ptr(), value.clone()) for key, value in lm.model.state_dict().items()}
    attributes = {name: {**vars(module)} for name, module in lm.model.named_modules()}
    config = lm.model.config.to_dict()
    smooth(lm, magnitudes, 0.5, folds="all")
    for key, value in lm.model.state_dict().items():
        assert value.data_ptr() == tensors[key][0]
        assert torch.equal(value, tensors[key][1])
    for name, module in lm.model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert type(module) is type(lm.model.get_submodule(name))
    assert lm.model.config.to_dict() == config
    assert lm.scales == {}
    assert lm.note == ""


def test_what_does_not_change_is_shared_and_ties_stay(record):
    lm = tiny("LlamaForCausalLM/tied-bias")
    after = smooth(lm, record(lm), 0.5)
    old, new = dict(lm.model.named_parameters()), dict(after.model.named_parameters())
    changed = {name for name in old if new[name] is not old[name]}
    assert changed == {
        f"model.layers.{block}.{path}"
        for block in (0, 1)
        for path in (
            *(f"self_attn.{kind}_proj.weight" for kind in "qkv"),
            *(f"mlp.{kind}_proj.weight" for kind in ("gate", "up")),
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
        )
    }
    assert after.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
    assert after.note == "smoothed α=0.5"
    assert "smoothed α=0.5" in repr(after)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["OPTForCausalLM", "LlamaForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM"])
def test_half_precision_keeps_dtype_and_passes_its_check(name: str, dtype: torch.dtype, record):
    lm = tiny(name, dtype=dtype)
    after = smooth(lm, record(lm), 0.5, folds="all")
    assert {parameter.dtype for parameter in after.model.parameters()} == {dtype}
    assert {s.dtype for s in after.scales.values()} == {torch.float32}


def test_smoothing_again_starts_from_where_the_model_is(record):
    """From a capture of the smoothed model, or of the original: the same inputs, so the same result."""
    lm = tiny("LlamaForCausalLM")
    magnitudes = record(lm)
    once = smooth(lm, magnitudes, 0.5)
    from_new, from_old = smooth(once, record(once), 0.8), smooth(once, magnitudes, 0.8)
    directly = smooth(lm, magnitudes, 0.8)
    name = "model.layers.1.mlp.gate_proj"
    torch.testing.assert_close(from_new.scales[name], from_old.scales[name], rtol=1e-4, atol=0)
    torch.testing.assert_close(from_new.scales[name], directly.scales[name], rtol=1e-4, atol=0)  # eq. 3.4 forgets s
    assert not torch.allclose(from_new.scales[name], once.scales[name], rtol=1e-2)
    assert change(lm, from_new) < 1e-5
    assert from_new.note == "smoothed α=0.5, smoothed α=0.8"


def test_a_capture_of_the_smoothed_model_serves_the_original(record):
    lm = tiny("LlamaForCausalLM")
    magnitudes = record(lm)
    late = record(smooth(lm, magnitudes, 0.3))
    for name, s in smooth(lm, late, 0.6).scales.items():
        torch.testing.assert_close(s, smooth(lm, magnitudes, 0.6).scales[name], rtol=1e-4, atol=0)


def test_dead_channels_are_left_alone(record):
    lm = tiny("LlamaForCausalLM")
    magnitudes = record(lm)
    name = "model.layers.0.self_attn.q_proj"
    magnitudes.found[name][[3, 11]] = 0
    s = smooth(lm, magnitudes, 0.5).scales[name]
    assert s[[3, 11]].tolist() == [1, 1]
    assert (s[[0, 4]] != 1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_maxima_are_refused(value: float, record):
    lm = tiny("LlamaForCausalLM")
    magnitudes = record(lm)
    magnitudes.found["model.layers.1.mlp.gate_proj"][7] = value
    with pytest.raises(NonFinite, match=r"'model\.layers\.1\.mlp\.gate_proj' is (nan|inf) in channel 7"):
        smooth(lm, magnitudes, 0.5)


def test_a_capture_of_another_model_is_refused(record):
    lm, other = tiny("LlamaForCausalLM"), record(tiny("LlamaForCausalLM", hidden_size=96, head_dim=8))
    with pytest.raises(SqvizError, match=r"q_proj' have shape \(96,\), its input has \(48,\)"):
        smooth(lm, other, 0.5)
    with pytest.raises(NoSuchLayer, match=r"hold nothing for 'model\.layers\.0\.self_attn\.q_proj'"):
        smooth(lm, record(tiny("OPTForCausalLM")), 0.5)


def test_experts_may_share_one_recorded_maximum(record):
    """A recorder that cannot tell experts apart gives [channel]; s is per expert all the same, by their weights."""
    lm = tiny("MixtralForCausalLM")
    magnitudes, name = record(lm), "model.layers.0.mlp.experts.down_proj"
    magnitudes.found[name] = magnitudes.found[name].amax(0)
    after = smooth(lm, magnitudes, 0.5, folds="all")
    assert after.scales[name].shape == (5, 24)
    assert change(lm, after) < 1e-5


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.lists(
        st.tuples(*[st.one_of(st.just(0.0), st.floats(2.0**-100, 2.0**100, width=32))] * 2), min_size=1, max_size=8
    ),
    st.floats(0, 1),
)
def test_smoothing_scale_against_an_obvious_loop(pairs: list[tuple[float, float]], alpha: float):
    expected = [1.0 if x == 0 or w == 0 else min(max(x**alpha / w ** (1 - alpha), 1e-5), 1e5) for x, w in pairs]
    x, w = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    got = smoothing_scale(x, w, alpha)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)


def test_strengths_that_were_found_bring_their_folds():
    """Half of what a search over all folds finds is for folds into linears: it is not left out in silence."""
    lm = tiny("LlamaForCausalLM")
    tokens = torch.randint(3, 131, (400,), generator=torch.Generator().manual_seed(2))
    m = capture(lm, tokens, samples=8, length=40, progress=False)
    found = {folds: search_alpha(lm, m, W8A8, "layer", folds=folds, progress=False) for folds in ("all", "norm")}
    for folds, alpha in found.items():
        by_itself, asked = smooth(lm, m, alpha), smooth(lm, m, alpha, folds=folds)
        assert by_itself.scales.keys() == {
            name for group in groups(lm) if alpha.alphas[group.name] is not None for name in group.consumers
        }
        assert all(torch.equal(by_itself.scales[name], asked.scales[name]) for name in asked.scales)
    with pytest.raises(SqvizError, match=r"folds=.norm.: these strengths were found with folds=.all.* Leave"):
        smooth(lm, m, found["all"], folds="norm")
    assert smooth(lm, m, 0.5).scales.keys() == smooth(lm, m, 0.5, folds="norm").scales.keys()
    assert smooth(lm, m, "auto", scheme=W8A8).history[0]["folds"] == "outliers"

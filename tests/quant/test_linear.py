"""Simulated models against the same model with naive fake quantisation hung onto every linear by hooks."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sqviz.errors import Cancelled, NonFinite, NoSuchLayer, SqvizError
from sqviz.models.linears import experts, groups, linear_names, weight
from sqviz.models.tiny import TINY, tiny
from sqviz.observe.hooks import watch
from sqviz.progress import CancelToken
from sqviz.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from sqviz.quant.linear import is_router, quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA, SMOOTHQUANT_O1, SMOOTHQUANT_O3, W8A8, ZEROQUANT, Scheme
from sqviz.quant.simulated import SimulatedExperts, SimulatedLinear
from sqviz.quant.smooth import smooth

IDS = torch.randint(3, 131, (1, 40), generator=torch.Generator().manual_seed(5))
DENSE = [name for name in TINY if not name.startswith(("Mixtral", "Deepseek"))]
PER_CHANNEL = Scheme(PerTensor(), PerChannel(), static=True)
MIXTURES = [name for name in TINY if name.startswith(("Mixtral", "Deepseek"))]


def logits(lm, ids=IDS):
    with torch.no_grad():
        return lm.model(input_ids=ids, use_cache=False).logits


def naive(x, dims, bits=8):
    step = x.abs().amax(dims, keepdim=True) / (2 ** (bits - 1) - 1)
    return torch.where(step > 0, (x / step).round() * step, 0.0)


def hooked(lm, weight_dims, per_token, names=None):
    """A copy of the model, every linear of its blocks faked in the most obvious way."""
    model = copy.deepcopy(lm.model)
    for name in linear_names(lm) if names is None else names:
        module = model.get_submodule(name)
        dims = weight_dims if isinstance(module, nn.Linear) or weight_dims == (0, 1) else (0,)  # Conv1D: [channel out]
        module.weight = nn.Parameter(naive(module.weight.detach(), dims))
        module.register_forward_pre_hook(
            lambda _, args: (naive(args[0], (-1,) if per_token else tuple(range(args[0].ndim))), *args[1:])
        )
    return SimpleNamespace(model=model)


def extremes(lm, ids=IDS):
    """A stand-in for `capture`: minimum and maximum per channel of every linear's input."""
    inputs = {}

    def look(group, x):
        stats = SimpleNamespace(
            minimum=x.amin(0), maximum=x.amax(0), absmax=x.abs().amax(0), expert_absmax=None, expert_tokens=None
        )
        inputs.update(dict.fromkeys(group.consumers, stats))

    def look_inside(group, x, routing):
        count = experts(lm, group.name)
        each = torch.stack([x[routing.expert == e].abs().sum(0) * 0 for e in range(count)])
        for e in range(count):
            if (routing.expert == e).any():
                each[e] = x[routing.expert == e].abs().amax(0)
        look(group, x)
        stats = inputs[group.name]
        stats.expert_absmax, stats.expert_tokens = each, routing.expert.bincount(minlength=count)

    with watch(lm, look, routed=look_inside):
        logits(lm, ids)
    return SimpleNamespace(inputs=inputs, scales=dict(lm.scales), model="stand-in", absmax=lambda n: inputs[n].absmax)


@pytest.mark.parametrize("name", DENSE)
def test_equals_naive_fake_quantisation(name):
    lm = tiny(name)
    assert torch.equal(logits(quantize(lm, W8A8)), logits(hooked(lm, (0, 1), False)))
    per_token = quantize(lm, SMOOTHQUANT_LLAMA)
    assert torch.equal(logits(per_token), logits(hooked(lm, (1,), True)))
    assert not torch.equal(logits(per_token), logits(lm))


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *(
            (name, scheme)
            for name in ("LlamaForCausalLM", "GPT2LMHeadModel")
            for scheme in (ZEROQUANT, Scheme(None, PerChannel()), Scheme(PerChannel(), None, bits=3))
        ),
        ("MixtralForCausalLM", Scheme(PerGroup(8), PerGroup(6), bits=6, weight_bits=4, symmetric=False)),
    ],
)
def test_every_kind_of_scheme_runs_and_is_near_at_eight_bits(name, scheme):
    lm = tiny(name)
    eight = quantize(lm, scheme.replace(bits=8, weight_bits=8))
    error = float((logits(eight) - logits(lm)).norm() / logits(lm).norm())
    assert 0 < error < 0.5
    assert not torch.equal(logits(quantize(lm, scheme)), logits(eight)) or scheme.bits == scheme.bits_of_weights == 8


@pytest.mark.parametrize("field", ["weight", "activation"])
def test_groups_that_leave_channels_over_are_refused(field):
    """Of 48 channels and, in the experts, 24."""
    lm = tiny("MixtralForCausalLM")
    scheme = Scheme(**{"weight": PerChannel(), "activation": PerToken(), field: PerGroup(16)})
    with pytest.raises(SqvizError, match=r"leaves 8 of the 24 channels of .*: groups of 2, 3, 4, 6, 8, 12, 24 divide"):
        quantize(lm, scheme)
    for size in (12, 24, 48, 64):  # 48 and 64: a whole row of the experts is one group
        quantize(lm, scheme.replace(**{field: PerGroup(size)}))
    with pytest.raises(SqvizError, match="no size divides all"):
        quantize(tiny("LlamaForCausalLM"), scheme)
    quantize(tiny("LlamaForCausalLM"), scheme, skip="*.down_proj")


def test_a_model_without_activation_scheme_keeps_its_weights_shared():
    lm = tiny("LlamaForCausalLM")
    q = quantize(lm, Scheme(None, PerToken()))
    for name in linear_names(lm):
        assert weight(q, name).data_ptr() == weight(lm, name).data_ptr()


@pytest.mark.parametrize(
    "name", ["LlamaForCausalLM/tied-bias", "GPT2LMHeadModel", "MixtralForCausalLM", "OPTForCausalLM"]
)
def test_the_original_is_untouched_and_unchanged_tensors_are_shared(name):
    lm = tiny(name)
    before = {key: tensor.clone() for key, tensor in lm.model.state_dict().items()}
    modules = {key: (type(module), len(module._forward_pre_hooks)) for key, module in lm.model.named_modules()}
    first = logits(lm)
    q = quantize(lm, W8A8)
    logits(q)
    assert {key: (type(module), len(module._forward_pre_hooks)) for key, module in lm.model.named_modules()} == modules
    assert lm.model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in lm.model.state_dict().items())
    assert torch.equal(logits(lm), first)
    changed = {f"{n}.weight" for n in linear_names(lm)} | set(linear_names(lm))
    old, new = dict(lm.model.named_parameters()), dict(q.model.named_parameters())
    routers = {f"{n}.weight" for g in groups(lm) for n in g.consumers if is_router(lm, g, n)}
    for key in old.keys() & new.keys():
        assert (old[key].data_ptr() == new[key].data_ptr()) == (key not in changed or key in routers), key
    assert q.scales is lm.scales
    assert "W8 per-tensor, A8 per-tensor" in repr(q)


def test_embeddings_and_head_are_left_alone():
    lm = tiny("LlamaForCausalLM")
    q = quantize(lm, W8A8)
    assert type(q.model.lm_head) is nn.Linear
    assert q.model.lm_head.weight is lm.model.lm_head.weight
    assert sum(isinstance(module, SimulatedLinear) for module in q.model.modules()) == len(linear_names(lm)) == 14


def test_skip_by_pattern():
    lm = tiny("LlamaForCausalLM")
    q = quantize(lm, W8A8, skip=["*.down_proj", "model.layers.0.*"])
    kept = {name for name in linear_names(lm) if type(q.model.get_submodule(name)) is nn.Linear}
    assert kept == {n for n in linear_names(lm) if n.endswith("down_proj") or ".0." in n}
    rest = [name for name in linear_names(lm) if name not in kept]
    assert torch.equal(logits(q), logits(hooked(lm, (0, 1), False, rest)))
    assert torch.equal(logits(quantize(lm, W8A8, skip="*")), logits(lm))
    with pytest.raises(NoSuchLayer, match=r"down_prj.*down_proj"):
        quantize(lm, W8A8, skip="*.down_prj")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    lm = tiny("LlamaForCausalLM", dtype=dtype)
    q = quantize(lm, SMOOTHQUANT_O1)
    assert {p.dtype for p in q.model.parameters()} == {dtype}
    assert logits(q).dtype == dtype
    error = float((logits(q) - logits(lm)).double().norm() / logits(lm).double().norm())
    assert error < 1


def test_generate():
    lm = tiny("LlamaForCausalLM")
    q = quantize(lm, SMOOTHQUANT_LLAMA)
    arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = q.model.generate(IDS, **arguments)
    ids = IDS
    for _ in range(5):  # per-token steps do not depend on what else is in the pass
        ids = torch.cat([ids, logits(q, ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, ids)


# --- static steps and smoothing ---


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        *((name, scheme) for name in ("LlamaForCausalLM", *MIXTURES) for scheme in (SMOOTHQUANT_O3, PER_CHANNEL)),
        ("OPTForCausalLM", SMOOTHQUANT_O3.replace(symmetric=False)),
        ("LlamaForCausalLM", PER_CHANNEL.replace(symmetric=False)),
    ],
)
def test_static_steps_follow_the_smoothing(name, scheme):
    lm = tiny(name)
    before = extremes(lm)
    smoothed = smooth(lm, before, 0.6, folds="all")
    derived = quantize(smoothed, scheme, before)  # captured before smoothing, folded since
    direct = quantize(smoothed, scheme, extremes(smoothed))  # captured from the smoothed model
    steps = [
        {key: buffer for key, buffer in q.model.named_buffers() if key.rpartition(".")[2] in ("step", "zero")}
        for q in (derived, direct)
    ]
    assert steps[0].keys() == steps[1].keys() != set()
    for key, step in steps[0].items():
        tolerance = {"rtol": 2e-3, "atol": 1e-7} if key.endswith("step") else {"rtol": 0, "atol": 1}
        torch.testing.assert_close(step, steps[1][key], **tolerance)


def test_static_steps_of_an_unsmoothed_model_from_a_smoothed_capture():
    lm = tiny("LlamaForCausalLM")
    smoothed = smooth(lm, extremes(lm), 0.5)
    back = quantize(lm, SMOOTHQUANT_O3, extremes(smoothed)).model
    straight = quantize(lm, SMOOTHQUANT_O3, extremes(lm)).model
    name = linear_names(lm)[0]
    step, expected = (model.get_submodule(name).quantizer.step for model in (back, straight))
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=0)


def test_static_on_the_calibration_tokens_is_dynamic_in_the_first_linear():
    lm = tiny("LlamaForCausalLM")
    seen = []
    for q in (quantize(lm, W8A8), quantize(lm, SMOOTHQUANT_O3, extremes(lm))):
        module = q.model.get_submodule("model.layers.0.self_attn.q_proj")
        module.quantizer.register_forward_hook(lambda _, __, out: seen.append(out))
        logits(q)
    assert torch.equal(*seen)


def test_static_values_beyond_calibration_saturate():
    lm = tiny("LlamaForCausalLM")
    q = quantize(lm, SMOOTHQUANT_O3, extremes(lm)).model.get_submodule("model.layers.0.self_attn.q_proj").quantizer
    x = torch.full((1, 48), 1e6)
    assert torch.equal(q(x), torch.full((1, 48), 127.0) * q.step)


def test_static_needs_the_right_magnitudes():
    lm = tiny("LlamaForCausalLM")
    with pytest.raises(SqvizError, match=r"is static.*sqviz\.capture\(lm, text\).*static=False"):
        quantize(lm, SMOOTHQUANT_O3)
    other = extremes(tiny("LlamaForCausalLM", hidden_size=36))
    with pytest.raises(SqvizError, match=r"stand-in hold 36 channels for .*q_proj, which has 48"):
        quantize(lm, SMOOTHQUANT_O3, other)
    with pytest.raises(SqvizError, match=r"stand-in hold nothing for .*another model"):
        quantize(lm, SMOOTHQUANT_O3, extremes(tiny("OPTForCausalLM")))


def test_online_scaling_is_part_of_the_simulation():
    lm = tiny("Olmo2ForCausalLM")
    seen = extremes(lm)
    smoothed = smooth(lm, seen, 0.5, online=True)
    q = quantize(smoothed, W8A8)
    name = "model.layers.0.self_attn.q_proj"
    module, scaled = q.model.get_submodule(name), smoothed.model.get_submodule(name)
    x = torch.randn(1, 9, 48)
    expected = naive(x / scaled.input_scale, (0, 1, 2)) @ naive(scaled.weight.detach(), (0, 1)).T
    torch.testing.assert_close(module(x), expected)
    static = quantize(smoothed, SMOOTHQUANT_O3, seen).model.get_submodule(name).quantizer.step
    torch.testing.assert_close(static.max(), (seen.absmax(name) / scaled.input_scale).max() / 127)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "OPTForCausalLM", "MixtralForCausalLM"])
def test_smoothing_repairs_planted_outliers(name):
    lm = tiny(name)
    smoothed = smooth(lm, extremes(lm), 0.5, folds="all")
    naively, repaired = (float((logits(quantize(m, W8A8)) - logits(lm)).norm()) for m in (lm, smoothed))
    assert repaired < naively / 2


def test_only_per_channel_activations_survive_outliers():
    """Thesis Table 3.1."""
    lm = tiny("OPTForCausalLM")
    error = {
        kind: float((logits(quantize(lm, Scheme(None, kind()))) - logits(lm)).norm())
        for kind in (PerTensor, PerToken, PerChannel)
    }
    assert error[PerChannel] < error[PerToken] / 4 < error[PerTensor] / 4


# --- mixtures of experts ---


@pytest.mark.parametrize("name", MIXTURES)
def test_routers_stay_and_everything_else_is_simulated(name):
    lm = tiny(name)
    q = quantize(lm, SMOOTHQUANT_LLAMA)
    for group in groups(lm):
        for linear in group.consumers:
            parent = q.model.get_submodule(linear.rpartition(".")[0])
            if linear.endswith("mlp.gate"):
                assert is_router(lm, group, linear)
                assert weight(q, linear).data_ptr() == weight(lm, linear).data_ptr()
            elif experts(lm, linear):
                assert isinstance(parent, SimulatedExperts)
                assert not is_router(lm, group, linear)
            else:
                assert isinstance(q.model.get_submodule(linear), SimulatedLinear)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_equal_a_loop_over_tokens(name):
    lm = tiny(name)
    path = next(n for n in linear_names(lm) if n.endswith("experts.down_proj")).rpartition(".")[0]
    original = lm.model.get_submodule(path)
    hidden = torch.randn(23, 48)
    choice = torch.stack([torch.randperm(5)[:2] for _ in range(23)])
    share = torch.rand(23, 2)
    exact = quantize(lm, Scheme(PerChannel(), None)).model.get_submodule(path)
    quantized = quantize(lm, SMOOTHQUANT_LLAMA).model.get_submodule(path)
    up = torch.stack([naive(w.detach(), (1,)) for w in original.gate_up_proj])
    down = torch.stack([naive(w.detach(), (1,)) for w in original.down_proj])
    for module, fake in ((exact, lambda x: x), (quantized, lambda x: naive(x, (-1,)))):
        expected = torch.zeros_like(hidden)
        for t in range(23):
            for slot in range(2):
                e = int(choice[t, slot])
                gate, value = (up[e] @ fake(hidden[t])).chunk(2)
                expected[t] += share[t, slot] * (down[e] @ fake(original.act_fn(gate) * value))
        torch.testing.assert_close(module(hidden, choice, share), expected, rtol=1e-3, atol=1e-3)


def test_experts_can_be_skipped_in_part():
    lm = tiny("MixtralForCausalLM")
    path = "model.layers.0.mlp.experts"
    only_up = quantize(lm, W8A8, skip="*.experts.down_proj").model.get_submodule(path)
    assert only_up.inner is None
    assert only_up.down_proj.data_ptr() == lm.model.get_submodule(path).down_proj.data_ptr()
    only_down = quantize(lm, W8A8, skip="*.experts.gate_up_proj").model.get_submodule(path)
    assert only_down.outer is None
    assert len(only_down.inner) == 5
    none = quantize(lm, W8A8, skip="*.experts.*").model.get_submodule(path)
    assert type(none) is type(lm.model.get_submodule(path))
    whole = quantize(lm, Scheme(PerTensor(), None)).model.get_submodule(path)
    for e in range(5):  # every expert has a step of its own
        assert torch.equal(whole.down_proj[e], naive(lm.model.get_submodule(path).down_proj[e].detach(), (0, 1)))


def test_an_expert_that_calibration_never_used_has_a_step():
    lm = tiny("MixtralForCausalLM")
    m = extremes(lm)
    name = "model.layers.0.mlp.experts.down_proj"
    stats = m.inputs[name]
    stats.expert_absmax[3], stats.expert_tokens[3] = 0, 0
    inner = quantize(lm, SMOOTHQUANT_O3, m).model.get_submodule("model.layers.0.mlp.experts").inner
    assert float(inner[3].step) == pytest.approx(float(stats.absmax.max()) / 127)
    assert float(inner[0].step) == pytest.approx(float(stats.expert_absmax[0].max()) / 127)


# --- bad input ---


def test_what_cannot_be_quantised_is_said():
    lm = tiny("LlamaForCausalLM")
    with pytest.raises(SqvizError, match=r"backend='cutlass'.*'simulate'"):
        quantize(lm, W8A8, backend="cutlass")
    with pytest.raises(SqvizError, match=r"scheme='W8A8'.*sqviz\.Scheme"):
        quantize(lm, "W8A8")
    with pytest.raises(SqvizError, match=r"q_proj is quantised already"):
        quantize(quantize(lm, W8A8), W8A8)

    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    odd = Odd(48, 48, bias=False)
    lm.model.get_submodule("model.layers.1.self_attn").q_proj = odd
    with pytest.raises(SqvizError, match=r"layers\.1\.self_attn\.q_proj is a Odd.*skip="):
        quantize(lm, W8A8)
    assert quantize(lm, W8A8, skip="*.1.self_attn.q_proj").model.get_submodule("model.layers.1.self_attn.q_proj")


def test_cancel():
    lm = tiny("LlamaForCausalLM")
    cancel = CancelToken()
    cancel.cancel()
    with pytest.raises(Cancelled):
        quantize(lm, W8A8, cancel=cancel)
    assert not any(isinstance(module, SimulatedLinear) for module in lm.model.modules())


def test_non_finite_weights_and_activations_name_the_linear():
    lm = tiny("LlamaForCausalLM")
    q = quantize(lm, W8A8)
    with torch.no_grad():
        lm.model.get_submodule("model.layers.1.mlp.up_proj").weight[2, 3] = torch.nan
    with pytest.raises(NonFinite, match=r"the weight of model\.layers\.1\.mlp\.up_proj"):
        quantize(lm, W8A8)
    with pytest.raises(NonFinite, match=r"the input of model\.layers\.1\.mlp\.down_proj"):
        q.model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = torch.inf
        logits(q)

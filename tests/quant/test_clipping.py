"""Ranges cut off: the share with the least error against a loop over tokens, quantiles against sorted values."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sqviz
from sqviz.errors import SqvizError
from sqviz.models.linears import groups, weight
from sqviz.models.tiny import tiny
from sqviz.observe.hooks import activations
from sqviz.quant.clipping import HOPELESS, SHARES, ClipTokens, ClipValues, LeastError, activation_clip, weight_clip
from sqviz.quant.error import output_error
from sqviz.quant.granularity import PerChannel, PerTensor
from sqviz.quant.rows import LARGEST, RANDOM, sample_rows

TOKENS = torch.arange(240) * 37 % 131


def obvious_weight_clip(w, rows, per_out: bool):
    """One output after the other, one token after the other, in Python numbers."""
    outs = [[o] for o in range(len(w))] if per_out else [list(range(len(w)))]
    found = []
    for some in outs:
        most = max(abs(float(v)) for o in some for v in w[o])
        errors = []
        for share in SHARES:
            bound = torch.tensor(most) * torch.tensor(share)
            step = bound / 127
            total = 0.0
            for x in rows:
                size = float((w @ x).square().sum()) or 1.0
                for o in some:
                    new = torch.clamp(torch.round(w[o] / step), -127, 127) * step if step > 0 else w[o] * 0
                    total += float((new - w[o]) @ x) ** 2 / size
            errors.append(total / len(rows))
        found.append((most, errors))
    for tried in range(2, len(SHARES)):  # the shares after the one at which all are hopeless are not tried
        if all(errors[tried - 1] > HOPELESS * min(errors[:tried]) for _, errors in found):
            return [(most, errors[:tried]) for most, errors in found]
    return found


@settings(max_examples=25, deadline=None)
@example(1, 6, 1, False, 83)  # given up before the least error of all
@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_the_weight_clip_has_the_least_error(out, channels, rows, per_out, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out, channels, generator=generator) ** 3
    x = torch.randn(rows, channels, generator=generator)
    got = weight_clip(w, x, PerChannel() if per_out else PerTensor())
    for bound, (most, errors) in zip(got.flatten(), obvious_weight_clip(w, x, per_out), strict=True):
        taken = min(range(len(SHARES)), key=lambda k: abs(SHARES[k] * most - float(bound)))
        assert taken < len(errors)
        assert errors[taken] <= min(errors) * 1.001 + 1e-12


def test_an_outlier_that_nothing_reads_is_clipped_and_one_that_is_read_is_not():
    w = torch.randn(8, 16)
    w[3, 5] = 60.0
    idle, busy = torch.randn(40, 16), torch.randn(40, 16)
    idle[:, 5] = 0
    assert float(weight_clip(w, idle, PerTensor())) < 10 < 59 < float(weight_clip(w, busy, PerTensor()))
    assert float(weight_clip(w, idle[:0], PerTensor())) == 60.0


def test_the_activation_clip_has_the_least_error():
    x, w = torch.randn(30, 16), torch.randn(9, 16)
    x[0] *= 40
    most = float(x.abs().max())
    bound = activation_clip(most, x, w)
    errors = {}
    for share in SHARES:
        step = most * share / 127
        new = torch.clamp(torch.round(x / step), -127, 127) * step
        errors[share] = sum(
            float(((n - row) @ w.T).square().sum() / (row @ w.T).square().sum()) for n, row in zip(new, x, strict=True)
        )
    assert bound == pytest.approx(most * min(errors, key=errors.__getitem__), rel=1e-6)
    assert bound < most / 2
    assert activation_clip(0.0, x * 0, w) == 0.0


def test_rows_are_the_largest_and_others_of_each_segment():
    lm = tiny("LlamaForCausalLM")
    segments = TOKENS.view(3, 80)
    rows = sample_rows(lm, segments)
    for group in groups(lm):
        got = rows.of(group)
        assert got.shape == (3 * (LARGEST + RANDOM), weight(lm, group.name).shape[1])
        for segment, some in zip(segments, got.split(LARGEST + RANDOM), strict=True):
            x = activations(lm, segment, [group.name])[group.name]
            heights = x.abs().amax(1).sort(descending=True).values
            torch.testing.assert_close(some[:LARGEST].abs().amax(1), heights[:LARGEST])
            distance = (some[:, None] - x[None]).abs().amax(-1)  # [sampled token]: each is a token, none comes twice
            assert float(distance.amin(1).max()) < 1e-5
            assert len(distance.argmin(1).unique()) == len(some)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV2ForCausalLM"])
def test_experts_have_rows_of_their_own(name):
    lm = tiny(name)
    m = sqviz.capture(lm, TOKENS, length=80, progress=False)
    rows = sample_rows(lm, TOKENS.view(3, 80))
    group = next(g for g in groups(lm) if g.name.endswith("experts.down_proj"))
    tokens = m.inputs[group.name].expert_tokens
    assert [len(rows.of(group, e)) > 0 for e in range(len(tokens))] == [bool(t) for t in tokens]
    for backend in ("simulate", "auto"):
        scheme = sqviz.SMOOTHQUANT_O3.replace(weight_clip=LeastError(), clip=LeastError())
        q = sqviz.quantize(lm, scheme, m, backend=backend)
        assert bool(q.model(TOKENS[None, :40]).logits.isfinite().all())


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3])
def test_clipping_tokens_takes_the_share_with_the_largest_values_out(share):
    lm = tiny("LlamaForCausalLM")
    m = sqviz.capture(lm, TOKENS, length=80, progress=False)
    q = sqviz.quantize(lm, sqviz.SMOOTHQUANT_O3.replace(clip=ClipTokens(share)), m)
    for group in groups(lm):
        heights = torch.cat([activations(lm, s, [group.name])[group.name].abs().amax(1) for s in TOKENS.view(3, 80)])
        kept = heights.sort().values[: len(heights) - int(share * len(heights))]
        step = float(q.model.get_submodule(group.name).quantizer.step)
        assert step == pytest.approx(float(kept.max()) / 127, rel=1e-5)


def test_clipping_values_takes_the_quantile():
    lm = tiny("OPTForCausalLM")
    m = sqviz.capture(lm, TOKENS, length=80, progress=False)
    q = sqviz.quantize(lm, sqviz.SMOOTHQUANT_O3.replace(clip=ClipValues(0.99)), m)
    for group in groups(lm):
        x = torch.cat([activations(lm, s, [group.name])[group.name].abs().flatten() for s in TOKENS.view(3, 80)])
        step = float(q.model.get_submodule(group.name).quantizer.step)
        assert step * 127 == pytest.approx(float(x.quantile(0.99)), rel=0.06)  # quantiles of a capture: within 5 %


def test_quantiles_want_a_second_pass_after_smoothing():
    lm = tiny("LlamaForCausalLM")
    before = sqviz.capture(lm, TOKENS, length=80, progress=False)
    smooth = sqviz.smooth(lm, before, 0.5)
    scheme = sqviz.SMOOTHQUANT_O3.replace(clip=ClipTokens())
    with pytest.raises(SqvizError, match="Capture again"):
        sqviz.quantize(smooth, scheme, before)
    after = sqviz.capture(smooth, TOKENS, length=80, progress=False)
    sqviz.quantize(smooth, scheme, after)
    sqviz.quantize(smooth, scheme.replace(clip=LeastError()), before)  # looks at inputs itself


@pytest.mark.parametrize("backend", ["simulate", "auto"])
def test_weights_are_clipped_the_same_way_in_both_worlds(backend):
    lm = tiny("LlamaForCausalLM")
    m = sqviz.capture(lm, TOKENS, length=80, progress=False)
    scheme = sqviz.SMOOTHQUANT_O1.replace(weight_clip=LeastError())
    q = sqviz.quantize(lm, scheme, m, backend=backend)
    rows = sample_rows(lm, TOKENS.view(3, 80))
    for group in groups(lm):
        for name in group.consumers:
            bound = float(weight_clip(weight(lm, name).detach(), rows.of(group), PerTensor()))
            module = q.model.get_submodule(name)
            if backend == "simulate":
                assert float(module.weight.abs().max()) <= bound * (1 + 1e-6)
            else:
                step = module.product.step[module.start] if len(module.product.step) > 1 else module.product.step
                assert float(step) == pytest.approx(bound / 127, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"clip": ClipTokens()}, "PerTensor"),
        ({"clip": LeastError(), "static": True, "activation": PerChannel()}, "PerTensor"),
        ({"clip": 0.02, "static": True, "activation": PerTensor()}, "ClipTokens"),
        ({"weight_clip": ClipTokens()}, "LeastError"),
        ({"weight_clip": LeastError(), "weight": sqviz.PerGroup(8)}, "PerChannel"),
        ({"weight_clip": LeastError(), "symmetric": False}, "symmetric"),
        ({"outliers": 0}, "above 0"),
        ({"outliers": True}, "above 0"),
        ({"outliers": 6.0, "activation": PerTensor(), "static": True}, "static=False"),
        ({"outliers": 6.0, "weight": None}, "weights"),
    ],
)
def test_schemes_that_contradict_themselves_are_refused(fields, words):
    with pytest.raises(SqvizError, match=words):
        sqviz.Scheme(**fields)


@pytest.mark.parametrize("share", [-0.1, 1.0, True, "2%"])
def test_shares_and_quantiles_are_checked(share):
    with pytest.raises(SqvizError, match="share"):
        ClipTokens(share)
    with pytest.raises(SqvizError, match="quantile"):
        ClipValues(0.98)


@pytest.mark.parametrize("clip", [ClipTokens(0.1), LeastError()])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM"])
def test_a_dynamic_step_follows_the_tensor_up_to_the_clip(name, clip):
    lm = tiny(name)
    m = sqviz.capture(lm, TOKENS, length=80, progress=False)
    scheme = sqviz.SMOOTHQUANT_O2.replace(clip=clip)
    static = sqviz.quantize(lm, scheme.replace(static=True), m)
    q = sqviz.quantize(lm, scheme, m)
    plain = [group.name for group in groups(lm) if not any("experts" in one for one in group.consumers)]
    for path in plain:
        found, bound = (
            q.model.get_submodule(path).quantizer,
            127 * float(static.model.get_submodule(path).quantizer.step),
        )
        assert found.ceiling == pytest.approx(bound, rel=1e-5)
        for size in (0.3, 1.0, 20.0):
            x = size * bound * torch.linspace(-1, 1, 40).view(2, 20)
            step = min(float(x.abs().max()), bound) / 127
            expected = torch.clamp(torch.round(x / step), -127, 127) * step
            assert float((found(x) - expected).abs().max()) <= 1.01 * step  # the same but for ties
            assert float((found(x) - expected).abs().mean()) <= 0.05 * step
    assert bool(q.model(TOKENS[None, :1]).logits.isfinite().all())
    with pytest.raises(SqvizError, match="simulate"):
        sqviz.quantize(lm, scheme, m, backend="auto")


def test_without_magnitudes_the_error_says_what_to_do():
    lm = tiny("LlamaForCausalLM")
    dynamic = sqviz.SMOOTHQUANT_O2.replace(clip=LeastError())
    for scheme in (sqviz.SMOOTHQUANT_O3, sqviz.SMOOTHQUANT_O1.replace(weight_clip=LeastError()), dynamic):
        with pytest.raises(SqvizError, match=r"sqviz\.capture"):
            sqviz.quantize(lm, scheme)


def test_error_curves_refuse_what_they_do_not_know():
    with pytest.raises(SqvizError, match="clip=None"):
        output_error(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), sqviz.LLM_INT8)

"""A capture against the obvious: all inputs of all linears kept in a list, and numpy on the whole."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sqviz.errors import Cancelled, NonFinite, NoTokenizer, SqvizError, TextTooShort
from sqviz.models.linears import experts, groups, linear_names, weight
from sqviz.models.lm import LM
from sqviz.models.tiny import TINY, tiny
from sqviz.observe.capture import WEIGHT_BINS, capture, weight_stats, with_maps
from sqviz.observe.hooks import activations
from sqviz.observe.magnitudes import QUANTILES, InputStats, Magnitudes
from sqviz.progress import CancelToken

SAMPLES, LENGTH = 3, 9
MIXTURES = ("MixtralForCausalLM", "DeepseekV2ForCausalLM")


def stream(lm: LM, count: int = SAMPLES * LENGTH) -> Tensor:
    return torch.randint(3, lm.config.vocab_size, (count,), generator=torch.Generator().manual_seed(1))


def small(lm: LM, **options: object) -> Magnitudes:
    return capture(lm, stream(lm), length=LENGTH, progress=False, **options)  # type: ignore[arg-type]


def naive(lm: LM) -> dict[str, np.ndarray]:
    """All inputs, [row channel] by group, kept whole."""
    names = [group.name for group in groups(lm)]
    passes = [activations(lm, segment, names) for segment in stream(lm).view(-1, LENGTH)]
    return {name: np.concatenate([seen[name].numpy() for seen in passes]) for name in names}


def pooled(magnitude: np.ndarray, bins: int) -> np.ndarray:
    run = -(-len(magnitude) // bins)
    return np.stack([magnitude[start : start + run].max(0) for start in range(0, len(magnitude), run)])


@pytest.mark.parametrize("architecture", TINY)
def test_every_architecture_against_keeping_everything(architecture: str) -> None:
    lm = tiny(architecture)
    m = small(lm, map_tokens=4)
    assert m.names == linear_names(lm)
    assert m.samples == SAMPLES
    for name, x in naive(lm).items():
        stats, magnitude = m.inputs[name], np.abs(x)
        close = {"rtol": 1e-4, "atol": 1e-6}
        np.testing.assert_allclose(stats.minimum, x.min(0), **close)
        np.testing.assert_allclose(stats.maximum, x.max(0), **close)
        np.testing.assert_allclose(stats.absmax, magnitude.max(0), **close)
        np.testing.assert_allclose(stats.mean, magnitude.mean(0), **close)
        if stats.expert_absmax is None:
            np.testing.assert_allclose(stats.token_absmax, magnitude.max(1), **close)
            held = magnitude[stats.channel_token, np.arange(x.shape[1])]
            np.testing.assert_allclose(held, magnitude.max(0), **close)
            np.testing.assert_allclose(stats.map.float(), pooled(magnitude[:LENGTH], 4), rtol=2e-3, atol=1e-4)
        exact = np.quantile(magnitude, QUANTILES, axis=0, method="inverted_cdf")
        seen = exact > 1e-5
        np.testing.assert_allclose(stats.quantiles.numpy()[seen], exact[seen], rtol=0.051)
        assert (stats.quantiles <= stats.absmax).all()
    for name in m.names:
        w = weight(lm, name).detach().abs().numpy()
        np.testing.assert_array_equal(m.weights[name].channel_absmax, w.max(0))
        np.testing.assert_array_equal(m.weights[name].out_absmax, w.max(1))


def test_groups_share_one_object_and_fold_with_their_largest_weight() -> None:
    lm = tiny("LlamaForCausalLM")
    m = small(lm)
    for group in groups(lm):
        assert all(m.inputs[name] is m.inputs[group.name] for name in group.consumers)
        largest = torch.cat([weight(lm, name) for name in group.consumers]).abs().amax(0)
        for name in group.consumers:
            assert torch.equal(m.fold_weight_absmax(name), largest)
            assert m.group(name).consumers == group.consumers
            assert m.group(name).fold_kind == group.fold_kind


@pytest.mark.parametrize("architecture", MIXTURES)
def test_countare_told_apart(architecture: str) -> None:
    """Inputs of the second linear by the formula, one token and one expert after the other."""
    lm = tiny(architecture)
    m = small(lm)
    group = next(group for group in groups(lm) if group.kind == "mlp.experts.down_proj")
    module = lm.model.get_submodule(group.name.rpartition(".")[0])
    sent: list[tuple[Tensor, ...]] = []
    handle = module.register_forward_pre_hook(lambda _, args: sent.append(args))
    with torch.no_grad():
        for segment in stream(lm).view(-1, LENGTH):
            lm.model(segment[None])
    handle.remove()
    count = experts(lm, group.name)
    absmax = torch.zeros(count, weight(lm, group.name).shape[1])
    tokens, token_absmax = [0] * count, torch.zeros(len(m.tokens))
    for index, (hidden, choice, _) in enumerate(sent):
        for place, chosen in enumerate(choice):
            for expert in chosen.tolist():
                gate, up = (module.gate_up_proj[expert] @ hidden[place]).chunk(2)
                inner = (torch.nn.functional.silu(gate) * up).abs().detach()
                absmax[expert] = torch.maximum(absmax[expert], inner)
                token = index * LENGTH + place
                token_absmax[token] = torch.maximum(token_absmax[token], inner.max())
                tokens[expert] += 1
    stats = m.inputs[group.name]
    assert stats.expert_tokens is not None
    assert stats.expert_tokens.tolist() == tokens
    torch.testing.assert_close(m.absmax(group.name), absmax, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats.token_absmax, token_absmax, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats.map.float().amax(1), token_absmax[:LENGTH], rtol=2e-3, atol=1e-4)
    stacked = weight(lm, group.name).view(count, -1, absmax.shape[1]).abs().amax(1)
    assert torch.equal(m.fold_weight_absmax(group.name), stacked)
    router = m.group("1.mlp.gate").name
    assert m.absmax(router).ndim == m.fold_weight_absmax(router).ndim == 1


def test_an_expert_without_a_token_saw_zeros_and_has_the_maxima_of_all() -> None:
    lm = tiny("MixtralForCausalLM", num_local_experts=24)
    m = capture(lm, stream(lm, 2), samples=1, length=2, progress=False)
    name = "model.layers.0.mlp.experts.down_proj"
    stats = m.inputs[name]
    assert stats.expert_tokens is not None
    idle = stats.expert_tokens == 0
    assert idle.sum() >= 20
    assert stats.expert_absmax is not None
    assert torch.equal(stats.expert_absmax.amax(1) == 0, idle)
    assert m.absmax(name).shape[0] == 24
    assert torch.equal(m.absmax(name)[~idle], stats.expert_absmax[~idle])
    assert (m.absmax(name)[idle] == stats.expert_absmax.amax(0)).all()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"])
def test_batches_do_not_matter(architecture: str) -> None:
    lm = tiny(architecture)
    one, two = small(lm), small(lm, batch=2)
    for name in one.names:
        a, b = one.inputs[name], two.inputs[name]
        for field in ("minimum", "maximum", "mean", "token_absmax"):
            torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.map, b.map, rtol=2e-3, atol=1e-4)
        assert [top.token for top in a.top] == [top.token for top in b.top]


def test_top_tokens() -> None:
    lm = tiny("LlamaForCausalLM")
    m = small(lm)
    for name, x in naive(lm).items():
        absmax = np.abs(x).max(1)
        order = np.argsort(-absmax, kind="stable")[:16]
        top = m.inputs[name].top
        np.testing.assert_allclose([t.value for t in top], absmax[order], rtol=1e-5)
        for entry in top:
            assert abs(x[entry.token, entry.channel]) == pytest.approx(entry.value, rel=1e-5)
            assert entry.position == entry.token % LENGTH
            assert entry.text == f"#{int(m.tokens[entry.token])}"
        assert len({t.token for t in top}) == 16
    assert m.token_texts == tuple(f"#{token}" for token in m.tokens[:LENGTH].tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    stats = small(tiny("LlamaForCausalLM", dtype=dtype)).inputs["model.layers.1.mlp.down_proj"]
    exact = small(tiny("LlamaForCausalLM")).inputs["model.layers.1.mlp.down_proj"]
    assert stats.absmax.dtype == torch.float32
    assert float((stats.absmax / exact.absmax).log().abs().median()) < (0.1 if dtype == torch.bfloat16 else 1e-4)


def test_nothing_of_the_result_is_an_inference_tensor_or_a_view_of_the_model() -> None:
    lm = tiny("LlamaForCausalLM")
    m = small(lm)
    owned = {parameter.data_ptr() for parameter in lm.model.parameters()}
    for stats in [*m.inputs.values(), *m.weights.values()]:
        for value in vars(stats).values():
            if isinstance(value, Tensor):
                assert not value.is_inference()
                assert not value.requires_grad
                assert value.data_ptr() not in owned


def test_maps_made_later_are_the_maps_left_out() -> None:
    for architecture in ("LlamaForCausalLM", "MixtralForCausalLM"):
        lm = tiny(architecture)
        m = small(lm)
        again = with_maps(lm, _without_maps(m))
        for name in m.names:
            assert torch.equal(again.inputs[name].map, m.inputs[name].map)
            assert torch.equal(again.weights[name].map, m.weights[name].map)
            assert torch.equal(again.inputs[name].absmax, m.inputs[name].absmax)


def _without_maps(m: Magnitudes) -> Magnitudes:
    import dataclasses

    cut = {name: dataclasses.replace(stats, map=stats.map[:0]) for name, stats in m.inputs.items()}
    return dataclasses.replace(m, inputs=cut)


@pytest.mark.parametrize(("out", "channels", "count"), [(1, 1, 0), (127, 3, 0), (128, 3, 0), (300, 5, 0), (300, 7, 3)])
def test_weights_in_chunks(out: int, channels: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(out, channels)
    monkeypatch.setattr("sqviz.observe.capture.CHUNK_ELEMENTS", 50)
    stats = weight_stats(w, count)
    assert torch.equal(stats.channel_absmax, w.abs().amax(0))
    assert torch.equal(stats.out_absmax, w.abs().amax(1))
    assert len(stats.map) <= WEIGHT_BINS
    np.testing.assert_allclose(stats.map.float(), pooled(w.abs().numpy(), WEIGHT_BINS), rtol=1e-3, atol=1e-6)
    if count:
        assert stats.expert_absmax is not None
        assert torch.equal(stats.expert_absmax, w.view(count, -1, channels).abs().amax(1))
    transposed = weight_stats(w.T.contiguous().T, count)
    assert torch.equal(transposed.map, stats.map)


# --- what can go wrong ---


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [1, 2])
def test_values_that_are_not_finite_are_named(bad: float, batch: int) -> None:
    lm = tiny("LlamaForCausalLM")
    tokens = stream(lm)
    place = 2 * LENGTH + 4
    rare = 2
    tokens[place] = rare  # drawn from 3 on, so this id is nowhere else
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[rare, 7] = bad  # type: ignore[index, operator]
    with pytest.raises(NonFinite, match=r"model\.layers\.0\.self_attn\.q_proj .* segment 2 at position 4\..*bfloat16"):
        capture(lm, tokens, length=LENGTH, batch=batch, progress=False)


class CountDown(CancelToken):
    """Asked to stop after so many looks."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def check(self, what: str = "the work") -> None:
        self.looks -= 1
        if self.looks < 0:
            self.cancel()
        super().check(what)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("looks", [0, 1, 7, 12, 26, 30])
def test_a_cancelled_capture_leaves_the_model_as_it_was(looks: int, architecture: str) -> None:
    lm = tiny(architecture)
    tokens = stream(lm)

    def state() -> list[object]:
        return [
            (name, sorted(module.__dict__), len(module._forward_pre_hooks), module.training)
            for name, module in lm.model.named_modules()
        ]

    before = state()
    with torch.no_grad():
        logits = lm.model(tokens[None]).logits
    with pytest.raises(Cancelled):
        capture(lm, tokens, length=LENGTH, cancel=CountDown(looks), progress=False)
    assert state() == before
    with torch.no_grad():
        assert torch.equal(lm.model(tokens[None]).logits, logits)
    assert small(lm).samples == SAMPLES


def test_bad_numbers_and_texts() -> None:
    lm = tiny("LlamaForCausalLM")
    tokens = stream(lm)
    for options in ({"batch": 0}, {"map_tokens": 0}, {"samples": 0}, {"length": 0}):
        name, value = next(iter(options.items()))
        with pytest.raises(SqvizError, match=rf"{name}={value}"):
            capture(lm, tokens, **{"length": LENGTH, "progress": False, **options})  # type: ignore[arg-type]
    with pytest.raises(TextTooShort):
        capture(lm, tokens, length=1 + len(tokens), progress=False)
    with pytest.raises(NoTokenizer):
        capture(lm, "no tokenizer for this", length=2, progress=False)


def test_dead_channels() -> None:
    lm = tiny("LlamaForCausalLM")
    with torch.no_grad():
        lm.model.get_submodule("model.layers.0.input_layernorm").weight[5] = 0  # type: ignore[index, operator]
    stats: InputStats = small(lm).inputs["model.layers.0.self_attn.q_proj"]
    assert stats.absmax[5] == 0
    assert stats.channel_token[5] == -1
    assert not stats.quantiles[:, 5].any()


@pytest.mark.embedded
def test_the_embedded_models_outliers() -> None:
    """The one that the project's notes name, over a short text."""
    import sqviz

    lm = sqviz.load()
    m = capture(lm, sqviz.text(), samples=2, length=128, progress=False)
    stats = m.inputs["model.layers.28.mlp.down_proj"]
    assert float(stats.absmax.max()) > 2000
    assert 2 < float(stats.absmax.median()) < 8
    assert stats.top[0].position == stats.top[1].position == 0
    assert stats.top[0].channel == stats.top[1].channel
    assert stats.top[0].text == m.token_texts[0] or stats.top[0].token == 128
    assert "".join(m.token_texts).count("·") > 50

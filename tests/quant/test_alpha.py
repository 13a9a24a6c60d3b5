"""The search for α: each objective against trying everything by hand, and what a cancel leaves."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sqviz
from sqviz.errors import SqvizError
from sqviz.models.linears import groups
from sqviz.models.tiny import tiny
from sqviz.observe.hooks import activations
from sqviz.quant import alpha as search
from sqviz.quant.alpha import FEWEST, FLAT, GRID, HELD, NOISE, SEARCHED, divided, search_alpha
from sqviz.quant.block import Blocks
from sqviz.quant.clipping import LeastError
from sqviz.quant.divergence import STRIDE, Divergence
from sqviz.quant.found_alpha import FoundAlpha, Tried

TOKENS = torch.randint(3, 131, (8 * 40,), generator=torch.Generator().manual_seed(1))
SEEN, UNSEEN = TOKENS.view(-1, 40).split([2, 6])
"""A third of the calibration is searched on."""


@pytest.fixture(scope="module")
def lm():
    return tiny("LlamaForCausalLM")


@pytest.fixture(scope="module")
def m(lm):
    return sqviz.capture(lm, TOKENS, length=40, progress=False)


def divergence(lm, q, segments):
    """KL by the definition, token by token."""
    total, count = 0.0, 0
    for segment in segments:
        with torch.no_grad():
            p = lm.model(segment[None]).logits[0].double().softmax(-1)
            q_ = q.model(segment[None]).logits[0].double().softmax(-1)
        for t in range(STRIDE - 1, len(segment), STRIDE):
            total += float((p[t] * (p[t] / q_[t]).log()).sum())
            count += 1
    return total / count


def walked(start, errors):
    """Downhill along the grid, from the best of three places, with every error known beforehand."""
    now = min((start, None, 0.5), key=errors.__getitem__)
    for _ in GRID:
        place = GRID.index(now)
        now = min((now, *GRID[max(0, place - 1) : place], *GRID[place + 1 : place + 2]), key=errors.__getitem__)
    return now


@torch.no_grad()
def test_logits_are_searched_by_kind_and_then_block_by_block(lm, m, monkeypatch):
    monkeypatch.setattr(search, "REFINED", 1)
    scheme = sqviz.SMOOTHQUANT_O1
    found = search_alpha(lm, m, scheme, "logits", progress=False)
    segments = SEEN
    kinds = dict.fromkeys(group.kind for group in groups(lm))

    def value(alphas, index=None):
        smoothed, skip = lm, []
        if index is not None:
            alphas = {group.name: alphas[group.name] for group in groups(lm) if group.block == index}
            skip = [name for group in groups(lm) if group.block != index for name in group.consumers]
        if any(v is not None for v in alphas.values()):
            smoothed = sqviz.smooth(lm, m, lambda group: alphas.get(group.name), folds="outliers")
        return divergence(lm, sqviz.quantize(smoothed, scheme, skip=skip), segments)

    def spread(by_kind):
        return {group.name: by_kind[group.kind] for group in groups(lm)}

    by_norm = {group.kind: 0.5 if group.fold_kind == "norm" else None for group in groups(lm)}
    starts = (dict.fromkeys(kinds), by_norm, dict.fromkeys(kinds, 0.5))
    now = min(starts, key=lambda one: value(spread(one)))
    for kind in kinds:
        now[kind] = walked(now[kind], {alpha: value(spread({**now, kind: alpha})) for alpha in GRID})
    alphas = spread(now)
    lost = {index: value(alphas, index) for index in {group.block for group in groups(lm)}}
    index = max(lost, key=lambda index: lost[index])
    for group in (group for group in groups(lm) if group.block == index):
        errors = {alpha: value({**alphas, group.name: alpha}, index) for alpha in GRID}
        alphas[group.name] = walked(alphas[group.name], errors)
    assert found.alphas == alphas
    assert len(set(alphas.values()) - {None}) > 1
    assert found.complete
    assert found.objective == "logits"


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=len(GRID), max_size=len(GRID)), st.sampled_from(GRID))
def test_a_walk_along_the_grid_ends_where_it_is_least_around_and_asks_nothing_twice(errors, start):
    asked = []

    def value(alpha):
        asked.append(alpha)
        return float(errors[GRID.index(alpha)])

    alpha, least = search._climb(value, start, float(errors[GRID.index(start)]))
    place = GRID.index(alpha)
    assert least == errors[place] <= min(errors[GRID.index(one)] for one in (start, None, 0.5))
    assert all(errors[beside] >= least for beside in (place - 1, place + 1) if 0 <= beside < len(GRID))
    assert len(set(asked)) == len(asked)
    assert start not in asked


@torch.no_grad()
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "GPTJForCausalLM", "MixtralForCausalLM"])
@pytest.mark.parametrize("kept", [False, True])
def test_blocks_before_the_changed_one_are_not_computed_again(name, kept, monkeypatch):
    lm = sqviz.keep_sinks(tiny(name), [5, 9]) if kept else tiny(name)
    segments = TOKENS.view(-1, 40)[:2]
    q = sqviz.quantize(lm, sqviz.W8A8, skip=[n for g in groups(lm) if g.block == 0 for n in g.consumers])
    whole, own = Divergence(lm, segments), Divergence(lm, segments)
    expected = whole(q)
    assert own(q, since=1) == pytest.approx(expected, rel=1e-5)
    assert own(lm, since=1) == pytest.approx(0, abs=1e-6)
    assert expected > 1e-6
    blocks = q.blocks
    assert all("forward" not in block.__dict__ for block in blocks)
    calls = []
    blocks[0].register_forward_hook(lambda module, given, out: calls.append(out))
    monkeypatch.setattr(type(blocks[0]), "forward", lambda *given, **named: pytest.fail("was computed"))
    with pytest.raises(pytest.fail.Exception):
        own(q)
    assert own(q, since=len(blocks)) == pytest.approx(0, abs=1e-6)
    assert calls


def test_layers_are_searched_by_the_error_of_their_own_output(lm, m):
    scheme = sqviz.SMOOTHQUANT_LLAMA
    found = search_alpha(lm, m, scheme, "layer", progress=False)
    rows = search.sample_rows(lm, TOKENS.view(-1, 40)[:4])
    for group in groups(lm)[:4]:
        errors = {}
        for alpha in GRID:
            smoothed = lm if alpha is None else sqviz.smooth(lm, m, {group.name: alpha}, folds="all")
            q = sqviz.quantize(smoothed, scheme)
            x = rows.of(group)
            s = smoothed.scales.get(group.name, torch.ones(x.shape[1]))
            errors[alpha] = 0.0
            for name in group.consumers:
                y = x @ lm.model.get_submodule(name).weight.detach().T
                new = q.model.get_submodule(name)
                errors[alpha] += float(((new(x / s).detach() - y).square().sum(1) / y.square().sum(1)).mean())
        assert found.alphas[group.name] == walked(None, errors)


def test_blocks_are_searched_by_what_they_add(lm, m):
    scheme = sqviz.SMOOTHQUANT_O2
    found = search_alpha(lm, m, scheme, "block", progress=False)
    segments = SEEN
    mine = [group for group in groups(lm) if group.block == 1]
    elsewhere = [name for group in groups(lm) if group.block != 1 for name in group.consumers]
    now = {group.name: None for group in mine}
    for group in mine:
        errors = {}
        for alpha in GRID:
            trial = {**now, group.name: alpha}
            smoothed = lm
            if any(v is not None for v in trial.values()):
                smoothed = sqviz.smooth(lm, m, trial, folds="outliers", check=False)
            q = sqviz.quantize(smoothed, scheme, skip=elsewhere)
            errors[alpha] = Blocks(lm, segments).error(q, 1)
        now[group.name] = walked(now[group.name], errors)
    assert {name: found.alphas[name] for name in now} == now


def test_the_error_of_a_block_is_that_of_what_it_adds(lm, m):
    segments = TOKENS.view(-1, 40)[:2]
    q = sqviz.quantize(lm, sqviz.W8A8, skip=[name for g in groups(lm) if g.block for name in g.consumers])
    states = [one.model(segments[:1], output_hidden_states=True).hidden_states for one in (lm, q)]
    x, y, new = states[0][0], states[0][1], states[1][1]
    expected = ((new - y).square().sum(-1) / (y - x).square().sum(-1)).mean()
    assert Blocks(lm, segments[:1]).error(q, 0) == pytest.approx(float(expected.detach()), rel=1e-4)
    assert Blocks(lm, segments).error(lm, 1) == 0


def kept(tried):
    """The best search, if it is better than the best flat strength by more than the noise."""
    flat = min((tried[name] for name in FLAT), key=lambda one: one.divergence)
    best = flat
    for name in set(tried) - set(FLAT):
        ahead = flat.divergence - tried[name].divergence
        if ahead > NOISE * tried[name].noise and tried[name].divergence < best.divergence:
            best = tried[name]
    return best.name


def test_auto_keeps_what_is_best_on_text_that_no_search_has_seen(lm, m):
    scheme = sqviz.SMOOTHQUANT_O3
    found = search_alpha(lm, m, scheme, progress=False)
    assert [one.divergence for one in found.tried] == sorted(one.divergence for one in found.tried)
    assert {one.name for one in found.tried} == {
        "layer",
        "block",
        "logits",
        "none",
        "0.5 into norms",
        "flat 0.5",
        "flat 0.85",
    }
    by_name = {one.name: one for one in found.tried}
    assert found.objective == kept(by_name)
    smoothed = lm
    if any(value is not None for value in found.alphas.values()):
        smoothed = sqviz.smooth(lm, m, found, folds="outliers")
    one = by_name[found.objective]
    assert divergence(lm, sqviz.quantize(smoothed, scheme, m), UNSEEN) == pytest.approx(one.divergence, rel=1e-3)
    flat = sqviz.quantize(sqviz.smooth(lm, m, 0.5, folds="outliers"), scheme, m)
    assert divergence(lm, flat, UNSEEN) == pytest.approx(by_name["flat 0.5"].divergence, rel=1e-3)
    seen = divergence(lm, sqviz.quantize(smoothed, scheme, m), SEEN)
    assert seen == pytest.approx(one.searched, rel=1e-3)
    auto = sqviz.smooth(lm, m, "auto", scheme=scheme, folds="outliers")
    assert {name: s.tolist() for name, s in auto.scales.items()} == {
        name: s.tolist() for name, s in smoothed.scales.items()
    }


@torch.no_grad()
def test_searches_are_told_apart_from_flat_strengths_segment_by_segment(lm, m):
    scheme = sqviz.SMOOTHQUANT_O3
    tried = {one.name: one for one in search_alpha(lm, m, scheme, progress=False).tried}
    assert all((one.noise is None) == (name in FLAT) for name, one in tried.items())
    best = min((tried[name] for name in FLAT), key=lambda one: one.divergence).name
    into_norms, into_linears = FLAT[best]
    flat = lm
    if (into_norms, into_linears) != (None, None):
        each = {group.name: into_norms if group.fold_kind == "norm" else into_linears for group in groups(lm)}
        flat = sqviz.smooth(lm, m, lambda group: each[group.name], folds="outliers")
    by_layer = search_alpha(lm, m, scheme, "layer", progress=False)
    two = [sqviz.quantize(one, scheme, m) for one in (flat, sqviz.smooth(lm, m, by_layer, folds="outliers"))]
    behind = [divergence(lm, two[1], [one]) - divergence(lm, two[0], [one]) for one in UNSEEN]
    mean = sum(behind) / len(behind)
    noise = math.sqrt(sum((one - mean) ** 2 for one in behind) / (len(behind) - 1) / len(behind))
    assert tried["layer"].divergence - tried[best].divergence == pytest.approx(mean, rel=1e-2, abs=1e-6)
    assert tried["layer"].noise == pytest.approx(noise, rel=1e-2)


@pytest.mark.parametrize(
    ("logits", "layer", "name"),
    [
        ((0.5, 0.01), (0.6, 0.01), "logits"),
        ((0.5, 0.3), (0.6, 0.01), "layer"),
        ((0.5, 0.3), (0.9, 0.06), "flat 0.5"),
        ((0.5, 0.3), (2.0, 0.01), "flat 0.5"),
        ((math.inf, 0.0), (math.inf, 0.0), "flat 0.5"),
    ],
)
def test_a_search_is_kept_only_if_it_is_ahead_by_more_than_the_noise(lm, m, logits, layer, name):
    one = search._Search(lm, m, sqviz.SMOOTHQUANT_O1, "outliers", sqviz.CancelToken())
    found = {"layer": {"a": 0.2}, "logits": {"a": 0.4}}
    one._flat = {"none": {"a": None}, "flat 0.5": {"a": 0.5}}
    tried = [Tried("none", math.inf), Tried("flat 0.5", 1.0)]
    tried += [Tried("layer", layer[0], 0.1, layer[1]), Tried("logits", logits[0], 0.1, logits[1])]
    assert one.best(found, tried) == (name, {**found, **one._flat}[name])


@given(st.integers(FEWEST, 80))
def test_what_is_searched_on_and_what_decides_do_not_meet(count):
    searched, held = (part.flatten().tolist() for part in divided(torch.arange(count)[:, None]))
    assert not set(searched) & set(held)
    assert len(searched) >= 2
    assert len(held) >= 2 * min(len(searched), HELD / 2)
    assert (len(searched), len(held)) == (SEARCHED, HELD) or count < SEARCHED + HELD


def test_a_candidate_that_gives_no_numbers_is_not_kept(lm, m, monkeypatch):
    one = search._Search(lm, m, sqviz.SMOOTHQUANT_O1, "outliers", sqviz.CancelToken())
    monkeypatch.setattr(search, "FLAT", {"none": (None, None), "flat 0.5": (0.5, 0.5)})
    answers = iter([[math.nan] * 6, [1.0] * 6, [0.5] * 5 + [math.inf]])
    monkeypatch.setattr(one.held, "each", lambda model: torch.tensor(next(answers)))
    with sqviz.progress.progress(3, "deciding", show=False) as bar:
        tried = one.decide({"layer": {}}, bar)
    assert [each.divergence for each in tried] == [math.inf, 1.0, math.inf]
    assert one.best({"layer": {}}, tried)[0] == "flat 0.5"


def test_a_model_that_gives_no_numbers_ends_the_walk_and_loses(lm, m):
    for nan in itertools.product((False, True), repeat=len(GRID)):
        alpha, least = search._climb(lambda one, nan=nan: math.nan if nan[GRID.index(one)] else float(one or 0))
        assert not math.isnan(least)
        if not (nan[GRID.index(None)] and nan[GRID.index(0.5)]):
            assert not nan[GRID.index(alpha)]
    broken = torch.full((2, 3), math.nan)
    assert search._noise(broken[0], broken[1]) == 0


def test_kept_sinks_stand_before_a_block_that_runs_by_itself(lm):
    kept = sqviz.keep_sinks(lm, [7, 9])
    segments = TOKENS.view(-1, 40)[:2]
    blocks = Blocks(kept, segments)
    assert [blocks.error(kept, index) for index in (0, 1)] == [0, 0]
    q = sqviz.quantize(kept, sqviz.W8A8, skip=[name for g in groups(lm) if g.block for name in g.consumers])
    states = [one.model(segments[:1], output_hidden_states=True).hidden_states for one in (kept, q)]
    x, y, new = states[0][0], states[0][1], states[1][1]
    expected = ((new - y).square().sum(-1) / (y - x).square().sum(-1)).mean()
    assert Blocks(kept, segments[:1]).error(q, 0) == pytest.approx(float(expected), rel=1e-4)
    m = sqviz.capture(kept, TOKENS, length=40, progress=False)
    assert search_alpha(kept, m, sqviz.SMOOTHQUANT_O1, "block", progress=False).complete


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "OPTForCausalLM", "Gemma2ForCausalLM", "Olmo2ForCausalLM"])
def test_other_architectures_and_clipped_schemes(name):
    lm = tiny(name)
    m = sqviz.capture(lm, TOKENS, length=40, progress=False)
    scheme = sqviz.SMOOTHQUANT_O3.replace(weight_clip=LeastError(), clip=LeastError())
    for objective in ("layer", "block", "logits"):
        found = search_alpha(lm, m, scheme, objective, progress=False)
        assert found.alphas.keys() == {group.name for group in groups(lm)}
        assert any(value is not None for value in found.alphas.values())
        assert all(found.alphas[group.name] is None for group in groups(lm) if group.fold is None)
        sqviz.quantize(sqviz.smooth(lm, m, found, folds="outliers"), scheme, m)


def test_a_model_smoothed_already_is_searched_further(lm, m):
    smooth = sqviz.smooth(lm, m, 0.3, folds="outliers")
    found = search_alpha(smooth, m, sqviz.SMOOTHQUANT_LLAMA, "layer", progress=False)
    x = activations(smooth, TOKENS[:40], [groups(lm)[0].name])[groups(lm)[0].name]
    assert x.isfinite().all()
    assert found.alphas.keys() == {group.name for group in groups(lm)}


def test_a_cancelled_search_returns_the_best_so_far(lm, m):
    cancel = sqviz.CancelToken()
    steps = itertools.count()

    def step(self, count=1):
        if self.what == "searching α" and next(steps) == 3:
            cancel.cancel()
        self.cancel.check(self.what)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sqviz.progress.Bar.step", step)
        found = search_alpha(lm, m, sqviz.SMOOTHQUANT_O1, "layer", cancel=cancel, progress=False)
    assert not found.complete
    assert found.objective == "layer"
    whole = search_alpha(lm, m, sqviz.SMOOTHQUANT_O1, "layer", progress=False)
    first = [group.name for group in groups(lm)][:4]
    assert {name: found.alphas[name] for name in first} == {name: whole.alphas[name] for name in first}
    assert all(found.alphas[group.name] is None for group in groups(lm)[4:])


def test_found_strengths_are_kept_and_reapplied(lm, m, tmp_path):
    found = search_alpha(lm, m, sqviz.SMOOTHQUANT_O1, "layer", progress=False)
    found.save(tmp_path / "alpha.json")
    again = FoundAlpha.load(tmp_path / "alpha.json")
    assert again == found
    one, two = (sqviz.smooth(lm, m, a, folds="outliers") for a in (found, again))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    with pytest.raises(SqvizError, match="Search anew"):
        sqviz.smooth(tiny("OPTForCausalLM"), sqviz.capture(tiny("OPTForCausalLM"), TOKENS, length=40), again)
    kept = (tmp_path / "alpha.json").read_text()
    for text in ('{"some": "thing"}', kept.replace('"folds": "outliers"', '"folds": "linear"')):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(SqvizError, match="no strengths"):
            FoundAlpha.load(tmp_path / "other.json")


def test_what_cannot_be_searched_is_said(lm, m):
    with pytest.raises(SqvizError, match="scheme="):
        sqviz.smooth(lm, m, "auto")
    with pytest.raises(SqvizError, match="objective"):
        search_alpha(lm, m, sqviz.W8A8, "perplexity")
    short = sqviz.capture(lm, TOKENS[:80], length=40, progress=False)
    with pytest.raises(SqvizError, match=f"{FEWEST} segments.*samples={SEARCHED + HELD}"):
        search_alpha(lm, short, sqviz.W8A8)
    with pytest.raises(SqvizError, match="folds"):
        search_alpha(tiny("Olmo2ForCausalLM"), m, sqviz.W8A8, folds="norm")


def test_what_was_found_is_told_in_short_and_no_two_look_alike(lm, m):
    found = search_alpha(lm, m, sqviz.SMOOTHQUANT_O1, "layer", progress=False)
    frame = found.to_frame()
    assert [*frame["linear"]] == [group.name for group in groups(lm)]
    assert [*frame["block"]] == [group.block for group in groups(lm)]
    assert [*frame["kind"]] == [group.kind for group in groups(lm)]
    assert [None if x != x else x for x in frame["alpha"]] == [found.alphas[name] for name in frame["linear"]]
    assert len(repr(found)) < 300
    assert "searched by layer for SMOOTHQUANT_O1" in found.describe()
    assert dataclasses.replace(found, objective="flat 0.5").describe().startswith("flat 0.5 for SMOOTHQUANT_O1")
    assert dataclasses.replace(found, objective="none").describe().startswith("no smoothing for SMOOTHQUANT_O1")
    name = groups(lm)[0].name
    other = dataclasses.replace(found, alphas={**found.alphas, name: 0.123})
    assert sqviz.Method("a", sqviz.W8A8, found).key() != sqviz.Method("a", sqviz.W8A8, other).key()
    assert sqviz.Method("a", sqviz.W8A8, found).key() == sqviz.Method("b", sqviz.W8A8, found).key()


def test_candidates_stand_in_a_table(lm, m, tmp_path):
    found = search_alpha(lm, m, sqviz.SMOOTHQUANT_O1, "layer", progress=False)
    tried = (Tried("layer", 0.2, 0.1), Tried("flat 0.5", 0.3))
    found = dataclasses.replace(found, tried=tried, complete=False)
    frame = found.tried_to_frame()
    assert [*frame.index] == ["layer", "flat 0.5"]
    assert [*frame["KL held, nats per token"]] == [0.2, 0.3]
    assert [*frame["kept"]] == [True, False]
    assert frame["KL searched, nats per token"]["layer"] == 0.1
    bare = dataclasses.replace(found, tried=(Tried("layer", 0.2),)).tried_to_frame()
    assert "KL searched, nats per token" not in bare
    assert "cancelled: the best so far" in repr(found)
    found.save(tmp_path / "alpha.json")
    assert FoundAlpha.load(tmp_path / "alpha.json") == found

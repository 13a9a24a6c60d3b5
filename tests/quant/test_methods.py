"""Methods do what their parts do one after the other, and ask for no more calibration than they need."""

import pytest
import torch

import sqviz
from sqviz.errors import Cancelled, SqvizError
from sqviz.models.tiny import tiny
from sqviz.quant.clipping import ClipTokens, LeastError

TOKENS = torch.randint(3, 131, (8 * 40,), generator=torch.Generator().manual_seed(1))


class Calibrate:
    """Counts its captures."""

    def __init__(self):
        self.models = []

    def __call__(self, lm):
        self.models.append(lm)
        return sqviz.capture(lm, TOKENS, length=40, progress=False)


def logits(lm):
    with torch.no_grad():
        return lm.model(TOKENS[None, :40]).logits


def test_table_3_2_has_the_rows_of_the_thesis():
    lm = tiny("LlamaForCausalLM")
    rows = sqviz.table_3_2()
    assert [row.name for row in rows] == [
        "none",
        "W8A8",
        "ZeroQuant",
        "LLM.int8()",
        "Outlier Suppression",
        "SmoothQuant-O1",
        "SmoothQuant-O2",
        "SmoothQuant-O3",
        "SmoothQuant-Llama",
    ]
    expected = logits(lm)
    errors = {row.name: float((logits(row.apply(lm, Calibrate())) - expected).norm()) for row in rows}
    assert errors["none"] == 0
    assert errors["SmoothQuant-O1"] < errors["W8A8"]
    assert errors["LLM.int8()"] < errors["W8A8"]
    assert errors["SmoothQuant-Llama"] < errors["SmoothQuant-O1"] <= errors["SmoothQuant-O3"] * 1.2


def test_a_method_is_its_parts_in_order():
    lm = tiny("OPTForCausalLM")
    scheme = sqviz.SMOOTHQUANT_O3.replace(clip=ClipTokens(0.1), weight_clip=LeastError())
    calibrate = Calibrate()
    method = sqviz.Method("all", scheme, 0.6, folds="all", kept_sinks=True, attention=True, skip=("*.1.*",))
    got = method.apply(lm, calibrate, keep=lambda lm: sqviz.keep_sinks(lm, [7, 9]))
    kept = sqviz.keep_sinks(lm, [7, 9])
    smoothed = sqviz.smooth(kept, Calibrate()(kept), 0.6, folds="all")
    byhand = sqviz.quantize(smoothed, scheme, Calibrate()(smoothed), skip="*.1.*", attention=True)
    torch.testing.assert_close(logits(got), logits(byhand))
    assert len(calibrate.models) == 2


@pytest.mark.parametrize(
    ("method", "captures"),
    [
        (sqviz.Method("none"), 0),
        (sqviz.Method("dynamic", sqviz.W8A8), 0),
        (sqviz.Method("static", sqviz.SMOOTHQUANT_O3), 1),
        (sqviz.Method("smoothed", sqviz.SMOOTHQUANT_O1, 0.5), 1),
        (sqviz.Method("both", sqviz.SMOOTHQUANT_O3, 0.5), 1),
        (sqviz.Method("quantiles", sqviz.SMOOTHQUANT_O3.replace(clip=ClipTokens(0.1))), 1),
        (sqviz.Method("after smoothing", sqviz.SMOOTHQUANT_O3.replace(clip=ClipTokens(0.1)), 0.5), 2),
    ],
)
def test_calibration_is_asked_for_as_often_as_needed(method, captures):
    calibrate = Calibrate()
    method.apply(tiny("LlamaForCausalLM"), calibrate)
    assert len(calibrate.models) == captures


def test_searched_strengths_bring_their_folds_and_a_search_may_be_given():
    lm = tiny("LlamaForCausalLM")
    m = Calibrate()(lm)
    found = sqviz.search_alpha(lm, m, sqviz.SMOOTHQUANT_O1, "layer", progress=False)
    asked = []

    def search(*given):
        asked.append(given)
        return found

    auto = sqviz.Method("auto", sqviz.SMOOTHQUANT_O1, "auto")
    assert auto.folds == sqviz.Method("found", sqviz.SMOOTHQUANT_O1, found).folds == "outliers"
    assert sqviz.Method("number", sqviz.SMOOTHQUANT_O1, 0.5).folds == "norm"
    expected = logits(sqviz.quantize(sqviz.smooth(lm, m, found), sqviz.SMOOTHQUANT_O1))
    torch.testing.assert_close(logits(auto.apply(lm, Calibrate(), search=search)), expected)
    torch.testing.assert_close(logits(auto.replace(alpha=found).apply(lm, Calibrate())), expected)
    assert [(given[0], given[2:]) for given in asked] == [(lm, (sqviz.SMOOTHQUANT_O1, "outliers"))]
    assert sqviz.Method("auto", sqviz.SMOOTHQUANT_LLAMA, "auto").folds == "all"
    named = sqviz.Method("norms", sqviz.SMOOTHQUANT_O1, "auto", folds="norm")
    assert named.folds == "norm"


@pytest.mark.parametrize("backend", ["simulate", "auto"])
def test_quantising_can_be_stopped_between_two_linears(backend):
    class AfterThree(sqviz.CancelToken):
        def told(self, what, done, total):
            steps.append(done)
            if what == "quantising" and done == 3:
                self.cancel()

    steps, lm = [], tiny("LlamaForCausalLM")
    method = sqviz.Method("clipped", sqviz.SMOOTHQUANT_O3.replace(weight_clip=LeastError()), 0.5)
    with pytest.raises(Cancelled, match="quantising"):
        method.apply(lm, Calibrate(), backend, cancel=AfterThree())
    assert steps[-1] == 3


def test_the_frontier_relaxes_step_by_step():
    rows = sqviz.frontier(sqviz.SMOOTHQUANT_O3)
    assert len(rows) == 7
    assert rows[0] == sqviz.Method("SmoothQuant-O3", sqviz.SMOOTHQUANT_O3, 0.5)
    assert len({row.name for row in rows}) == len({row.describe() for row in rows}) == 7
    assert rows[-1].scheme.weight == sqviz.PerChannel()
    assert rows[3].scheme.clip == LeastError()
    assert (rows[4].folds, rows[5].folds, rows[5].alpha) == ("outliers", "outliers", "auto")
    assert sqviz.frontier(sqviz.SMOOTHQUANT_O1)[3].scheme.clip is None
    assert len(sqviz.frontier(sqviz.SMOOTHQUANT_LLAMA)) == 6
    single = sqviz.frontier(sqviz.SMOOTHQUANT_O3, floating=("*.29.mlp.down_proj",))
    assert len(single) == 8
    assert single[6] == rows[3].replace(name=single[6].name, skip=("*.29.mlp.down_proj",))
    assert "*.29.mlp.down_proj in 16 bit" in single[6].name
    assert "*.29.mlp.down_proj in 16 bit" in single[6].describe()


@pytest.mark.parametrize("backend", ["simulate", "auto"])
def test_what_is_quantised_cannot_be_rescaled(backend):
    lm = tiny("LlamaForCausalLM")
    m, q = Calibrate()(lm), sqviz.quantize(lm, sqviz.W8A8, backend=backend)
    with pytest.raises(SqvizError, match="smooth the model that it was made from"):
        sqviz.smooth(q, m, 0.5)
    for change in (
        lambda: sqviz.non_scaling_norms(q),
        lambda: sqviz.keep_sinks(q, [3]),
        lambda: sqviz.search_alpha(q, m, sqviz.W8A8),
    ):
        with pytest.raises(SqvizError, match="quantised already"):
            change()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alpha": "automatic", "scheme": sqviz.W8A8}, "auto"),
        ({"alpha": "auto"}, "scheme"),
        ({"alpha": 0.5, "folds": "linear"}, "one of norm, all, outliers"),
        ({"alpha": 0.5, "norms_without_gain": True}, "norms"),
        ({"attention": True}, "scheme"),
        ({"skip": ("*.q_proj",)}, "scheme"),
    ],
)
def test_methods_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(SqvizError, match=words):
        sqviz.Method("it", **fields)


def test_which_tokens_carry_the_outliers():
    lm = tiny("LlamaForCausalLM")
    m = Calibrate()(lm)
    frame = m.outlier_tokens()
    leads = {}
    for group in m.groups:
        token = int(m.inputs[group.name].token_absmax.argmax())
        leads[token] = leads.get(token, 0) + 1
    assert frame["leads"].sum() == len(m.groups)
    assert sorted(frame["leads"][frame["leads"] > 0]) == sorted(leads.values())
    first = frame.iloc[0]
    assert leads[first["segment"] * 40 + first["position"]] == first["leads"] == max(leads.values())
    assert frame["largest"].max() == pytest.approx(max(float(m.inputs[n].absmax.max()) for n in m.names), rel=1e-3)


def test_experts_that_saw_no_token_are_reported():
    lm = tiny("MixtralForCausalLM")
    few = sqviz.capture(lm, TOKENS[:2], length=2, progress=False)
    expected = {
        group.name: [e for e, n in enumerate(few.inputs[group.name].expert_tokens.tolist()) if n == 0]
        for group in few.groups
        if few.inputs[group.name].expert_tokens is not None
    }
    assert few.idle_experts() == {name: idle for name, idle in expected.items() if idle}
    assert few.idle_experts()
    assert "experts saw no token" in repr(few)
    sqviz.quantize(sqviz.smooth(lm, few, 0.5, folds="all"), sqviz.SMOOTHQUANT_O3, few)
    assert Calibrate()(tiny("LlamaForCausalLM")).idle_experts() == {}

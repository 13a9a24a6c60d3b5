"""`precision_map` against one operator quantised by hand: float64 models, plain hooks, integers by loops."""

import math
import types

import pytest
import torch
from jaxtyping import Float
from torch import Tensor, nn

from sqviz.errors import SqvizError
from sqviz.models.linears import weight
from sqviz.models.tiny import TINY, tiny
from sqviz.progress import CancelToken
from sqviz.quant import int8_attention
from sqviz.quant.attention_products import mix, scores
from sqviz.quant.divergence import STRIDE
from sqviz.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken
from sqviz.quant.linear import quantize
from sqviz.quant.precision_map import precision_map, words_of
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA, SMOOTHQUANT_O1, SMOOTHQUANT_O3, W8A8, Scheme

LENGTH = 18
IDS = torch.randint(3, 131, (2 * LENGTH,), generator=torch.Generator().manual_seed(3))
SEGMENTS = IDS.view(2, LENGTH)


def mapped(lm, scheme=SMOOTHQUANT_O1, **more):
    return precision_map(lm, scheme, text=IDS, length=LENGTH, progress=False, **more)


# --- the same by hand ---


def rounded(x: Float[Tensor, "row channel"], per_row: bool) -> Float[Tensor, "row channel"]:
    largest = x.abs().amax(1, keepdim=True) if per_row else x.abs().max()
    step = largest / 127
    return torch.where(step == 0, 0.0, (x / torch.where(step == 0, 1.0, step)).round() * step)


def token_error(y: Tensor, new: Tensor, x: Tensor | float = 0.0) -> float:
    rows = [
        float((b - a).square().sum() / (a - c).square().sum())
        for a, b, c in zip(y, new, x if isinstance(x, Tensor) else [0.0] * len(y), strict=True)
    ]
    return sum(rows) / len(rows)


@torch.no_grad()
def by_hand(lm, block: int, change):
    """(error of the block's part, KL) with `change(model's block)` done to a float64 model by plain hooks."""
    found = []
    for segment in SEGMENTS:
        module = lm.model.get_submodule(lm.arch.blocks)[block]
        seen = {}

        def before(_, args, kwargs, seen=seen):
            seen.setdefault("x", (args[0] if args else kwargs["hidden_states"])[0])

        def after(_, __, out, seen=seen):
            seen.setdefault("y", []).append((out if isinstance(out, Tensor) else out[0])[0])

        hooks = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
        logits = [lm.model(segment[None]).logits[0]]
        undo = change(module)
        logits.append(lm.model(segment[None]).logits[0])
        for hook in [*undo, *hooks]:
            hook.remove()
        p, q = (one[STRIDE - 1 :: STRIDE].log_softmax(-1) for one in logits)
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        # the first blocks read the same, so the block's own input is the same in both passes
        found.append((token_error(seen["y"][0], seen["y"][1], seen["x"]), kl))
    return tuple(sum(values) / len(values) for values in zip(*found, strict=True))


LINEARS = [
    ("LlamaForCausalLM", "mlp.down_proj"),
    ("LlamaForCausalLM", "self_attn.k_proj"),
    ("OPTForCausalLM", "fc1"),
    ("GPT2LMHeadModel", "attn.c_attn"),
    ("FalconForCausalLM/7b", "self_attention.query_key_value"),
    ("CohereForCausalLM", "mlp.up_proj"),
    ("Gemma2ForCausalLM", "self_attn.o_proj"),
    ("BloomForCausalLM", "mlp.dense_4h_to_h"),
]


@pytest.mark.parametrize(("name", "operator"), LINEARS)
@pytest.mark.parametrize("scheme", [SMOOTHQUANT_O1, SMOOTHQUANT_LLAMA, W8A8], ids=lambda scheme: scheme.name)
def test_one_linear_is_what_hooks_make_of_it(name, operator, scheme):
    lm = tiny(name, dtype=torch.float64)
    w = weight(lm, f"{lm.arch.blocks}.1.{operator}").detach()
    w_hat = rounded(w, per_row=scheme.weight == PerChannel())
    outputs = []

    def change(block):
        def quantised(module, args, out):
            x = args[0].flatten(0, -2)
            new = rounded(x, per_row=scheme.activation == PerToken()) @ w_hat.T
            new = new if module.bias is None else new + module.bias
            outputs.append((out.flatten(0, -2), new))
            return new.view(out.shape)

        return [block.get_submodule(operator).register_forward_hook(quantised)]

    in_block, in_model = by_hand(lm, 1, change)
    one = mapped(lm, scheme, blocks=[1]).operator(1, operator)
    assert one.precision == "INT8"
    local = sum(token_error(*pair) for pair in outputs) / len(outputs)
    assert one.local == pytest.approx(local, rel=1e-4)
    assert one.in_block == pytest.approx(in_block, rel=1e-4)
    assert one.in_model == pytest.approx(in_model, rel=1e-2, abs=5e-7)


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("LlamaForCausalLM", "post_attention_layernorm"),
        ("OPTForCausalLM", "activation_fn"),
        ("GPT2LMHeadModel", "ln_1"),
    ],
)
def test_what_stays_in_16_bit_is_asked_what_int8_would_cost(name, operator):
    lm = tiny(name, dtype=torch.float64)

    def change(block):
        def hold(_, __, out):
            return rounded(out.flatten(0, -2), per_row=True).view(out.shape)

        return [block.get_submodule(operator).register_forward_hook(hold)]

    in_block, in_model = by_hand(lm, 0, change)
    one = mapped(lm, blocks=[0]).operator(0, operator)
    assert one.precision == "16 bit"
    assert one.reason
    assert one.in_block == pytest.approx(in_block, rel=1e-4)
    assert one.in_model == pytest.approx(in_model, rel=1e-2, abs=5e-7)


def attention_by_hand(q, k, v, factor, quantise_qk: bool, quantise_pv: bool):
    """Causal attention, head by head and query by query, with integers where asked; (logits, output)."""
    heads, queries, _ = q.shape
    logits = torch.full((heads, queries, queries), -math.inf, dtype=torch.float64)
    out = torch.zeros(heads, queries, v.shape[-1], dtype=torch.float64)
    code = lambda x: (lambda step: ((x / step).round(), step))(float(x.abs().max()) / 127)  # noqa: E731
    for head in range(heads):
        for t in range(queries):
            for at in range(t + 1):
                if quantise_qk:
                    (a, da), (b, db) = code(q[head, t]), code(k[head, at])
                    logits[head, t, at] = float(a @ b) * da * db * factor
                else:
                    logits[head, t, at] = float(q[head, t] @ k[head, at]) * factor
            p = logits[head, t, : t + 1].softmax(0)
            if quantise_pv:
                values = [code(v[head, at]) for at in range(t + 1)]
                held, step = code(p * torch.tensor([d for _, d in values], dtype=torch.float64))
                out[head, t] = sum(c * value for c, (value, _) in zip(held, values, strict=True)) * step
            else:
                out[head, t] = p @ v[head, : t + 1]
    return logits, out


@pytest.mark.parametrize("operator", ["qk", "pv"])
def test_each_product_of_attention_is_what_loops_over_queries_make_of_it(operator, monkeypatch):
    """Queries and keys after RoPE, probabilities included, the other product left in floating point."""
    from torch.nn import functional

    lm = tiny("LlamaForCausalLM", dtype=torch.float64)
    real, kept = functional.scaled_dot_product_attention, []

    def change(block):
        calls = types.SimpleNamespace(layer=-1)

        def sdpa(query, key, value, *args, **kwargs):
            calls.layer += 1
            if calls.layer != 1:
                return real(query, key, value, *args, **kwargs)
            times = query.shape[1] // key.shape[1]
            q, k, v = query[0], key[0].repeat_interleave(times, 0), value[0].repeat_interleave(times, 0)
            factor = q.shape[-1] ** -0.5
            plain = attention_by_hand(q, k, v, factor, False, False)
            new = attention_by_hand(q, k, v, factor, operator == "qk", operator == "pv")
            kept.append((plain, new))
            return new[1][None]

        monkeypatch.setattr(functional, "scaled_dot_product_attention", sdpa)
        return [types.SimpleNamespace(remove=monkeypatch.undo)]

    in_block, in_model = by_hand(lm, 1, change)
    one = mapped(lm, blocks=[1]).operator(1, operator)
    local = []
    for plain, new in kept:
        which = 0 if operator == "qk" else 1
        y, y_hat = (torch.nan_to_num(pair[which], neginf=0.0).movedim(1, 0).flatten(1) for pair in (plain, new))
        local.append(token_error(y, y_hat))
    assert one.precision == "INT8"
    assert one.local == pytest.approx(sum(local) / len(local), rel=1e-3)
    assert one.in_block == pytest.approx(in_block, rel=1e-3)
    assert one.in_model == pytest.approx(in_model, rel=3e-2, abs=5e-7)


def test_both_halves_are_the_definition_of_int8_attention():
    from sqviz_kernels import spec

    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, 11, 8, generator=g) for _ in range(3))
    codes = [(c.view(k.shape), s.view(k.shape[:3])) for c, s in (spec.quantise(x.reshape(-1, 8)) for x in (k, v))]
    expected = spec.attention(q, *codes[0], *codes[1], 8**-0.5, causal_from=0)
    hidden = ~torch.ones(11, 11, dtype=torch.bool).tril()
    shares = scores(q, k, 8**-0.5).masked_fill(hidden, -math.inf).softmax(-1)
    assert torch.equal(mix(shares, v), expected)


@pytest.mark.parametrize("name", TINY)
def test_all_together_is_the_quantised_model(name):
    """Also over every architecture: every operator is measured, and what is left out has its reason."""
    lm = tiny(name)
    before = {key: value.clone() for key, value in lm.model.state_dict().items()}
    found = mapped(lm)
    refused = bool(int8_attention.obstacle(lm))
    model = quantize(lm, SMOOTHQUANT_O1, attention=not refused)
    with torch.no_grad():
        pairs = [
            [m.model(s[None]).logits[0, STRIDE - 1 :: STRIDE].log_softmax(-1) for m in (lm, model)] for s in SEGMENTS
        ]
    kl = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs) / len(pairs)
    assert found.together == pytest.approx(kl, rel=1e-5, abs=5e-7)
    for ops in found.blocks:
        for one in ops:
            assert one.quantised == (not one.reason)
            assert (one.kind in ("linear", "product") and not (refused and one.kind == "product")) == one.quantised
            assert math.isfinite(one.local) == math.isfinite(one.in_block) == (one.kind != "router")
            assert math.isnan(one.in_model)
            assert all((x.steps > 0) == one.quantised for x in one.operands)
    assert all(torch.equal(value, before[key]) for key, value in lm.model.state_dict().items())
    assert not any("forward" in m.__dict__ for m in lm.model.modules())


def test_an_operator_in_all_blocks_costs_what_quantising_only_it_costs():
    lm = tiny("MixtralForCausalLM")
    found = mapped(lm, SMOOTHQUANT_LLAMA, blocks="all")
    for operator, others in (("mlp.experts.down_proj", "*[!p].down_proj"), ("self_attn.o_proj", "*")):
        skip = [n for n in _linears(lm) if not n.endswith(operator)]
        model = quantize(lm, SMOOTHQUANT_LLAMA, skip=skip)
        with torch.no_grad():
            pairs = [
                [m.model(s[None]).logits[0, STRIDE - 1 :: STRIDE].log_softmax(-1) for m in (lm, model)]
                for s in SEGMENTS
            ]
        kl = sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs) / len(pairs)
        assert found.everywhere[operator] == pytest.approx(kl, rel=1e-4, abs=5e-7), others
        assert all(math.isfinite(found.operator(block, operator).in_model) for block in (0, 1))


def _linears(lm):
    from sqviz.models.linears import linear_names

    return linear_names(lm)


def test_steps_and_magnitudes():
    lm = tiny("LlamaForCausalLM")
    found = mapped(lm, Scheme(PerGroup(53), PerToken()))
    down = {x.label: x for x in found.operator(0, "mlp.down_proj").operands}
    assert (down["X"].steps, down["W"].steps) == (LENGTH, 48)
    assert down["W"].granularity == "per group of 53"
    assert down["W"].largest == float(weight(lm, "model.layers.0.mlp.down_proj").detach().abs().max())
    qk = {x.label: x for x in found.operator(0, "qk").operands}
    assert (qk["Q"].steps, qk["K"].steps) == (6 * LENGTH, 2 * LENGTH)  # queries are grouped
    assert words_of(PerTensor()) == "per tensor"
    experts = {x.label: x for x in mapped(tiny("MixtralForCausalLM")).operator(0, "mlp.experts.gate_up_proj").operands}
    assert (experts["X"].steps, experts["W"].steps) == (LENGTH, 5)


def test_products_stay_in_16_bit_where_they_have_to():
    off = mapped(tiny("LlamaForCausalLM"), attention=False).operator(0, "qk")
    assert (off.precision, off.reason) == ("16 bit", "attention=False")
    assert math.isfinite(off.in_block)
    bloom = mapped(tiny("BloomForCausalLM")).operator(0, "pv")
    assert bloom.precision == "16 bit"
    assert "inside of the model" in bloom.reason


def test_a_cancelled_map_keeps_what_it_has():
    class After(CancelToken):
        left = 40

        @property
        def cancelled(self):
            self.left -= 1
            return self.left < 0

    found = mapped(tiny("LlamaForCausalLM"), blocks="all", cancel=After())
    assert not found.complete
    assert math.isfinite(found.operator(0, "qk").in_block)
    assert math.isnan(found.operator(1, "add#2").in_model)
    assert "cancelled" in repr(found)
    assert "cancelled" in found.view().meta["note"]


def test_errors_name_what_is_wrong():
    lm = tiny("LlamaForCausalLM")
    with pytest.raises(SqvizError, match=r"blocks=.*9 is no block; 0 … 1 or 'all'"):
        mapped(lm, blocks=[9])
    with pytest.raises(SqvizError, match="Give the magnitudes"):
        mapped(lm, SMOOTHQUANT_O3)
    with pytest.raises(SqvizError, match="quantised already"):
        mapped(quantize(lm, SMOOTHQUANT_O1))
    found = mapped(lm)
    with pytest.raises(SqvizError, match="block 0 has no operator 'fc1'; it has input_layernorm"):
        found.operator(0, "fc1")
    with pytest.raises(SqvizError, match="there are blocks 0 … 1"):
        found.operator(7, "qk")
    assert isinstance(lm.model, nn.Module)


def test_a_table():
    frame = mapped(tiny("OPTForCausalLM")).to_frame()
    assert set(frame[frame.precision == "INT8"].name) >= {"fc1", "fc2", "qk", "pv"}
    assert len(frame) == 2 * 14

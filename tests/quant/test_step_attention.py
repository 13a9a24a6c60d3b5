"""One query of a model whose linears alone are INT8: the same attention, in a shape that the processor likes better."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sqviz.models.tiny import TINY, tiny
from sqviz.quant import step_attention
from sqviz.quant.checkpoint import load_int8, save_int8
from sqviz.quant.linear import quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA
from sqviz.streaming.cache import SinkCache
from sqviz.streaming.perplexity import streaming_perplexity
from sqviz.streaming.policies import Sinks

IDS = torch.randint(3, 131, (2, 40), generator=torch.Generator().manual_seed(5))


class Shapes(TorchFunctionMode):
    """The shapes of the queries that torch's sdpa is called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            self.seen.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


class Layer(torch.nn.Module):
    def __init__(self, groups):
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def one_query(heads, kv_heads, dtype, mask, queries=1):
    generator = torch.Generator().manual_seed(heads)
    q = torch.randn(2, heads, queries, 16, generator=generator).to(dtype)
    k, v = (torch.randn(2, kv_heads, 21, size, generator=generator).to(dtype) for size in (16, 16))
    hidden = torch.rand(2, heads if mask == "per head" else 1, queries, 21, generator=generator) < 0.4
    given = {None: None, "added": torch.zeros(hidden.shape).masked_fill(hidden, -1e30).to(dtype)}.get(mask, ~hidden)
    return Layer(heads // kv_heads), q, k, v, given


@pytest.mark.parametrize("mask", [None, "bool", "added", "per head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (5, 1)])
def test_it_is_transformers_attention(heads, dtype, mask):
    arguments = one_query(*heads, dtype, mask)
    got, expected = (f(*arguments, scaling=0.3)[0] for f in (step_attention.attention, sdpa_attention_forward))
    assert got.shape == expected.shape
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert torch.allclose(got, expected, rtol=0, atol=tolerance)


def test_what_is_no_single_query_or_is_watched_is_left_as_it_was():
    for queries in (1, 3):
        arguments = one_query(6, 2, torch.bfloat16, "bool", queries)
        with Shapes() as shapes:
            got = step_attention.attention(*arguments, scaling=0.3)[0]
        assert torch.equal(got, sdpa_attention_forward(*arguments, scaling=0.3)[0])
        assert shapes.seen == [tuple(arguments[1].shape)] or queries == 1  # transformers packs it too, under a mask
    arguments = one_query(6, 2, torch.bfloat16, None)
    with Shapes() as shapes:
        step_attention.attention(*arguments, scaling=0.3)
    assert shapes.seen == [(2, 6, 1, 16)]


def test_keys_of_several_heads_are_read_at_once(monkeypatch):
    seen = []

    def watched(q, *rest, **named):
        seen.append(tuple(q.shape))
        return scaled_dot_product_attention(q, *rest, **named)

    monkeypatch.setattr(step_attention, "scaled_dot_product_attention", watched)
    step_attention.attention(*one_query(6, 2, torch.bfloat16, None))
    step_attention.attention(*one_query(4, 4, torch.bfloat16, None))
    step_attention.attention(*one_query(4, 4, torch.float32, None))  # nothing to gain
    assert seen == [(2, 2, 3, 16), (2, 4, 2, 16)]


@pytest.mark.parametrize("name", TINY)
def test_models_compute_what_they_did(name, tmp_path):
    lm = tiny(name)
    executed = quantize(lm, SMOOTHQUANT_LLAMA, backend="auto")
    before, config = lm.config._attn_implementation, executed.config
    supported = before == "sdpa" and getattr(lm.model, "_supports_attention_backend", False)
    assert config._attn_implementation == (step_attention.NAME if supported else before)
    back = load_int8(save_int8(executed, tmp_path / "model"))
    assert back.config._attn_implementation == config._attn_implementation
    plain = executed.replace(model=executed.model)
    with torch.no_grad():
        found = []
        for implementation in (config._attn_implementation, before):
            plain.config._attn_implementation = implementation
            cache = None
            for part in IDS.split([37, 1, 1, 1], 1):
                out = plain.model(input_ids=part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
            found.append(out.logits)
    assert lm.config._attn_implementation == before
    assert float((found[0] - found[1]).norm()) <= 0.02 * float(found[1].norm())  # a code at a half may fall elsewhere


def test_streams_of_it_share_their_sinks_still():
    """All linears in floating point: with INT8 ones, last digits of the attention move codes that are at a half."""
    executed = quantize(tiny("LlamaForCausalLM"), SMOOTHQUANT_LLAMA, backend="auto", skip=["*"])
    assert executed.config._attn_implementation == step_attention.NAME
    parallel, tokens = (
        streaming_perplexity(executed, IDS[0], Sinks(2, 9), method=how, progress=False).nll
        for how in ("parallel", "tokens")
    )
    assert torch.allclose(torch.as_tensor(parallel), torch.as_tensor(tokens), atol=1e-4)
    cache = SinkCache(executed, Sinks(2, 9))
    with torch.no_grad():
        for part in IDS[:1].split([9, 1, 1, 29], 1):
            assert executed.model(input_ids=part, past_key_values=cache, use_cache=True).logits.isfinite().all()
    cache.close()


def test_a_compiled_model_takes_transformers_way():
    executed = quantize(tiny("LlamaForCausalLM", num_hidden_layers=1), SMOOTHQUANT_LLAMA, backend="auto")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = executed.model(IDS[:, :1], use_cache=False).logits
        got = torch.compile(executed.model, backend="eager")(IDS[:, :1], use_cache=False).logits
    torch._dynamo.reset()
    assert float((got - expected).norm()) <= 0.02 * float(expected.norm())

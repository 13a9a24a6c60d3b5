"""Perplexity of a stream: both methods against the slow computation, bad input, stopping and going on."""

import math
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference
from streams import STREAMED, model

import sqviz
from sqviz.errors import Cancelled, NonFinite, SqvizError, TextTooShort, TooLarge
from sqviz.models.tiny import tiny
from sqviz.streaming import feed, shared_sinks
from sqviz.streaming.perplexity import perplexity_within, streaming_perplexity
from sqviz.streaming.policies import Dense, Recompute, Sinks, Window
from sqviz.streaming.shared_sinks import SharedSinks

IDS = torch.randint(3, 131, (60,), generator=torch.Generator().manual_seed(3))


def nll_of(logits, ids):
    """−ln p of tokens 1 …, by the definition."""
    return -logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("name", STREAMED)
def test_both_methods_are_the_slow_computation(name):
    lm, ids = model(name), IDS[:30]
    for policy in (Sinks(2, 7), Window(6), Dense()):
        wanted = nll_of(reference(lm, ids, policy.sinks, policy.recent), ids)
        for method in ("tokens", "parallel"):
            result = streaming_perplexity(lm, ids, policy, method=method, block=11)
            assert torch.allclose(result.nll, wanted, atol=2e-4), (policy, method)
            assert result.perplexity == pytest.approx(math.exp(float(wanted.mean())), rel=1e-3)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(2, 50), st.integers(0, 4), st.integers(1, 12), st.integers(1, 40), st.booleans())
def test_blocks_of_any_size_agree(length, sinks, recent, block, alibi):
    lm = model("BloomForCausalLM" if alibi else "LlamaForCausalLM")
    one = streaming_perplexity(lm, IDS[:length], Sinks(sinks, recent), method="tokens")
    many = streaming_perplexity(lm, IDS[:length], Sinks(sinks, recent), block=block)
    assert len(one.nll) == length - 1
    assert torch.allclose(one.nll, many.nll, atol=1e-4)


@pytest.mark.parametrize("lot", [1, 3, 256])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "FalconForCausalLM/7b", "GlmForCausalLM", "Cohere2ForCausalLM"])
def test_sharing_sinks_changes_nothing(name, lot, monkeypatch):
    lm, policy = model(name, attn_implementation="sdpa"), Sinks(3, 8)
    with monkeypatch.context() as patched:
        patched.setattr(feed, "applies", lambda cache: False)
        own = streaming_perplexity(lm, IDS, policy, block=13)
    monkeypatch.setattr(shared_sinks, "LOT", lot)
    turned, turn = [], SharedSinks._turned
    monkeypatch.setattr(SharedSinks, "_turned", lambda self, query: turned.append(1) or turn(self, query))
    shared = streaming_perplexity(lm, IDS, policy, block=13)
    assert len(turned) == 5 * lm.config.num_hidden_layers  # blocks, each longer than the window
    assert torch.allclose(own.nll, shared.nll, atol=2e-5)


@pytest.mark.parametrize("method", ["tokens", "parallel"])
@pytest.mark.parametrize("recent", [1, 5, 100])
def test_recomputation_runs_each_window_by_itself(recent, method):
    lm, ids = model("LlamaForCausalLM"), IDS[:24]
    windows = [ids[max(0, t - recent + 1) : t + 1] for t in range(len(ids))]
    with torch.no_grad():
        logits = torch.stack([lm.model(input_ids=window[None]).logits[0, -1] for window in windows])
    result = streaming_perplexity(lm, ids, Recompute(recent), method=method, block=13)
    assert torch.allclose(result.nll, nll_of(logits, ids), atol=1e-4)


def test_perplexity_within_a_window_is_that_of_its_tokens():
    nll = torch.rand(40, generator=torch.Generator().manual_seed(0))
    for window in (1, 7, 40, 90):
        shown = perplexity_within(nll, window)
        wanted = [float(nll[max(0, k - window + 1) : k + 1].mean().exp()) for k in range(40)]
        assert shown.tolist() == pytest.approx(wanted, rel=1e-5)
    result = streaming_perplexity(model("LlamaForCausalLM"), IDS, Sinks(2, 6))
    assert float(result.running[-1]) == pytest.approx(result.perplexity, rel=1e-5)
    assert result.tokens_per_second > 0


class Stop(Exception):
    pass


@pytest.mark.parametrize("policy", [Sinks(2, 7), Window(5), Dense(), Recompute(6)], ids=repr)
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BloomForCausalLM", "DeepseekV2ForCausalLM"])
def test_a_stopped_run_goes_on_where_it_stopped(tmp_path, name, policy, monkeypatch):
    monkeypatch.setattr("sqviz.streaming.cache.SLACK", 3)  # the window moves to the buffer's beginning often
    lm, file = model(name), tmp_path / "run.safetensors"
    whole = streaming_perplexity(lm, IDS, policy, block=8)

    def stop(read, nll):
        if read > 30:
            raise Stop

    with pytest.raises(Stop):
        streaming_perplexity(lm, IDS, policy, block=8, checkpoint=file, on_block=stop)
    seen = []
    rest = streaming_perplexity(lm, IDS, policy, block=8, checkpoint=file, on_block=lambda read, nll: seen.append(read))
    assert seen[0] > 30
    assert torch.equal(rest.nll, whole.nll)
    again = streaming_perplexity(lm, IDS, policy, block=8, checkpoint=file, on_block=lambda *_: pytest.fail("done"))
    assert torch.equal(again.nll, whole.nll)


def test_a_killed_run_goes_on(tmp_path):
    """Another process, killed while it works; nothing of it is asked to tidy up."""
    file, told = tmp_path / "run.safetensors", tmp_path / "told"
    script = f"""
import pathlib, time, torch
from sqviz.models.tiny import tiny
from sqviz.streaming.perplexity import streaming_perplexity
from sqviz.streaming.policies import Sinks
def slow(read, _):
    if read > 30:
        pathlib.Path({str(told)!r}).write_text("here")
        time.sleep(600)
streaming_perplexity(
    tiny("LlamaForCausalLM"), torch.tensor({IDS.tolist()}), Sinks(2, 7),
    block=8, checkpoint={str(file)!r}, every_seconds=0, on_block=slow,
)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    try:
        until = time.monotonic() + 120
        while not told.exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    lm, seen = model("LlamaForCausalLM"), []
    rest = streaming_perplexity(
        lm, IDS, Sinks(2, 7), block=8, checkpoint=file, on_block=lambda read, _: seen.append(read)
    )
    assert seen[0] > 24
    assert torch.equal(rest.nll, streaming_perplexity(lm, IDS, Sinks(2, 7), block=8).nll)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    lm, file = model("LlamaForCausalLM"), tmp_path / "run.safetensors"
    streaming_perplexity(lm, IDS, Sinks(2, 7), checkpoint=file)
    kept = file.read_bytes()
    for other, ids, policy, differs in (
        (lm, IDS, Sinks(3, 7), "policy"),
        (lm, IDS[:-1], Sinks(2, 7), "ids"),
        (model("LlamaForCausalLM", seed=5), IDS, Sinks(2, 7), "model"),
    ):
        with pytest.raises(SqvizError, match=rf"another run: its {differs} differ.*delete"):
            streaming_perplexity(other, ids, policy, checkpoint=file)
    assert file.read_bytes() == kept
    file.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(SqvizError, match=r"damaged.*delete it"):
        streaming_perplexity(lm, IDS, Sinks(2, 7), checkpoint=file)


def test_a_checkpoint_of_another_version_is_refused(tmp_path, monkeypatch):
    lm, file = model("LlamaForCausalLM"), tmp_path / "run.safetensors"
    streaming_perplexity(lm, IDS, Sinks(2, 7), checkpoint=file)
    monkeypatch.setattr("sqviz.streaming.checkpoint.VERSION", 9)
    with pytest.raises(SqvizError, match=r"is sqviz-stream 2; this sqviz reads sqviz-stream 9"):
        streaming_perplexity(lm, IDS, Sinks(2, 7), checkpoint=file)


def test_a_failed_pass_leaves_the_checkpoint_as_it_was(tmp_path, monkeypatch):
    lm, file = model("LlamaForCausalLM"), tmp_path / "run.safetensors"
    whole = streaming_perplexity(lm, IDS, Sinks(2, 7), block=10)
    head, calls = lm.model.lm_head.forward, []

    def broken(x):
        calls.append(None)
        return head(x) * (torch.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(lm.model.lm_head, "forward", broken)
    with pytest.raises(NonFinite, match="after 30 tokens"):
        streaming_perplexity(lm, IDS, Sinks(2, 7), block=10, checkpoint=file, every_seconds=0)
    resumed = streaming_perplexity(lm, IDS, Sinks(2, 7), block=10, checkpoint=file)
    assert torch.equal(resumed.nll, whole.nll)


def test_cancelled_between_two_passes_the_model_is_as_before():
    lm, token = model("LlamaForCausalLM"), sqviz.CancelToken()
    hooks = [len(module._forward_pre_hooks) for module in lm.model.modules()]
    with pytest.raises(Cancelled):
        streaming_perplexity(lm, IDS, Sinks(2, 7), block=5, cancel=token, on_block=lambda read, _: token.cancel())
    assert [len(module._forward_pre_hooks) for module in lm.model.modules()] == hooks


def test_a_dense_run_that_would_not_fit_is_refused_before_it_starts(monkeypatch):
    class Machine:
        available = 3_000_000

    monkeypatch.setattr(feed.psutil, "virtual_memory", Machine)
    lm = model("LlamaForCausalLM")
    ids = torch.randint(3, 131, (20_000,))
    with pytest.raises(TooLarge, match=r"20000 tokens need about 0\.\d GB.*Sinks"):
        streaming_perplexity(lm, ids, Dense(), block=16)
    assert streaming_perplexity(lm, ids[:40], Dense(), block=16).perplexity > 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": IDS[:1]}, "at least 2"),
        ({"method": "both"}, "'tokens' or 'parallel'"),
        ({"block": 0}, "at least 1"),
        ({"block": True}, "at least 1"),
        ({"policy": "Sinks"}, "keeps no cache"),
    ],
)
def test_bad_input(given, message):
    arguments = {"tokens": IDS, "policy": Sinks(2, 7)} | given
    with pytest.raises(SqvizError, match=message):
        streaming_perplexity(model("LlamaForCausalLM"), **arguments)


def test_learned_positions_are_refused_but_can_be_recomputed():
    lm = tiny("OPTForCausalLM")
    with pytest.raises(SqvizError, match="absolute position"):
        streaming_perplexity(lm, IDS, Sinks(2, 7))
    assert streaming_perplexity(lm, IDS, Recompute(8)).perplexity > 1
    with pytest.raises(TextTooShort):
        streaming_perplexity(lm, IDS[:1], Recompute(8))

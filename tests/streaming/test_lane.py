"""Lanes: what a live view shows is what the functions without a view compute."""

import pytest
import torch
from streams import model

from sqviz.errors import SqvizError
from sqviz.streaming.generate import stream_generate
from sqviz.streaming.lane import Reading, Writing, trained_context
from sqviz.streaming.perplexity import streaming_perplexity
from sqviz.streaming.policies import Dense, Recompute, Sinks, Window

IDS = torch.randint(3, 131, (40,), generator=torch.Generator().manual_seed(3))
LM = model("LlamaForCausalLM")


def hooks() -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in LM.model.modules())


@pytest.mark.parametrize("policy", [Dense(), Window(9), Sinks(2, 7), Recompute(9)])
def test_a_reading_lane_is_the_perplexity_token_by_token(policy):
    before, lane = hooks(), Reading(LM, IDS, policy, alternatives=3)
    steps = list(iter(lane.step, None))
    expected = streaming_perplexity(LM, IDS, policy, method="tokens").nll
    assert torch.allclose(torch.tensor([step.nll for step in steps]), expected, atol=1e-5)
    assert [step.position for step in steps] == list(range(1, 40))
    assert [step.token for step in steps] == IDS[1:].tolist()
    assert all(len(step.top) == 3 and step.top[0][1] >= step.top[2][1] > 0 for step in steps)
    assert [step.cache.keys for step in steps] == [min(t, 9) if policy != Dense() else t for t in range(1, 40)]
    assert lane.step() is None
    lane.close()
    assert hooks() == before


@pytest.mark.parametrize("policy", [Window(9), Sinks(2, 7), Recompute(9)])
def test_a_writing_lane_is_the_generated_stream(policy):
    lane, stream = Writing(LM, IDS[:12], policy, eos=(), seed=3, do_sample=True), None
    stream = stream_generate(LM, IDS[:12], policy, eos=(), seed=3, do_sample=True)
    for _ in range(15):
        mine, its = lane.step(), next(stream)
        assert (mine.token, mine.nll, mine.position, mine.cache) == (its.token, its.nll, its.position, its.cache)
    lane.close()
    stream.close()


def test_a_writing_lane_ends_where_the_turn_does():
    lane = Writing(LM, IDS[:5], Sinks(2, 7), max_tokens=2, eos=())
    assert [lane.step() is None for _ in range(3)] == [False, False, True]
    lane.close()


def test_the_policy_changes_between_two_steps():
    """From there on the lane is a cache whose policy was changed at that place."""
    lane = Reading(LM, IDS, Sinks(2, 7))
    first = [lane.step().nll for _ in range(20)]
    lane.change(Sinks(1, 5))
    rest = [step.nll for step in iter(lane.step, None)]
    from sqviz.streaming.cache import SinkCache

    cache, found = SinkCache(LM, Sinks(2, 7)), []
    with torch.no_grad():
        for at in range(39):
            if at == 20:
                cache.policy = Sinks(1, 5)
            logits = LM.model(input_ids=IDS[None, at : at + 1], past_key_values=cache).logits[0, -1]
            found.append(-float(logits.log_softmax(-1)[IDS[at + 1]]))
    assert first + rest == pytest.approx(found, abs=1e-5)
    lane.close()
    slow = Reading(LM, IDS, Recompute(9))
    slow.step()
    slow.change(Recompute(5))
    nll = [step.nll for step in iter(slow.step, None)]
    expected = streaming_perplexity(LM, IDS, Recompute(5), method="tokens").nll[1:]
    assert torch.allclose(torch.tensor(nll), expected, atol=1e-5)


@pytest.mark.parametrize(("policy", "other"), [(Sinks(2, 7), Recompute(9)), (Recompute(9), Sinks(2, 7))])
def test_a_cache_does_not_come_or_go_on_the_way(policy, other):
    lane = Reading(LM, IDS, policy)
    lane.step()
    with pytest.raises(SqvizError, match="Begin a new stream"):
        lane.change(other)
    assert lane.policy == policy
    assert lane.step() is not None
    lane.close()


def test_a_step_that_fails_can_be_tried_again(monkeypatch):
    lane = Reading(LM, IDS, Sinks(2, 7))
    got = [lane.step().nll for _ in range(5)]
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise torch.OutOfMemoryError("no memory")

        patch.setattr(LM.model.lm_head, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            lane.step()
    got += [step.nll for step in iter(lane.step, None)]
    expected = streaming_perplexity(LM, IDS, Sinks(2, 7), method="tokens").nll
    assert torch.allclose(torch.tensor(got), expected, atol=1e-5)
    lane.close()


def test_trained_context():
    assert trained_context(LM) == LM.config.max_position_embeddings
    assert trained_context(model("BloomForCausalLM")) is None

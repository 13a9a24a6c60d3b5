"""What a token costs: the caches that are timed hold what they are said to hold, and all take turns."""

import pytest
import torch

import sqviz
from sqviz.errors import Cancelled, SqvizError, TextTooShort
from sqviz.evaluation.stream_cost import MARGIN, POLICIES, interleaved, steps_at, stream_cost
from sqviz.models.tiny import tiny

IDS = torch.randint(3, 131, (64,), generator=torch.Generator().manual_seed(1))


def attended(lm) -> list[int]:
    """Notes how many keys each pass attends to."""
    seen: list[int] = []
    attention = lm.model.model.layers[0].self_attn

    def note(_, args, kwargs) -> None:
        cache, new = kwargs["past_key_values"], kwargs["hidden_states"].shape[1]
        seen.append(new if cache is None else cache.get_mask_sizes(new, 0)[0])

    attention.register_forward_pre_hook(note, with_kwargs=True)
    return seen


@pytest.mark.parametrize("size", [7, 16, 33])
def test_every_step_attends_to_as_many_keys(size):
    lm = tiny("LlamaForCausalLM")
    with torch.no_grad(), steps_at(lm, IDS, size, 2) as (steps, held):
        seen = attended(lm)
        assert tuple(steps) == POLICIES
        for turn in range(20):
            for step in steps.values():
                step(turn)
        assert held["window, recomputed"]() == 0
        assert held["sinks"]() >= held["dense"]() * size / (size + 1) > 0
    assert set(seen) == {size}


def test_policies_take_turns_and_the_first_turn_does_not_count():
    order, cpu = [], torch.device("cpu")
    steps = {name: lambda turn, name=name: order.append((name, turn)) for name in "ab"}
    found = interleaved(steps, {"a": 3, "b": 1}, cpu)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("a", 3)]
    assert set(found) == {"a", "b"}
    assert all(seconds >= 0 for seconds in found.values())


def test_a_row_for_each_policy_and_size(tmp_path):
    lm = tiny("LlamaForCausalLM")
    hooks = [len(module._forward_pre_hooks) for module in lm.model.modules()]
    found = stream_cost(lm, (9, 17), IDS, sinks=2, rounds=3)
    assert [(row.size, row.policy) for row in found.rows] == [(size, name) for size in (9, 17) for name in POLICIES]
    assert all(row.milliseconds > 0 and row.peak > 0 for row in found.rows)
    frame = found.to_frame()
    assert (frame.loc[(slice(None), "dense"), "of a dense step"] == 1).all()
    assert [len(trace.x) for trace in found.figure().data] == [2] * 6
    bundle = found._repr_mimebundle_()
    assert {"image/svg+xml", "application/vnd.plotly.v1+json", "text/plain"} <= set(bundle)
    assert "plotly" in found.to_html(tmp_path / "cost.html").read_text(encoding="utf-8")
    assert [len(module._forward_pre_hooks) for module in lm.model.modules()] == hooks


def test_models_without_a_cache_of_their_positions_can_be_recomputed():
    found = stream_cost(tiny("OPTForCausalLM"), (9,), IDS, rounds=1, policies=("dense", "window, recomputed"))
    assert len(found.rows) == 2
    with pytest.raises(SqvizError, match="learns an embedding"):
        stream_cost(tiny("OPTForCausalLM"), (9,), IDS, rounds=1)


def test_bad_input():
    lm = tiny("LlamaForCausalLM")
    with pytest.raises(SqvizError, match="'dense'"):
        stream_cost(lm, (9,), IDS, policies=("sparse",))
    with pytest.raises(SqvizError, match="one round"):
        stream_cost(lm, (9,), IDS, rounds=0)
    with pytest.raises(SqvizError, match="do not fit"):
        stream_cost(lm, (4,), IDS)
    with pytest.raises(TextTooShort, match=str(60 + MARGIN)):
        stream_cost(lm, (9, 60), IDS)
    token = sqviz.CancelToken()
    token.cancel()
    with pytest.raises(Cancelled):
        stream_cost(lm, (9,), IDS, cancel=token)

"""The live stream without a page: lanes get on, stop, change and start anew; what is shown is what they computed."""

import dataclasses
import math
import time

import pytest
import tokenizers
import torch
import traitlets

from sqviz.errors import SqvizError, TextTooShort
from sqviz.models.tiny import tiny
from sqviz.observe.pieces import token_texts
from sqviz.streaming.generate import stream_generate
from sqviz.streaming.lane import LaneStep
from sqviz.streaming.perplexity import streaming_perplexity
from sqviz.streaming.policies import Dense, Recompute, Sinks, Window
from sqviz.streaming.reader import CacheView
from sqviz.widgets import stream_explorer as module
from sqviz.widgets.stream_explorer import LANES, explore_stream
from sqviz.widgets.stream_track import LATEST, POINTS, Track

IDS = torch.randint(3, 131, (120,), generator=torch.Generator().manual_seed(1))
LM = tiny("LlamaForCausalLM")


def hooks() -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in LM.model.modules())


class Heard:
    """What the page would be sent."""

    def __init__(self, view, monkeypatch) -> None:
        self.messages: list[dict] = []
        monkeypatch.setattr(view, "send", lambda content, buffers=None: self.messages.append(content))

    def steps(self, name: str) -> list[list]:
        return [s for m in self.messages if m["kind"] == "steps" for s in m["lanes"].get(name, {"steps": []})["steps"]]


@pytest.fixture
def view():
    found = explore_stream(LM, IDS, lanes=list(LANES), sinks=2, recent=9)
    yield found
    found.close()


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_each_lane_is_the_perplexity_of_its_policy(view, monkeypatch):
    heard, before = Heard(view, monkeypatch), hooks()
    view.start()
    assert view.wait(60)
    assert (view.state, view.problem) == ("ended", "")
    policies = {"dense": Dense(), "window": Window(11), "sinks": Sinks(2, 9), "recompute": Recompute(11)}
    for name, policy in policies.items():
        expected = streaming_perplexity(LM, IDS, policy, method="tokens").nll
        steps = heard.steps(name)
        assert [step[0] for step in steps] == list(range(1, 120))
        assert [step[2] for step in steps] == pytest.approx(expected.tolist(), abs=2e-4)
        assert view.tracks[name].perplexity == pytest.approx(float(expected.double().mean().exp()), rel=1e-4)
        assert view.tracks[name].ended
    assert view.page_state()["snapshot"]["lanes"]["sinks"]["count"] == 119
    view.close()
    assert hooks() == before


def test_pause_start_and_reset(view, monkeypatch):
    heard = Heard(view, monkeypatch)
    view.start()
    until(lambda: "sinks" in view.tracks and view.tracks["sinks"].count > 5)
    view.pause()
    assert view.wait(10)
    assert view.state == "paused"
    counts = {name: track.count for name, track in view.tracks.items()}
    time.sleep(0.1)
    assert counts == {name: track.count for name, track in view.tracks.items()}
    view.start()
    assert view.wait(60)
    assert [step[0] for step in heard.steps("sinks")] == list(range(1, 120))
    view.reset()
    assert (view.state, view.tracks) == ("ready", {})
    assert heard.messages[-1] == {"kind": "all", "lanes": {}, "machine": heard.messages[-1]["machine"]}


def test_stop_frees_the_caches_and_start_begins_anew(view, monkeypatch):
    heard, before = Heard(view, monkeypatch), hooks()
    view.start()
    until(lambda: "sinks" in view.tracks and view.tracks["sinks"].count > 5)
    view.stop()
    assert (view.state, view._lanes, hooks()) == ("ended", {}, before)
    count = view.tracks["sinks"].count
    assert count > 5  # what was read is still there to be looked at
    view.on = ["sinks"]
    assert view.state == "ended"
    heard.messages.clear()
    view.start()
    assert view.wait(60)
    assert [step[0] for step in heard.steps("sinks")] == list(range(1, 120))
    view.stop()
    view.stop()
    assert (view.state, hooks()) == ("ended", before)


def test_stop_before_the_start_is_nothing(view):
    view.stop()
    view.pause()
    assert view.state == "ready"


def test_a_lane_that_comes_in_when_the_others_are_at_the_end(view, monkeypatch):
    heard = Heard(view, monkeypatch)
    view.on = ["sinks"]
    view.start()
    assert view.wait(60)
    assert view.state == "ended"
    view.on = ["sinks", "window"]
    assert view.state == "paused"
    view.start()
    assert view.wait(60)
    assert view.state == "ended"
    assert [len(heard.steps(name)) for name in ("sinks", "window")] == [119, 119]


def test_a_moved_slider_is_answered_by_the_very_next_step(view, monkeypatch):
    """The lane that it concerns goes first, and what it did is sent at once, whatever the pace."""
    heard, order = Heard(view, monkeypatch), []
    monkeypatch.setattr(module.Pace, "due", lambda self: False)
    real = module.StreamExplorer._step

    def step(self, name):
        order.append(name)
        if len(order) == 40:
            self.sinks = 3
        return real(self, name)

    monkeypatch.setattr(module.StreamExplorer, "_step", step)
    view.on = ["dense", "window", "sinks"]
    view.start()
    assert view.wait(60)
    assert {order[39], *order[40:42]} >= {"window", "sinks"}
    sent = [m for m in heard.messages if m["kind"] == "steps"]
    assert len(sent) == 3  # one for each of the two lanes, and the end
    assert len(sent[1]["lanes"]["sinks"]["cache"]["sinks"]) == 3


def test_sliders_act_while_it_runs(view, monkeypatch):
    """Token by token against a lane whose policy is changed at the same place."""
    from sqviz.streaming.lane import Reading

    heard = Heard(view, monkeypatch)
    view.on = ["sinks"]
    view.start()
    until(lambda: "sinks" in view.tracks and view.tracks["sinks"].count > 20)
    view.recent, view.sinks = 5, 4
    assert view.wait(60)
    got = [step[2] for step in heard.steps("sinks")]
    for first in range(20, 119):
        for second in range(first, min(first + 4, 119)):  # a step may come between the two assignments
            lane, expected = Reading(LM, IDS, Sinks(2, 9)), []
            for place in range(119):
                if place == second:
                    lane.change(Sinks(4, 5))
                elif place == first:
                    lane.change(Sinks(2, 5))
                expected.append(lane.step().nll)
                if abs(expected[-1] - got[place]) > 2e-4:
                    break
            lane.close()
            if len(expected) == 119 and abs(expected[-1] - got[-1]) < 2e-4:
                return
    pytest.fail("no place at which the sliders could have acted")


def test_fast_lanes_are_not_held_up_by_slow_ones(view, monkeypatch):
    """Each has the same time: a lane whose step takes ten times as long gets a tenth as far."""
    Heard(view, monkeypatch)
    view.on = ["window", "sinks"]
    real = module.StreamExplorer._make

    def slowed(self, policy):
        lane = real(self, policy)
        if policy == Window(11):
            step = lane.step
            lane.step = lambda: (time.sleep(0.05), step())[1]
        return lane

    monkeypatch.setattr(module.StreamExplorer, "_make", slowed)
    view.start()
    until(lambda: view.tracks.get("sinks") is not None and view.tracks["sinks"].count >= 60)
    assert view.tracks["window"].count < 30
    view.pause()


def test_an_error_pauses_and_is_shown(view, monkeypatch):
    Heard(view, monkeypatch)
    with monkeypatch.context() as patch:

        def full(*_, **__):
            raise torch.OutOfMemoryError("no memory")

        patch.setattr(LM.model.lm_head, "forward", full)
        view.start()
        assert view.wait(30)
        assert (view.state, view.problem) == ("paused", "OutOfMemoryError: no memory")
    view.start()
    assert view.wait(60)
    assert (view.state, view.problem) == ("ended", "")
    assert view.tracks["sinks"].count == 119


def test_messages_of_the_page(view, monkeypatch):
    heard = Heard(view, monkeypatch)
    view._message(None, {"kind": "start"}, None)
    until(lambda: view.state == "ended")
    view._message(None, {"kind": "hello"}, None)
    assert heard.messages[-1]["kind"] == "all"
    assert len(heard.messages[-1]["lanes"]["dense"]["steps"]) == 119
    view._message(None, {"kind": "source", "what": "text", "text": "hello"}, None)
    assert "has no tokenizer" in view.problem
    view._message(None, "nonsense", None)
    view._message(None, {"kind": "reset"}, None)
    assert view.state == "ready"


def speaking():
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(97 + i): i for i in range(26)} | {" ": 26, "?": 27}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    return dataclasses.replace(LM, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_a_long_paste_comes_in_pieces_and_its_end_is_left_out(monkeypatch):
    monkeypatch.setattr(module, "MOST_PASTED", 1000)
    monkeypatch.setattr(module, "SLOW_TO_TOKENIZE", 500)
    view = explore_stream(speaking(), "start here", lanes=["sinks"], recent=9)
    Heard(view, monkeypatch)
    sources = []
    view.observe(lambda change: sources.append(change["new"]["source"]), names=["about"])
    for _ in range(3):
        view._message(None, {"kind": "piece", "text": "abcd" * 100}, None)
    view._message(None, {"kind": "source", "what": "text", "text": "xyz"}, None)
    assert view.about["tokens"] == 1000
    assert sources[0] == "cutting 1,000 characters into tokens …"
    assert view.about["source"] == "pasted text"
    assert "longer than 1,000 characters" in view.problem
    view._message(None, {"kind": "source", "what": "text", "text": "abc"}, None)
    assert view.about["tokens"] == 3  # the pieces belonged to the text before
    view._message(None, {"kind": "source", "what": "text", "text": "a"}, None)
    assert "1 token: one to give and one to predict are needed" in view.problem
    assert view.about["tokens"] == 3
    view.close()


def test_sampling_as_the_page_chooses_it(monkeypatch):
    """Greedy and drawn texts are those of stream_generate; nonsense is refused and leaves the text as it was."""
    lm = speaking()
    view = explore_stream(lm, "start here", lanes=["sinks"], sinks=2, recent=9)
    heard = Heard(view, monkeypatch)
    for choice in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 3}):
        view._message(None, {"kind": "source", "what": "prompt", "text": "abc", **choice}, None)
        heard.messages.clear()
        view.start()
        until(lambda: len(heard.steps("sinks")) > 20)
        view.pause()
        assert view.wait(30)
        stream = stream_generate(lm, "abc", Sinks(2, 9), eos=(), **choice)
        got = heard.steps("sinks")
        expected = [next(stream) for _ in got]
        assert [step[1] for step in got] == list(token_texts(lm.tokenizer, [step.token for step in expected]))
        assert [step[2] for step in got] == pytest.approx([step.nll for step in expected], abs=2e-4)
        stream.close()
    view._message(None, {"kind": "source", "what": "prompt", "text": "abc", "top_p": "most"}, None)
    assert "most" in view.problem
    view.close()


def test_another_text_and_the_models_own(view, monkeypatch):
    Heard(view, monkeypatch)
    view.on = ["sinks"]
    view.read(IDS[:30])
    view.start()
    assert view.wait(60)
    assert view.tracks["sinks"].count == 29
    view.write(IDS[:9], max_tokens=12, seed=1)
    view.start()
    assert view.wait(60)
    assert view.tracks["sinks"].count == 12
    with pytest.raises(TextTooShort):
        view.read(IDS[:1])


def test_two_on_one_model(monkeypatch):
    views = [explore_stream(LM, IDS, lanes=["sinks"], sinks=count, recent=9) for count in (1, 3)]
    heard = [Heard(view, monkeypatch) for view in views]
    for view in views:
        view.start()
    for view, messages, count in zip(views, heard, (1, 3), strict=True):
        assert view.wait(60)
        expected = streaming_perplexity(LM, IDS, Sinks(count, 9), method="tokens").nll
        assert [step[2] for step in messages.steps("sinks")] == pytest.approx(expected.tolist(), abs=2e-4)
        view.close()


def test_a_track_stays_small_however_long():
    track, cache = Track(), CacheView((0, 1, 2, 3), 10, 20, 15, 16, 1000)
    for position in range(1, 50_001):
        track.add(LaneStep(position, 5, "x", 1.0, (("y", 0.5),), cache, 0.001), 0.001)
        if position % 7000 == 0:
            track.news()
    assert len(track.points) <= POINTS
    assert (len(track._latest), track.count) == (LATEST, 50_000)
    assert [point[0] for point in track.points] == sorted({point[0] for point in track.points})
    assert track.points[-1][0] > 49_000
    assert track.running == track.perplexity == pytest.approx(math.e)
    assert len(track.news()["steps"]) == LATEST
    assert track.news()["steps"] == []
    track.add(None, 0.0)
    assert track.all()["ended"]


def test_bad_input(view):
    with pytest.raises(SqvizError, match="'dense'"):
        explore_stream(LM, IDS, lanes=["sparse"])
    with pytest.raises(SqvizError, match="at least 0 and 1"):
        explore_stream(LM, IDS, recent=0)
    with pytest.raises(TextTooShort):
        explore_stream(LM, IDS[:1])
    with pytest.raises(traitlets.TraitError, match="can run"):
        view.on = ["sparse"]
    view.recent = 10**9
    assert view.recent == LM.config.max_position_embeddings
    view.sinks = -3
    assert view.sinks == 0


def test_still_and_page(view, monkeypatch):
    assert "image/png" in view._repr_mimebundle_()[0]  # before anything was read
    Heard(view, monkeypatch)
    view.start()
    assert view.wait(60)
    assert "image/png" in view._repr_mimebundle_()[0]
    assert '"count": 119' in view.to_html()

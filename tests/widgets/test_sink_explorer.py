"""The sink explorer without a page: what is chosen is what is scored, and the latest choice wins."""

import base64
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import traitlets

sys.path.insert(0, str(Path(__file__).parents[1] / "streaming"))  # its slow second implementation
from reference import reference

import sqviz.widgets.sink_explorer as module
from sqviz.errors import SqvizError, TextTooShort
from sqviz.models.tiny import tiny
from sqviz.streaming.perplexity import streaming_perplexity
from sqviz.streaming.policies import Dense, Sinks, Window
from sqviz.widgets.sink_explorer import explore_sinks

IDS = torch.randint(3, 131, (70,), generator=torch.Generator().manual_seed(1))
LM = tiny("LlamaForCausalLM")


@pytest.fixture
def explorer():
    view = explore_sinks(LM, IDS, sinks=2, recent=9)
    assert view.wait(60)
    yield view
    view.close()


def nll(view, name: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(view.scores[name]["nll"]), "<f4").copy())


def check(view, sinks) -> None:
    """Every number against a run of its own."""
    assert view.wait(60)
    assert view.problem == view.status == ""
    size = view.recent + len(view.chosen)
    for name, policy in (("dense", Dense()), ("window", Window(size)), ("sinks", sinks)):
        expected = streaming_perplexity(LM, IDS, policy, method="tokens")
        assert torch.allclose(nll(view, name), expected.nll, atol=1e-4), name
        assert view.scores[name]["policy"] == repr(policy)
        assert view.scores[name]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-4)
    assert view.policy == sinks
    assert view.code == f"cache = sqviz.SinkCache(lm, sqviz.{sinks!r})"


def test_scores_follow_the_choice(explorer):
    check(explorer, Sinks(2, 9))
    explorer.chosen = [0, 5, 7]
    check(explorer, Sinks(3, 9, positions=(0, 5, 7)))
    explorer.recent = 14
    check(explorer, Sinks(3, 14, positions=(0, 5, 7)))
    explorer.chosen = []
    check(explorer, Window(14))
    explorer.chosen = [1, 0]
    check(explorer, Sinks(2, 14))


@pytest.mark.parametrize("chosen", [[], [0], [1, 3], [0, 1, 2, 4, 40]])
def test_a_token_made_a_sink_or_taken_away_is_seen_or_masked(explorer, chosen):
    """Against a model run without any cache, in which each token sees exactly what is kept, masked the slow way."""
    explorer.chosen = chosen
    assert explorer.wait(60)
    slow = reference(LM, IDS, len(chosen), explorer.recent, chosen).log_softmax(-1)
    expected = -slow[:-1].gather(1, IDS[1:, None])[:, 0]
    assert torch.allclose(nll(explorer, "sinks"), expected, atol=1e-4)
    if chosen:
        without = -reference(LM, IDS, 0, explorer.recent).log_softmax(-1)[:-1].gather(1, IDS[1:, None])[:, 0]
        assert (expected - without).abs().max() > 1e-3


def test_a_hundred_moves_cost_few_runs_and_the_latest_wins(explorer, monkeypatch):
    runs, go = [], threading.Event()
    real = streaming_perplexity

    def counted(lm, ids, policy, **rest):
        runs.append(policy)
        go.wait(30)
        return real(lm, ids, policy, **rest)

    monkeypatch.setattr(module, "streaming_perplexity", counted)
    for recent in range(10, 60):
        explorer.recent = recent
    go.set()
    check(explorer, Sinks(2, 59))
    assert len(runs) <= 6


def test_an_error_is_shown_and_the_next_choice_works(explorer, monkeypatch):
    with monkeypatch.context() as patch:

        def fail(*_, **__):
            raise RuntimeError("no memory")

        patch.setattr(module, "streaming_perplexity", fail)
        explorer.recent = 12
        assert explorer.wait(60)
        assert "RuntimeError: no memory" in explorer.problem
    explorer.recent = 13
    check(explorer, Sinks(2, 13))


def test_what_cannot_be_is_refused_or_brought_back(explorer):
    explorer.recent = 1000
    assert explorer.recent == 70
    explorer.recent = 0
    assert explorer.recent == 1
    with pytest.raises(traitlets.TraitError, match="places of tokens"):
        explorer.chosen = [70]
    with pytest.raises(traitlets.TraitError):
        explorer.chosen = [-1]
    check(explorer, Sinks(2, 1))


def test_two_explorers_on_one_model():
    views = [explore_sinks(LM, IDS, sinks=count, recent=9) for count in (1, 3)]
    for view, count in zip(views, (1, 3), strict=True):
        check(view, Sinks(count, 9))
        view.close()
        view._worker.join(10)
        assert not view._worker.alive


def test_still_and_page(explorer):
    data, _ = explorer._repr_mimebundle_()
    assert "image/png" in data
    assert "chosen sinks" in explorer.to_html()


def test_a_page_carries_what_its_sliders_offer(explorer):
    explorer.chosen = [0, 3]
    assert explorer.wait(60)
    explorer.to_html(counts=(0, 1), recents=(5, 900))
    states = explorer.page_state()["states"]
    assert [(state["recent"], state["chosen"]) for state in states] == [
        (recent, chosen) for recent in (5, 70) for chosen in ([], [0], [0, 3])
    ]
    for state in states:
        policy = module._policy(state["recent"], state["chosen"])
        expected = streaming_perplexity(LM, IDS, policy, method="tokens")
        found = torch.from_numpy(np.frombuffer(base64.b64decode(state["scores"]["sinks"]["nll"]), "<f4").copy())
        assert torch.allclose(found, expected.nll, atol=1e-4)
        assert state["code"].endswith(f"sqviz.{policy!r})")


def test_bad_input():
    for given in ({"tokens": 1}, {"sinks": -1}, {"recent": 0}):
        with pytest.raises(SqvizError, match="are needed"):
            explore_sinks(LM, IDS, **given)
    with pytest.raises(TextTooShort):
        explore_sinks(LM, IDS[:1])
    with pytest.raises(SqvizError, match="learns an embedding"):
        explore_sinks(tiny("OPTForCausalLM"), IDS)
    view = explore_sinks(LM, IDS[:3], sinks=8, recent=50)  # more than the text has
    assert (len(view.chosen), view.recent) == (3, 3)
    assert view.wait(60)
    assert view.problem == ""
    view.close()

"""Experiments of chapter 4: policies side by side, answers inside a stream, StreamEval, ARC."""

import json

import plotly.graph_objects as go
import pytest
import torch

import sqviz
from sqviz.errors import Cancelled, NoTokenizer, SqvizError, TooLarge
from sqviz.evaluation.answers import QuestionStream, score_alone, score_answers
from sqviz.evaluation.arc_stream import arc_stream
from sqviz.evaluation.policies import cache_sizes, compare_policies, four_policies, sink_counts, with_line_breaks
from sqviz.evaluation.streameval import streameval
from sqviz.models.tiny import tiny
from sqviz.streaming.perplexity import streaming_perplexity
from sqviz.streaming.policies import Dense, Recompute, Sinks, Window

IDS = torch.randint(3, 131, (80,), generator=torch.Generator().manual_seed(1))


class Letters:
    """A tokenizer of the tiny models: a letter is its code."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [min(ord(letter), 130) for letter in text]}


def lettered():
    return tiny("LlamaForCausalLM").replace(tokenizer=Letters())


def test_policies_of_the_thesis():
    assert list(four_policies(64).values()) == [Dense(), Window(64), Sinks(4, 60), Recompute(64)]
    assert sink_counts(64)["0 + 64"] == Sinks(0, 64)
    assert sink_counts(64)["8 + 56"] == Sinks(8, 56)
    assert cache_sizes((8, 16))["4 + 12"] == Sinks(4, 12)
    with pytest.raises(SqvizError, match="do not fit"):
        sink_counts(8)


def test_a_comparison_is_each_policy_by_itself(tmp_path):
    lm, heard = tiny("LlamaForCausalLM"), []
    found = compare_policies(lm, IDS, four_policies(9, 2), block=16, on_block=lambda *given: heard.append(given))
    for label, policy in four_policies(9, 2).items():
        assert torch.equal(found.results[label].nll, streaming_perplexity(lm, IDS, policy, block=16).nll)
        assert [read for name, read, _ in heard if name == label][-1] == len(IDS)
    frame = found.to_frame()
    assert frame.loc["window", "policy"] == "Window(9)"
    assert frame.loc["dense", "perplexity"] == found.results["dense"].perplexity
    figure = found.figure()
    assert isinstance(figure, go.Figure)
    assert [trace.name for trace in figure.data] == list(four_policies(9, 2))
    bundle = found._repr_mimebundle_()
    assert "image/svg+xml" in bundle
    assert "application/vnd.plotly.v1+json" in bundle
    assert "plotly" in found.to_html(tmp_path / "figure.html").read_text(encoding="utf-8")


def test_a_list_of_policies_is_labelled_by_itself():
    found = compare_policies(tiny("LlamaForCausalLM"), IDS, [Sinks(2, 7), Window(9)], limit=20)
    assert list(found.results) == ["Sinks(2, 7)", "Window(9)"]
    assert all(len(result.nll) == 19 for result in found.results.values())
    with pytest.raises(SqvizError, match="listed twice"):
        compare_policies(tiny("LlamaForCausalLM"), IDS, [Window(9), Window(9)])


def test_a_live_comparison_that_is_stopped_keeps_what_was_read(monkeypatch):
    """By the button, which cancels the token; without `live` the error is raised."""
    policies = {"first": Sinks(2, 7), "second": Window(9), "third": Window(5)}

    def stopping(token):
        return lambda label, read, _: token.cancel() if (label, read) == ("second", 48) else None

    monkeypatch.setattr("sqviz.evaluation.policies.in_notebook", lambda: True)
    lm, token = tiny("LlamaForCausalLM"), sqviz.CancelToken()
    found = compare_policies(lm, IDS, policies, block=16, on_block=stopping(token), cancel=token, live=True)
    assert {label: len(result.nll) for label, result in found.results.items()} == {"first": 79, "second": 48}
    assert torch.equal(found.results["second"].nll, streaming_perplexity(lm, IDS, Window(9), block=16).nll[:48])
    assert found.refused == {"second": "second: stopped after 49 tokens", "third": "third: stopped after 0 tokens"}
    assert "second: stopped" in found.figure().layout.title.subtitle.text
    assert found.to_frame().loc["second", "tokens per second"] == 0
    token = sqviz.CancelToken()
    with pytest.raises(Cancelled):
        compare_policies(lm, IDS, policies, block=16, on_block=stopping(token), cancel=token)


def test_a_policy_that_does_not_fit_is_left_out(monkeypatch):
    def refuse(lm, ids, policy, **rest):
        if policy == Dense():
            raise TooLarge("too many tokens")
        return streaming_perplexity(lm, ids, policy, **rest)

    monkeypatch.setattr("sqviz.evaluation.policies.streaming_perplexity", refuse)
    found = compare_policies(tiny("LlamaForCausalLM"), IDS, [Dense(), Window(9)])
    assert list(found.results) == ["Window(9)"]
    assert "too many tokens" in found.refused["Dense()"]
    assert "too many tokens" in repr(found)


def test_line_breaks_take_the_place_of_the_first_tokens():
    changed = with_line_breaks(lettered(), IDS, 3)
    assert changed[:3].tolist() == [10, 10, 10]
    assert torch.equal(changed[3:], IDS[3:])
    with pytest.raises(SqvizError, match="no tokenizer"):
        with_line_breaks(tiny("LlamaForCausalLM"), IDS)


@pytest.mark.parametrize("policy", [Sinks(2, 9), Window(7), Dense(), Recompute(6)], ids=repr)
def test_an_answer_is_right_if_every_token_is_the_most_likely_one(policy):
    lm = tiny("LlamaForCausalLM")
    stream = QuestionStream(IDS, torch.tensor([[10, 12], [40, 41], [79, 80]]))
    assert not score_answers(lm, stream, policy, block=16).any()  # a random model guesses nothing
    text = IDS.clone()
    for place in (10, 11, 40, 79):  # now let the answers be what the model says
        before = score_of(lm, text[:place], policy)
        text[place] = before
    right = score_answers(lm, QuestionStream(text, stream.answers), policy, block=16)
    assert right.tolist() == [True, True, True]
    text[11] = (text[11] + 1) % 131
    assert score_answers(lm, QuestionStream(text, stream.answers), policy, block=16).tolist()[0] is False


@pytest.mark.parametrize("shots", [0, 1, 2])
def test_a_question_asked_alone_sees_the_ones_right_before_it(shots):
    """The same as a text of its own that is read as a stream without a limit."""
    lm = tiny("LlamaForCausalLM")
    starts, answers = torch.tensor([0, 20, 50]), torch.tensor([[10, 12], [40, 41], [77, 80]])
    text, first = IDS.clone(), [int(starts[max(0, number - shots)]) for number in range(3)]
    for place in (10, 11, 40, 77, 78):
        begin = first[[12, 41, 80].index(next(stop for stop in (12, 41, 80) if place < stop))]
        text[place] = score_of(lm, text[begin:place], Dense())
    text[79] = (score_of(lm, text[first[2] : 79], Dense()) + 1) % 131  # the last token of the third is wrong
    asked = QuestionStream(text, answers, starts)
    assert score_alone(lm, asked, shots=shots).tolist() == [True, True, False]
    with pytest.raises(SqvizError, match="cannot be asked alone"):
        score_alone(lm, QuestionStream(text, answers))


def score_of(lm, ids, policy):
    """The token that the model says after a text, one token at a time."""
    from sqviz.streaming.feed import Feed

    *_, (_, logits) = Feed(lm, ids, policy, 1).passes()
    return int(logits[-1].argmax())


def test_streameval_asks_what_stood_so_many_lines_ago():
    lm = lettered()
    stream = streameval(lm, 60, every=10, back=20, digits=3, seed=2)
    text = "".join(chr(code) for code in stream.ids)
    lines = [line for line in text.split("\n") if line.startswith("line ")]
    assert len(lines) == 60
    facts = [line.removesuffix(".").rsplit(" ", 1)[1] for line in lines]
    said = ["".join(chr(code) for code in stream.ids[first:stop]).strip() for first, stop in stream.answers]
    assert said == [facts[line - 20] for line in (30, 40, 50, 60) for line in [line]]
    asked = [line for line in text.split("\n") if line.startswith("What")]
    assert all(line.count(line.split()[5].strip("?")) == 2 for line in asked)
    assert torch.equal(stream.ids, streameval(lm, 60, every=10, back=20, digits=3, seed=2).ids)
    assert not torch.equal(stream.ids, streameval(lm, 60, every=10, back=20, digits=3, seed=3).ids)
    for bad in ({"lines": 20}, {"every": 0}, {"back": 1000}, {"digits": 0}):
        with pytest.raises(SqvizError):
            streameval(lm, **{"lines": 60, **bad})
    with pytest.raises(NoTokenizer):
        streameval(tiny("LlamaForCausalLM"), 60)


QUESTION = {
    "question": "What melts?",
    "choices": {"text": ["ice", "stone"], "label": ["A", "B"]},
    "answerKey": "A",
}


def test_arc_from_a_local_file(tmp_path):
    lm, file = lettered(), tmp_path / "arc.jsonl"
    file.write_text(f"{json.dumps(QUESTION)}\n\n{json.dumps(QUESTION | {'answerKey': 'B'})}\n", encoding="utf-8")
    stream = arc_stream(lm, file)
    text = "".join(chr(code) for code in stream.ids)
    one = "Question: What melts?\nA. ice\nB. stone\nAnswer:"
    assert text == f"{one} A\n\n{one} B\n\n"
    assert [text[first:stop] for first, stop in stream.answers] == [" A", " B"]
    assert len(arc_stream(lm, file, limit=1).answers) == 1
    assert score_answers(lm, stream, Sinks(4, 28)).shape == (2,)
    assert [text[start:][:9] for start in stream.starts] == ["Question:"] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no question"),
        ("not json\n", "line 1 of .* is no JSON"),
        (json.dumps({"question": "?"}), "question 1 is not in the form"),
        (json.dumps(QUESTION | {"answerKey": "E"}), "question 1 is not in the form"),
    ],
)
def test_a_file_that_holds_no_questions(tmp_path, content, message):
    file = tmp_path / "arc.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(SqvizError, match=message):
        arc_stream(lettered(), file)


def test_where_questions_come_from():
    with pytest.raises(SqvizError, match="hub:dataset/config/split"):
        arc_stream(lettered(), "hub:arc")
    with pytest.raises(OSError, match="nowhere"):
        arc_stream(lettered(), "nowhere.jsonl")
    with pytest.raises(NoTokenizer):
        arc_stream(tiny("LlamaForCausalLM"), "nowhere.jsonl")


@pytest.mark.embedded
def test_the_embedded_model_breaks_without_sinks_and_not_with_them():
    """Thesis Figure 4.1 and Table 4.1, small."""
    lm = sqviz.load()
    tokens = sqviz.text().tokens(lm.tokenizer, limit=256)
    found = compare_policies(lm, tokens, [Dense(), Window(32), Sinks(4, 28)])
    dense, window, sinks = (result.perplexity for result in found.results.values())
    assert window > 1.5 * sinks
    assert sinks < 1.5 * dense
    breaks = streaming_perplexity(lm, with_line_breaks(lm, tokens), Sinks(4, 28))
    assert breaks.perplexity < 1.3 * sinks

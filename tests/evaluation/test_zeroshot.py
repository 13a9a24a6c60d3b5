"""Likelihoods against one forward pass per token, formats against prompts written out, and bad rows."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqviz.errors import Cancelled, NonFinite, NoTokenizer, SqvizError
from sqviz.evaluation.items import Item, Task, choose
from sqviz.evaluation.tasks import TASKS
from sqviz.evaluation.zeroshot import Likelihood, answer, contribution, encode_pair, loglikelihoods, tokens_of, window
from sqviz.models.tiny import tiny
from sqviz.progress import CancelToken
from sqviz.quant.linear import quantize
from sqviz.quant.schemes import SMOOTHQUANT_LLAMA

PAIRS = [
    ("The baker opened the", " oven"),
    ("Question: What is two plus three?\nAnswer:", " five and nothing else"),
    ("A", " B"),
    ("A", " C"),
    ("", " bread"),
    ("a space at the end  ", "and more"),
    ("<s>begun already", " twice"),
    ("café", " — über"),
]
LABELLED = {"text": ["iron", "wood"], "label": ["A", "B"]}


@torch.no_grad()
def slow(lm, context, continuation):
    """Every token from a forward pass of its own, in float64, over tokens put together here by hand."""
    tokenizer = lm.tokenizer
    if context:
        bare = context.rstrip(" ")
        special = {"add_special_tokens": not context.startswith("<s>")}
        ids = tokenizer.encode(context + continuation, **special)
        start = len(tokenizer.encode(bare, **special))
    else:
        ids, start = [0, *tokenizer.encode(continuation, add_special_tokens=False)], 1
    total, greedy = 0.0, True
    for place in range(start, len(ids)):
        seen = torch.tensor([ids[max(0, place - window(lm)) : place]])
        scores = lm.model(seen, use_cache=False).logits[0, -1].double().log_softmax(-1)
        total += float(scores[ids[place]])
        greedy &= int(scores.argmax()) == ids[place]
    return total, greedy


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize(
    ("name", "add_bos"),
    [("LlamaForCausalLM", False), ("LlamaForCausalLM", True), ("GPT2LMHeadModel", False), ("BloomForCausalLM", False)],
)
def test_equals_one_token_at_a_time(make_reader, name, add_bos, batch):
    rest = {"max_position_embeddings": 64} if name != "BloomForCausalLM" else {}
    lm = make_reader(name, add_bos=add_bos, **rest)
    found = loglikelihoods(lm, [encode_pair(lm, *pair) for pair in PAIRS], batch=batch)
    for pair, one in zip(PAIRS, found, strict=True):
        value, greedy = slow(lm, *pair)
        assert one.value == pytest.approx(value, rel=1e-5, abs=1e-4)
        assert (one.greedy, one.dropped) == (greedy, 0)


def test_equals_one_token_at_a_time_when_quantised_per_token(make_reader):
    lm = quantize(make_reader(), SMOOTHQUANT_LLAMA)
    for pair, one in zip(PAIRS, loglikelihoods(lm, [encode_pair(lm, *pair) for pair in PAIRS]), strict=True):
        assert one.value == pytest.approx(slow(lm, *pair)[0], rel=1e-3)


def test_what_the_model_would_say_is_greedy(reader):
    ids = reader.tokenizer.encode("The ferry leaves")
    after = []
    for _ in range(4):
        after.append(int(reader.model(torch.tensor([ids + after])).logits[0, -1].argmax()))
    wrong = [*after[:3], (after[3] + 1) % 200]
    right, other, shorter = loglikelihoods(reader, [(ids, after), (ids, wrong), (ids, after[:1])])
    assert (right.greedy, other.greedy, shorter.greedy) == (True, False, True)


def test_too_long_a_prompt_loses_its_beginning(make_reader):
    lm = make_reader(max_position_embeddings=20)
    before, after = encode_pair(lm, "word after word " * 30, " the end")
    (long,) = loglikelihoods(lm, [(before, after)])
    kept = 21 - len(after)
    (short,) = loglikelihoods(lm, [(before[-kept:], after)])
    assert long.value == short.value
    assert long.dropped == len(before) - kept
    task = Task("t", {"q": str}, choose("{q}", (" x", " y"), lambda row: 0))
    items = task.at([{"q": "word " * 50}, {"q": "word"}]).items()
    (score,) = answer(lm, task, items, tokens_of(lm, task, items), "")
    assert score.note.startswith("1 of 2 longer than 20 tokens")
    with pytest.raises(SqvizError, match="21 tokens, and tiny/LlamaForCausalLM reads 20"):
        loglikelihoods(lm, [([1], [5] * 21)])
    assert loglikelihoods(lm, [([1], [5] * 20)])[0].value < 0


class Counting:
    """Counts the forward passes of a model while it is entered."""

    def __init__(self, lm):
        self.lm, self.shapes = lm, []

    def __enter__(self):
        note = lambda _, __, kwargs: self.shapes.append(tuple(kwargs["input_ids"].shape))  # noqa: E731
        self.hook = self.lm.model.register_forward_pre_hook(note, with_kwargs=True)
        return self.shapes

    def __exit__(self, *_):
        self.hook.remove()


def test_choices_that_differ_in_the_last_token_share_a_forward_pass(reader, data):
    task = TASKS["mmlu"].at(data / "mmlu.jsonl")
    items = task.items()
    requests = tokens_of(reader, task, items)
    assert len(requests) == 12
    with Counting(reader) as shapes:
        found = loglikelihoods(reader, requests)
    assert len(shapes) == 3
    assert len({one.value for one in found[:4]}) == 4


def test_the_first_of_equal_choices_is_taken():
    item = Item((("q", " a"), ("q", " bb")), 0, (1, 2))
    equal, other = Likelihood(-2.0, False, 0), Likelihood(-3.0, False, 0)
    assert contribution("acc", item, [equal, equal]) == 1
    assert contribution("acc", Item(item.pairs, 1, (1, 2)), [equal, equal]) == 0
    assert contribution("acc_norm", item, [equal, other]) == 0  # −2 per character against −1.5
    assert contribution("perplexity", item, [equal, other]) == 2
    with pytest.raises(SqvizError, match="'acc_norm' and 'perplexity' are allowed"):
        contribution("f1", item, [equal])


@settings(max_examples=60, deadline=None)
@given(st.text("abc <é ", min_size=1, max_size=12), st.text("abcé", min_size=1, max_size=8))
def test_context_and_continuation_are_all_of_the_text(reader, context, word):
    lm = reader
    try:
        before, after = encode_pair(lm, context, f" {word}")
    except SqvizError as error:
        assert "no token of its own" in str(error)  # noqa: PT017
        return
    whole = lm.tokenizer.encode(f"{context} {word}")
    alone = lm.tokenizer.encode(context.rstrip())
    if alone:
        assert len(before) == len(alone)
        assert after == whole[len(alone) :]
    else:
        assert (before, after) == ([0], whole)


def test_models_without_a_limit_read_as_much_as_in_lm_eval(make_reader):
    assert window(make_reader("BloomForCausalLM", max_position_embeddings=None)) == 2048
    assert window(make_reader("MptForCausalLM", max_position_embeddings=None)) == 96


# --- formats ---

WRITTEN_OUT = {
    "lambada": ("the baker opened the oven and took out the", [" bread"], 0),
    "hellaswag": (
        "Home and Garden: How to store onions. Choose a dry place. Damp air makes them rot.",
        ["  Hang them in a net.", " Put them into a lake.", " Ask the onions.", " Write them a letter."],
        0,
    ),
    "piqa": (
        "Question: keep a door from slamming\nAnswer:",
        [" push a wedge of wood below it", " push a wedge of butter below it"],
        0,
    ),
    "openbookqa": (
        "A lamp is brighter when it gets more",
        [" electric current", " dust", " applause", " paint"],
        0,
    ),
    "rte": (
        (
            "The bridge over the Lune was closed on Monday and opened again on Friday.\n"
            "Question: The bridge was open on Friday. True or False?\nAnswer:"
        ),
        [" True", " False"],
        0,
    ),
    "copa": ("The milk boiled over because", ["  nobody watched the pot.", "  the cow was brown."], 0),
    "arc_easy": (
        "Question: Which of these is drawn by a magnet?\nAnswer:",
        [" an iron nail", " a wooden spoon", " a glass marble", " a paper cup"],
        0,
    ),
    "mmlu": (
        (
            "The following are multiple choice questions (with answers) about elementary mathematics.\n\n"
            "What is two plus three?\nA. 4\nB. 5\nC. 6\nD. 7\nAnswer:"
        ),
        [" A", " B", " C", " D"],
        1,
    ),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_a_question_as_it_is_put(name, data):
    items = TASKS[name].at(data / f"{name}.jsonl").items()
    item = items[2 if name == "hellaswag" else 0]
    context, choices, right = WRITTEN_OUT[name]
    assert item.pairs == tuple((context, choice) for choice in choices)
    assert item.right == right
    assert item.lengths == tuple(len(choice) - 1 for choice in choices)


def test_winogrande_scores_what_follows_behind_each_option(data):
    first, second, *_ = TASKS["winogrande"].at(data / "winogrande.jsonl").items()
    assert first.pairs == (
        ("The rope held the sack because the rope", " was strong."),
        ("The rope held the sack because the sack", " was strong."),
    )
    assert (first.right, second.right) == (0, 1)


def item_of(name, row):
    (item,) = TASKS[name].at([row]).items()
    return item


def test_other_forms_of_the_same_data_sets():
    rte = {"sentence1": "a", "sentence2": "b", "label": 1}
    assert item_of("rte", rte) == item_of("rte", {"premise": "a", "hypothesis": "b", "label": "not_entailment"})
    columns = {"question": "?", "choices": LABELLED, "answerKey": "B"}
    objects = [{"text": "iron", "label": "A"}, {"text": "wood", "label": "B"}]
    assert item_of("arc_challenge", columns) == item_of("arc_easy", columns | {"choices": objects})
    numbered = columns | {"choices": {"text": ["iron", "wood"], "label": [1, 2]}, "answerKey": 2}
    assert item_of("arc_easy", numbered) == item_of("arc_easy", columns)
    mmlu = {"question": "?", "choices": list("wxyz"), "answer": 2}
    assert item_of("mmlu", mmlu) == item_of("mmlu", mmlu | {"answer": "C"}) == item_of("mmlu", mmlu | {"answer": "2"})
    assert item_of("mmlu", mmlu).pairs[0][0] == "?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    assert item_of("lambada", {"text": "alone"}).pairs == (("", " alone"),)
    braces = {"goal": "{sol1}", "sol1": "{goal}", "sol2": "}{", "label": 0}
    assert item_of("piqa", braces).pairs[0] == ("Question: {sol1}\nAnswer:", " {goal}")


def test_every_row_of_the_table_can_be_asked(data):
    for name, task in TASKS.items():
        assert task.name == name
        assert task.about
        file = data / f"{'arc_easy' if name == 'arc_challenge' else name}.jsonl"
        items = task.at(file).items()
        assert len(items) == len(file.read_text(encoding="utf-8").splitlines())
        assert task.at(file).items(limit=2) == items[:2]


# --- bad input ---

PIQA = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("piqa", {"goal": "g", "sol1": "a", "label": 0}, "no field 'sol2'; there are: goal, sol1, label"),
        ("rte", {"label": 0}, r"no field 'sentence1' \(or 'premise'\); there are: label"),
        ("piqa", PIQA | {"goal": 3}, "field 'goal' is a whole number, and text is expected"),
        ("piqa", PIQA | {"goal": None}, "field 'goal' is empty, and text is expected"),
        ("piqa", PIQA | {"label": -1}, "right answer is number -1, and 0 … 1 are allowed; the test splits"),
        ("piqa", PIQA | {"label": "yes"}, "field 'label' is 'yes', and a whole number"),
        ("piqa", PIQA | {"sol1": " "}, "a choice is empty"),
        ("piqa", [1], "it is a list, and an object with the fields goal, sol1, sol2, label"),
        ("winogrande", {"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}, "no gap '_'"),
        ("winogrande", {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "3"}, "'1' or '2' is allowed"),
        (
            "copa",
            {"premise": "p", "choice1": "a", "choice2": "b", "question": "why", "label": 0},
            "'cause' or 'effect'",
        ),
        ("arc_easy", {"question": "?", "choices": LABELLED, "answerKey": "C"}, "'A', 'B' are the labels"),
        ("arc_easy", {"question": "?", "choices": {"text": ["a"]}, "answerKey": "A"}, "its choices lack 'label'"),
        ("arc_easy", {"question": "?", "choices": ["a", "b"], "answerKey": "A"}, "its choices lack"),
        (
            "arc_easy",
            {"question": "?", "choices": {"text": ["a"], "label": []}, "answerKey": "A"},
            "1 texts and 0 labels",
        ),
        ("mmlu", {"question": "?", "choices": ["a"], "answer": 0}, "1 choices, and 4"),
        (
            "hellaswag",
            {"activity_label": "", "ctx_a": "", "ctx_b": "", "endings": [1], "label": 0},
            "something else than",
        ),
    ],
)
def test_a_bad_row_is_named(name, row, message, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(SqvizError, match=rf"line 2 of .*rows\.jsonl' is no question of {name}: .*{message}"):
        TASKS[name].at(file).items()
    with pytest.raises(SqvizError, match=f"row 1 is no question of {name}"):
        TASKS[name].at([row]).items()


def test_a_bad_file_is_named(tmp_path):
    task, file = TASKS["piqa"], tmp_path / "rows.jsonl"
    with pytest.raises(SqvizError, match=r"there is no file '.*rows.jsonl'"):
        task.at(file).items()
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(SqvizError, match=r"rows.jsonl' holds no question"):
        task.at(str(file)).items()
    file.write_text('{"goal":\n', encoding="utf-8")
    with pytest.raises(SqvizError, match=r"line 1 of .* is not JSON"):
        task.at(file).items()
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SqvizError, match="is not UTF-8"):
        task.at(file).items()
    with pytest.raises(SqvizError, match="the list of rows holds no question"):
        task.at([]).items()
    with pytest.raises(SqvizError, match=r"has no source: write task\.at"):
        task.items()
    file.write_text(f"﻿{json.dumps(PIQA)}\n", encoding="utf-8")
    assert len(task.at(file).items()) == 1


def test_bad_requests(reader, make_reader):
    with pytest.raises(SqvizError, match="batch=0"):
        loglikelihoods(reader, [([1], [2])], batch=0)
    with pytest.raises(NoTokenizer, match=r"sqviz\.wrap"):
        encode_pair(tiny("LlamaForCausalLM"), "a", " b")
    task = Task("t", {"q": str}, choose("{q}", ("{q}",), lambda row: 0))
    with pytest.raises(SqvizError, match=r"question 1 of t: .*no token of its own"):
        tokens_of(reader, task, [Item((("a", ""),), 0, (0,))])
    blank = make_reader()
    blank.tokenizer.bos_token = blank.tokenizer.eos_token = None
    with pytest.raises(SqvizError, match="no BOS and no EOS token"):
        encode_pair(blank, "", " b")
    broken = make_reader()
    with torch.no_grad():
        broken.model.lm_head.weight[7, 0] = torch.nan
    with pytest.raises(NonFinite, match="NaN or infinite"):
        loglikelihoods(broken, [([1], [2])])


def test_cancel(reader):
    token = CancelToken()
    token.cancel()
    with Counting(reader) as shapes, pytest.raises(Cancelled):
        loglikelihoods(reader, [([1], [2])], cancel=token)
    assert shapes == []
    assert loglikelihoods(reader, []) == []

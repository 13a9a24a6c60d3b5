"""What `evaluate` knows by name: `TASKS`, one row per format of questions, and `CORPORA`, one per text for perplexity.

Field names are those of the data sets, prompts and metrics those of lm-eval 0.4.13's tasks of the same name, zero-shot,
so that numbers can be put side by side. Where a data set comes in two forms (numbers or words for the right answer,
`choices` as columns or as a list of objects) both are read.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from sqviz.errors import SqvizError
from sqviz.evaluation.items import Item, Kinds, Row, Task, choose, index

WORD_OR_NUMBER = (int, str)
LETTERS = ("A", "B", "C", "D")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text for perplexity.

    Attributes:
        name: what its scores are called.
        source: what `sqviz.text` takes; None: the embedded addresses.
        segments: how many are scored where no limit is given; None: all.
        about: one line for tables.
    """

    name: str
    source: str | None
    segments: int | None
    about: str = ""


def _last_word(row: Row) -> Item:
    before, _, word = row["text"].rpartition(" ")
    return Item(((before, f" {word}"),), 0, (len(word),))


def _cleaned(text: str) -> str:
    """HellaSwag without the marks that its WikiHow half carries."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _hellaswag_context(row: Row) -> str:
    return _cleaned(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")


def _hellaswag_endings(row: Row) -> list[str]:
    return [_cleaned(ending) for ending in _texts(row["endings"], "endings")]


def _winogrande(row: Row) -> Item:
    """Partial scoring: the options stand in the context, and what follows the gap is scored behind each."""
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise SqvizError("its sentence has no gap '_'")
    number = index(row, "answer") - 1
    if number not in (0, 1):
        raise SqvizError(f"its answer is {row['answer']!r}, and '1' or '2' is allowed; its test split has no answers")
    options = row["option1"], row["option2"]
    after = after.strip()
    return Item(tuple((before + option, f" {after}") for option in options), number, (len(after),) * 2)


def _copa_context(row: Row) -> str:
    words = {"cause": "because", "effect": "therefore"}
    if row["question"] not in words:
        raise SqvizError(f"its question is {row['question']!r}, and 'cause' or 'effect' is allowed")
    return f"{row['premise'].strip()[:-1]} {words[row['question']]}"


def _copa_choices(row: Row) -> list[str]:
    # The space is lm-eval's: together with the one before every choice there are two.
    return [f" {row[name][:1].lower()}{row[name][1:]}" for name in ("choice1", "choice2")]


def _texts(values: Sequence[object], field: str) -> list[str]:
    if not all(isinstance(value, str) for value in values):
        raise SqvizError(f"the field {field!r} is a list that holds something else than text")
    return [str(value) for value in values]


def _labelled(row: Row) -> tuple[list[str], list[str]]:
    """-> texts and labels of `choices`, which is {"text": […], "label": […]} or [{"text": …, "label": …}, …]."""
    given = row["choices"]
    try:
        columns = (
            given if isinstance(given, Mapping) else {key: [one[key] for one in given] for key in ("text", "label")}
        )
        texts, labels = _texts(columns["text"], "choices"), [str(label) for label in columns["label"]]
    except (KeyError, TypeError) as error:
        form = 'give {"text": […], "label": […]} or [{"text": …, "label": …}, …]'
        raise SqvizError(f"its choices lack {error}: {form}") from error
    if len(texts) != len(labels):
        raise SqvizError(f"its choices have {len(texts)} texts and {len(labels)} labels")
    return texts, labels


def _choice_texts(row: Row) -> list[str]:
    return _labelled(row)[0]


def _answer_key(row: Row) -> int:
    key, (_, labels) = str(row["answerKey"]).strip(), _labelled(row)
    if key not in labels:
        raise SqvizError(f"its answerKey is {key!r}, and {', '.join(map(repr, labels))} are the labels of its choices")
    return labels.index(key)


def _word_or_number(field: str, words: Sequence[str]) -> Callable[[Row], int]:
    """The right answer as a number, or as one of these words."""

    def right(row: Row) -> int:
        return words.index(row[field]) if row[field] in words else index(row, field)

    return right


def _mmlu_context(row: Row) -> str:
    choices = _texts(row["choices"], "choices")
    if len(choices) != len(LETTERS):
        raise SqvizError(f"it has {len(choices)} choices, and {len(LETTERS)} are expected")
    subject = row.get("subject")
    about = (
        f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        if subject
        else ""
    )
    lines = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
    return f"{about}{row['question'].strip()}\n{lines}\nAnswer:"


_QUESTION = "Question: {question}\nAnswer:"
_ARC: Mapping[str, Kinds] = {"question": str, "choices": (dict, list), "answerKey": WORD_OR_NUMBER}
_BOTH = ("acc", "acc_norm")

_ROWS = (
    Task("lambada", {"text": str}, _last_word, ("acc", "perplexity"), harness="lambada_openai", about="the last word"),
    Task(
        "hellaswag",
        {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list, "label": WORD_OR_NUMBER},
        choose(_hellaswag_context, _hellaswag_endings, "label"),
        _BOTH,
        harness="hellaswag",
        about="how a scene goes on",
    ),
    Task(
        "piqa",
        {"goal": str, "sol1": str, "sol2": str, "label": WORD_OR_NUMBER},
        choose("Question: {goal}\nAnswer:", ("{sol1}", "{sol2}"), "label"),
        _BOTH,
        harness="piqa",
        about="how to do a thing",
    ),
    Task(
        "winogrande",
        {"sentence": str, "option1": str, "option2": str, "answer": WORD_OR_NUMBER},
        _winogrande,
        harness="winogrande",
        about="who is meant",
    ),
    Task(
        "openbookqa",
        {"question_stem": str, "choices": (dict, list), "answerKey": WORD_OR_NUMBER},
        choose("{question_stem}", _choice_texts, _answer_key),
        _BOTH,
        harness="openbookqa",
        about="elementary science",
    ),
    Task(
        "rte",
        {"sentence1": str, "sentence2": str, "label": WORD_OR_NUMBER},
        choose(
            "{sentence1}\nQuestion: {sentence2} True or False?\nAnswer:",
            ("True", "False"),
            _word_or_number("label", ("entailment", "not_entailment")),
        ),
        same_as={"premise": "sentence1", "hypothesis": "sentence2"},
        harness="rte",
        about="whether one sentence follows from another",
    ),
    Task(
        "copa",
        {"premise": str, "choice1": str, "choice2": str, "question": str, "label": WORD_OR_NUMBER},
        choose(_copa_context, _copa_choices, "label"),
        harness="copa",
        about="cause and effect",
    ),
    Task(
        "arc_easy",
        _ARC,
        choose(_QUESTION, _choice_texts, _answer_key),
        _BOTH,
        harness="arc_easy",
        about="school science",
    ),
    Task(
        "arc_challenge",
        _ARC,
        choose(_QUESTION, _choice_texts, _answer_key),
        _BOTH,
        harness="arc_challenge",
        about="school science, the harder part",
    ),
    Task(
        "mmlu",
        {"question": str, "choices": list, "answer": WORD_OR_NUMBER},
        choose(_mmlu_context, LETTERS, _word_or_number("answer", LETTERS)),
        harness="mmlu",
        about="57 school and university subjects; a field `subject` names it",
    ),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _ROWS}
"""Formats of questions, by name."""

CORPORA: Mapping[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus("perplexity", None, 40, "text of your own, or the embedded addresses"),
        Corpus("wikitext2", "hub:Salesforce/wikitext/wikitext-2-raw-v1/test/text", None, "WikiText-2, test split"),
        Corpus(
            "pg19",
            "hub:emozilla/pg19-test/default/test/text",
            512,
            "books before 1919, the beginning of the test split",
        ),
    )
}
"""Texts for perplexity, by name."""

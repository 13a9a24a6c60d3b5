"""Multiple choice as one endless stream (thesis §4.4.2, Table 4.5): all questions of ARC with answers, one by one.

Questions come through `datasets` ("hub:allenai/ai2_arc/ARC-Easy/test") or from a local JSONL file in the same form, a
line each:

    {"question": "…", "choices": {"text": ["…", …], "label": ["A", …]}, "answerKey": "A"}
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from sqviz.errors import NoTokenizer, SqvizError
from sqviz.evaluation.answers import QuestionStream
from sqviz.models.lm import LM


def arc_stream(lm: LM, source: str | Path, limit: int | None = None) -> QuestionStream:
    """The first `limit` questions of a file or of the hub as a stream, each followed by the label of its right choice.

    Raises:
        NoTokenizer: the model has none.
        SqvizError: a line that is no question, or no question at all; a hub name in another form.
        OSError: the file is not there, or the hub cannot be reached.
    """
    if lm.tokenizer is None:
        raise NoTokenizer(f"{lm.name} has no tokenizer, and the questions are text")
    ids: list[int] = []
    answers: list[tuple[int, int]] = []
    starts: list[int] = []
    for number, question in enumerate(islice(_questions(source), limit)):
        asked, label = _text(question, number)
        starts.append(len(ids))
        ids += lm.tokenizer(asked, add_special_tokens=False)["input_ids"]
        said = lm.tokenizer(f" {label}", add_special_tokens=False)["input_ids"]
        answers.append((len(ids), len(ids) + len(said)))
        ids += said + lm.tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    if not answers:
        raise SqvizError(f"{str(source)!r} holds no question")
    return QuestionStream(torch.tensor(ids), torch.tensor(answers), torch.tensor(starts))


def _questions(source: str | Path) -> Iterator[dict[str, Any]]:
    if isinstance(source, str) and source.startswith("hub:"):
        parts = source.removeprefix("hub:").rsplit("/", 2)
        if len(parts) != 3 or not all(parts):
            raise SqvizError(f"{source!r}: write hub:dataset/config/split, such as hub:allenai/ai2_arc/ARC-Easy/test")
        import datasets

        dataset, config, split = parts
        yield from datasets.load_dataset(dataset, config, split=split, streaming=True)
        return
    with Path(source).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as broken:
                raise SqvizError(f"line {number + 1} of {str(source)!r} is no JSON: {broken}") from broken


def _text(question: Any, number: int) -> tuple[str, str]:
    try:
        choices = question["choices"]
        lines = [f"{label}. {text}" for label, text in zip(choices["label"], choices["text"], strict=True)]
        label = choices["label"][list(choices["label"]).index(question["answerKey"])]
        return "\n".join([f"Question: {question['question']}", *lines, "Answer:"]), str(label)
    except (KeyError, TypeError, ValueError) as broken:
        raise SqvizError(
            f"question {number + 1} is not in the form of ARC ({broken!r}); see the docs of arc_stream"
        ) from broken

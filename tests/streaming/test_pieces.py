"""Text piece by piece is the text decoded as a whole."""

import random

import pytest
from generation import SPECIAL, byte_fallback, byte_level
from hypothesis import given, settings
from hypothesis import strategies as st

from sqviz.streaming.pieces import LONGEST, Pieces

BYTES, FALLBACK = byte_level(), byte_fallback()
FIRST = len(SPECIAL)
some = settings(deadline=None, derandomize=True, max_examples=60, database=None)


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces_of(tokenizer, ids, before=()):
    pieces = Pieces(tokenizer, before)
    return [*(pieces.push(token) for token in ids), pieces.rest()]


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte level", "byte fallback"])
@some
@given(st.text(max_size=60))
def test_any_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert "".join(pieces_of(tokenizer, ids)) == whole(tokenizer, ids)


@some
@given(st.lists(st.integers(0, FIRST + 255), max_size=200))
def test_any_tokens_of_a_byte_level_tokenizer(ids):
    assert "".join(pieces_of(BYTES, ids)) == whole(BYTES, ids)


def test_long_runs_of_bytes_without_a_word():
    text = "😀你好é" * 60
    ids = FALLBACK(text, add_special_tokens=False).input_ids
    assert len(ids) > 5 * LONGEST
    assert "".join(pieces_of(FALLBACK, ids)) == whole(FALLBACK, ids) == text


def test_a_character_comes_whole_with_its_last_byte():
    ids = BYTES("é😀", add_special_tokens=False).input_ids
    assert pieces_of(BYTES, ids) == ["", "é", "", "", "", "😀", ""]
    assert pieces_of(BYTES, ids[:-1]) == ["", "é", "", "", "", "\ufffd"]


def test_bytes_that_are_no_character_are_not_waited_for():
    ids = [FIRST + random.Random(0).choice(range(256)) for _ in range(3000)]
    pieces, sizes = Pieces(BYTES), []
    text = ""
    for token in ids:
        text += pieces.push(token)
        sizes.append(len(pieces._window))
    assert text + pieces.rest() == whole(BYTES, ids)
    assert max(sizes) <= LONGEST + 1
    assert max(len(p) for p in pieces_of(BYTES, [BYTES("é").input_ids[0]] * 400)) <= 8


def test_blanks_before_words_and_what_came_before():
    a, cat, s = FALLBACK.convert_tokens_to_ids(["▁a", "▁cat", "s"])
    assert pieces_of(FALLBACK, [a, cat, s, 1, cat]) == ["a", " cat", "s", "", " cat", ""]
    assert pieces_of(FALLBACK, [a, cat], [1, cat, s]) == [" a", " cat", ""]
    assert pieces_of(FALLBACK, [a, cat], [1]) == ["a", " cat", ""]
    half = BYTES("x😀", add_special_tokens=False).input_ids
    assert "".join(pieces_of(BYTES, half[3:], half[:3])) == "😀"


def test_special_tokens_add_nothing_and_are_named_as_alternatives():
    pieces = Pieces(BYTES, [1])
    assert pieces.push(4) == ""
    assert pieces.peek(4) == "<|im_end|>"
    first, *_, last = BYTES("é", add_special_tokens=False).input_ids
    assert pieces.peek(first) == "\ufffd"
    pieces.push(first)
    assert pieces.peek(last) == "é"
    assert pieces.push(last) == "é"


def test_without_a_tokenizer_there_is_no_text():
    pieces = Pieces(None, [1, 2])
    assert (pieces.push(3), pieces.rest(), pieces.peek(3)) == ("", "", "")

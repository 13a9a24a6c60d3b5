"""Documents from every kind of source, and the token streams cut from them."""

import json
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sqviz
from sqviz.corpus import source as source_module
from sqviz.errors import DownloadError, SqvizError, TextTooShort


class Characters:
    """A tokenizer whose tokens are code points; it records what it was asked for."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert add_special_tokens is False
        return {"input_ids": [ord(letter) for letter in text]}

    @staticmethod
    def decode(ids):
        return "".join(chr(int(token)) for token in ids)


characters = Characters()


# --- sources


def test_the_embedded_addresses():
    text = sqviz.text()
    documents = list(text)
    assert len(documents) == 249
    assert documents[0].startswith("Fellow-Citizens of the Senate")  # Washington, 1790
    assert sum(map(len, documents)) > 11_000_000
    assert list(text) == documents  # a second pass starts anew
    half = source_module.second_half()
    assert list(half) == list(half) == documents[124:]
    assert "second half" in repr(half)


def test_a_list():
    assert list(sqviz.text(["one", "two"])) == ["one", "two"]
    assert list(sqviz.text(("one",))) == ["one"]
    assert list(sqviz.text(word for word in ["one", "two"])) == ["one", "two"]


def test_a_source_is_passed_through():
    text = sqviz.text(["one"])
    assert sqviz.text(text) is text


@pytest.mark.parametrize("name", ["book.txt", "book.md"])
def test_a_file(tmp_path, name):
    (tmp_path / name).write_bytes("﻿Grüße\r\n\r\nZwei".encode())
    assert list(sqviz.text(tmp_path / name)) == ["Grüße\n\nZwei"]
    assert list(sqviz.text(str(tmp_path / name))) == ["Grüße\n\nZwei"]


def test_a_folder_in_the_order_of_names(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert list(sqviz.text(tmp_path)) == ["first", "second", "third", "fourth"]


def test_a_column_of_json_lines(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"id": i, "body": f"row {i}"}) for i in range(3)))
    assert list(sqviz.text(file, column="body")) == ["row 0", "row 1", "row 2"]
    with pytest.raises(SqvizError, match=r"line 1 .*column 'text'; it has: id, body.*column="):
        sqviz.text(file)


@given(st.lists(st.text(alphabet="ab\n", max_size=40), min_size=1, max_size=30))
@settings(deadline=None, derandomize=True)
def test_pieces_of_a_long_file_joined_are_the_file(tmp_path_factory, paragraphs):
    whole = "\n\n".join(paragraphs)
    file = tmp_path_factory.mktemp("long") / "long.txt"
    file.write_text(whole)
    before = source_module.PIECE_CHARACTERS
    try:
        source_module.PIECE_CHARACTERS = 50
        pieces = list(sqviz.text(file))
    finally:
        source_module.PIECE_CHARACTERS = before
    assert "\n\n".join(pieces) == whole


def test_a_long_file_comes_in_pieces(tmp_path):
    file = tmp_path / "long.txt"
    file.write_text("\n\n".join(["word " * 2000] * 100))
    pieces = list(sqviz.text(file))
    assert 5 <= len(pieces) <= 10
    assert "\n\n".join(pieces) == file.read_text()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ([], "takes a list of strings"),
        (["a", 3], "takes a list of strings.*int"),
        ("/no/such/file.txt", "no file or folder '/no/such/file.txt'"),
        ("The quick brown fox", r"no file or folder.*for a text itself write sqviz\.text"),
        ("hub:wikitext", "hub:dataset/config/split/column.*Example"),
        ("hub:a/b/c", "hub:dataset/config/split/column"),
        ("hub:a/b//d", "hub:dataset/config/split/column"),
    ],
)
def test_what_is_no_source(bad, said):
    with pytest.raises(SqvizError, match=said):
        sqviz.text(bad)


def test_an_empty_folder(tmp_path):
    with pytest.raises(SqvizError, match=r"holds no \.txt, \.md, \.jsonl file"):
        sqviz.text(tmp_path)


def test_bytes_that_are_no_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(SqvizError, match=r"not UTF-8.*byte 3.*iconv"):
        list(sqviz.text(tmp_path / "latin.txt"))


def test_a_line_that_is_no_json(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": broken}\n')
    with pytest.raises(SqvizError, match=r"line 2 of .*rows\.jsonl.* not JSON"):
        list(sqviz.text(tmp_path / "rows.jsonl"))


# --- tokens and segments


def test_tokens_are_the_documents_joined_by_a_blank_line():
    text = sqviz.text(["one", "", "two", "three"])
    assert characters.decode(text.tokens(characters)) == "one\n\ntwo\n\nthree"
    assert text.tokens(characters).dtype == torch.int64
    assert characters.decode(text.tokens(characters, limit=6)) == "one\n\nt"


def test_a_limit_reads_no_further_than_needed():
    read = []

    def documents():
        for number in range(1000):
            read.append(number)
            yield "abcd"

    assert len(sqviz.corpus.source.TextSource("endless", documents).tokens(characters, limit=10)) == 10
    assert len(read) == 2


words = st.lists(st.text(alphabet="abc", min_size=1, max_size=12), min_size=1, max_size=12)


@given(words, st.integers(2, 9), st.integers(0, 3))
@settings(deadline=None, derandomize=True)
def test_segments_are_the_shuffled_stream_cut_up(documents, length, seed):
    text = sqviz.text(documents)
    total = sum(map(len, documents)) + 2 * (len(documents) - 1)
    if total < length:
        with pytest.raises(TextTooShort):
            list(text.segments(characters, length, seed=seed))
        return
    segments = list(text.segments(characters, length, seed=seed))
    assert len(segments) == total // length
    assert all(segment.shape == (length,) for segment in segments)
    joined = "".join(characters.decode(segment) for segment in segments)
    parts = joined.split("\n\n")
    assert all(part in documents for part in parts[:-1])
    again = list(text.segments(characters, length, seed=seed))
    assert all(torch.equal(one, other) for one, other in zip(segments, again, strict=True))


def test_seeds_give_different_orders_and_every_document_once():
    documents = [letter * 3 for letter in "abcdefghijklmnopqrstuvwxyz"]
    orders = set()
    for seed in range(5):
        stream = "".join(map(characters.decode, sqviz.text(documents).segments(characters, 4, seed=seed)))
        whole = sorted(part for part in stream.split("\n\n") if len(part) == 3)
        assert len(whole) >= 25
        assert len(set(whole)) == len(whole)
        orders.add(stream)
    assert len(orders) == 5


def test_text_beyond_what_is_held_is_still_given_once_each(monkeypatch):
    monkeypatch.setattr(source_module, "SHUFFLE_CHARACTERS", 30)
    documents = [f"{number:03d}" for number in range(100)]
    stream = "".join(map(characters.decode, sqviz.text(documents).segments(characters, 498)))
    assert sorted(stream.split("\n\n")) == documents
    assert stream.split("\n\n") != documents


def test_samples_stop_early():
    text = sqviz.text(["a" * 1000])
    assert len(list(text.segments(characters, 10, samples=3))) == 3
    assert len(list(text.segments(characters, 10, samples=300))) == 100


def test_too_short():
    with pytest.raises(TextTooShort, match=r"'1 documents' has 5 tokens, and one segment needs 512.*length=5"):
        next(sqviz.text(["hello"]).segments(characters, 512))
    with pytest.raises(TextTooShort, match="holds no text"):
        sqviz.text(["", ""]).tokens(characters)


@pytest.mark.parametrize(("length", "samples"), [(1, 3), (0, 3), (-5, 3), (8, 0), (8, -1)])
def test_counts_that_make_no_sense_are_refused_at_once(length, samples):
    with pytest.raises(SqvizError, match=r"length=|samples="):
        sqviz.text(["hello"]).segments(characters, length, samples)
    with pytest.raises(SqvizError, match="limit=0"):
        sqviz.text(["hello"]).tokens(characters, limit=0)


# --- through `datasets`


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """A local folder that `datasets` reads as it reads one from the hub."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "org" / "speeches"
    folder.mkdir(parents=True)
    for split, rows in {"train": 50, "test": 3}.items():
        lines = [json.dumps({"number": i, "speech": f"{split} {i}"}) for i in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def test_a_data_set_is_streamed_in_its_order(dataset):
    text = sqviz.text(f"hub:{dataset}/default/test/speech")
    assert list(text) == ["test 0", "test 1", "test 2"]
    assert list(text) == ["test 0", "test 1", "test 2"]
    assert list(islice(sqviz.text(f"hub:{dataset}/default/train/speech"), 2)) == ["train 0", "train 1"]
    stream = "".join(map(characters.decode, text.segments(characters, 5, seed=3)))
    assert "test 0\n\ntest 1\n\ntest 2".startswith(stream)


def test_a_column_that_is_not_there_lists_the_columns(dataset):
    with pytest.raises(
        SqvizError, match=r"column 'text' holds no text; the columns are: number \(int\), speech \(str\)"
    ):
        list(sqviz.text(f"hub:{dataset}/default/test/text"))
    with pytest.raises(SqvizError, match="column 'number' holds no text"):
        list(sqviz.text(f"hub:{dataset}/default/test/number"))


def test_a_split_or_config_that_is_not_there(dataset):
    with pytest.raises(SqvizError, match="validation"):
        list(sqviz.text(f"hub:{dataset}/default/validation/speech"))
    with pytest.raises(SqvizError, match="german"):
        list(sqviz.text(f"hub:{dataset}/german/test/speech"))


def test_a_data_set_that_cannot_be_reached():
    with pytest.raises(DownloadError, match=r"hub:nobody/nothing.*embedded text"):
        list(sqviz.text("hub:nobody/nothing/default/train/text"))


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hub:Salesforce/wikitext/wikitext-2-raw-v1/test/text", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("hub:imdb/default/train/text", ("imdb", None, "train")),
        ("hub:/data/my/set/default/train/text", ("/data/my/set", None, "train")),
    ],
)
def test_names_with_slashes(source, parts):
    from sqviz.corpus.hub import parse_hub

    assert parse_hub(source) == (*parts, "text")

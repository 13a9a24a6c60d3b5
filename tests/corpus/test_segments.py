"""What `text` may be in capture, perplexity and the rest."""

import pathlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sqviz
from sqviz.corpus.segments import as_segments, as_tokens
from sqviz.errors import NoTokenizer, SqvizError, TextTooShort
from sqviz.models.lm import LM


class Words:
    """A tokenizer with one token per word."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        assert add_special_tokens is False
        return {"input_ids": [len(word) for word in text.split()]}


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 2)
        text_config = SimpleNamespace(max_position_embeddings=64)
        self.config = SimpleNamespace(_name_or_path="toy", get_text_config=lambda: text_config)

    def get_input_embeddings(self):
        return self.embedding


lm = LM(Toy(), Words(), arch=None)
dumb = lm.replace(tokenizer=None)


@pytest.mark.parametrize(
    "given",
    ["a bb ccc", ["a bb", "ccc"], sqviz.text(["a", "bb", "ccc"]), torch.tensor([1, 2, 3], dtype=torch.int32)],
    ids=["string", "list", "source", "ids"],
)
def test_everything_that_is_text(given):
    assert as_tokens(lm, given).tolist() == [1, 2, 3]
    assert as_tokens(lm, given).dtype == torch.int64
    assert as_tokens(lm, given, limit=2).tolist() == [1, 2]
    if not isinstance(given, torch.Tensor):
        assert sorted(torch.cat(list(as_segments(lm, given, None, 3))).tolist()) == [1, 2, 3]


def test_a_path(tmp_path):
    (tmp_path / "some.txt").write_text("a bb ccc")
    assert as_tokens(lm, tmp_path / "some.txt").tolist() == [1, 2, 3]
    assert as_tokens(lm, pathlib.PurePosixPath(tmp_path / "some.txt")).tolist() == [1, 2, 3]


def test_ids_are_cut_in_their_own_order_and_the_tail_is_dropped():
    ids = torch.arange(11)
    assert [s.tolist() for s in as_segments(lm, ids, None, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [s.tolist() for s in as_segments(lm, ids, 1, 4, seed=5)] == [[0, 1, 2, 3]]


def test_text_needs_a_tokenizer_and_ids_do_not():
    with pytest.raises(NoTokenizer, match=r"toy has no tokenizer.*LongTensor.*sqviz\.wrap\(model, tokenizer\)"):
        as_tokens(dumb, "a bb")
    with pytest.raises(NoTokenizer):
        as_segments(dumb, sqviz.text(["a"]), 1, 2)
    assert as_tokens(dumb, torch.tensor([3])).tolist() == [3]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.zeros(1, 4, dtype=torch.int64), r"\(1, 4\).*ids\[0\]"),
        (torch.zeros(4), "float32"),
        (torch.zeros(4, dtype=torch.bool), "bool"),
        (torch.tensor([1, 50]), r"0 … 49 for toy; these reach from 1 to 50"),
        (torch.tensor([-1, 5]), "from -1 to 5"),
    ],
)
def test_ids_that_are_none(ids, said):
    with pytest.raises(SqvizError, match=said):
        as_tokens(lm, ids)


@pytest.mark.parametrize("given", [3, None, [1, 2, 3], [], {"a": 1}])
def test_what_is_no_text(given):
    with pytest.raises(SqvizError, match=r"text must be a string.*torch\.tensor\(ids\)"):
        as_tokens(lm, given)


def test_too_short_says_how_many_tokens_there_are(tmp_path, monkeypatch):
    with pytest.raises(TextTooShort, match=r"3 tokens, and one segment needs 8"):
        next(as_segments(lm, "a bb ccc", 1, 8))
    with pytest.raises(TextTooShort, match=r"5 tokens, and one segment needs 8"):
        as_segments(lm, torch.arange(5), 1, 8)
    with pytest.raises(TextTooShort, match="0 tokens"):
        as_tokens(lm, torch.tensor([], dtype=torch.int64))
    (tmp_path / "book.txt").write_text("long " * 100)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextTooShort, match=r"There is a file of that name: sqviz\.text"):
        next(as_segments(lm, "book.txt", 1, 8))


def test_a_segment_longer_than_the_model_can_take():
    with pytest.raises(SqvizError, match=r"length=65 is more than the 64 positions that toy was made for"):
        as_segments(lm, "a", 1, 65)


def test_counts_are_checked_for_ids_too():
    with pytest.raises(SqvizError, match="length=1"):
        as_segments(lm, torch.arange(5), 1, 1)
    with pytest.raises(SqvizError, match="samples=0"):
        as_segments(lm, torch.arange(5), 0, 2)

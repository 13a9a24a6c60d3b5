"""Tokens to be read by people, one by one."""

from collections.abc import Sequence
from typing import Any

_SHOWN = str.maketrans({" ": "·", "\n": "↵", "\r": "↵", "\t": "⇥"})
_LEADING_BLANK = ("Ġ", "▁")  # how byte-level and sentencepiece vocabularies write a blank before a word


def token_texts(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """What each token reads: blanks as ·, line ends as ↵, tabs as ⇥; "#17" for token 17 if there is no tokenizer."""
    if tokenizer is None:
        return tuple(f"#{token}" for token in ids)
    distinct = list(dict.fromkeys(ids))
    texts = tokenizer.batch_decode([[token] for token in distinct], clean_up_tokenization_spaces=False)
    raw = tokenizer.convert_ids_to_tokens(distinct)
    table = {token: _visible(text, piece) for token, text, piece in zip(distinct, texts, raw, strict=True)}
    return tuple(table[token] for token in ids)


def _visible(text: str, piece: str | None) -> str:
    if piece and piece.startswith(_LEADING_BLANK) and not text.startswith(" "):
        text = f" {text}"  # sentencepiece drops the blank of a text's first word, and here each token is a text
    return text.translate(_SHOWN) or (piece or "")

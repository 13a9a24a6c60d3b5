"""Text of a growing list of tokens, piece by piece.

A character may span tokens, and a token's text may depend on the one before it (a leading space). So tokens are decoded
together with a few before them, and what may still change is held back: bytes that are not yet a whole character.
"""

from collections.abc import Sequence
from typing import Any

UNKNOWN = "\ufffd"  # what decoders write for bytes that are no character
CONTEXT = 64  # tokens before the first that are decoded with it
PATIENCE = 8  # tokens without a whole character, after which the bytes are taken to be no character
PARTIAL = 3  # bytes that may begin a character (of four)
LONGEST = 64  # tokens decoded at a time
RESTART = 8  # tokens left of them when there were more


class Pieces:
    """Turns tokens into text as they come; without a tokenizer every piece is empty."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        """Begin after the tokens `before`, whose text is not given out."""
        self._tokenizer = tokenizer
        self._window = list(before[-CONTEXT:])
        self._boundary = len(self._window)  # tokens up to here are whole characters
        self._waiting = 0
        self._given = len(self._decode(self._window).rstrip(UNKNOWN))

    def push(self, token: int) -> str:
        """The text that this token completes."""
        if self._tokenizer is None:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        partial = len(text) - len(text.rstrip(UNKNOWN))
        self._waiting = self._waiting + 1 if partial else 0
        held = partial if self._waiting <= PATIENCE else min(partial, PARTIAL)
        piece = text[self._given : len(text) - held]
        self._given = max(self._given, len(text) - held)
        if piece and not partial:
            self._restart(self._boundary)
            self._boundary = len(self._window)
        elif len(self._window) > LONGEST:
            self._restart(len(self._window) - RESTART, held)
            self._boundary = 0
        return piece

    def rest(self) -> str:
        """The text held back, as it is. It stays held back."""
        if self._tokenizer is None:
            return ""
        return self._decode(self._window)[self._given :]

    def peek(self, token: int) -> str:
        """The text that this token would add; a special token's name, and U+FFFD for part of a character."""
        if self._tokenizer is None:
            return ""
        return self._decode([*self._window, token])[self._given :] or str(self._tokenizer.convert_ids_to_tokens(token))

    def _restart(self, first: int, held: int = 0) -> None:
        self._window = self._window[first:]
        self._given = max(0, len(self._decode(self._window)) - held)

    def _decode(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

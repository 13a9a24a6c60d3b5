"""Prompts as token ids: the first of a stream, and those that go on with it.

A chat goes on by the text that the model's template adds to what was said: the template writes the whole chat anew, the
part that the stream holds is checked to be the same, and the rest is what is fed.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sqviz.corpus.segments import as_tokens
from sqviz.errors import NoTokenizer, SqvizError
from sqviz.models.lm import LM

Message = Mapping[str, str]
Prompt = str | Tensor | list[Message]


class Turns:
    """What was said in a stream so far, if it is a chat."""

    def __init__(self, lm: LM) -> None:
        self._lm = lm
        self._messages: list[dict[str, str]] | None = None
        self._written = ""

    def first(self, prompt: Prompt) -> list[int]:
        """Ids of the prompt that a stream begins with; text gets the special tokens that its tokenizer begins with.

        Raises:
            NoTokenizer: text or messages for a model without a tokenizer.
            SqvizError: an empty prompt, ids outside the vocabulary, no chat template, or something else than a prompt.
        """
        if isinstance(prompt, str):
            return _not_empty(self._ids(prompt, special=True))
        if isinstance(prompt, Tensor):
            return _given_ids(self._lm, prompt)
        messages = _checked(prompt)
        written = self._write(messages)
        ids = _not_empty(self._ids(written))
        self._messages, self._written = messages, written
        return ids

    def then(self, prompt: Prompt, said: str) -> list[int]:
        """Ids to go on with, after the model said `said`. Text and ids are taken as they are; they end a chat.

        Raises:
            SqvizError: the template would write earlier turns in another way than they were read, messages for a
                stream that is no chat, and as `first`.
        """
        if isinstance(prompt, str | Tensor):
            ids = _not_empty(self._ids(prompt)) if isinstance(prompt, str) else _given_ids(self._lm, prompt)
            self._messages = None
            return ids
        new = _checked(prompt)
        if self._messages is None:
            raise SqvizError(
                "this stream is no chat, or no longer: it was given text or token ids. Go on with stream.send(text), "
                "or begin with messages: [{'role': 'user', 'content': …}]"
            )
        messages = [*self._messages, {"role": "assistant", "content": said}, *new]
        written = self._write(messages)
        ids = _not_empty(self._ids(self._rest(written, said)))
        self._messages, self._written = messages, written
        return ids

    def _rest(self, written: str, said: str) -> str:
        """What the template adds to the text that the stream holds; blanks around a reply may be missing in it."""
        if written.startswith(self._written):
            after = written[len(self._written) :]
            for known in (said, said.rstrip(), said.lstrip(), said.strip()):
                if after.startswith(known):
                    return after[len(known) :]
        raise SqvizError(
            f"the chat template of {self._lm.name} rewrites earlier turns (it leaves out reasoning, say, or the date): "
            "what the cache holds is not what the template would write now. Begin a new stream with all messages, or "
            "go on with stream.send(text), which takes the text as it is"
        )

    def _write(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        tokenizer = self._tokenizer()
        if not getattr(tokenizer, "chat_template", None):
            raise SqvizError(
                f"the tokenizer of {self._lm.name} has no chat template, so it cannot take messages. Give text, load "
                "an instruction-tuned model, or set lm.tokenizer.chat_template"
            )
        try:
            return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except (TemplateError, ValueError) as error:
            raise SqvizError(f"the chat template of {self._lm.name} refused these messages: {error}") from error

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer()(text, add_special_tokens=special, verbose=False).input_ids
        return ids

    def _tokenizer(self) -> Any:
        if self._lm.tokenizer is None:
            raise NoTokenizer(
                f"{self._lm.name} has no tokenizer, so it cannot take text: give a 1-D torch.LongTensor of token ids, "
                "or a tokenizer: sqviz.wrap(model, tokenizer)"
            )
        return self._lm.tokenizer


def _given_ids(lm: LM, ids: Tensor) -> list[int]:
    return as_tokens(lm, _not_empty(ids) if ids.ndim == 1 else ids).tolist()


def _not_empty(ids: Any) -> Any:
    if len(ids) == 0:
        raise SqvizError("the prompt is empty: one token at least is needed to go on from.")
    return ids


def _checked(prompt: Any) -> list[dict[str, str]]:
    if not isinstance(prompt, list | tuple) or not all(isinstance(message, Mapping) for message in prompt):
        raise SqvizError(
            "a prompt is text, a 1-D tensor of token ids (torch.tensor(ids)), or a list of messages such as "
            f"{{'role': 'user', 'content': 'Hello'}}; got {type(prompt).__name__}"
        )
    for message in _not_empty(prompt):
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise SqvizError(f"a message has a 'role' and a 'content', both strings; got {dict(message)!r}")
    return [dict(message) for message in prompt]

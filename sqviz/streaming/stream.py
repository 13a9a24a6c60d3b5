"""`Stream`: text that is being generated, one step at a time, and gone on with turn after turn.

One step reads what was not read yet (the prompt in pieces, or the token chosen last) and chooses one token. The token
chosen last is never in the cache: it is read by the next step, together with the next turn's prompt if there is one.
"""

import array
import asyncio
import collections
import dataclasses
import io
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Int64
from torch import Tensor

from sqviz.errors import SqvizError
from sqviz.models.lm import LM
from sqviz.progress import CancelToken
from sqviz.streaming.pieces import Pieces
from sqviz.streaming.policies import Policy
from sqviz.streaming.reader import CacheView, Reader
from sqviz.streaming.sampling import Choice, Sampler
from sqviz.streaming.turns import Prompt, Turns

if TYPE_CHECKING:
    from sqviz.streaming.cache import SinkCache

Ended = Literal["max_tokens", "eos", "stop", "cancelled"]


@dataclasses.dataclass(frozen=True)
class StreamStep:
    """One generated token.

    Attributes:
        index: its number in this turn, from 0.
        position: its column in the whole stream, prompts included.
        token: its id.
        text: what can be decoded now that it is there: nothing for a part of a character or a special token. The texts
            of all steps together are the text of all tokens.
        nll: −ln p of the token in nats under the model's own distribution, before temperature, top-k, top-p, penalty.
        top: the most probable tokens at this place as (id, text, probability), probabilities as for `nll`.
        cache: what is kept; this token is not in it yet.
        seconds: time of this step, that of reading the prompt included.
    """

    index: int
    position: int
    token: int
    text: str
    nll: float
    top: tuple[tuple[int, str, float], ...]
    cache: CacheView
    seconds: float


@dataclasses.dataclass(frozen=True)
class Ends:
    """When a turn ends."""

    max_tokens: int | None
    eos: frozenset[int]
    stop: tuple[str, ...]

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) and text for text in self.stop):
            raise SqvizError(f"stop={self.stop!r}: strings that are not empty are allowed.")

    def why(self, count: int, token: int, text: str, piece: str) -> Ended | None:
        """The reason to end after this token, whose piece is the end of the text."""
        if token in self.eos:
            return "eos"
        if any(text.find(stop, max(0, len(text) - len(piece) - len(stop) + 1)) >= 0 for stop in self.stop):
            return "stop"
        return "max_tokens" if count == self.max_tokens else None


@dataclasses.dataclass
class _Turn:
    """What was generated since the latest prompt; `tail` is as much of the text's end as may begin a stop string."""

    pieces: Pieces
    text: io.StringIO = dataclasses.field(default_factory=io.StringIO)
    tail: str = ""
    count: int = 0
    ended: Ended | None = None

    @property
    def open(self) -> bool:
        """Whether there is more to come."""
        return self.ended in (None, "cancelled")


class Stream(Iterator[StreamStep], AsyncIterator[StreamStep]):
    """Text that is being generated; see `stream_generate`. Iterate it with `for` or `async for`.

    Several threads or tasks may iterate it: steps are done one at a time, and each is given to one of them. As a
    context manager it takes the hooks of its cache off the model at the end; a cache that was passed in is left as it
    is.
    """

    def __init__(
        self,
        lm: LM,
        read: Reader,
        sampler: Sampler,
        prompt: Prompt,
        ends: Ends,
        token: CancelToken | None = None,
        *,
        owned: bool = True,
    ) -> None:
        """Use `stream_generate`. `owned`: the cache was made for this stream."""
        self._lm, self._reader, self._sampler, self._ends, self._owned = lm, read, sampler, ends, owned
        self._turns, self._ids = Turns(lm), array.array("q")
        self._lock, self._ready = threading.Lock(), collections.deque[StreamStep]()
        self._cancel, self._token = threading.Event(), token
        self._turn = self._begin(self._turns.first(prompt))

    # --- what there is ---

    @property
    def text(self) -> str:
        """What was generated since the latest prompt."""
        return self._turn.text.getvalue()

    @property
    def tokens(self) -> Int64[Tensor, " token"]:
        """All ids of the stream: prompts and what was generated."""
        return torch.tensor(self._ids.tolist(), dtype=torch.long)

    @property
    def ended(self) -> Ended | None:
        """Why the turn ended; None while it goes on. Only "cancelled" can be gone on with as it is."""
        return self._turn.ended

    @property
    def cache(self) -> "SinkCache | None":
        """Where keys are kept; its policy may be changed on the way. None for `Recompute`."""
        return self._reader.cache

    def change(self, policy: Policy) -> None:
        """Keep something else from the next token on; waits for the step under way.

        Raises `SqvizError` where a policy with a cache would have to become one without, or the other way round.
        """
        with self._lock:
            self._reader.change(policy)

    def __repr__(self) -> str:
        return f"Stream({self._lm.name}: {len(self._ids)} tokens, {self.ended or 'goes on'})"

    # --- one step after the other ---

    def __iter__(self) -> "Stream":
        return self

    def __aiter__(self) -> "Stream":
        return self

    def __next__(self) -> StreamStep:
        while self._advance():
            if self._ready:
                return self._ready.popleft()
        raise StopIteration

    async def __anext__(self) -> StreamStep:
        # A step waits in `_ready` until it is taken: a task that is cancelled while it waits for one loses none.
        while await asyncio.to_thread(self._advance):
            if self._ready:
                return self._ready.popleft()
        raise StopAsyncIteration

    def cancel(self) -> None:
        """End the iteration after the step under way, or between two pieces of a prompt; iterate again to go on."""
        self._cancel.set()

    def _stopped(self) -> bool:
        return self._cancel.is_set() or (self._token is not None and self._token.cancelled)

    def _advance(self) -> bool:
        """Have a step ready; False if there is none to come."""
        with self._lock:
            if not self._ready:
                step = self._step()
                if step is None:
                    return False
                self._ready.append(step)
            return True

    def _step(self) -> StreamStep | None:
        if not self._turn.open:
            return None
        began = time.perf_counter()
        logits = None if self._stopped() else self._reader.read(self._ids, self._stopped)
        if logits is None:
            self._cancel.clear()
            if self._token is not None and self._token.cancelled:
                self._token = None  # it cannot be taken back; having stopped the stream once, it is let go of
            self._turn.ended = "cancelled"
            return None
        self._turn.ended = None
        return self._take(self._sampler.choose(logits), began)

    def _take(self, choice: Choice, began: float) -> StreamStep:
        """Make a chosen token part of the stream."""
        turn, token = self._turn, choice.token
        index, position = turn.count, self._reader.start + len(self._ids)
        top = tuple((other, turn.pieces.peek(other), probability) for other, probability in choice.top)
        piece = turn.pieces.push(token)
        self._ids.append(token)
        self._sampler.note([token])
        turn.count += 1
        turn.tail += piece
        turn.ended = self._ends.why(turn.count, token, turn.tail, piece)
        turn.tail = turn.tail[-max(map(len, self._ends.stop), default=1) :]
        if turn.ended is not None:
            piece += turn.pieces.rest()
        turn.text.write(piece)
        seconds = time.perf_counter() - began
        return StreamStep(index, position, token, piece, choice.nll, top, self._reader.view(), seconds)

    # --- turns ---

    def reply(self, message: str) -> "Stream":
        """Say something as the user of a chat; iterate to read what the model answers. Only new tokens are fed.

        Args:
            message: what the user says. The model's chat template is put around it. The reply so far counts as said,
                whether it came to its end or not.

        Raises:
            SqvizError: as `send`.
        """
        return self.send([{"role": "user", "content": message}])

    def send(self, prompt: Prompt) -> "Stream":
        """Go on with more text on the same cache; iterate to read what the model makes of it.

        Args:
            prompt: text or ids, added as they are; or messages, added by the model's chat template.

        Raises:
            SqvizError: an empty or bad prompt, or messages where the stream is no chat or where the template would now
                write earlier turns in another way.
        """
        with self._lock:
            said = self.text + (self._turn.pieces.rest() if self._turn.open else "")
            new = self._turns.then(prompt, said)
            if self.ended == "eos" and not isinstance(prompt, str | Tensor) and self._hidden(self._ids[-1]):
                self._ids.pop()  # not read yet; the template ends the turn in its own way
            self._turn = self._begin(new)
        return self

    def _begin(self, ids: list[int]) -> _Turn:
        self._ids.extend(ids)
        self._sampler.note(ids)
        self._ready.clear()
        return _Turn(Pieces(self._lm.tokenizer, self._ids))

    def _hidden(self, token: int) -> bool:
        return not self._lm.tokenizer.decode([token], skip_special_tokens=True)

    # --- the end ---

    def close(self) -> None:
        """Take the hooks of the stream's own cache off the model. The stream cannot go on afterwards."""
        with self._lock:
            if self._owned and self._reader.cache is not None:
                self._reader.cache.close()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

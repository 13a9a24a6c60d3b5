"""lm-eval's model interface over an `LM`, so that every task of lm-eval runs on a quantised model too.

    import lm_eval
    lm_eval.simple_evaluate(model=adapter(int8), tasks=["gsm8k"])

Likelihoods come from `zeroshot`, hence local files and lm-eval agree. Generation is greedy.
"""

import functools
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

import torch

from sqviz.errors import SqvizError, Unavailable
from sqviz.evaluation.zeroshot import Likelihood, Tokens, encode, encode_pair, loglikelihoods, prefix_token, window
from sqviz.models.lm import LM
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar
from sqviz.quant.int8_attention import uses

NEW_TOKENS = 256  # as lm-eval, for tasks that do not say
_ROOM = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


def harness(module: str) -> Any:
    """A module of lm-eval.

    Raises:
        Unavailable: lm-eval is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise Unavailable(
            "lm-eval is not installed, and this task comes through it: pip install 'sqviz[eval]'. From a local file it "
            "works without: sqviz.evaluate(lm, {'hellaswag': 'hellaswag.jsonl'})"
        ) from error


def adapter(lm: LM, *, batch: int = 1, cancel: CancelToken | None = None, progress: bool = False) -> Any:
    """An `lm_eval.api.model.LM` that answers with this model; nothing is copied.

    Args:
        lm: the model, quantised or not, with a tokenizer.
        batch: prompts per forward pass for likelihoods; generation takes one at a time.
        cancel: stops between two forward passes.
        progress: show a progress bar.

    Raises:
        Unavailable: lm-eval is not installed.
        SqvizError: from its methods: sampling was asked for, or a prompt that leaves no room.
    """
    return _adapter_class()(lm, batch, cancel, progress)


@functools.cache
def _adapter_class() -> type:
    base: Any = harness("lm_eval.api.model").LM

    class Adapter(base):
        """See `adapter`."""

        def __init__(self, lm: LM, batch: int, cancel: CancelToken | None, progress: bool) -> None:
            super().__init__()
            self.lm, self.batch, self.cancel, self.progress = lm, batch, cancel, progress
            self._device = lm.device

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            found = self._score([encode_pair(self.lm, *request.args[:2]) for request in requests], "likelihoods")
            return [(one.value, one.greedy) for one in found]

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            parts = [list(windows(self.lm, request.args[0])) for request in requests]
            found = iter(self._score([pair for part in parts for pair in part], "texts"))
            return [sum(next(found).value for _ in part) for part in parts]

        def generate_until(self, requests: list[Any]) -> list[str]:
            said = []
            with progress_bar(len(requests), "answers", unit="prompts", cancel=self.cancel, show=self.progress) as bar:
                for request in requests:
                    said.append(generate(self.lm, request.args[0], request.args[1], self.cancel))
                    bar.step()
            return said

        def _score(self, pairs: Sequence[Tokens], what: str) -> list[Likelihood]:
            return loglikelihoods(
                self.lm, pairs, batch=self.batch, what=what, cancel=self.cancel, progress=self.progress
            )

    return Adapter


def windows(lm: LM, text: str) -> Iterator[Tokens]:
    """A text cut so that each token is predicted once: full windows one after another, the last with all context it can
    have. The first token is predicted from the prefix token."""
    longest, ids = window(lm), encode(lm, text)
    for start in range(0, len(ids), longest):
        stop = min(start + longest, len(ids))
        first = max(0, stop - longest - 1) if start else 0
        yield ([prefix_token(lm)] if start == 0 else ids[first:start]), ids[start:stop]


@torch.no_grad()
def generate(lm: LM, prompt: str, settings: dict[str, Any], cancel: CancelToken | None = None) -> str:
    """What greedy decoding writes after a prompt, up to the first of the texts in `settings["until"]`.

    Raises:
        SqvizError: sampling or beams were asked for, or there is no room for a prompt.
        Cancelled: stopped through `cancel`.
    """
    if settings.get("do_sample") or (settings.get("temperature") or 0) > 0 or settings.get("num_beams", 1) != 1:
        raise SqvizError(f"the task asks for {settings}, and only greedy decoding is offered: do_sample=False")
    room = next((int(settings[name]) for name in _ROOM if name in settings), NEW_TOKENS)
    if window(lm) <= room:
        raise SqvizError(f"{room} new tokens leave no room for a prompt: {lm.name} reads {window(lm)} at once")
    ids = encode(lm, prompt)[-(window(lm) - room) :] or [prefix_token(lm)]
    until, ends = _stops(lm, settings.get("until"))
    new: list[int] = []
    for token in _greedy(lm, ids, room):
        if cancel is not None:
            cancel.check("generation")
        new.append(token)
        if token in ends or any(stop in lm.tokenizer.decode(new, skip_special_tokens=True) for stop in until):
            break
    said = str(lm.tokenizer.decode(new, skip_special_tokens=True))
    for stop in until:
        said = said.split(stop)[0]
    return said


def _stops(lm: LM, until: Any) -> tuple[list[str], set[int]]:
    """Texts and tokens that end an answer."""
    texts = [until] if isinstance(until, str) else list(until or ())
    given = getattr(getattr(lm.model, "generation_config", None), "eos_token_id", None)
    ends = {given} if isinstance(given, int) else set(given or ())
    own = getattr(lm.tokenizer, "eos_token_id", None)
    if own is not None:
        ends.add(own)
        texts.append(lm.tokenizer.decode([own], skip_special_tokens=False))
    return [text for text in texts if text], ends


def _greedy(lm: LM, ids: list[int], room: int) -> Iterator[int]:
    """The most likely token, again and again."""
    cache: Any = None
    if uses(lm):
        from sqviz.quant.int8_cache import Int8Cache

        cache = Int8Cache(lm)
    fresh = torch.tensor([ids], device=lm.device)
    for _ in range(room):
        out = lm.model(input_ids=fresh, past_key_values=cache, use_cache=True)
        cache, fresh = out.past_key_values, out.logits[:, -1:].argmax(-1)
        yield int(fresh)

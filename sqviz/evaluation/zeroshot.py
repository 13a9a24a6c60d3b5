"""How likely a model finds a continuation after a context, and what accuracy follows from that.

Tokens are made as lm-eval makes them: context and continuation are encoded as one text, the context once more alone,
and the continuation is what the whole has beyond the context's length; spaces at the end of the context count to the
continuation. What the tokenizer adds by itself in front stays. An empty context is the BOS token, or else the EOS
token. What is too long loses its beginning.

    ln p(continuation | context) = Σ ln softmax(logits before the token)[token]        float32, summed in float64
    acc       is the right choice the one with the largest ln p? The first of equal ones is taken.
    acc_norm  the same with ln p divided by the characters of the choice.

Prompts that differ in nothing but the last token share one forward pass: one per question where answers are letters.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sqviz.errors import NonFinite, NoTokenizer, SqvizError
from sqviz.evaluation.items import Item, Task
from sqviz.evaluation.scores import Score, score
from sqviz.models.lm import LM
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar

Tokens = tuple[list[int], list[int]]
"""Context, and the continuation that is scored."""

_LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx", "max_seq_len")
_DEFAULT_WINDOW = 2048  # as lm-eval, for models that have no limit of their own


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """Of one continuation.

    Attributes:
        value: ln p of the whole of it.
        greedy: whether each of its tokens is the most likely one.
        dropped: tokens left off at the beginning of the context.
    """

    value: float
    greedy: bool
    dropped: int


def window(lm: LM) -> int:
    """The most tokens the model reads at once."""
    for name in _LENGTHS:
        if isinstance(longest := getattr(lm.config, name, None), int):
            return longest
    longest = getattr(lm.tokenizer, "model_max_length", None)
    return longest if isinstance(longest, int) and longest < 10**9 else _DEFAULT_WINDOW


def prefix_token(lm: LM) -> int:
    """The token that stands for an empty context.

    Raises:
        SqvizError: the tokenizer has neither a BOS nor an EOS token.
    """
    for name in ("bos_token_id", "eos_token_id"):
        token = getattr(tokenizer_of(lm), name, None)
        if token is not None:
            return int(token)
    raise SqvizError(f"{lm.name}: the tokenizer has no BOS and no EOS token, so nothing can stand for an empty context")


def encode(lm: LM, text: str) -> list[int]:
    """Token ids with what the tokenizer adds by itself, but no second BOS token for a text that begins with one."""
    tokenizer = tokenizer_of(lm)
    first = getattr(tokenizer, "bos_token", None) or getattr(tokenizer, "eos_token", None)
    if first and text.startswith(first):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(text)["input_ids"])


def encode_pair(lm: LM, context: str, continuation: str) -> Tokens:
    """Tokens of a context and of what is scored after it.

    Raises:
        SqvizError: nothing is left to score.
        NoTokenizer: the model has none.
    """
    if not context:
        alone = list(tokenizer_of(lm)(continuation, add_special_tokens=False)["input_ids"])
        first = prefix_token(lm)
        before, after = (alone[:1], alone[1:]) if alone[:1] == [first] else ([first], alone)
    else:
        bare = context.rstrip()
        whole, before = encode(lm, context + continuation), encode(lm, bare)
        if not before:  # nothing but spaces, and a tokenizer that adds nothing: as if it were empty
            before = [prefix_token(lm)]
            whole = before + whole
        after = whole[len(before) :]
    if not after:
        raise SqvizError(f"the continuation {continuation!r} has no token of its own after {context[-40:]!r}")
    return before, after


def loglikelihoods(
    lm: LM,
    requests: Sequence[Tokens],
    *,
    batch: int = 1,
    what: str = "likelihoods",
    cancel: CancelToken | None = None,
    progress: bool = False,
) -> list[Likelihood]:
    """ln p of each continuation after its context.

    Args:
        lm: the model, quantised or not.
        requests: tokens of context and continuation.
        batch: prompts per forward pass, padded on the right. Leave it at 1 for a model quantised with dynamic
            per-tensor steps, which would otherwise span the batch and the padding.
        what: the title of the progress bar.
        cancel: stops the work between two forward passes.
        progress: show a progress bar.

    Raises:
        SqvizError: a continuation longer than the model can read; a bad batch.
        NonFinite: the model gave NaN, or an infinite logit for a token that occurs.
        Cancelled: stopped through `cancel`.
    """
    check_count(batch, "batch", "prompts per forward pass")
    longest = window(lm)
    prompts: dict[tuple[int, ...], list[int]] = {}
    for number, (before, after) in enumerate(requests):
        if len(after) > longest:
            raise SqvizError(f"a continuation has {len(after)} tokens, and {lm.name} reads {longest} at once")
        prompts.setdefault(_prompt(before, after, longest), []).append(number)
    rows = sorted(prompts, key=len, reverse=True)  # the longest first: a lack of memory shows at once
    found: dict[int, Likelihood] = {}
    with progress_bar(len(requests), what, unit="prompts", cancel=cancel, show=progress) as bar:
        bar.step(0)
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            for row, logits in zip(part, _forward(lm, part), strict=True):
                for number in prompts[row]:
                    found[number] = _likelihood(lm, logits[: len(row)], *requests[number])
                bar.step(len(prompts[row]))
    return [found[number] for number in range(len(requests))]


def tokens_of(lm: LM, task: Task, items: Sequence[Item]) -> list[Tokens]:
    """Tokens of every choice of every question, in order. Raises what `encode_pair` does, naming the question."""
    found = []
    for number, item in enumerate(items, 1):
        try:
            found += [encode_pair(lm, *pair) for pair in item.pairs]
        except NoTokenizer:
            raise
        except SqvizError as error:
            raise SqvizError(f"question {number} of {task.name}: {error}") from error
    return found


def answer(
    lm: LM,
    task: Task,
    items: Sequence[Item],
    requests: Sequence[Tokens],
    content: str,
    *,
    batch: int = 1,
    cancel: CancelToken | None = None,
    progress: bool = False,
) -> list[Score]:
    """All metrics of a task over these questions, whose tokens `tokens_of` made. Raises what `loglikelihoods` does."""
    start = time.perf_counter()
    found = iter(loglikelihoods(lm, requests, batch=batch, what=task.name, cancel=cancel, progress=progress))
    choices = [[next(found) for _ in item.pairs] for item in items]
    seconds = time.perf_counter() - start
    note = _note([max(choice.dropped for choice in said) for said in choices], window(lm))
    return [
        score(
            task.name,
            metric,
            torch.tensor([contribution(metric, *one) for one in zip(items, choices, strict=True)], dtype=torch.float64),
            content=content,
            seconds=seconds,
            note=note,
        )
        for metric in task.metrics
    ]


def contribution(metric: str, item: Item, choices: Sequence[Likelihood]) -> float:
    """What one question adds to a metric: 1 or 0 for an accuracy, −ln p for perplexity."""
    values = [choice.value for choice in choices]
    if metric == "perplexity":
        return -values[item.right]
    if metric == "acc_norm":
        values = [value / length for value, length in zip(values, item.lengths, strict=True)]
    elif metric != "acc":
        raise SqvizError(f"metric {metric!r}: 'acc', 'acc_norm' and 'perplexity' are allowed")
    if len(values) == 1:
        return float(choices[0].greedy)
    return float(values.index(max(values)) == item.right)


def check_count(value: Any, name: str, what: str) -> None:
    """Raise `SqvizError` unless it is a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SqvizError(f"{name}={value!r}: a number of {what}, at least 1, is allowed")


def tokenizer_of(lm: LM) -> Any:
    """The model's tokenizer. Raises `NoTokenizer` if it has none."""
    if lm.tokenizer is None:
        raise NoTokenizer(f"{lm.name} has no tokenizer, and questions are text: sqviz.wrap(model, tokenizer) adds one")
    return lm.tokenizer


def _prompt(before: list[int], after: list[int], longest: int) -> tuple[int, ...]:
    """What the model reads: all but the last token, which is only predicted."""
    return tuple((before + after)[:-1][-longest:])


@torch.no_grad()
def _forward(lm: LM, rows: Sequence[tuple[int, ...]]) -> Tensor:
    """-> logits [row token vocabulary] in the model's dtype; what lies beyond a row's end means nothing."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=lm.device)
    return lm.model(input_ids=ids, use_cache=False).logits


def _likelihood(lm: LM, logits: Tensor, before: list[int], after: list[int]) -> Likelihood:
    said = logits[-len(after) :].float()
    targets = torch.tensor(after, device=said.device)
    value = -float(cross_entropy(said, targets, reduction="none").double().sum())
    if not abs(value) < float("inf"):
        raise NonFinite(
            f"{lm.name} gave NaN or infinite logits, so there is no likelihood. Load it in float32 or bfloat16, and "
            "check what was done to it last."
        )
    greedy = bool((said.argmax(-1) == targets).all())
    return Likelihood(value, greedy, len(before) + len(after) - 1 - len(logits))


def _note(dropped: Sequence[int], longest: int) -> str:
    cut = sum(1 for count in dropped if count)
    if not cut:
        return ""
    return f"{cut} of {len(dropped)} longer than {longest} tokens: up to {max(dropped)} at the beginning left off"

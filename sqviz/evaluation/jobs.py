"""From what `evaluate` was asked for to jobs: read, tokenised and hashed before the model runs for the first time.

So a missing file, a row without its field or a hub out of reach shows at once, not after an hour of other tasks.
"""

import dataclasses
import difflib
import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from sqviz.corpus.segments import Text, as_tokens
from sqviz.corpus.source import text as text_source
from sqviz.errors import SqvizError
from sqviz.evaluation.items import Source, Task, content_of
from sqviz.evaluation.lm_eval_tasks import FILES, installed, known_names, load
from sqviz.evaluation.perplexity import segment_nll
from sqviz.evaluation.scores import Score, missing, score
from sqviz.evaluation.tasks import CORPORA, TASKS
from sqviz.evaluation.zeroshot import answer, tokenizer_of, tokens_of
from sqviz.models.lm import LM
from sqviz.progress import CancelToken
from sqviz.progress import progress as progress_bar

Wanted = str | Task | Mapping[str, Source | Text]
"""One task, or several by name with where they are."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A task that is ready to run.

    Attributes:
        name: of the task.
        names: of the tasks that its scores belong to; more than one for a group of lm-eval.
        content: a hash of its items.
        run: scores the model; takes the cancel token and whether to show progress.
    """

    name: str
    names: tuple[str, ...]
    content: str
    run: Callable[[CancelToken | None, bool], list[Score]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What holds for all tasks; see `evaluate`."""

    text: Text | None
    length: int
    limit: int | None
    batch: int


def jobs(lm: LM, wanted: Wanted | Sequence[Wanted], settings: Settings) -> tuple[Job, ...]:
    """The tasks, ready to run, in order.

    Raises:
        SqvizError: an unknown task, a name twice, a file that does not hold what it should.
    """
    several = [wanted] if isinstance(wanted, str | Task | Mapping) else list(wanted)
    named = [pair for one in several for pair in _pairs(one)]
    if not named:
        raise SqvizError(f"tasks is empty. A task is one of {_known()}, 'name:questions.jsonl' or a Task")
    names = [task.name if isinstance(task, Task) else task for task, _ in named]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SqvizError(
            f"tasks has {', '.join(sorted(twice))} more than once. The same format from two files needs two names: "
            "TASKS['arc_easy'].at('b.jsonl', name='b')"
        )
    return tuple(_job(lm, task, source, settings) for task, source in named)


def _pairs(one: Any) -> list[tuple[str | Task, Any]]:
    """-> task or name, and its source (None: the one it has by itself)."""
    if isinstance(one, Task):
        return [(one, one.source)]
    if isinstance(one, Mapping):
        return list(one.items())
    if not isinstance(one, str):
        raise SqvizError(
            f"a task is a name, 'name:questions.jsonl', a mapping of names to files or a Task; not {type(one).__name__}"
        )
    name, colon, path = one.partition(":")
    return [(name, path if colon else None)]


def _job(lm: LM, task: str | Task, source: Any, settings: Settings) -> Job:
    if isinstance(task, str) and task in CORPORA:
        return _perplexity(lm, task, source, settings)
    row = task if isinstance(task, Task) else TASKS.get(task)
    if row is not None and source is not None:
        return _questions(lm, row.at(source), settings)
    name = row.name if row is not None else str(task)
    if task == name and name.endswith(FILES) and source is None:
        return _harness(lm, Path(name).stem, name, settings)
    if row is None and (source is not None or not installed()):
        raise SqvizError(_unknown(name, [*CORPORA, *TASKS]))
    if row is not None and not row.harness:
        raise SqvizError(f"the task {name!r} has no source and no counterpart in lm-eval: task.at('questions.jsonl')")
    harness = row.harness if row is not None else name
    if harness not in known_names(name):
        raise SqvizError(_unknown(name, [*CORPORA, *TASKS, *known_names(name)]))
    return _harness(lm, name, harness, settings)


def _harness(lm: LM, name: str, own_name: str, settings: Settings) -> Job:
    """A task of lm-eval by its own name, or in a file in lm-eval's form."""
    tokenizer_of(lm)
    tasks = load(name, own_name, settings.limit)
    return Job(name, tasks.names, tasks.content, lambda cancel, show: tasks.run(lm, settings.batch, cancel, show))


def _known() -> str:
    return ", ".join(map(repr, [*CORPORA, *TASKS]))


def _unknown(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, dict.fromkeys(names), n=3, cutoff=0.5)
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    more = (
        "lm-eval has no task of that name either" if installed() else "pip install 'sqviz[eval]' adds those of lm-eval"
    )
    return f"there is no task {name!r}.{meant} Known: {_known()}; {more}. A format of your own is a sqviz Task"


def _questions(lm: LM, task: Task, settings: Settings) -> Job:
    items = task.items(settings.limit)
    content = content_of("questions", [dataclasses.astuple(item) for item in items])
    requests = tokens_of(lm, task, items)

    def run(cancel: CancelToken | None, show: bool) -> list[Score]:
        return answer(lm, task, items, requests, content, batch=settings.batch, cancel=cancel, progress=show)

    return Job(task.name, (task.name,), content, run)


def _perplexity(lm: LM, name: str, source: Any, settings: Settings) -> Job:
    """Segments of a text; see `sqviz.evaluation.perplexity`."""
    corpus, length, limit = CORPORA[name], settings.length, settings.limit
    if source is not None:
        given = text_source(source) if isinstance(source, str | os.PathLike) else source
    elif name == "perplexity" and settings.text is not None:
        given = settings.text
    else:
        given = text_source(corpus.source)
        limit = limit or corpus.segments
    ids = as_tokens(lm, given, None if limit is None else limit * max(length, 1))
    segment_nll(lm, ids, length, batch=settings.batch)  # complains now about what it cannot work with
    ids = ids[: len(ids) // length * length]
    content = content_of("segments", [length, hashlib.sha256(ids.numpy().tobytes()).hexdigest()])
    note = "" if limit == settings.limit else f"the first {limit} segments; limit=… takes more"

    def run(cancel: CancelToken | None, show: bool) -> list[Score]:
        start = time.perf_counter()
        sums = []
        with progress_bar(len(ids) // length, name, unit="segments", cancel=cancel, show=show) as bar:
            bar.step(0)
            for nll in segment_nll(lm, ids, length, batch=settings.batch, cancel=cancel):
                sums.append(float(nll.double().sum()))
                bar.step()
        seconds = time.perf_counter() - start
        return _perplexity_scores(
            lm, name, torch.tensor(sums, dtype=torch.float64), ids, length, content, seconds, note
        )

    return Job(name, (name,), content, run)


def _perplexity_scores(
    lm: LM,
    name: str,
    nll: Tensor,
    ids: Int64[Tensor, " token"],
    length: int,
    content: str,
    seconds: float,
    note: str,
) -> list[Score]:
    predicted = torch.full_like(nll, length - 1)
    first = score(name, "perplexity", nll, predicted, content=content, seconds=seconds, note=note)
    bytes_ = predicted_bytes(lm, ids.view(-1, length))
    if bytes_ is None or not bool(bytes_.sum()):
        why = "no tokenizer tells how many bytes the tokens stand for"
        return [first, missing(name, "bits_per_byte", len(nll), content=content, seconds=seconds, note=why)]
    bits = nll / math.log(2)
    return [first, score(name, "bits_per_byte", bits, bytes_, content=content, seconds=seconds, note=note)]


def predicted_bytes(lm: LM, segments: Int64[Tensor, "segment token"]) -> Tensor | None:
    """UTF-8 bytes of each segment's predicted tokens; None without a tokenizer that can decode.

    All tokens but the first are decoded together, special tokens as their names and spaces as they come. Of a character
    that a segment's edge cuts in two, the pieces count as the replacement characters they decode to, 3 bytes each. A
    tokenizer that drops the space before a text's first word (sentencepiece) is one byte short in segments that begin
    with a word.
    """
    decode = getattr(lm.tokenizer, "decode", None)
    if decode is None:
        return None
    texts = [
        decode(segment[1:].tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for segment in segments
    ]
    return torch.tensor([len(text.encode("utf-8", "replace")) for text in texts], dtype=torch.float64)

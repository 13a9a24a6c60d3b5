"""`evaluate`: perplexity and zero-shot accuracy of a model, and whether it is worse than another.

    sqviz.evaluate(lm)                                              # perplexity on embedded text
    sqviz.evaluate(int8, {"hellaswag": "val.jsonl", "perplexity": "book.txt"}, reference=lm)
    sqviz.evaluate(lm, ["lambada", "arc_easy"], limit=200)          # from the hub, through lm-eval
    after - before                                                  # paired differences of two evaluations

Thesis Tables 3.3 to 3.7 are of this kind. Numbers of local files are those that lm-eval gives for the same rows.
"""

import dataclasses
from collections.abc import Sequence

from sqviz.corpus.segments import Text
from sqviz.errors import Cancelled, SqvizError
from sqviz.evaluation.jobs import Job, Settings, Wanted, jobs
from sqviz.evaluation.paired import SAME, NotComparable
from sqviz.evaluation.result import Evaluation
from sqviz.evaluation.scores import Score
from sqviz.evaluation.zeroshot import check_count
from sqviz.models.lm import LM
from sqviz.progress import CancelToken

__all__ = ["Evaluation", "EvaluationCancelled", "evaluate"]


class EvaluationCancelled(Cancelled):
    """`evaluate` was stopped on request; `partial` is the evaluation of the tasks that were finished."""

    def __init__(self, message: str, partial: Evaluation) -> None:
        kept = list(dict.fromkeys(score.task for score in partial.scores))
        super().__init__(
            f"{message}. Finished: {', '.join(kept) or 'no task'}"
            + ("; their scores are this exception's `partial` (sys.last_value.partial in a notebook)" if kept else "")
        )
        self.stopped, self.partial = message, partial


def evaluate(
    lm: LM,
    tasks: Wanted | Sequence[Wanted] = ("perplexity",),
    *,
    text: Text | None = None,
    length: int = 512,
    limit: int | None = None,
    reference: LM | Evaluation | None = None,
    batch: int = 1,
    seed: int = 0,
    cancel: CancelToken | None = None,
    progress: bool = True,
) -> Evaluation:
    """Score a model on tasks.

    All tasks are read before the first is run, so a task that cannot be run stops the evaluation at its beginning.

    Args:
        lm: the model, quantised or not.
        tasks: one task or several.
            "perplexity": on `text`; "wikitext2", "pg19": on these texts from the hub.
            "lambada", "hellaswag", "piqa", "winogrande", "openbookqa", "rte", "copa", "arc_easy", "arc_challenge",
            "mmlu", whatever else lm-eval knows, and "task.yaml" in its form: through lm-eval, and the hub if need be.
            "name:questions.jsonl" or {"name": "questions.jsonl"}: the same from a local file with the data set's own
            field names; for perplexity a text file.
            A `Task`: a format of your own.
        text: what "perplexity" is measured on: a string, `sqviz.text(…)`, a list of strings, a path, token ids. None:
            the beginning of the embedded addresses.
        length: tokens per segment for perplexity.
        limit: items per task: the first so many questions or segments. None: all; of the embedded addresses 40
            segments, of pg19 512.
        reference: the unquantised model, scored on the same items, or its evaluation.
        batch: prompts or segments per forward pass. Leave it at 1 for a model quantised with dynamic per-tensor steps.
        seed: of the bootstrap behind the intervals of differences.
        cancel: stops the work between two forward passes.
        progress: show progress bars.

    Raises:
        SqvizError: an unknown task, a file that does not hold what its task needs, bad numbers; `NoTokenizer` for text
            and a model without tokenizer, `TextTooShort`, `NonFinite`; `NotComparable` for a reference that saw other
            items; `Unavailable` for a task of the hub without lm-eval.
        DownloadError: the hub cannot be reached.
        EvaluationCancelled: stopped through `cancel`, the progress bar's button or Ctrl-C; its `partial` holds the
            scores of finished tasks.
    """
    check_count(batch, "batch", "prompts or segments per forward pass")
    if limit is not None:
        check_count(limit, "limit", "items per task")
    if reference is not None and not isinstance(reference, LM | Evaluation):
        raise SqvizError(f"reference is an LM or an Evaluation, not {type(reference).__name__}")
    settings = Settings(text, length, limit, batch)
    ready = jobs(lm, tasks, settings)
    others = jobs(reference, tasks, settings) if isinstance(reference, LM) else ()
    if reference is not None:
        _check_contents(ready, reference.scores if isinstance(reference, Evaluation) else others)
    found = Evaluation(_name(lm), (), reference if isinstance(reference, Evaluation) else None, seed)
    found = _run(found, ready, cancel, progress)
    if isinstance(reference, LM):
        try:
            other = _run(Evaluation(_name(reference), (), None, seed), others, cancel, progress)
        except EvaluationCancelled as stopped:
            finished = stopped.partial if stopped.partial.scores else None
            raise EvaluationCancelled(stopped.stopped, dataclasses.replace(found, reference=finished)) from stopped
        found = dataclasses.replace(found, reference=other)
    return found


def _run(found: Evaluation, ready: Sequence[Job], cancel: CancelToken | None, show: bool) -> Evaluation:
    """The evaluation with the scores of these jobs."""
    for job in ready:
        try:
            scores = job.run(cancel, show)
        except Cancelled as stopped:
            raise EvaluationCancelled(str(stopped), found) from stopped
        except KeyboardInterrupt as stopped:
            raise EvaluationCancelled(f"{job.name} was interrupted", found) from stopped
        found = dataclasses.replace(found, scores=(*found.scores, *scores))
    return found


def _check_contents(ready: Sequence[Job], others: Sequence[Job] | Sequence[Score]) -> None:
    """Raise `NotComparable` unless what is compared is the same on both sides, before anything has run."""
    contents: dict[str, str] = {}
    for other in others:
        contents |= dict.fromkeys((other.task,) if isinstance(other, Score) else other.names, other.content)
    asked = {name: job.content for job in ready for name in job.names}
    for name, content in asked.items():
        if contents.get(name, content) != content:
            raise NotComparable(f"{name}: the reference did not see the same items. {SAME}")
    if not contents.keys() & asked.keys():
        raise NotComparable(
            f"the reference has none of these tasks: it has {', '.join(contents) or 'none'}, and "
            f"{', '.join(asked)} were asked for"
        )


def _name(lm: LM) -> str:
    return f"{lm.name} ({lm.note})" if lm.note else lm.name

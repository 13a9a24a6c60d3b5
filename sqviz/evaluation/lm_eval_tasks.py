"""Tasks of lm-eval from the hub, turned into `Score`s with their items, so that two models can be paired on them too.

A group whose score is the mean over all its questions, such as mmlu, becomes one score; of any other group or tag each
task has its own. Where a metric is no sum over items (F1, correlations) the score holds lm-eval's value and no items.
"""

import dataclasses
import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from sqviz.errors import DownloadError, SqvizError, Unavailable
from sqviz.evaluation.items import content_of
from sqviz.evaluation.lm_eval_adapter import adapter, harness
from sqviz.evaluation.scores import Score, metric, score
from sqviz.models.lm import LM
from sqviz.progress import CancelToken

FILES = (".yaml", ".yml")
"""How files with tasks in lm-eval's form end."""

SHOTS_SEED = 1234  # lm-eval's own


def installed() -> bool:
    """Whether lm-eval is there."""
    return find_spec("lm_eval") is not None


@functools.cache
def _manager() -> Any:
    manager = harness("lm_eval.tasks").TaskManager()
    if not hasattr(manager, "load"):
        raise Unavailable(
            "lm-eval is older than 0.4.13, and its interface was another one: pip install -U 'sqviz[eval]'"
        )
    return manager


def known_names(name: str) -> Sequence[str]:
    """The tasks, groups and tags of lm-eval. Raises `Unavailable`, for a task of this name, without lm-eval."""
    try:
        return _manager().all_tasks
    except Unavailable as error:
        raise Unavailable(f"{name}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A task or group of lm-eval with its data.

    Attributes:
        name: what its score is called here.
        content: a hash of all requests.
        limit: questions per task.
        loaded: lm-eval's own objects.
        pooled: metrics that are one mean over all tasks.
    """

    name: str
    content: str
    limit: int | None
    loaded: Mapping[str, Any]
    pooled: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What the tasks of its scores are called."""
        several = tuple(self.loaded["tasks"])
        return (self.name,) if self.pooled or len(several) == 1 else several

    def run(self, lm: LM, batch: int, cancel: CancelToken | None, show: bool) -> list[Score]:
        """Score a model."""
        start = time.perf_counter()
        _prepare(self.loaded)
        results = harness("lm_eval.evaluator").evaluate(
            lm=adapter(lm, batch=batch, cancel=cancel, progress=show),
            task_dict=self.loaded,
            limit=self.limit,
            bootstrap_iters=0,
            log_samples=True,
        )
        return _scores(self, results, time.perf_counter() - start)


def load(name: str, own_name: str, limit: int | None = None) -> Loaded:
    """Load a task of lm-eval and its data.

    Args:
        name: what its score is to be called.
        own_name: what lm-eval calls it, or a .yaml file with a task in lm-eval's form.
        limit: questions per task, the first so many; None: all.

    Raises:
        Unavailable: lm-eval is not installed.
        DownloadError: the data set cannot be reached.
        SqvizError: the task has no questions.
    """
    from huggingface_hub.errors import HfHubHTTPError

    manager = _manager()
    try:
        loaded = manager.load([own_name])
        _prepare(loaded)
        for task in loaded["tasks"].values():
            task.build_all_requests(limit=limit, rank=0, world_size=1)
    except (OSError, HfHubHTTPError) as error:
        raise DownloadError(
            f"{name}: its data set cannot be read: {str(error)[:300]}. Check the network; a file at hand is read "
            f"without it: sqviz.evaluate(lm, {{{name!r}: 'questions.jsonl'}})"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise SqvizError(f"{name}: lm-eval cannot load this task: {error}") from error
    asked = {key: [request.args for request in task.instances] for key, task in loaded["tasks"].items()}
    content = content_of("lm-eval", json.loads(json.dumps(asked, default=str)))
    group = loaded.get("groups", {}).get(own_name)
    means = getattr(group, "aggregate_metric_list", None) or ()
    return Loaded(name, content, limit, loaded, tuple(mean.metric for mean in means if mean.weight_by_size))


def _prepare(loaded: Mapping[str, Any]) -> None:
    """No examples unless the task says so, and the same ones each time, as lm-eval does."""
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SHOTS_SEED)


def _scores(task: Loaded, results: Mapping[str, Any], seconds: float) -> list[Score]:
    names = list(task.loaded["tasks"])
    if task.pooled:
        samples = [sample for name in names for sample in results["samples"][name]]
        return [_one(task, task.name, key, samples, None, seconds) for key in _keys(samples) if key[0] in task.pooled]
    found = []
    for name in names:
        shown = name if len(names) > 1 else task.name
        samples = results["samples"][name]
        for key in _keys(samples):
            own = results["results"][name].get(f"{key[0]},{key[1]}")
            found.append(_one(task, shown, key, samples, own, seconds))
    return found


def _keys(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(metric, filter), in order."""
    return list(dict.fromkeys((name, sample["filter"]) for sample in samples for name in sample["metrics"]))


def _one(
    task: Loaded,
    shown: str,
    key: tuple[str, str],
    samples: Sequence[Mapping[str, Any]],
    own: float | None,
    seconds: float,
) -> Score:
    """A score from samples if that gives lm-eval's own value, else that value without items."""
    name, kind = key
    label = name if kind == "none" else f"{name} ({kind})"
    better = _better(task, name)
    values = [_contribution(name, sample[name]) for sample in samples if sample["filter"] == kind]
    if all(value is not None for value in values):
        items = torch.tensor([value for value in values if value is not None], dtype=torch.float64)
        made = score(
            shown, label, items[:, 0], items[:, 1], content=task.content, seconds=seconds, higher_is_better=better
        )
        if own is None or math.isclose(made.value or 0.0, own, rel_tol=1e-9, abs_tol=1e-12):
            return made
    if own is None:
        raise SqvizError(f"{shown}: lm-eval gives no value for {label!r}")
    note = "not a mean over items: cannot be paired"
    better = metric(name, better).higher_is_better
    return Score(shown, label, float(own), len(values), None, better, None, None, task.content, seconds, note)


def _contribution(name: str, value: Any) -> tuple[float, float] | None:
    """x and w of `scores` from what lm-eval holds of one item; None where it is something else."""
    if name == "perplexity" and isinstance(value, float):
        return -value, 1.0  # a log-likelihood
    if name in ("word_perplexity", "byte_perplexity", "bits_per_byte") and isinstance(value, tuple):
        return -value[0] / (math.log(2) if name == "bits_per_byte" else 1.0), float(value[1])
    if isinstance(value, bool | int | float):
        return float(value), 1.0
    return None


def _better(task: Loaded, name: str) -> bool | None:
    """Whether higher is better, as lm-eval's task has it."""
    for one in task.loaded["tasks"].values():
        known = one.higher_is_better()
        if known.get(name) is not None:
            return bool(known[name])
    return None
